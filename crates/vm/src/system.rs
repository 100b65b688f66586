//! System memory: the part of a guest that is never managed.
//!
//! One anonymous mapping, cut into page tables, code, stacks, vCPU blocks, mailboxes, the window table,
//! histograms and the expected table. A KVM guest sees it as memslot 0 from [`SYSTEM_GPA`] on; a thread guest
//! uses it where it is. It lives as long as the last vCPU thread or handle that can reach it.
#![expect(unsafe_code)]
// UNSAFETY: owns a raw mapping, and hands out references to the shared structures in it.

use core::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::error::VmError;
use crate::layout::{Expected, Histogram, Mailbox, VcpuBlock, WindowTable};

/// Guest physical (and virtual) address of system memory.
pub(crate) const SYSTEM_GPA: u64 = 2 << 20;
/// Guest physical (and virtual) address of managed memory: above all legacy holes.
pub(crate) const MANAGED_GPA: u64 = 4 << 30;
/// Most that managed memory may hold, so that one page of the third level maps everything.
pub(crate) const MANAGED_LIMIT: u64 = (512 << 30) - MANAGED_GPA;

pub(crate) const PAGE: usize = 4096;
const STACK_BYTES: usize = PAGE;

/// Marks a type that may be laid over zeroed system memory and shared with a running guest.
///
/// # Safety
///
/// The type is `repr(C)`, consists of atomics only, and is valid when all bytes are zero.
pub(crate) unsafe trait Shared {}

// SAFETY: (for all of them) `repr(C)`, nothing but atomics, and zero is a valid value.
unsafe impl Shared for VcpuBlock {}
// SAFETY: as above.
unsafe impl Shared for Mailbox {}
// SAFETY: as above.
unsafe impl Shared for WindowTable {}
// SAFETY: as above.
unsafe impl Shared for Histogram {}
// SAFETY: as above.
unsafe impl Shared for Expected {}

/// Where in system memory each part begins. All offsets are in bytes from its start.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) vcpus: usize,
    pub(crate) pages: u64,
    /// Pages for page tables and the GDT.
    pub(crate) tables: usize,
    pub(crate) code: usize,
    stacks: usize,
    blocks: usize,
    mailboxes: usize,
    windows: usize,
    histograms: usize,
    expected: usize,
    pub(crate) bytes: usize,
}

impl Plan {
    /// Lays out system memory for so many vCPUs, pages of managed memory, pages of tables and bytes of code.
    pub(crate) fn new(vcpus: usize, pages: u64, table_pages: usize, code_bytes: usize) -> Self {
        let mut next = 0;
        let mut take = |bytes: usize| {
            let at = next;
            next += bytes.next_multiple_of(PAGE);
            at
        };
        let tables = take(table_pages * PAGE);
        let code = take(code_bytes);
        let stacks = take(vcpus * STACK_BYTES);
        let blocks = take(vcpus * size_of::<VcpuBlock>());
        let mailboxes = take(vcpus * size_of::<Mailbox>());
        let windows = take(size_of::<WindowTable>());
        let histograms = take(2 * vcpus * size_of::<Histogram>());
        let expected = take(pages as usize * size_of::<Expected>());
        Self {
            vcpus,
            pages,
            tables,
            code,
            stacks,
            blocks,
            mailboxes,
            windows,
            histograms,
            expected,
            bytes: next,
        }
    }

    /// The end of a vCPU's stack: it grows down from here.
    pub(crate) fn stack_top(&self, vcpu: usize) -> usize {
        self.stacks + (vcpu + 1) * STACK_BYTES
    }

    pub(crate) fn block(&self, vcpu: usize) -> usize {
        self.blocks + vcpu * size_of::<VcpuBlock>()
    }

    pub(crate) fn mailbox(&self, vcpu: usize) -> usize {
        self.mailboxes + vcpu * size_of::<Mailbox>()
    }

    pub(crate) fn windows(&self) -> usize {
        self.windows
    }

    /// A vCPU's two histograms: accesses outside any window (0) and inside one (1).
    pub(crate) fn histogram(&self, vcpu: usize, inside: bool) -> usize {
        self.histograms + (2 * vcpu + usize::from(inside)) * size_of::<Histogram>()
    }

    pub(crate) fn expected(&self, page: u64) -> usize {
        self.expected + page as usize * size_of::<Expected>()
    }
}

/// The mapping itself.
#[derive(Debug)]
pub(crate) struct SystemMemory {
    base: NonNull<u8>,
    pub(crate) plan: Plan,
}

// SAFETY: the mapping belongs to the value alone, and all access is through atomics.
unsafe impl Send for SystemMemory {}
// SAFETY: as above.
unsafe impl Sync for SystemMemory {}

impl SystemMemory {
    /// Maps zeroed memory for `plan`.
    pub(crate) fn new(plan: Plan) -> Result<Self, VmError> {
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap_anonymous(
                core::ptr::null_mut(),
                plan.bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(VmError::system("map the guest's system memory"))?;
        let base = NonNull::new(base.cast::<u8>()).expect("mmap returns no null");
        Ok(Self { base, plan })
    }

    /// The host address of the byte at `offset`.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.base.as_ptr().addr() as u64 + offset as u64
    }

    /// Copies bytes (page tables, code) in; only before the guest starts.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.plan.bytes, "a write beyond system memory");
        // SAFETY: (1) the range lies in the mapping, checked above; (2) no guest runs yet, and `bytes` is not part
        // of the mapping, since nothing hands out slices of it.
        unsafe {
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(offset), bytes.len());
        }
    }

    fn at<T: Shared>(&self, offset: usize) -> &T {
        assert!(offset + size_of::<T>() <= self.plan.bytes && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: (1) inside the mapping and aligned, checked above; (2) `Shared`: atomics only, valid as zeros,
        // so writes of the guest through other pointers are atomic accesses; (3) the mapping lives as `self`.
        unsafe { self.base.add(offset).cast::<T>().as_ref() }
    }

    pub(crate) fn block(&self, vcpu: usize) -> &VcpuBlock {
        self.at(self.plan.block(vcpu))
    }

    pub(crate) fn mailbox(&self, vcpu: usize) -> &Mailbox {
        self.at(self.plan.mailbox(vcpu))
    }

    pub(crate) fn windows(&self) -> &WindowTable {
        self.at(self.plan.windows())
    }

    pub(crate) fn histogram(&self, vcpu: usize, inside: bool) -> &Histogram {
        self.at(self.plan.histogram(vcpu, inside))
    }

    pub(crate) fn expected(&self, page: u64) -> &Expected {
        assert!(page < self.plan.pages);
        self.at(self.plan.expected(page))
    }
}

impl Drop for SystemMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length; every vCPU thread holds a reference to `self`
        // while it can touch it, so nobody uses it any more.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.plan.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}
