//! Every kind of leaf under every kind of access: the hardware must do what [`Tables::translate`] says, and leave the
//! entry as it leaves it.
//!
//! Two sets of tables are filled alike. One is walked by the hardware, for a guest that makes one access; the other by
//! the crate. Then both are read through the crate: marks that the hardware set must be marks to it.

use core::sync::atomic::Ordering;

use afterimage_mmu::{Access, Found, Gfn, GfnRange, Level, PageSize, Pfn};
use afterimage_stage2::{
    ENTRIES, Entry, Execute, Format, HeapMemory, Leaf, MemoryType, TableCache, TableMemory, Tables,
    Translation, Writable,
};

use crate::console::say;
use crate::guest::{self, Program};
use crate::ram;
use crate::walker::{Exit, Marks, Registers, Walker};

const SIZES: [PageSize; 3] = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];
const WRITABLE: [Writable; 5] =
    [Writable::Never, Writable::HostOnly, Writable::Protected, Writable::Clean, Writable::Dirty];
const MEMORY: [MemoryType; 3] = [MemoryType::WriteBack, MemoryType::Uncached, MemoryType::Device];

/// What the guest finds where it reads.
const STAMP: u64 = 0x5eed_0000_0000_0000;
/// What it writes.
const WRITTEN: u64 = 0xd1d1_d1d1_d1d1_d1d1;

/// One access to one frame.
#[derive(Clone, Copy, Debug)]
struct Touch {
    gfn: Gfn,
    access: Access,
}

/// What the hardware did with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    /// It reached this frame.
    Reached(Pfn),
    /// It was stopped.
    Stopped(Found),
}

/// The judge of one format on one CPU.
struct Judge<'w, F: Format, W: Walker> {
    walker: &'w mut W,
    marks: Marks,
    format: core::marker::PhantomData<F>,
    accesses: u64,
    wrong: u64,
}

/// Tables of their own, and what fills them.
struct Subject<F: Format> {
    memory: HeapMemory,
    tables: Tables<F, HeapMemory>,
    cache: TableCache<HeapMemory>,
}

impl<F: Format> Subject<F> {
    /// Tables that map the guest's own frames.
    fn new() -> Self {
        let memory = HeapMemory::default();
        let tables = Tables::new(memory.clone()).expect("the heap has room");
        let mut subject = Self { memory, tables, cache: TableCache::default() };
        for number in guest::FIRST_CPU {
            let gfn = Gfn::new(number);
            let pfn = ram::guest_frame(gfn);
            subject.map(gfn, Leaf { pfn, size: PageSize::Size4K, ..FULL });
        }
        subject
    }

    fn map(&mut self, gfn: Gfn, leaf: Leaf) {
        assert!(self.tables.top_up(&mut self.cache), "the heap has room");
        let mapped = self.tables.map(gfn, leaf, &mut self.cache);
        assert_eq!(mapped, Ok(afterimage_mmu::Mapped::Fixed), "{leaf:?} at {gfn:?}");
    }

    fn entry(&self, gfn: Gfn) -> Entry {
        self.tables.walk(gfn).entry
    }

    /// Writes a word that no caller of the crate can have written: the entry of `gfn` at `level`.
    fn change_raw(&self, gfn: Gfn, level: Level, change: impl Fn(u64) -> u64) {
        let mut at = (F::ROOT_LEVEL, self.tables.root(), F::ROOT_PAGES * ENTRIES);
        loop {
            let (here, frame, entries) = at;
            let index = gfn.as_u64() / here.frames() % entries as u64;
            let entry = ram::entry(self.memory.entries(frame), index as usize);
            let raw = entry.load(Ordering::SeqCst);
            if here == level {
                entry.store(change(raw), Ordering::SeqCst);
                return;
            }
            let child = F::child(raw, here).expect("the entry's table is linked");
            at = (Level::new(here.number() - 1).expect("a child has a level"), child, ENTRIES);
        }
    }
}

/// What the hardware walks, and what the crate does.
struct Pair<F: Format> {
    real: Subject<F>,
    twin: Subject<F>,
}

impl<F: Format> Pair<F> {
    fn new() -> Self {
        Self { real: Subject::new(), twin: Subject::new() }
    }
}

const FULL: Leaf = Leaf {
    pfn: Pfn::new(0),
    size: PageSize::Size4K,
    writable: Writable::Dirty,
    execute: Execute::Always,
    memory: MemoryType::WriteBack,
    accessed: true,
};

/// The host's frame behind the leaf, and the frame in it that is touched.
fn place(size: PageSize) -> (Pfn, u64) {
    match size {
        PageSize::Size4K => (ram::MATRIX, 0),
        PageSize::Size2M => (Pfn::new(ram::MATRIX.as_u64() + 512), 0x155),
        PageSize::Size1G => (ram::GIB, 0xabc),
    }
}

