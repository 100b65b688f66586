//! The crate `page_table_multiarch` walks tables that ours has built, and the other way round. Its entries for other machines
//! than this are not compiled here: for EPT and RISC-V their bits are said below, from the manuals, and the walk is its own.

// UNSAFETY: the other crate's tables lie in our memory.
#![expect(unsafe_code)]

use std::sync::OnceLock;

use afterimage_mmu::{PageSize, Pfn};
use afterimage_stage2::{Ept4, Format, HeapMemory, Npt4, Sv39x4, Sv48x4, TableMemory, Writable};
use memory_addr::{PhysAddr, VirtAddr};
use page_table_multiarch::x86_64::X64PageTable;
use page_table_multiarch::{
    GenericPTE, MappingFlags, PageSize as TheirSize, PageTable64, PagingHandler, PagingMetaData,
};
use proptest::prelude::*;

use crate::ours::{
    Near, Op, Ours, Seen, clear_table, copy_table, frames, near, ops, pfn_of, root_page_frames, sizes,
};

/// What a manual says of the words of a format.
trait Manual: Copy + core::fmt::Debug + Send + Sync + 'static {
    const PRESENT: u64 = 1;
    const WRITE: u64;
    const EXECUTE: u64;
    /// The bits of every link, of every leaf that is used and in ordinary memory, and of a large one.
    const LINK: u64;
    const LEAF: u64;
    const LARGE: u64;
    /// The address, and how far to the right it stands.
    const ADDRESS: u64;
    const SHIFT: u32;

    fn is_large(raw: u64) -> bool;
}

/// SDM volume 3C, tables 29-1 to 29-7.
#[derive(Clone, Copy, Debug)]
struct EptManual;

impl Manual for EptManual {
    const WRITE: u64 = 1 << 1;
    const EXECUTE: u64 = 1 << 2;
    const LINK: u64 = 0b111 | 1 << 8;
    // Write-back, whatever the guest's PAT says; accessed.
    const LEAF: u64 = 1 | 6 << 3 | 1 << 6 | 1 << 8;
    const LARGE: u64 = 1 << 7;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    const SHIFT: u32 = 0;

    fn is_large(raw: u64) -> bool {
        raw & Self::LARGE != 0
    }
}

/// RISC-V privileged specification, Sv39: V, R, W, X, U, A, and the frame from bit 10 on.
#[derive(Clone, Copy, Debug)]
struct RiscvManual;

impl Manual for RiscvManual {
    const WRITE: u64 = 1 << 2;
    const EXECUTE: u64 = 1 << 3;
    const LINK: u64 = 1;
    const LEAF: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 6;
    const LARGE: u64 = 0;
    const ADDRESS: u64 = 0x003f_ffff_ffff_fc00;
    const SHIFT: u32 = 2;

    fn is_large(raw: u64) -> bool {
        raw & 0b1110 != 0
    }
}

#[derive(Clone, Copy, Debug)]
struct Word<B: Manual>(u64, core::marker::PhantomData<B>);

impl<B: Manual> Word<B> {
    fn new(bits: u64, address: PhysAddr) -> Self {
        let mut word = Self(bits, core::marker::PhantomData);
        word.set_paddr(address);
        word
    }
}

impl<B: Manual> GenericPTE for Word<B> {
    fn new_page(address: PhysAddr, flags: MappingFlags, is_huge: bool) -> Self {
        let mut word = Self::new(B::LEAF, address);
        word.set_flags(flags, is_huge);
        word
    }

    fn new_table(address: PhysAddr) -> Self {
        Self::new(B::LINK, address)
    }

    fn paddr(&self) -> PhysAddr {
        PhysAddr::from(((self.0 & B::ADDRESS) << B::SHIFT) as usize)
    }

    fn flags(&self) -> MappingFlags {
        let mut flags = MappingFlags::READ;
        flags.set(MappingFlags::WRITE, self.0 & B::WRITE != 0);
        flags.set(MappingFlags::EXECUTE, self.0 & B::EXECUTE != 0);
        flags
    }

