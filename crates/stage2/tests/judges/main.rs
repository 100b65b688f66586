//! Other people's crates, which know nothing of ours, read what it writes, and it what they write: entries, and whole tables
//! that random operations have made.
//!
//! | format | words | whole tables |
//! |---|---|---|
//! | NPT | `x86_64` | `x86_64`, both in turn on the same tables; `page_table_multiarch` |
//! | VMSAv8-64 stage 2 | `aarch64-paging` | `aarch64-paging`, which has no name for DBM |
//! | Sv39x4, Sv48x4 | the test's own reading of the manual: `page_table_multiarch` has them for RISC-V hosts only | `page_table_multiarch` |
//! | EPT | the same: no crate at hand knows it | `page_table_multiarch` |
//!
//! Their roots are one page. A root of several tables in a row, or a wider one, they are shown page by page: that these lie in
//! a row they cannot judge, nor tables of five levels. QEMU and Bochs do, see `judges/`.
#![cfg(not(shuttle))]

mod arm;
mod entries;
mod multiarch;
mod ours;
mod x86;
