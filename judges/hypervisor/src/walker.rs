//! What both kinds of hardware have alike: a guest is entered on tables, and comes out for a reason.

use afterimage_mmu::{Access, Found, Gpa, Pfn};

use crate::cpus::Descriptors;

/// The guest's registers, as `svm.rs` and `vmx.rs` load and store them: in this order.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Registers {
    pub(crate) rax: u64,
    pub(crate) rbx: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) rbp: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) r10: u64,
    pub(crate) r11: u64,
    pub(crate) r12: u64,
    pub(crate) r13: u64,
    pub(crate) r14: u64,
    pub(crate) r15: u64,
    pub(crate) rip: u64,
    pub(crate) rsp: u64,
}

/// Why the guest was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It halted: it is done.
    Halt,
    /// Another CPU wants it out.
    Kicked,
    /// A translation was missing, or forbade the access.
    Fault(NestedFault),
    /// Anything else.
    Other(Other),
}

/// A nested page fault, an EPT violation, or an EPT misconfiguration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NestedFault {
    pub(crate) gpa: Gpa,
    /// Nothing in it: the hardware does not say (a misconfiguration).
    pub(crate) access: Access,
    pub(crate) found: Found,
}

/// An exit that no guest of ours should cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Other {
    pub(crate) reason: u64,
    pub(crate) detail: u64,
    pub(crate) gpa: u64,
    pub(crate) rip: u64,
}

/// Whether the hardware sets accessed and dirty bits. NPT always does; EPT if it is told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marks {
    Set,
    Left,
}

/// Hardware that runs guests on stage-2 tables: one for each CPU, used there only.
pub(crate) trait Walker: Sized {
    /// Turns virtualisation on for this CPU.
    fn new(cpu: &Descriptors) -> Self;

    /// Uses these tables from now on, with nothing cached of them.
    fn load(&mut self, root: Pfn, marks: Marks);

    /// Runs the guest until it comes out.
    fn enter(&mut self, registers: &mut Registers) -> Exit;

    /// Forgets all cached translations before the guest runs again.
    fn forget(&mut self);
}
