//! A vCPU without KVM: the guest program as a function in an executable mapping of this process.
#![expect(unsafe_code)]
// UNSAFETY: maps machine code and calls it.

use core::ptr::NonNull;
use core::sync::atomic::Ordering::Relaxed;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

use crate::error::VmError;
use crate::layout::VcpuBlock;
use crate::program::Program;
use crate::signals::{self, Runner, Target};

/// The program, mapped executable and no longer writable.
#[derive(Debug)]
pub(crate) struct Code {
    base: NonNull<u8>,
    bytes: usize,
    exit: usize,
}

// SAFETY: the mapping is only read and executed.
unsafe impl Send for Code {}
// SAFETY: as above.
unsafe impl Sync for Code {}

impl Code {
    pub(crate) fn map(program: &Program) -> Result<Self, VmError> {
        let bytes = program.code.len();
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap_anonymous(
                core::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(VmError::system("map the guest program"))?;
        let code = Self {
            base: NonNull::new(base.cast::<u8>()).expect("mmap returns no null"),
            bytes,
            exit: program.exit,
        };
        // SAFETY: the new mapping is as long as the program and belongs to nobody else.
        unsafe { core::ptr::copy_nonoverlapping(program.code.as_ptr(), code.base.as_ptr(), bytes) };
        // SAFETY: the mapping is ours, and no reference into it exists.
        unsafe { mprotect(base, bytes, MprotectFlags::READ | MprotectFlags::EXEC) }
            .map_err(VmError::system("make the guest program executable"))?;
        Ok(code)
    }

    /// Where the program begins.
    pub(crate) fn entry(&self) -> *const u8 {
        self.base.as_ptr()
    }

    /// Runs the program on the calling thread until it ends.
    ///
    /// `memory` is the range of the managed memory's host addresses. The block's pointers must be host addresses of
    /// structures that stay until this returns.
    pub(crate) fn run(&self, block: &VcpuBlock, memory: core::ops::Range<u64>) {
        let start = self.base.as_ptr().addr() as u64;
        let target = Target {
            block,
            memory,
            runner: Runner::Thread { code: start..start + self.bytes as u64, exit: start + self.exit as u64 },
        };
        // SAFETY: the mapping begins with a function of this type.
        let entry: extern "sysv64" fn(*const VcpuBlock) = unsafe { core::mem::transmute(self.entry()) };
        signals::with_target(&target, || entry(block));
        block.saved_stack.store(0, Relaxed);
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; every thread in it holds a reference to `self`.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}
