//! The other CPUs during a storm: each a vCPU, in and out of its guest.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_mmu::{Access, Fault, FaultError, FaultOutcome, Gfn, PageSize, SpaceId, Vcpu};
use afterimage_stage2::{Entry, Format, MapError, Stage2};

use super::frames::TAG;
use super::{Bare, MANAGED_GFN, Mmu, Primary, Storm, stale};
use crate::cpus::{self, Descriptors};
use crate::guest::{self, COUNT_OFFSET, Program};
use crate::walker::{Exit, NestedFault, Registers, Walker};

/// What the guests run on.
pub(super) struct Ground<'m, F: Format> {
    pub(super) mmu: &'m Mmu<F>,
    pub(super) primary: &'m Primary,
    pub(super) storm: Storm,
    pub(super) pages: u64,
    /// The guests are to stop.
    pub(super) over: AtomicBool,
    /// How often they were entered.
    pub(super) entries: AtomicU64,
    /// Faults that left a page of more than 4 KiB behind.
    pub(super) large: AtomicU64,
}

impl<F: Format> Ground<'_, F> {
    /// One CPU beside the first: a vCPU, in and out of its guest. How many accesses it checked.
    pub(super) fn run_guest<W: Walker>(&self, descriptors: &Descriptors) -> u64 {
        let cpu = cpus::this();
        let mut vcpu = self.mmu.vcpu();
        self.mmu.secondary().host().cpus[vcpu.id()].store(cpu, Ordering::Relaxed);
        let mut walker = W::new(descriptors);
        let root = self.mmu.secondary().root(SpaceId(0)).expect("there is one space");
        walker.load(root, self.storm.marks);
        let (stack, memory) = guest::memory_of(cpu);
        let mut registers = Registers {
            rip: Program::Check.start(),
            rsp: stack.as_u64(),
            rdi: MANAGED_GFN.gpa().as_u64(),
            rsi: memory.as_u64(),
            r8: 0x9e37_79b9_7f4a_7c15 + cpu as u64,
            r9: self.pages - 1,
            r10: 0,
            r11: COUNT_OFFSET + 8 * cpu as u64,
            r12: TAG,
            ..Registers::default()
        };
        while !self.over.load(Ordering::Acquire) {
            if vcpu.enter_guest().is_err() {
                walker.forget();
                continue;
            }
            self.entries.fetch_add(1, Ordering::AcqRel);
            let exit = walker.enter(&mut registers);
            if !vcpu.leave_guest().is_empty() {
                walker.forget();
            }
            match exit {
                Exit::Halt => {
                    let what = match registers.rax as u32 {
                        1 => "says that it is another's",
                        2 => "has lost a count",
                        _ => "holds another's code",
                    };
                    stale(format_args!("on CPU {cpu} page {} {what}: {:#x}", registers.rbx, registers.rdx));
                }
                Exit::Kicked => {}
                Exit::Fault(fault) => self.serve(&mut vcpu, fault),
                Exit::Other(other) => panic!("CPU {cpu} left its guest for {other:x?}"),
            }
        }
        registers.r10
    }

    fn serve(&self, vcpu: &mut Vcpu<'_, Stage2<F, Bare>>, nested: NestedFault) {
        let gfn = nested.gpa.gfn();
        // Hardware that does not say what for is asked again.
        let access = if nested.access.is_empty() { Access::READ } else { nested.access };
        let fault = Fault { found: nested.found, ..Fault::new(gfn, access) };
        match vcpu.handle_fault(self.primary, &fault) {
            Ok(FaultOutcome::Fixed) => self.look(vcpu, gfn),
            Ok(FaultOutcome::FixedFast | FaultOutcome::Spurious) => {}
            Ok(FaultOutcome::Retry(retry)) => self.mmu.wait(retry.range),
            Err(FaultError::CannotMap { cause: MapError::Conflict { found, wanted, .. }, .. }) => {
                stale(format_args!("{gfn:?} is mapped to {:?} and wanted at {:?}", found.pfn, wanted.pfn));
            }
            other => panic!("the fault of {gfn:?} for {access:?} ended in {other:?}"),
        }
    }

    /// Counts large pages.
    fn look(&self, vcpu: &mut Vcpu<'_, Stage2<F, Bare>>, gfn: Gfn) {
        let mut walker = vcpu.walker();
        let section = walker.walk();
        let tables = self.mmu.secondary().tables(SpaceId(0), section.walking()).expect("there is one space");
        if matches!(tables.walk(gfn).entry, Entry::Leaf(leaf) if leaf.size > PageSize::Size4K) {
            self.large.fetch_add(1, Ordering::Relaxed);
        }
    }
}
