//! Hardware stage-2 page tables that many vCPUs change at once: what a guest's accesses are translated by.
//!
//! * [`Format`] says what the words mean: Intel EPT, AMD NPT, Arm VMSAv8-64 stage 2, RISC-V Sv39x4 and Sv48x4.
//! * [`Tables`] are the tables: any number of threads map, walk, zap, protect, age, split and collapse at once, without a
//!   lock.
//! * [`Stage2`] is the engine's [`SecondaryMmu`](afterimage_mmu::SecondaryMmu) over them; it frees tables that go.
//! * [`TableMemory`] is where the tables lie, [`TableCache`] what a vCPU keeps of it at hand.
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
