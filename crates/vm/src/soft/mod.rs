//! vCPUs in software, on stage-2 tables that they walk themselves.
//!
//! A [`SoftMachine`] is what such a guest runs on: the engine over [`Stage2`] tables in a [`TablePool`], the primary MMU
//! that its faults ask for pages, and physical memory. [`Guest::start_soft`](crate::Guest::start_soft) runs the same workloads on it
//! as on KVM or threads.
//!
//! The vCPU is hardware's stand-in: `walk.rs` has the walk of the tables, `tlb.rs` what it remembers, `cpu.rs` when it
//! forgets, and `program.rs` the guest's program. What it can show and what not: `docs/soft-vcpu.md`.

mod cpu;
mod pause;
mod program;
mod tables;
mod timing;
mod tlb;
mod walk;

use core::fmt;
use core::ptr::NonNull;
use std::sync::Arc;

use afterimage_mmu::{GuestMmu, Pfn, PrimaryMmu, SpaceId};
use afterimage_stage2::{Host, Stage2};

use self::cpu::Cpu;
pub(crate) use self::pause::Pause;
pub use self::pause::Paused;
use self::program::Program;
pub use self::tables::TablePool;
pub use self::walk::Hardware;
use crate::guest::State;
use crate::layout::Ended;
use crate::report::VcpuEnd;

/// Guest memory as the machine has it: frames of 4 KiB by physical address.
///
/// # Safety
///
/// What [`frame`](Self::frame) gives stays mapped, readable and writable, 4 KiB long and aligned to 8 bytes, as long as the memory lives,
/// and is not accessed but by atomics while a guest can reach it.
#[expect(unsafe_code, reason = "the promise that vCPUs rely on")]
// UNSAFETY: vCPUs access frames by the addresses that implementations give.
pub unsafe trait PhysicalMemory: Send + Sync + 'static {
    /// Where frame `pfn` lies in this process; `None`: there is no such frame.
    fn frame(&self, pfn: Pfn) -> Option<NonNull<u8>>;

    /// How often `pfn` has changed hands: odd while it is somebody's, even while it is free.
    fn generation(&self, pfn: Pfn) -> u32;
}

/// What a vCPU does when an invalidation made its fault retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AfterRetry {
    /// It waits until the invalidation has ended.
    Park,
    /// It enters the guest again, and faults again: KVM's way.
    Refault,
}

/// Whether the guest fetches from its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fetches {
    /// It only loads and stores.
    None,
    /// It does, and no large page is ever to be executable: one that is, is a wrong page.
    FromSmallPages,
}

/// What a software guest runs on. Guest frame 0 is the first of memslot 0 of address space 0.
pub struct SoftMachine<F: Hardware, H: Host<Memory = TablePool>, M, R> {
    /// The engine, over tables in `tables`.
    pub mmu: Arc<GuestMmu<Stage2<F, H>>>,
    /// Whom faults ask for pages.
    pub primary: Arc<M>,
    /// The frames behind those pages.
    pub ram: R,
    /// The tables as physical memory.
    pub tables: TablePool,
    /// What a retry does.
    pub after_retry: AfterRetry,
    /// Entries of the ring in which each vCPU has its writes logged, where they are; `None`: in the slot's bitmap.
    pub ring_entries: Option<usize>,
    /// What it fetches from.
    pub fetches: Fetches,
}

impl<F: Hardware, H: Host<Memory = TablePool>, M, R> fmt::Debug for SoftMachine<F, H, M, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftMachine")
            .field("mmu", &self.mmu)
            .field("tables", &self.tables)
            .field("after_retry", &self.after_retry)
            .finish_non_exhaustive()
    }
}

impl<F: Hardware, H: Host<Memory = TablePool>, M, R> SoftMachine<F, H, M, R> {
    fn root(&self) -> Pfn {
        self.mmu.secondary().root(SpaceId(0)).expect("a machine has an address space")
    }
}

/// A machine of whatever format, as the guest's threads have it.
pub(crate) trait Processor: Send + Sync {
    /// Runs the program of vCPU `index` on the calling thread until it ends.
    fn run(&self, index: usize, state: &State) -> VcpuEnd;
}

impl<F, H, M, R> Processor for SoftMachine<F, H, M, R>
where
    F: Hardware,
    H: Host<Memory = TablePool>,
    M: PrimaryMmu<Page = H::Page> + Send + Sync,
    R: PhysicalMemory,
{
    fn run(&self, index: usize, state: &State) -> VcpuEnd {
        let cpu = Cpu::new(self, state.system.block(index), &state.exits[index]);
        match Program::new(cpu, state, index).run() {
            Ok(Ended::Stopped) => VcpuEnd::Stopped,
            Ok(Ended::Limit) => VcpuEnd::Limit,
            Err(end) => end,
        }
    }
}
