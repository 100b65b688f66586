//! A vCPU whose caches hold what the tables no longer say.

use core::sync::atomic::AtomicU32;
use std::sync::Arc;

use afterimage_mmu::{
    FaultInError, GuestMmu, Hva, Memslot, PageRef, PageUse, Patience, Policy, SlotId, Snapshot, Spin,
};
use afterimage_stage2::{Ept, Npt};

use super::*;
use crate::system::{Plan, SystemMemory};

const FRAMES: u64 = 1024;
const BASE: Hva = Hva::new(1 << 30);
const GFN: Gfn = Gfn::new(5);
/// Translations that may be made for an access: more mean that it is never done.
const WALKS: u32 = 100;

/// All frames in one, since none of them is read.
struct Ram {
    frame: Box<[AtomicU64; 512]>,
    walks: AtomicU32,
}

// SAFETY: the frame is 512 atomic words, aligned to 8 bytes, which live as long as the memory.
unsafe impl PhysicalMemory for Ram {
    fn frame(&self, _pfn: Pfn) -> Option<NonNull<u8>> {
        Some(NonNull::from(&*self.frame).cast())
    }

    fn generation(&self, _pfn: Pfn) -> u32 {
        assert!(self.walks.fetch_add(1, Relaxed) < WALKS, "the vCPU walks again and again");
        1
    }
}

/// A part of a page of 2 MiB that is always there.
struct Page(Pfn);

impl PageRef for Page {
    fn pfn(&self) -> Pfn {
        self.0
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn block(&self) -> PageSize {
        PageSize::Size2M
    }

    fn release(self, _used: PageUse) {}
}

struct Primary;

impl PrimaryMmu for Primary {
    type Page = Page;
    type Error = &'static str;

    fn fault_in(
        &self,
        _slot: &Memslot,
        fault: &Fault,
        _since: &Snapshot,
        _patience: Patience,
    ) -> Result<Page, FaultInError<&'static str>> {
        Ok(Page(Pfn::new(fault.gfn.as_u64())))
    }
}

struct Tests;

impl Host for Tests {
    type Memory = TablePool;
    type Platform = Spin;
    type Page = Page;

    fn block(&self, _pfn: Pfn) -> PageSize {
        PageSize::Size2M
    }
}

fn machine<F: Hardware>() -> SoftMachine<F, Tests, Primary, Ram> {
    let tables = TablePool::new(FRAMES).expect("memory");
    let stage2 = Stage2::new(Tests, tables.clone(), 1, PageSize::Size2M).expect("memory");
    let mmu = Arc::new(GuestMmu::new(stage2, Policy::default()));
    mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), FRAMES, BASE)).expect("the first slot");
    SoftMachine {
        mmu,
        primary: Arc::new(Primary),
        ram: Ram { frame: Box::new([const { AtomicU64::new(0) }; 512]), walks: AtomicU32::new(0) },
        tables,
        after_retry: AfterRetry::Park,
        ring_entries: None,
        fetches: Fetches::None,
    }
}

/// A collapse leaves a small page cached that was read-only, until the flush; and that waits for this vCPU. A store finds
/// the large page all the same.
#[test]
fn a_small_page_that_forbids_does_not_hide_the_large_one_in_its_place() {
    fn check<F: Hardware>() {
        let machine = machine::<F>();
        let system = SystemMemory::new(Plan::new(1, FRAMES, 0, 0)).expect("memory");
        let exits = AtomicU64::new(0);
        let mut cpu = Cpu::new(&machine, system.block(0), &exits);
        cpu.store(GFN, 0, 1).expect("the page is faulted in");
        assert!(cpu.tlb.conflicts(GFN, PageSize::Size4K), "by a large page");

        let page = Translation { pfn: Pfn::new(5), writable: false, executable: true, generation: 1 };
        cpu.tlb.put(GFN, PageSize::Size4K, page);
        cpu.store(GFN, 8, 2).expect("the large page allows it");
        assert_eq!(machine.ram.frame[1].load(Relaxed), 2, "{}", F::NAME);
        assert!(cpu.take_misled().is_none());
        cpu.leave();
    }
    check::<Npt>();
    check::<Ept>();
}

/// Hardware walks for what nobody has asked for, and must find no freed table there either.
#[test]
fn a_speculative_walk_notices_a_freed_table() {
    let machine = machine::<Npt>();
    let system = SystemMemory::new(Plan::new(1, FRAMES, 0, 0)).expect("memory");
    let exits = AtomicU64::new(0);
    let mut cpu = Cpu::new(&machine, system.block(0), &exits);
    cpu.store(GFN, 0, 1).expect("the page is faulted in");
    assert!(cpu.speculate(GFN).is_ok() && cpu.take_misled().is_none());

    // No table is there.
    let (nowhere, level) = (Pfn::new(3), Level::new(1).expect("a level"));
    cpu.tlb.put_table(GFN, level, nowhere);
    assert!(cpu.speculate(GFN).is_ok());
    let misled = cpu.take_misled().expect("it came to no table");
    assert_eq!((misled.kind, misled.gfn, misled.found), (RecordKind::FreedTable, GFN, nowhere.as_u64()));
    assert!(cpu.speculate(GFN).is_ok() && cpu.take_misled().is_none(), "it has forgotten how it got there");
    cpu.leave();
}