/// Judges every leaf of format `F`; how many accesses were made.
///
/// `wrong`: bits that are turned over in every leaf that the hardware walks, to see that the judge finds fault.
pub(crate) fn run<F: Format, W: Walker>(walker: &mut W, marks: Marks, wrong: u64) {
    let mut judge = Judge::<F, W> { walker, marks, format: core::marker::PhantomData, accesses: 0, wrong };
    judge.leaves();
    judge.what_is_no_leaf();
    judge.far_away();
    judge.marks_come_back();
    say!(
        "  {}, {} levels, marks {marks:?}: {} accesses are as the crate says",
        F::NAME,
        F::ROOT_LEVEL.number(),
        judge.accesses
    );
}

impl<F: Format, W: Walker> Judge<'_, F, W> {
    /// Runs a guest that touches, on these tables.
    fn touch(&mut self, subject: &Subject<F>, touch: Touch) -> Done {
        self.accesses += 1;
        let gpa = touch.gfn.gpa().as_u64();
        let program = match touch.access {
            Access::WRITE => Program::Write,
            Access::EXEC => Program::Fetch,
            _ => Program::Read,
        };
        let inside = if program == Program::Fetch { guest::CODE_OFFSET } else { 0 };
        let (stack, _) = guest::memory_of(0);
        let mut registers = Registers {
            rip: program.start(),
            rsp: stack.as_u64(),
            rdi: gpa + inside,
            rsi: WRITTEN,
            ..Registers::default()
        };
        self.walker.load(subject.tables.root(), self.marks);
        match self.walker.enter(&mut registers) {
            Exit::Halt if program == Program::Write => {
                Done::Reached(ram::holding(WRITTEN).expect("what the guest wrote is nowhere"))
            }
            Exit::Halt => Done::Reached(Pfn::new(registers.rax & !STAMP)),
            Exit::Fault(fault) => {
                if program == Program::Write {
                    assert_eq!(ram::holding(WRITTEN), None, "{touch:?}: the hardware wrote and then stopped");
                }
                assert_eq!(fault.gpa.as_u64(), gpa + inside, "{touch:?}: the hardware names another address");
                if fault.found != Found::Reserved {
                    assert_eq!(fault.access, touch.access, "{touch:?}: the hardware names another access");
                }
                Done::Stopped(fault.found)
            }
            other => panic!("{touch:?} ended in {other:x?}"),
        }
    }

    /// One access on both, when `fill` has filled each; no leaf is left where it was.
    fn compare(&mut self, pair: &mut Pair<F>, touch: Touch, fill: impl Fn(&mut Subject<F>)) -> Done {
        let Pair { real, twin } = pair;
        fill(real);
        fill(twin);
        let before = twin.entry(touch.gfn);
        let level = real.tables.walk(touch.gfn).level;
        let wrong = if matches!(before, Entry::Leaf(_)) { self.wrong } else { 0 };
        real.change_raw(touch.gfn, level, |raw| raw ^ wrong);
        let done = self.touch(real, touch);
        real.change_raw(touch.gfn, level, |raw| raw ^ wrong);
        let said = match twin.tables.translate(touch.gfn, touch.access) {
            Translation::Frame(pfn) => Done::Reached(pfn),
            Translation::Fault(found) => Done::Stopped(found),
        };
        assert_eq!(done, said, "{touch:?} of {before:?}: left is the hardware, right the crate");
        let [real, twin] = [real, twin].map(|subject| {
            let entry = subject.entry(touch.gfn);
            if matches!(entry, Entry::Leaf(_)) {
                subject.tables.zap(GfnRange::frame(touch.gfn));
            }
            entry
        });
        // Hardware may count an access that it then stops (QEMU does, for pages of 1 GiB). Nothing else may differ.
        let counted = match (done, twin) {
            (Done::Stopped(_), Entry::Leaf(leaf)) => Entry::Leaf(Leaf { accessed: true, ..leaf }),
            _ => twin,
        };
        assert!(
            real == twin || real == counted,
            "{touch:?} of {before:?}: the hardware left {real:?} behind, the crate {twin:?}"
        );
        done
    }

    fn leaves(&mut self) {
        for size in SIZES {
            let (pfn, inside) = place(size);
            let mut pair = Pair::new();
            for writable in WRITABLE {
                for memory in MEMORY {
                    for accessed in [false, true] {
                        for execute in [Execute::Never, Execute::Always] {
                            let leaf = Leaf { pfn, size, writable, execute, memory, accessed };
                            self.leaf(&mut pair, leaf, inside);
                        }
                    }
                }
            }
        }
    }

    fn leaf(&mut self, pair: &mut Pair<F>, leaf: Leaf, inside: u64) {
        let base = Gfn::new(leaf.size.frames().max(PageSize::Size2M.frames()));
        for access in [Access::READ, Access::WRITE, Access::EXEC] {
            let touch = Touch { gfn: base + inside, access };
            ram::stamp(Pfn::new(leaf.pfn.as_u64() + inside), STAMP);
            self.compare(pair, touch, |subject| subject.map(base, leaf));
        }
    }

    /// Absent, frozen, MMIO: at every level.
    fn what_is_no_leaf(&mut self) {
        for access in [Access::READ, Access::WRITE, Access::EXEC] {
            for size in SIZES {
                let gfn = Gfn::new(size.frames().max(PageSize::Size2M.frames()) + 5);
                let touch = Touch { gfn, access };
                let done = self.compare(&mut Pair::new(), touch, |_| {});
                assert_eq!(done, Done::Stopped(Found::Absent));
                let done = self.compare(&mut Pair::new(), touch, |subject| {
                    let (pfn, _) = place(size);
                    subject.map(gfn, Leaf { pfn, size, ..FULL });
                    subject.change_raw(gfn, size.level(), |_| F::FROZEN);
                    assert_eq!(subject.entry(gfn), Entry::Frozen);
                });
                assert_eq!(done, Done::Stopped(Found::Absent), "a frozen entry");
            }
            for generation in [0, 1, 0x55_5555_5555, (1 << 39) - 1] {
                let touch = Touch { gfn: Gfn::new(0x777), access };
                let done = self.compare(&mut Pair::new(), touch, |subject| {
                    assert!(subject.tables.top_up(&mut subject.cache));
                    let cached = subject.tables.cache_mmio(touch.gfn, generation, &mut subject.cache);
                    assert_eq!(cached, Ok(Some(afterimage_mmu::Mapped::Fixed)));
                });
                assert_eq!(
                    done,
                    Done::Stopped(Found::Reserved),
                    "an MMIO entry of generation {generation:#x}"
                );
            }
        }
    }

    /// Guest frames with every bit of the address that the guest can form.
    fn far_away(&mut self) {
        let mut pair = Pair::new();
        for bit in 9..28 {
            for gfn in [Gfn::new(1 << bit), Gfn::new(((2 << bit) - 1) & !0x1ff | 7)] {
                let leaf = Leaf { pfn: Pfn::new(ram::MATRIX.as_u64() + 1 + bit), ..FULL };
                ram::stamp(leaf.pfn, STAMP);
                for access in [Access::READ, Access::WRITE, Access::EXEC] {
                    let touch = Touch { gfn, access };
                    let done = self.compare(&mut pair, touch, |subject| subject.map(gfn, leaf));
                    assert_eq!(done, Done::Reached(leaf.pfn));
                    ram::stamp(leaf.pfn, STAMP);
                }
            }
        }
    }

    /// Marks that the hardware set are taken away by the crate, and set again by the hardware.
    fn marks_come_back(&mut self) {
        for size in SIZES {
            let (pfn, inside) = place(size);
            let base = Gfn::new(size.frames().max(PageSize::Size2M.frames()));
            let gfn = base + inside;
            let block = GfnRange::frame(gfn);
            let mut subject = Subject::<F>::new();
            let behind = Pfn::new(pfn.as_u64() + inside);
            ram::stamp(behind, STAMP);
            subject.map(base, Leaf { pfn, size, writable: Writable::Clean, ..FULL });
            for _ in 0..3 {
                assert!(subject.tables.age(block, afterimage_mmu::Age::Clear));
                assert!(!subject.tables.age(block, afterimage_mmu::Age::Test));
                let read = Touch { gfn, access: Access::READ };
                if F::HIDES_UNUSED {
                    assert_eq!(self.touch(&subject, read), Done::Stopped(Found::Absent));
                    let used =
                        subject.tables.upgrade_present(gfn, |leaf| Some(Leaf { accessed: true, ..leaf }));
                    assert_eq!(used, Some(afterimage_mmu::Mapped::Fixed));
                }
                assert_eq!(self.touch(&subject, read), Done::Reached(behind));
                assert!(subject.tables.age(block, afterimage_mmu::Age::Test));
            }
            let write = Touch { gfn, access: Access::WRITE };
            assert_eq!(self.touch(&subject, write), Done::Reached(behind));
            ram::stamp(behind, STAMP);
            let Entry::Leaf(leaf) = subject.entry(gfn) else { panic!("the leaf is gone") };
            assert!(leaf.accessed);
            assert_eq!(leaf.writable, if F::HAS_DIRTY { Writable::Dirty } else { leaf.writable });
            assert_eq!(subject.tables.write_protect(block, Writable::Protected), size.frames());
            assert_eq!(self.touch(&subject, write), Done::Stopped(Found::Present));
            assert_eq!(subject.tables.zap(block), size.frames());
            assert_eq!(self.touch(&subject, write), Done::Stopped(Found::Absent));
        }
    }
}