    fn set_paddr(&mut self, address: PhysAddr) {
        self.0 = self.0 & !B::ADDRESS | address.as_usize() as u64 >> B::SHIFT & B::ADDRESS;
    }

    fn set_flags(&mut self, flags: MappingFlags, is_huge: bool) {
        let execute = if flags.contains(MappingFlags::EXECUTE) { B::EXECUTE } else { 0 };
        let large = if is_huge { B::LARGE } else { 0 };
        self.0 = self.0 & B::ADDRESS | B::LEAF | execute | large;
    }

    fn bits(self) -> usize {
        self.0 as usize
    }

    fn is_unused(&self) -> bool {
        self.0 == 0
    }

    fn is_present(&self) -> bool {
        self.0 & B::PRESENT != 0
    }

    fn is_huge(&self) -> bool {
        B::is_large(self.0)
    }

    fn clear(&mut self) {
        self.0 = 0;
    }
}

struct Levels<const LEVELS: usize>;

impl<const LEVELS: usize> PagingMetaData for Levels<LEVELS> {
    const LEVELS: usize = LEVELS;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 12 + 9 * LEVELS;
    type VirtAddr = VirtAddr;

    fn flush_tlb(_address: Option<VirtAddr>) {}
}

/// Table pages for the judge, whose seam has no state.
struct Heap;

impl Heap {
    fn memory() -> &'static HeapMemory {
        static MEMORY: OnceLock<HeapMemory> = OnceLock::new();
        MEMORY.get_or_init(HeapMemory::default)
    }
}

impl PagingHandler for Heap {
    fn alloc_frames(count: usize, _align: usize) -> Option<PhysAddr> {
        let table = Self::memory().allocate(count)?;
        Some(PhysAddr::from((table.as_u64() << 12) as usize))
    }

    fn dealloc_frames(address: PhysAddr, count: usize) {
        // SAFETY: the judge frees what it allocated, once, when it goes.
        unsafe { Self::memory().free(Pfn::new(address.as_usize() as u64 >> 12), count) };
    }

    fn phys_to_virt(address: PhysAddr) -> VirtAddr {
        let table = Pfn::new(address.as_usize() as u64 >> 12);
        VirtAddr::from(Self::memory().entries(table).expose_provenance())
    }
}

type Judge<M, W> = PageTable64<M, W, Heap>;
type Ept = Judge<Levels<4>, Word<EptManual>>;
type Sv39 = Judge<Levels<3>, Word<RiscvManual>>;
type Sv48 = Judge<Levels<4>, Word<RiscvManual>>;

fn judge<M: PagingMetaData, W: GenericPTE>() -> Judge<M, W> {
    Judge::try_new().expect("the heap has room")
}

fn root<M: PagingMetaData, W: GenericPTE>(judge: &Judge<M, W>) -> Pfn {
    Pfn::new(judge.root_paddr().as_usize() as u64 >> 12)
}

fn address(gfn: u64) -> VirtAddr {
    VirtAddr::from((gfn << 12) as usize)
}

fn see<M: PagingMetaData<VirtAddr = VirtAddr>, W: GenericPTE>(judge: &Judge<M, W>, gfn: u64) -> Option<Seen> {
    let (to, flags, size) = judge.query(address(gfn)).ok()?;
    let size = match size {
        TheirSize::Size4K => PageSize::Size4K,
        TheirSize::Size2M => PageSize::Size2M,
        _ => PageSize::Size1G,
    };
    let (write, execute) = (flags.contains(MappingFlags::WRITE), flags.contains(MappingFlags::EXECUTE));
    Some(Seen { pfn: to.as_usize() as u64 >> 12, size, write, execute })
}

