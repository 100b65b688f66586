//! KVM's guest page-fault and invalidation protocol.
#![no_std]
extern crate alloc;

mod addr;

pub use addr::{FRAME_BYTES, FRAME_SHIFT, Gfn, GfnRange, Gpa, Hva, HvaRange, Level, PageSize, Pfn};
