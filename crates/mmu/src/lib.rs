//! KVM guest page-fault and invalidation protocol.
#![no_std]
extern crate alloc;