fn theirs_walks_ours<F, M, W>(judge: Judge<M, W>, ops: &[Op])
where
    F: Format,
    M: PagingMetaData<VirtAddr = VirtAddr>,
    W: GenericPTE,
{
    let memory = Heap::memory();
    let mut ours = Ours::<F>::new(memory);
    for op in ops {
        ours.apply(op);
    }
    let mut shown = None;
    for gfn in frames::<F>() {
        let page = (gfn / root_page_frames::<F>()) as usize;
        if shown != Some(page) {
            copy_table(memory, ours.root_page(page), root(&judge));
            shown = Some(page);
        }
        let theirs = see(&judge, gfn % root_page_frames::<F>());
        assert_eq!(theirs, ours.see(gfn, Writable::is_allowed), "{}: frame {gfn:#x}", F::NAME);
    }
    // The tables below are not the judge's to free.
    clear_table(memory, root(&judge));
}

/// What the judge does. What may be written says so in bits of our own, too, which it does not know: nothing may be.
#[derive(Clone, Debug)]
enum Theirs {
    Map { at: Near, size: PageSize, execute: bool },
    Unmap { at: Near },
    Protect { at: Near, execute: bool },
}

fn theirs() -> impl Strategy<Value = Theirs> {
    prop_oneof![
        3 => (near(), sizes(), any::<bool>()).prop_map(|(at, size, execute)| Theirs::Map { at, size, execute }),
        1 => near().prop_map(|at| Theirs::Unmap { at }),
        1 => (near(), any::<bool>()).prop_map(|(at, execute)| Theirs::Protect { at, execute }),
    ]
}

fn flags(execute: bool) -> MappingFlags {
    let mut flags = MappingFlags::READ | MappingFlags::USER;
    flags.set(MappingFlags::EXECUTE, execute);
    flags
}

fn ours_walks_theirs<F, M, W>(mut judge: Judge<M, W>, ops: &[Theirs])
where
    F: Format,
    M: PagingMetaData<VirtAddr = VirtAddr>,
    W: GenericPTE,
{
    let memory = Heap::memory();
    let ours = Ours::<F>::new(memory);
    let reach = root_page_frames::<F>();
    for op in ops {
        // What is mapped already, or not at all, is refused.
        match *op {
            Theirs::Map { at, size, execute } => {
                let gfn = at.gfn::<F>() % reach;
                let to = PhysAddr::from((pfn_of(gfn) << 12) as usize);
                let size = if size == PageSize::Size4K { TheirSize::Size4K } else { TheirSize::Size2M };
                let _ = judge.cursor().map(address(gfn), to, size, flags(execute));
            }
            Theirs::Unmap { at } => {
                let _ = judge.cursor().unmap(address(at.gfn::<F>() % reach));
            }
            Theirs::Protect { at, execute } => {
                let _ = judge.cursor().protect(address(at.gfn::<F>() % reach), flags(execute));
            }
        }
    }
    copy_table(memory, root(&judge), ours.root_page(0));
    for gfn in frames::<F>().map(|gfn| gfn % reach) {
        assert_eq!(see(&judge, gfn), ours.see(gfn, Writable::is_allowed), "{}: frame {gfn:#x}", F::NAME);
    }
    // The tables below are not ours to free.
    clear_table(memory, ours.root_page(0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn page_table_multiarch_walks_what_ours_builds(ops in prop::collection::vec(ops(), 1..40)) {
        theirs_walks_ours::<Npt4, _, _>(X64PageTable::try_new().expect("the heap has room"), &ops);
        theirs_walks_ours::<Ept4, _, _>(judge() as Ept, &ops);
        theirs_walks_ours::<Sv39x4, _, _>(judge() as Sv39, &ops);
        theirs_walks_ours::<Sv48x4, _, _>(judge() as Sv48, &ops);
    }

    #[test]
    fn ours_walks_what_page_table_multiarch_builds(ops in prop::collection::vec(theirs(), 1..40)) {
        ours_walks_theirs::<Npt4, _, _>(X64PageTable::try_new().expect("the heap has room"), &ops);
        ours_walks_theirs::<Ept4, _, _>(judge() as Ept, &ops);
        ours_walks_theirs::<Sv39x4, _, _>(judge() as Sv39, &ops);
        ours_walks_theirs::<Sv48x4, _, _>(judge() as Sv48, &ops);
    }
}
