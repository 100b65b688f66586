//! Two or three threads over the smallest tables: a block of guest frames 512 and 513, each with a page of the host behind it.
//!
//! Who only reads runs in the thread that is made last: a load takes any value that it may, old ones too, but where a thread has
//! loaded a word before it stores there, loom does not try the store before somebody else's load.

// UNSAFETY: a table is freed that was unlinked.
#![expect(unsafe_code)]

use afterimage_mmu::{Access, Age, Gfn, GfnRange, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    Change, Entry, Execute, Format, Leaf, MemoryType, Npt, Split, Step, TableCache, Tables, Translation,
    Vmsa, Writable,
};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::thread;

use crate::memory;

type X86 = Npt<4>;
/// Needs break-before-make.
type Arm = Vmsa<39>;

const FIRST: Gfn = Gfn::new(512);
const SECOND: Gfn = Gfn::new(513);
/// Where the first frame's page moves to.
const ELSEWHERE: u64 = 1024;

/// A large leaf over the block.
const LARGE: Leaf = Leaf {
    pfn: Pfn::new(512),
    size: PageSize::Size2M,
    writable: Writable::Clean,
    execute: Execute::Always,
    memory: MemoryType::WriteBack,
    accessed: true,
};

fn page(pfn: u64) -> Leaf {
    Leaf { pfn: Pfn::new(pfn), size: PageSize::Size4K, ..LARGE }
}

struct Machine<F: Format> {
    tables: Tables<F, memory::Tables>,
    /// What the pages hold: of the first frame, of the second, and where the first may move to.
    pages: [UnsafeCell<()>; 3],
    /// The dirty log's bit of the first frame.
    log: AtomicU64,
}

impl<F: Format> Machine<F> {
    fn new() -> Arc<Self> {
        let tables = Tables::new(memory::Tables::new()).expect("there is room");
        let pages = [(); 3].map(UnsafeCell::new);
        Arc::new(Self { tables, pages, log: AtomicU64::new(0) })
    }

    /// With the block mapped by one leaf.
    fn large() -> Arc<Self> {
        let machine = Self::new();
        assert_eq!(machine.map(FIRST, LARGE), Mapped::Fixed);
        machine
    }

    /// With `leaf` for a frame, and the tables that it needs.
    fn with(gfn: Gfn, leaf: Leaf) -> Arc<Self> {
        let machine = Self::new();
        assert_eq!(machine.map(gfn, leaf), Mapped::Fixed);
        machine
    }

    fn cache(&self) -> TableCache<memory::Tables> {
        let mut cache = TableCache::default();
        assert!(self.tables.top_up(&mut cache));
        cache
    }

    fn map(&self, gfn: Gfn, leaf: Leaf) -> Mapped {
        self.tables.map(gfn, leaf, &mut self.cache()).expect("nothing is in the way")
    }

    fn page(&self, pfn: Pfn) -> &UnsafeCell<()> {
        match pfn.as_u64() {
            512 => &self.pages[0],
            513 => &self.pages[1],
            ELSEWHERE => &self.pages[2],
            other => panic!("frame {other} is nobody's"),
        }
    }

    /// Fills a page, and maps it.
    fn install(&self, gfn: Gfn, pfn: u64) -> Mapped {
        self.page(Pfn::new(pfn)).with_mut(|_| ());
        self.map(gfn, page(pfn))
    }

    /// Reads a page through the tables.
    fn read(&self, gfn: Gfn) {
        if let Translation::Frame(pfn) = self.tables.translate(gfn, Access::READ) {
            self.page(pfn).with(|_| ());
        }
    }

    /// Takes a frame away, and its page; whether there was one.
    fn zap(&self, gfn: Gfn) -> bool {
        let Some(Step::Leaf(entry)) = self.tables.leaves(GfnRange::frame(gfn)).next() else { return false };
        let Change::Did(leaf) = entry.take_away() else { return false };
        self.page(leaf.pfn_of(gfn)).with_mut(|_| ());
        true
    }

