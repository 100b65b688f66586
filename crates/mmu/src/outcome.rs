//! What becomes of a fault: outcomes, retries, errors.
//!
//! Source: Linux `RET_PF_*`, and the error codes of `kvm_mmu_page_fault`.

use core::fmt;

use crate::addr::{Gfn, GfnRange};
use crate::block::Block;
use crate::host::{PrimaryMmu, Privacy, SecondaryMmu};

/// Where on the path a fault was found to be doomed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum RetryPoint {
    /// By the hint, before the page was faulted in: nothing was wasted.
    BeforeFaultIn = 0,
    /// By the hint, after the page was faulted in.
    AfterFaultIn,
    /// By the check that counts.
    UnderLock,
    /// The entry is another by now: somebody changed it at the same time, or a larger page there was split for this fault.
    LostRace,
    /// The slot is being deleted or moved.
    SlotChanging,
}

impl RetryPoint {
    /// How many points there are.
    pub const COUNT: usize = 5;

    /// All points, in the order of the path.
    pub const ALL: [Self; Self::COUNT] =
        [Self::BeforeFaultIn, Self::AfterFaultIn, Self::UnderLock, Self::LostRace, Self::SlotChanging];
}

/// Nothing was installed: the guest touches the page again, or the caller waits first.
#[must_use = "the guest has not got its page"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Where it was found.
    pub point: RetryPoint,
    /// What would have been installed: what to [`wait`](crate::GuestMmu::wait) for.
    pub range: GfnRange,
}

/// Why an access is to be emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulate {
    /// No memslot: a device.
    Mmio,
    /// A write to read-only memory.
    ReadOnly,
}

/// What became of a fault.
#[must_use = "a retry must be retried, an emulation emulated"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The translation is installed.
    Fixed,
    /// A present translation got the permission that was missing, without the lock.
    FixedFast,
    /// The translation was there already.
    Spurious,
    /// Nothing was installed.
    Retry(Retry),
    /// The access is for the emulator.
    Emulate(Emulate),
    /// The frame is write-tracked: unprotect and retry, or emulate.
    WriteProtected,
}

/// A fault that retrying does not help. `E` is the primary MMU's error, `M` the secondary's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError<E: fmt::Debug + fmt::Display, M: fmt::Debug + fmt::Display> {
    /// The virtual machine was released.
    #[error("guest frame {0} was touched after the virtual machine was released")]
    Released(Gfn),
    /// No memory for tables or for the page.
    #[error("there is no memory to map guest frame {0}")]
    NoMemory(Gfn),
    /// A signal came while the page was being resolved.
    #[error("a signal interrupted the fault of guest frame {0}")]
    Interrupted(Gfn),
    /// A prefetch met a slot that is being deleted or moved.
    #[error("the memslot of guest frame {0} is changing: prefetch it again later")]
    SlotChanging(Gfn),
    /// The access was to private memory that is shared, or the other way round, or to private memory of no slot.
    #[error("guest frame {gfn} was accessed as {accessed:?} memory, which it is not")]
    WrongPrivacy {
        /// The frame.
        gfn: Gfn,
        /// How it was accessed.
        accessed: Privacy,
    },
    /// The vCPU's dirty ring is all but full: collect and [reset](crate::GuestMmu::reset_dirty_rings) it, then let the guest
    /// go on.
    #[error("the dirty ring is full: guest frame {0} cannot be logged before it is reset")]
    DirtyRingFull(Gfn),
    /// The page's content is lost; poison is installed in its place.
    #[error("the content of guest frame {gfn} is lost and it is poisoned: {cause}")]
    Poisoned {
        /// The frame.
        gfn: Gfn,
        /// Why.
        cause: E,
    },
    /// The primary MMU has no such page.
    #[error("guest frame {gfn} has no page: {cause}")]
    NoPage {
        /// The frame.
        gfn: Gfn,
        /// Why.
        cause: E,
    },
    /// The translation cannot be installed.
    #[error("guest frame {gfn} cannot be mapped: {cause}")]
    CannotMap {
        /// The frame.
        gfn: Gfn,
        /// Why.
        cause: M,
    },
}

/// What [`Vcpu::handle_fault`](crate::Vcpu::handle_fault) gives.
pub(crate) type FaultResult<S, M> =
    Result<FaultOutcome, FaultError<<M as PrimaryMmu>::Error, <S as SecondaryMmu>::Error>>;

/// Nothing was installed of `block`.
pub(crate) fn retry(point: RetryPoint, block: Block) -> FaultOutcome {
    FaultOutcome::Retry(Retry { point, range: block.range() })
}
