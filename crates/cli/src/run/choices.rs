//! What the options of `run` can be set to, by name.

use afterimage_mmu::{Precheck, SequenceScope, WitnessKind};
use afterimage_vm::GuestKind;
use clap::ValueEnum;

/// The name of a choice, as the command line has it.
pub(super) fn name(choice: impl ValueEnum) -> String {
    choice.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum GuestChoice {
    /// KVM vCPUs
    Kvm,
    /// Host threads
    Thread,
    /// vCPUs in software, which walk stage-2 tables by themselves
    Soft,
}

impl From<GuestChoice> for GuestKind {
    fn from(choice: GuestChoice) -> Self {
        match choice {
            GuestChoice::Kvm => Self::Kvm,
            GuestChoice::Thread => Self::Thread,
            GuestChoice::Soft => Self::Soft,
        }
    }
}

/// The stage-2 tables of a software guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatChoice {
    /// Intel EPT, four levels
    Ept,
    /// Intel EPT, five levels
    Ept5,
    /// AMD nested paging, four levels
    Npt,
    /// AMD nested paging, five levels
    Npt5,
    /// Arm VMSAv8-64 stage 2, 40 bits
    Vmsa,
    /// RISC-V, three levels
    Sv39x4,
    /// RISC-V, four levels
    Sv48x4,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum PageChoice {
    #[value(name = "4k")]
    Small,
    #[value(name = "2m")]
    Huge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum BackingChoice {
    /// A memory file: a page can lose its mapping and stay
    Shared,
    /// Anonymous memory: a page is mapped or gone
    Anonymous,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum WorkloadChoice {
    /// Random pages: check the stamp, write the next; asks for discards
    Stamp,
    /// Every page in turn
    Scan,
    /// A small hot set and a cold tail
    Hot,
}

/// What is done to the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum InvalidateChoice {
    /// The host takes pages; they come back as they were
    Evict,
    /// The guest gives pages up; they come back as zeros
    Discard,
    /// Checkpoints: write-protect, read, release
    Protect,
    /// Pages move to other frames (software guests)
    Migrate,
    /// The marks of past accesses are taken away (software guests)
    Age,
    /// Writes are logged, and the log is compared with what was written (software guests)
    Dirty,
    /// Large pages are mapped in small ones (software guests, 2 MiB pages)
    Split,
    /// Small pages are mapped as large ones again (software guests, 2 MiB pages)
    Collapse,
    /// All translations go at once, and vCPUs load another root (software guests)
    Reload,
    /// The guest fetches, no large page is executable, and what is split for that is recovered (software guests, 2 MiB pages)
    Nx,
    /// Nothing
    None,
}

/// Where the writes of a software guest are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DirtyChoice {
    /// A bit for each frame
    Bitmap,
    /// A ring for each vCPU, which stops when it is full until it is collected
    Ring,
}

impl InvalidateChoice {
    /// Whether it needs tables of our own.
    pub(super) const fn needs_soft(self) -> bool {
        matches!(
            self,
            Self::Migrate | Self::Age | Self::Dirty | Self::Split | Self::Collapse | Self::Reload | Self::Nx
        )
    }

    /// Whether it has nothing to work on where all pages are small.
    pub(super) const fn needs_large(self) -> bool {
        matches!(self, Self::Split | Self::Collapse | Self::Nx)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum PrecheckChoice {
    Both,
    Before,
    After,
    Off,
}

impl From<PrecheckChoice> for Precheck {
    fn from(choice: PrecheckChoice) -> Self {
        match choice {
            PrecheckChoice::Both => Self::all(),
            PrecheckChoice::Before => Self::BEFORE_FAULT_IN,
            PrecheckChoice::After => Self::AFTER_FAULT_IN,
            PrecheckChoice::Off => Self::empty(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum SequenceChoice {
    Region,
    Global,
}

impl From<SequenceChoice> for SequenceScope {
    fn from(choice: SequenceChoice) -> Self {
        match choice {
            SequenceChoice::Region => Self::Region,
            SequenceChoice::Global => Self::Global,
        }
    }
}

/// What a fault holds while it installs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum WitnessChoice {
    /// mmu_lock for read, as in Linux
    Lock,
    /// Its announcement of what it is about to install
    Intent,
}

impl From<WitnessChoice> for WitnessKind {
    fn from(choice: WitnessChoice) -> Self {
        match choice {
            WitnessChoice::Lock => Self::Lock,
            WitnessChoice::Intent => Self::Intent,
        }
    }
}

/// What becomes of a fault that an invalidation made retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AfterRetryChoice {
    Refault,
    Park,
}

/// A safety rule that can be switched off to see that it is missed.
#[cfg(feature = "mutations")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum BreakChoice {
    /// The check under the lock always passes
    VerifyAlwaysFresh,
    /// A zap leaves out the last frame of each range
    ZapForgetsLastFrame,
    /// Discards are not announced
    DiscardWithoutInvalidation,
    /// Evictions are not announced
    EvictWithoutInvalidation,
    /// What was discarded comes back as it was
    DiscardKeepsBytes,
    /// An invalidation begins without a flush (rule F1)
    BeginWithoutFlush,
    /// A zap gives the lock up without a flush (rule F2)
    YieldWithoutFlush,
    /// A flush leaves out the last frame of its range
    FlushForgetsLastFrame,
    /// Pointers to a table outlive the flush before it is freed
    FlushKeepsTables,
    /// Roots are replaced and no vCPU reloads
    ReloadLeftOut,
    /// What is below an old root is freed before vCPUs have reloaded
    FreeBeforeReload,
    /// A flush does not wait for the vCPUs that it kicks
    KickWithoutAck,
    /// A removed table is freed before the flush
    FreeAtOnce,
    /// A large page is split without break-before-make
    SplitWithoutBreak,
    /// A large page is mapped executable where none may be
    LargeExecutable,
    /// The fast path tells the dirty log nothing
    FastFaultUnlogged,
    /// A reset of the dirty rings protects nothing
    RingResetUnprotected,
    /// A write protection is not flushed
    ProtectWithoutFlush,
    /// A zapped page's dirty mark is lost
    ZapLosesDirty,
}

#[cfg(feature = "mutations")]
impl BreakChoice {
    /// Switches the rule off, for the whole process.
    pub(super) fn apply(self) {
        use afterimage_mmu::mutation::{self as protocol, Mutation as Rule};
        use afterimage_stage2::mutation::{self as tables, Mutation as TableRule};
        match self {
            Self::VerifyAlwaysFresh => protocol::set(Some(Rule::VerifyAlwaysFresh)),
            Self::ZapForgetsLastFrame => protocol::set(Some(Rule::ZapForgetsLastFrame)),
            Self::DiscardWithoutInvalidation => protocol::set(Some(Rule::DiscardWithoutInvalidation)),
            Self::EvictWithoutInvalidation => protocol::set(Some(Rule::EvictWithoutInvalidation)),
            Self::DiscardKeepsBytes => protocol::set(Some(Rule::DiscardKeepsBytes)),
            Self::BeginWithoutFlush => protocol::set(Some(Rule::BeginWithoutFlush)),
            Self::YieldWithoutFlush => protocol::set(Some(Rule::YieldWithoutFlush)),
            Self::FlushForgetsLastFrame => protocol::set(Some(Rule::FlushForgetsLastFrame)),
            Self::FlushKeepsTables => protocol::set(Some(Rule::FlushKeepsTables)),
            Self::ReloadLeftOut => protocol::set(Some(Rule::ReloadLeftOut)),
            Self::FreeBeforeReload => tables::set(Some(TableRule::FreeBeforeReload)),
            Self::KickWithoutAck => protocol::set(Some(Rule::KickWithoutAck)),
            Self::FreeAtOnce => tables::set(Some(TableRule::FreeAtOnce)),
            Self::SplitWithoutBreak => tables::set(Some(TableRule::SplitWithoutBreak)),
            Self::FastFaultUnlogged => protocol::set(Some(Rule::FastFaultUnlogged)),
            Self::LargeExecutable => tables::set(Some(TableRule::LargeExecutable)),
            Self::RingResetUnprotected => protocol::set(Some(Rule::RingResetUnprotected)),
            Self::ProtectWithoutFlush => tables::set(Some(TableRule::ProtectWithoutFlush)),
            Self::ZapLosesDirty => tables::set(Some(TableRule::ZapLosesDirty)),
        }
    }
}