    fn leaf(&self, gfn: Gfn) -> Option<Leaf> {
        match self.tables.walk(gfn).entry {
            Entry::Leaf(leaf) => Some(leaf),
            Entry::Absent => None,
            other => panic!("{other:?} is nobody's last word"),
        }
    }

    /// A fast page fault for a write to the first frame, which is logged behind it.
    fn write_fast(&self) -> Option<Mapped> {
        let upgraded = self
            .tables
            .upgrade_present(FIRST, |leaf| Some(Leaf { writable: Writable::Dirty, accessed: true, ..leaf }));
        if upgraded == Some(Mapped::Fixed) {
            self.log.fetch_or(1, Ordering::Release);
        }
        upgraded
    }
}

/// Runs the other side, on the same machine.
fn other<F: Format, R: 'static>(
    machine: &Arc<Machine<F>>,
    run: impl FnOnce(&Machine<F>) -> R + 'static,
) -> thread::JoinHandle<R> {
    let machine = Arc::clone(machine);
    thread::spawn(move || run(&machine))
}

/// Two install the same frame, with no table there yet: one does, and neither loses its own.
pub(crate) fn two_installs() {
    let machine = Machine::<X86>::new();
    let second = other(&machine, |machine| machine.map(FIRST, page(512)));
    let did = [machine.map(FIRST, page(512)), second.join().expect("it does not panic")];
    let fixed = did.iter().filter(|did| **did == Mapped::Fixed).count();
    assert_eq!((fixed, machine.leaf(FIRST)), (1, Some(page(512))), "{did:?}");
}

/// Who finds a page finds it filled, and the tables on the way.
pub(crate) fn install_and_walk() {
    let machine = Machine::<X86>::new();
    let walks = other(&machine, |machine| machine.read(FIRST));
    assert_eq!(machine.install(FIRST, 512), Mapped::Fixed);
    walks.join().expect("it does not panic");
}

/// Who takes a page away has it alone.
pub(crate) fn install_and_zap() {
    let machine = Machine::<X86>::with(SECOND, page(513));
    let zaps = other(&machine, |machine| machine.zap(FIRST));
    assert_eq!(machine.install(FIRST, 512), Mapped::Fixed);
    let zapped = zaps.join().expect("it does not panic");
    assert_eq!(machine.leaf(FIRST).is_none(), zapped);
}

/// A page moves while it is taken away: whoever takes the new one has it alone, too.
pub(crate) fn zap_and_move() {
    let machine = Machine::<X86>::with(FIRST, page(512));
    let zaps = other(&machine, |machine| machine.zap(FIRST));
    let moved = machine.tables.zap(GfnRange::frame(FIRST));
    assert_eq!(machine.install(FIRST, ELSEWHERE), Mapped::Fixed);
    let zapped = zaps.join().expect("it does not panic");
    assert_eq!(machine.leaf(FIRST).is_none(), zapped && moved == 1);
}

/// A page moves while it is marked: whoever marks the new one finds it filled.
pub(crate) fn mark_and_move() {
    let machine = Machine::<X86>::with(FIRST, page(512));
    let marks = other(&machine, |machine| {
        if let Translation::Frame(pfn) = machine.tables.translate(FIRST, Access::WRITE) {
            machine.page(pfn).with(|_| ());
        }
    });
    assert_eq!(machine.tables.zap(GfnRange::frame(FIRST)), 1);
    assert_eq!(machine.install(FIRST, ELSEWHERE), Mapped::Fixed);
    marks.join().expect("it does not panic");
}

/// Aging takes the mark of a use, and never that of a write.
pub(crate) fn mark_and_age() {
    let machine = Machine::<X86>::with(FIRST, page(512));
    let ages = other(&machine, |machine| machine.tables.age(GfnRange::frame(FIRST), Age::Clear));
    assert_eq!(machine.tables.translate(FIRST, Access::WRITE), Translation::Frame(Pfn::new(512)));
    assert!(ages.join().expect("it does not panic"), "it was used");
    assert_eq!(machine.leaf(FIRST).map(|leaf| leaf.writable), Some(Writable::Dirty));
}

