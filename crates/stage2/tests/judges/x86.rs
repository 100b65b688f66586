//! The crate `x86_64` and ours change the same tables in turn, and each reads what both have made.

// UNSAFETY: the other crate's mapper asks for promises: that the tables are reachable, and that nobody changes them.
#![expect(unsafe_code)]

use afterimage_mmu::{PageSize, Pfn};
use afterimage_stage2::{HeapMemory, Npt4, TableMemory, Writable};
use proptest::prelude::*;
use x86_64::structures::paging::mapper::{
    MappedFrame, MappedPageTable, PageTableFrameMapping, Translate, TranslateResult,
};
use x86_64::structures::paging::{
    FrameAllocator, Mapper, Page, PageTable, PageTableFlags as Flags, PhysFrame, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::ours::{Near, Op, Ours, Seen, frames, near, ops, pfn_of, sizes};

#[derive(Clone)]
struct Identity(HeapMemory);

// SAFETY: only frames of this memory are linked, and these are where it says.
unsafe impl PageTableFrameMapping for Identity {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        let entries = self.0.entries(Pfn::new(frame.start_address().as_u64() >> 12));
        entries.cast_mut().cast()
    }
}

// SAFETY: nobody else has what the memory gives, and it is zero.
unsafe impl FrameAllocator<Size4KiB> for Identity {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let table = self.0.allocate(1)?;
        Some(PhysFrame::containing_address(PhysAddr::new(table.as_u64() << 12)))
    }
}

/// What either does.
#[derive(Clone, Debug)]
enum Turn {
    Ours(Op),
    Map { at: Near, size: PageSize, write: bool, execute: bool },
    Unmap { at: Near, size: PageSize },
    Update { at: Near, write: bool },
}

fn turns() -> impl Strategy<Value = Turn> {
    prop_oneof![
        3 => ops().prop_map(Turn::Ours),
        2 => (near(), sizes(), any::<bool>(), any::<bool>())
            .prop_map(|(at, size, write, execute)| Turn::Map { at, size, write, execute }),
        1 => (near(), sizes()).prop_map(|(at, size)| Turn::Unmap { at, size }),
        1 => (near(), any::<bool>()).prop_map(|(at, write)| Turn::Update { at, write }),
    ]
}

/// The flags of a leaf: those that the judge has names for, and of the bits that are software's, ours.
fn flags(write: bool, execute: bool) -> Flags {
    let mut flags = Flags::PRESENT | Flags::USER_ACCESSIBLE | Flags::ACCESSED;
    let writable = Flags::WRITABLE | Flags::DIRTY | Flags::BIT_52 | Flags::BIT_53;
    flags.set(writable, write);
    flags.set(Flags::NO_EXECUTE, !execute);
    flags
}

/// The address as the judge writes it: the upper half of 48 bits is sign-extended.
fn page(gfn: u64) -> VirtAddr {
    VirtAddr::new_truncate(gfn << 12)
}

/// The judge's mapper on our root, for as long as nobody else uses it.
fn with_judge<R>(
    ours: &Ours<Npt4>,
    work: impl FnOnce(&mut MappedPageTable<'_, Identity>, Identity) -> R,
) -> R {
    let mapping = Identity(ours.memory.clone());
    let root = PhysFrame::containing_address(PhysAddr::new(ours.tables.root().as_u64() << 12));
    // SAFETY: the root lives as long as the tables, and nobody else uses them meanwhile.
    let root = unsafe { &mut *mapping.frame_to_pointer(root) };
    // SAFETY: the same; what is linked is where the mapping says.
    let mut judge = unsafe { MappedPageTable::new(root, mapping.clone()) };
    work(&mut judge, mapping)
}

fn map(
    judge: &mut MappedPageTable<'_, Identity>,
    mut memory: Identity,
    gfn: u64,
    size: PageSize,
    flags: Flags,
) {
    let parents = Flags::PRESENT | Flags::WRITABLE | Flags::USER_ACCESSIBLE | Flags::ACCESSED;
    let to = PhysAddr::new((pfn_of(gfn) & !(size.frames() - 1)) << 12);
    if judge.translate_addr(page(gfn)).is_some() {
        // It would be refused, but not before a large page that is in the way was made writable.
        return;
    }
    // SAFETY: nothing runs on these tables. A large page where a table is is refused.
    unsafe {
        match size {
            PageSize::Size4K => {
                let at = Page::<Size4KiB>::containing_address(page(gfn));
                let frame = PhysFrame::containing_address(to);
                let _ = judge.map_to_with_table_flags(at, frame, flags, parents, &mut memory);
            }
            _ => {
                let at = Page::<Size2MiB>::containing_address(page(gfn));
                let frame = PhysFrame::containing_address(to);
                let _ = judge.map_to_with_table_flags(at, frame, flags, parents, &mut memory);
            }
        }
    }
}

fn see(judge: &MappedPageTable<'_, Identity>, gfn: u64) -> Option<Seen> {
    let TranslateResult::Mapped { frame, offset, flags } = judge.translate(page(gfn)) else { return None };
    let size = match frame {
        MappedFrame::Size4KiB(_) => PageSize::Size4K,
        MappedFrame::Size2MiB(_) => PageSize::Size2M,
        MappedFrame::Size1GiB(_) => PageSize::Size1G,
    };
    Some(Seen {
        pfn: (frame.start_address().as_u64() + offset) >> 12,
        size,
        write: flags.contains(Flags::WRITABLE),
        execute: !flags.contains(Flags::NO_EXECUTE),
    })
}

fn take(ours: &mut Ours<Npt4>, turn: &Turn) {
    match *turn {
        Turn::Ours(ref op) => ours.apply(op),
        Turn::Map { at, size, write, execute } => {
            with_judge(ours, |judge, memory| {
                map(judge, memory, at.gfn::<Npt4>(), size, flags(write, execute));
            });
        }
        Turn::Unmap { at, size: PageSize::Size4K } => {
            let at = Page::<Size4KiB>::containing_address(page(at.gfn::<Npt4>()));
            with_judge(ours, |judge, _| drop(judge.unmap(at)));
        }
        Turn::Unmap { at, .. } => {
            let at = Page::<Size2MiB>::containing_address(page(at.gfn::<Npt4>()));
            with_judge(ours, |judge, _| drop(judge.unmap(at)));
        }
        Turn::Update { at, write } => {
            let at = Page::<Size4KiB>::containing_address(page(at.gfn::<Npt4>()));
            // SAFETY: nothing runs on these tables.
            with_judge(ours, |judge, _| unsafe {
                if judge.translate_page(at).is_ok() {
                    drop(judge.update_flags(at, flags(write, true)));
                }
            });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn x86_64_and_ours_change_the_same_tables(turns in prop::collection::vec(turns(), 1..50)) {
        let mut ours = Ours::<Npt4>::new(&HeapMemory::default());
        for turn in &turns {
            take(&mut ours, turn);
        }
        let theirs = with_judge(&ours, |judge, _| frames::<Npt4>().map(|gfn| see(judge, gfn)).collect::<Vec<_>>());
        for (gfn, theirs) in frames::<Npt4>().zip(theirs) {
            prop_assert_eq!(theirs, ours.see(gfn, Writable::is_allowed), "frame {:#x}", gfn);
        }
    }
}
