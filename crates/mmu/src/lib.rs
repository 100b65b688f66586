//! KVM's guest page-fault and invalidation protocol.
#![no_std]
#![warn(clippy::std_instead_of_core, clippy::std_instead_of_alloc, clippy::alloc_instead_of_core)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod active;
mod addr;
mod fault;
mod guest_mmu;
mod host;
mod invalidation;
mod lock;
#[cfg(all(loom, test))]
mod loom_tests;
mod mmu_lock;
pub mod mutation;
mod notifier;
mod platform;
mod readers;
mod slots;
mod stats;
mod sync;
mod vcpu;
mod zap;

pub use addr::{FRAME_BYTES, FRAME_SHIFT, Gfn, GfnRange, Gpa, Hva, HvaRange, Level, PageSize, Pfn, PfnRange};
pub use fault::{Emulate, FaultError, FaultOutcome, Retry, RetryPoint, Vcpu};
pub use guest_mmu::{GuestMmu, Policy, Precheck, YieldPolicy};
pub use host::{
    Access, Age, Blocking, CachedMmio, FastFault, Fault, FaultInError, FaultKind, Found, Mapped, Notifier,
    PageRef, PageUse, Patience, PrimaryMmu, Privacy, SecondaryMmu, Young, Zap,
};
pub use invalidation::{Fresh, InvalidationError, Invalidations, SequenceScope, Snapshot, Stale};
pub use lock::RawMmuLock;
pub use mmu_lock::{MmuLock, MmuReadGuard, MmuWriteGuard, Witness};
pub use notifier::Invalidation;
pub use platform::{Platform, Spin};
pub use slots::{MAX_SPACES, Memslot, SlotError, SlotFlags, SlotId, SlotSet, SlotState, SpaceId};
pub use stats::{FaultStats, InvalidationStats};
pub use sync::ParkWord;
pub use vcpu::{Requests, VcpuWords};
pub use zap::{Walk, ZapWalk, Zapped};
