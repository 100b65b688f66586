//! Hardware stage-2 page tables that many vCPUs change at once: what a guest's accesses are translated by.
//!
//! * [`Format`] says what the words mean: Intel EPT, AMD NPT, Arm VMSAv8-64 stage 2, RISC-V Sv39x4 and Sv48x4.
//! * [`Tables`] are the tables: any number of threads map, walk, zap, protect, age, split and collapse at once, without a
//!   lock.
//! * [`Stage2`] is the engine's [`SecondaryMmu`](afterimage_mmu::SecondaryMmu) over them; it frees tables that go.
//! * [`TableMemory`] is where the tables lie, [`TableCache`] what a vCPU keeps of it at hand.
//!
//! # Under the engine
//!
//! Implement [`Host`] for what lies below, and [`PrimaryMmu`](afterimage_mmu::PrimaryMmu) for who owns the pages; [`HeapMemory`] is for
//! tests and for vCPUs in software, a hypervisor has a [`TableMemory`] of its own. The smallest machine that works:
//!
//! ```
//! use afterimage_mmu::{
//!     Access, Blocking, FRAME_BYTES, Fault, FaultInError, FaultOutcome, Found, Gfn, GuestMmu, Hva, HvaRange, Memslot,
//!     PageRef, PageSize, PageUse, Patience, Pfn, Policy, PrimaryMmu, SlotId, Snapshot, SpaceId, Spin, Vcpu, Zap,
//! };
//! use afterimage_stage2::{HeapMemory, Host, Npt4, Stage2, Translation};
//!
//! const BASE: Hva = Hva::new(0x4000_0000);
//!
//! /// A page without a reference count: nothing is freed here.
//! struct Page(Pfn);
//!
//! impl PageRef for Page {
//!     fn pfn(&self) -> Pfn {
//!         self.0
//!     }
//!     fn is_writable(&self) -> bool {
//!         true
//!     }
//!     fn release(self, _used: PageUse) {}
//! }
//!
//! /// The primary MMU: host address `n` lies in frame `n / 4096`.
//! struct Identity;
//!
//! impl PrimaryMmu for Identity {
//!     type Page = Page;
//!     type Error = &'static str;
//!
//!     fn fault_in(
//!         &self,
//!         slot: &Memslot,
//!         fault: &Fault,
//!         _since: &Snapshot,
//!         _patience: Patience,
//!     ) -> Result<Page, FaultInError<&'static str>> {
//!         Ok(Page(Pfn::new(slot.hva_of(fault.gfn).as_u64() / FRAME_BYTES)))
//!     }
//! }
//!
//! /// What lies below: tables on the heap, and CPUs that spin.
//! struct Bare;
//!
//! impl Host for Bare {
//!     type Memory = HeapMemory;
//!     type Platform = Spin;
//!     type Page = Page;
//! }
//!
//! /// An access as hardware makes it.
//! fn translate(vcpu: &mut Vcpu<'_, Stage2<Npt4, Bare>>, gfn: Gfn, access: Access) -> Translation {
//!     let stage2 = vcpu.mmu().secondary();
//!     let mut walker = vcpu.walker();
//!     let section = walker.walk();
//!     stage2.tables(SpaceId(0), section.walking()).unwrap().translate(gfn, access)
//! }
//!
//! // One address space, and leaves of up to 2 MiB where slot and pages allow them.
//! let stage2 = Stage2::<Npt4, _>::new(Bare, HeapMemory::default(), 1, PageSize::Size2M).unwrap();
//! let mmu = GuestMmu::new(stage2, Policy::default());
//! mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), 1024, BASE)).unwrap();
//! let mut vcpu = mmu.vcpu();
//! // The register that hardware walks from: read once the vCPU is there to be asked, and again whenever it is asked to reload.
//! let _root: Pfn = mmu.secondary().root(SpaceId(0)).unwrap();
//!
//! let (gfn, access) = (Gfn::new(3), Access::WRITE);
//! assert_eq!(translate(&mut vcpu, gfn, access), Translation::Fault(Found::Absent));
//! assert_eq!(vcpu.handle_fault(&Identity, &Fault::new(gfn, access)), Ok(FaultOutcome::Fixed));
//! assert_eq!(translate(&mut vcpu, gfn, access), Translation::Frame(Pfn::new(0x4_0003)));
//!
//! // The page is taken away.
//! let page = HvaRange::from_len(BASE + 3 * FRAME_BYTES, FRAME_BYTES).unwrap();
//! let invalidation = mmu.invalidate(page, Zap::Unmap, Blocking::Allowed);
//! assert_eq!(translate(&mut vcpu, gfn, access), Translation::Fault(Found::Absent));
//! drop(invalidation);
//! ```
//!
//! # Alone
//!
//! [`Tables`] need no engine. Then the caller flushes, and keeps a frame from being freed that somebody may still map:
//!
//! ```
//! use afterimage_mmu::{Access, Gfn, GfnRange, Mapped, PageSize, Pfn};
//! use afterimage_stage2::{
//!     Ept4, Execute, HeapMemory, Leaf, MemoryType, TableCache, Tables, Translation, Writable,
//! };
//!
//! let tables = Tables::<Ept4, _>::new(HeapMemory::default()).unwrap();
//! let leaf = Leaf {
//!     pfn: Pfn::new(512),
//!     size: PageSize::Size2M,
//!     writable: Writable::Clean,
//!     execute: Execute::Always,
//!     memory: MemoryType::WriteBack,
//!     accessed: true,
//! };
//! let mut cache = TableCache::default();
//! assert!(tables.top_up(&mut cache), "there is memory for what one install links");
//! assert_eq!(tables.map(Gfn::new(0), leaf, &mut cache), Ok(Mapped::Fixed));
//! assert_eq!(tables.translate(Gfn::new(5), Access::READ), Translation::Frame(Pfn::new(517)));
//! // A large leaf goes as a whole. CPUs are to forget it next.
//! assert_eq!(tables.zap(GfnRange::frame(Gfn::new(5))), 512);
//! # drop(cache);
//! ```
#![no_std]
#![warn(clippy::std_instead_of_core, clippy::std_instead_of_alloc, clippy::alloc_instead_of_core)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod format;
mod leaves;
mod memory;
pub mod mutation;
mod stage2;
mod sync;
mod tables;

pub use format::ept::{ACCESSED_DIRTY, Ept, Ept4, Ept5, MODE_BASED_EXECUTE};
pub use format::npt::{Npt, Npt4, Npt5};
pub use format::riscv::{Sv39x4, Sv48x4, Svx4};
pub use format::vmsa::Vmsa;
pub use format::{Entry, Execute, Format, Leaf, MMIO_GENERATION_BITS, MemoryType, Refused, Writable};
pub use leaves::{Change, LeafEntry, Leaves, Step};
#[cfg(not(loom_tables))]
pub use memory::HeapMemory;
pub use memory::{ENTRIES, TableCache, TableMemory};
pub use stage2::{Host, LargeExecute, LargePages, Stage2};
#[cfg(any(shuttle, loom_tables))]
pub use sync::AtomicU64;
pub use tables::{MapError, Removed, Split, Tables, Translation, Walked};
