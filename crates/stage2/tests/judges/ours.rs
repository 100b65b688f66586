//! Our side: tables, random operations on them, and what each frame is translated to.

// UNSAFETY: tables that were unlinked are freed, when nobody can use them any more; roots are copied word by word.
#![expect(unsafe_code)]

use std::sync::atomic::Ordering;

use afterimage_mmu::{Gfn, GfnRange, PageSize, Pfn};
use afterimage_stage2::{
    ENTRIES, Entry, Execute, Format, HeapMemory, Leaf, MemoryType, TableCache, TableMemory, Tables, Writable,
};
use proptest::prelude::*;

/// What both sides say of a frame.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Seen {
    pub(crate) pfn: u64,
    pub(crate) size: PageSize,
    pub(crate) write: bool,
    pub(crate) execute: bool,
}

/// A guest frame near a corner of the tables' reach.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Near {
    corner: usize,
    offset: u64,
}

impl Near {
    pub(crate) fn gfn<F: Format>(self) -> u64 {
        corners::<F>()[self.corner] + self.offset
    }
}

/// The first frame of all; of a table of level 2; of the upper half; and of the last 2048.
fn corners<F: Format>() -> [u64; 4] {
    let reach = 1 << (F::GPA_BITS - 12);
    [0, 1 << 18, reach / 2, reach - 2048]
}

/// Every frame that an operation may have changed.
pub(crate) fn frames<F: Format>() -> impl Iterator<Item = u64> {
    corners::<F>().into_iter().flat_map(|corner| corner..corner + 1700)
}

/// Guest frames that one page of the root translates.
pub(crate) fn root_page_frames<F: Format>() -> u64 {
    F::ROOT_LEVEL.frames() * ENTRIES as u64
}

/// The frame that `gfn` is mapped to, by us and by the judges.
pub(crate) fn pfn_of(gfn: u64) -> u64 {
    (1 << 20) + (gfn & 0x3f_ffff)
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Map { at: Near, size: PageSize, writable: Writable, execute: Execute },
    Zap { at: Near, frames: u64 },
    Protect { at: Near },
    Split { at: Near },
    Collapse { at: Near },
    Unlink { at: Near },
}

pub(crate) fn near() -> impl Strategy<Value = Near> {
    (0..4_usize, 0..1030_u64).prop_map(|(corner, offset)| Near { corner, offset })
}

pub(crate) fn sizes() -> impl Strategy<Value = PageSize> {
    prop::sample::select(&[PageSize::Size4K, PageSize::Size2M][..])
}

pub(crate) fn ops() -> impl Strategy<Value = Op> {
    let writable = prop::sample::select(&[Writable::Never, Writable::Clean, Writable::Dirty][..]);
    let execute = prop::sample::select(&[Execute::Never, Execute::Always][..]);
    prop_oneof![
        5 => (near(), sizes(), writable, execute)
            .prop_map(|(at, size, writable, execute)| Op::Map { at, size, writable, execute }),
        1 => (near(), 1..600_u64).prop_map(|(at, frames)| Op::Zap { at, frames }),
        1 => near().prop_map(|at| Op::Protect { at }),
        1 => near().prop_map(|at| Op::Split { at }),
        1 => near().prop_map(|at| Op::Collapse { at }),
        1 => near().prop_map(|at| Op::Unlink { at }),
    ]
}

/// Tables, and what is needed to change them.
pub(crate) struct Ours<F: Format> {
    pub(crate) tables: Tables<F, HeapMemory>,
    pub(crate) memory: HeapMemory,
    cache: TableCache<HeapMemory>,
}

impl<F: Format> Ours<F> {
    pub(crate) fn new(memory: &HeapMemory) -> Self {
        let tables = Tables::new(memory.clone()).expect("the heap has room");
        Self { tables, memory: memory.clone(), cache: TableCache::default() }
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        let Self { tables, cache, .. } = self;
        assert!(tables.top_up(cache));
        match *op {
            Op::Map { at, size, writable, execute } => {
                let gfn = at.gfn::<F>();
                let pfn = Pfn::new(pfn_of(gfn) & !(size.frames() - 1));
                let memory = MemoryType::WriteBack;
                let leaf = Leaf { pfn, size, writable, execute, memory, accessed: true };
                let _ = tables.map(Gfn::new(gfn), leaf, cache).expect("a frame has one page");
            }
            Op::Zap { at, frames } => {
                let start = Gfn::new(at.gfn::<F>());
                tables.zap(GfnRange::new(start, start + frames));
            }
            Op::Protect { at } => {
                tables.write_protect(GfnRange::frame(Gfn::new(at.gfn::<F>())), Writable::Protected);
            }
            Op::Split { at } => drop(tables.split(Gfn::new(at.gfn::<F>()), cache, |_| ())),
            Op::Collapse { at } => {
                let gfn = Gfn::new(at.gfn::<F>());
                let removed = tables.collapse(gfn, PageSize::Size2M, Execute::Always, |_| ());
                free(tables, removed.map(|removed| removed.table));
            }
            Op::Unlink { at } => {
                let removed = tables.unlink(Gfn::new(at.gfn::<F>()), PageSize::Size4K.level(), |_| ());
                free(tables, removed.map(|removed| removed.table));
            }
        }
    }

    /// What we say of a frame; `write` says what of a leaf's permission to write the judge can see.
    pub(crate) fn see(&self, gfn: u64, write: impl Fn(Writable) -> bool) -> Option<Seen> {
        match self.tables.walk(Gfn::new(gfn)).entry {
            Entry::Leaf(leaf) => Some(Seen {
                pfn: leaf.pfn_of(Gfn::new(gfn)).as_u64(),
                size: leaf.size,
                write: write(leaf.writable),
                execute: leaf.execute == Execute::Always,
            }),
            Entry::Absent => None,
            other => panic!("{other:?} at {gfn:#x}"),
        }
    }

    /// The root's page number `page`.
    pub(crate) fn root_page(&self, page: usize) -> Pfn {
        Pfn::new(self.tables.root().as_u64() + page as u64)
    }
}

fn free<F: Format>(tables: &Tables<F, HeapMemory>, table: Option<Option<Pfn>>) {
    if let Some(table) = table {
        let table = table.expect("nothing is in the way of one thread alone");
        // SAFETY: (1) it was unlinked just now; (2) and (3): nobody else translates by the tables.
        unsafe { tables.free(table, 1) };
    }
}

/// Writes a table's words into another: both have one page, and belong to `memory` and to this thread.
pub(crate) fn copy_table(memory: &HeapMemory, from: Pfn, to: Pfn) {
    for index in 0..ENTRIES {
        // SAFETY: each table has as many entries, and lives.
        let (from, to) = unsafe { (&*memory.entries(from).add(index), &*memory.entries(to).add(index)) };
        to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// Makes a table say nothing: what it linked is somebody else's.
pub(crate) fn clear_table(memory: &HeapMemory, table: Pfn) {
    for index in 0..ENTRIES {
        // SAFETY: the table has as many entries, and lives.
        unsafe { &*memory.entries(table).add(index) }.store(0, Ordering::Relaxed);
    }
}
