//! Hardware stage-2 page tables that many vCPUs change at once: what a guest's accesses are translated by.
//!
//! [`Format`] says what the words mean: Intel EPT, AMD NPT, Arm VMSAv8-64 stage 2, RISC-V Sv39x4 and Sv48x4.
#![no_std]
#![warn(clippy::std_instead_of_core, clippy::std_instead_of_alloc, clippy::alloc_instead_of_core)]

mod format;

pub use format::ept::{ACCESSED_DIRTY, Ept, Ept4, Ept5, MODE_BASED_EXECUTE};
pub use format::npt::{Npt, Npt4, Npt5};
pub use format::riscv::{Sv39x4, Sv48x4, Svx4};
pub use format::vmsa::Vmsa;
pub use format::{Entry, Execute, Format, Leaf, MMIO_GENERATION_BITS, MemoryType, Refused, Writable};