/// What may be written after a round of the dirty log is in the next round.
pub(crate) fn round_and_fast_fault() {
    let machine = Machine::<X86>::with(FIRST, Leaf { writable: Writable::Protected, ..page(512) });
    assert_eq!(machine.write_fast(), Some(Mapped::Fixed));
    let writes = other(&machine, |machine| machine.write_fast());
    machine.log.swap(0, Ordering::AcqRel);
    machine.tables.write_protect(GfnRange::frame(FIRST), Writable::Protected);
    assert!(writes.join().expect("it does not panic").is_some(), "it was never taken away");
    let leaf = machine.leaf(FIRST).expect("it was never taken away");
    let is_logged = machine.log.load(Ordering::Acquire) != 0;
    assert_eq!(leaf.writable == Writable::Dirty, is_logged, "{leaf:?}");
}

/// A fast page fault brings nothing back.
pub(crate) fn zap_and_fast_fault() {
    let machine = Machine::<X86>::with(FIRST, Leaf { writable: Writable::Protected, ..page(512) });
    let writes = other(&machine, |machine| machine.write_fast());
    assert_eq!(machine.tables.zap(GfnRange::frame(FIRST)), 1);
    writes.join().expect("it does not panic");
    assert_eq!(machine.leaf(FIRST), None);
}

/// Nobody notices a split, and it loses no write.
pub(crate) fn split_and_write() {
    let machine = Machine::<X86>::large();
    let writes = other(&machine, |machine| machine.tables.translate(SECOND, Access::WRITE));
    let split = machine.tables.split(FIRST, &mut machine.cache(), |_| ());
    assert_eq!(split, Ok(Split::Done(PageSize::Size4K)));
    let written = writes.join().expect("it does not panic");
    assert_eq!(written, Translation::Frame(Pfn::new(513)), "the split was noticed");
    assert_eq!(machine.leaf(SECOND).map(|leaf| leaf.writable), Some(Writable::Dirty));
}

/// A zap waits for who has frozen the entry, and takes what that made of it.
pub(crate) fn break_and_zap() {
    let machine = Machine::<Arm>::large();
    let zaps = other(&machine, |machine| machine.tables.zap(GfnRange::frame(FIRST)));
    let split = machine.tables.split(FIRST, &mut machine.cache(), |_| thread::yield_now());
    let split = split.expect("a table is at hand");
    let zapped = zaps.join().expect("it does not panic");
    assert_eq!(machine.leaf(FIRST), None, "it is zapped");
    assert_eq!(zapped, if matches!(split, Split::Done(_)) { 1 } else { 512 });
}

fn collapse(machine: &Machine<X86>) -> bool {
    let removed = machine.tables.collapse(FIRST, PageSize::Size2M, Execute::Always, |_| ());
    // The table stays allocated: nobody says when it can be freed.
    removed.is_some()
}

/// A write that went through is known of, whatever the collapse made of the table meanwhile.
pub(crate) fn collapse_and_write() {
    let machine = Machine::<X86>::with(FIRST, page(512));
    assert_eq!(machine.map(SECOND, page(513)), Mapped::Fixed);
    let writes = other(&machine, |machine| machine.tables.translate(SECOND, Access::WRITE));
    let collapsed = collapse(&machine);
    let written = writes.join().expect("it does not panic");
    let leaf = machine.leaf(SECOND).expect("it was never taken away");
    assert_eq!(collapsed, leaf.size == PageSize::Size2M);
    let is_written = matches!(written, Translation::Frame(_));
    assert_eq!(leaf.writable == Writable::Dirty, is_written, "a write is lost, or made up");
}

/// Who finds a large page finds all of it filled, whoever filled which part.
pub(crate) fn collapse_install_and_walk() {
    let machine = Machine::<X86>::with(FIRST, page(512));
    let collapses = other(&machine, collapse);
    let walks = other(&machine, |machine| machine.read(SECOND));
    assert_eq!(machine.install(SECOND, 513), Mapped::Fixed);
    let collapsed = collapses.join().expect("it does not panic");
    walks.join().expect("it does not panic");
    assert_eq!(machine.leaf(SECOND).map(|leaf| leaf.size == PageSize::Size2M), Some(collapsed));
}

/// A collapse that finds out too late that it cannot gives back what it has frozen.
pub(crate) fn collapse_in_vain() {
    let machine = Machine::<X86>::with(SECOND, page(513));
    let collapses = other(&machine, collapse);
    let walks = other(&machine, |machine| machine.read(FIRST));
    let did = machine.install(FIRST, 512);
    let zapped = machine.tables.zap(GfnRange::frame(SECOND));
    let collapsed = collapses.join().expect("it does not panic");
    walks.join().expect("it does not panic");
    assert_eq!((did, zapped), (Mapped::Fixed, if collapsed { 512 } else { 1 }));
    assert_eq!(machine.leaf(FIRST).is_some(), !collapsed);
}

/// What was installed in a table is there, or was taken away with the table, which is freed when the install has ended.
pub(crate) fn unlink_and_install() {
    let machine = Machine::<X86>::with(SECOND, page(513));
    let installs = other(&machine, |machine| machine.map(FIRST, page(512)));
    let removed = machine.tables.unlink(FIRST, PageSize::Size4K.level(), |_| ()).expect("there is a table");
    let did = installs.join().expect("it does not panic");
    let there = [FIRST, SECOND].iter().filter(|gfn| machine.leaf(**gfn).is_some()).count() as u64;
    let installed = 1 + u64::from(did == Mapped::Fixed);
    assert_eq!(removed.frames + there, installed, "an install is lost: {removed:?}, {did:?}");
    if let Some(table) = removed.table {
        // SAFETY: (1) it was unlinked above; (2) and (3): whoever else used the tables has ended.
        unsafe { machine.tables.free(table, 1) };
    }
}

/// Two installs by one vCPU, each announced as the engine does it; the table goes meanwhile, and is freed as the engine does it.
pub(crate) fn unlink_and_install_twice() {
    let machine = Machine::<X86>::with(SECOND, page(513));
    let announced = Arc::new(AtomicU64::new(0));
    let announces = Arc::clone(&announced);
    let installs = other(&machine, move |machine| {
        let mut cache = machine.cache();
        for (nth, gfn) in [(1, FIRST), (2, SECOND)] {
            announces.store(nth, Ordering::Release);
            fence(Ordering::SeqCst);
            let _ = machine.tables.map(gfn, page(gfn.as_u64()), &mut cache).expect("nothing is in the way");
            announces.store(0, Ordering::Release);
        }
    });
    let removed = machine.tables.unlink(FIRST, PageSize::Size4K.level(), |_| ()).expect("there is a table");
    fence(Ordering::SeqCst);
    let seen = announced.load(Ordering::Acquire);
    while seen != 0 && announced.load(Ordering::Acquire) == seen {
        thread::yield_now();
    }
    if let Some(table) = removed.table {
        // SAFETY: (1) it was unlinked above; (2) and (3): whoever could have found it has ended.
        unsafe { machine.tables.free(table, 1) };
    }
    installs.join().expect("it does not panic");
    machine.read(FIRST);
}

/// A removal that meets a table below gives it back.
pub(crate) fn unlink_in_vain() {
    let machine = Machine::<X86>::with(FIRST, page(512));
    // A second block, whose table hangs below the same one.
    let near = Gfn::new(0);
    let unlinks = other(&machine, |machine| {
        machine.tables.unlink(FIRST, PageSize::Size2M.level(), |_| ()).map(|removed| removed.table)
    });
    let walks = other(&machine, move |machine| machine.read(near));
    assert_ne!(machine.install(near, 513), Mapped::Spurious);
    assert_eq!(unlinks.join().expect("it does not panic"), Some(None), "a table is below");
    walks.join().expect("it does not panic");
    assert!(machine.leaf(FIRST).is_some());
}
