//! One software vCPU: its caches, its handshake with the engine, its faults.
//!
//! ```text
//! outside ──enter: no request waits──► in the guest ── load, store: TLB, walk, memory ──┐
//!    ▲  ▲                                 │  ▲                                          │
//!    │  └── serve requests: flush ◄───────┘  └──────────────────────────────────────────┘
//!    │          kicked (looked at every CHECK_EVERY accesses)
//!    └── fault: leave, ask the engine, come back and walk again
//! ```
//!
//! A translation is used only in the guest. Caches are flushed only on request: leaving the guest keeps them, as tagged
//! TLBs do. A frame's generation is looked at before each access by a cached translation: if it has changed since the
//! walk, the page was taken away and nobody told this vCPU.

// UNSAFETY: guest memory is accessed by address.
#![expect(unsafe_code)]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use core::time::Duration;

use afterimage_mmu::{
    Access, FRAME_BYTES, Fault, FaultError, FaultOutcome, Found, Gfn, Level, PageSize, Pfn, PrimaryMmu,
    Requests, RetryPoint, SpaceId, Vcpu,
};
use afterimage_stage2::{Host, Stage2};

use super::tables::TablePool;
use super::tlb::{Tlb, Translation};
use super::walk::{Hardware, Walk, Why, walk};
use super::{AfterRetry, Fetches, PhysicalMemory, SoftMachine};
use crate::layout::{RecordKind, VcpuBlock};
use crate::report::VcpuEnd;

/// Accesses between two looks at whether the vCPU was kicked, about as long as an interrupt takes to arrive; and between
/// two speculative walks.
const CHECK_EVERY: u32 = 32;
/// Loads of which one is a fetch, where a guest fetches.
const FETCH_EVERY: u32 = 256;
/// How long a vCPU whose dirty ring is full stays outside before it looks again.
const RING_PAUSE: Duration = Duration::from_micros(50);

/// A software vCPU on its thread.
pub(super) struct Cpu<'m, F: Hardware, H: Host<Memory = TablePool>, M, R> {
    vcpu: Vcpu<'m, Stage2<F, H>>,
    machine: &'m SoftMachine<F, H, M, R>,
    block: &'m VcpuBlock,
    exits: &'m AtomicU64,
    tlb: Tlb,
    root: Pfn,
    unchecked: u32,
    unfetched: u32,
    /// Walks in a row that met a freed table.
    astray: u32,
    /// What the caches led to that they should not have: for the program, which writes it down.
    misled: Option<Misled>,
}

/// A translation that was used after its time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Misled {
    pub(super) kind: RecordKind,
    pub(super) gfn: Gfn,
    pub(super) expected: u64,
    pub(super) found: u64,
}

impl<'m, F, H, M, R> Cpu<'m, F, H, M, R>
where
    F: Hardware,
    H: Host<Memory = TablePool>,
    M: PrimaryMmu<Page = H::Page>,
    R: PhysicalMemory,
{
    /// Makes the vCPU; it is in the guest.
    pub(super) fn new(
        machine: &'m SoftMachine<F, H, M, R>,
        block: &'m VcpuBlock,
        exits: &'m AtomicU64,
    ) -> Self {
        let mut vcpu = machine.mmu.vcpu();
        if let Some(entries) = machine.ring_entries {
            vcpu.log_in_ring(entries);
        }
        let mut cpu = Self {
            vcpu,
            machine,
            block,
            exits,
            tlb: Tlb::new(),
            root: machine.root(),
            unchecked: 0,
            unfetched: 0,
            astray: 0,
            misled: None,
        };
        cpu.enter();
        cpu
    }

    /// Loads the word at byte `offset` of `gfn`.
    #[inline]
    pub(super) fn load(&mut self, gfn: Gfn, offset: usize) -> Result<u64, VcpuEnd> {
        let frame = self.access(gfn, Access::READ)?;
        Ok(word(frame, offset).load(Relaxed))
    }

    /// The same, now and then as a fetch, if this guest makes any.
    #[inline]
    pub(super) fn load_or_fetch(&mut self, gfn: Gfn, offset: usize) -> Result<u64, VcpuEnd> {
        self.unfetched += 1;
        if self.unfetched < FETCH_EVERY || self.machine.fetches == Fetches::None {
            return self.load(gfn, offset);
        }
        self.unfetched = 0;
        let frame = self.access(gfn, Access::EXEC)?;
        Ok(word(frame, offset).load(Relaxed))
    }

    /// Stores to the word at byte `offset` of `gfn`.
    #[inline]
    pub(super) fn store(&mut self, gfn: Gfn, offset: usize, value: u64) -> Result<(), VcpuEnd> {
        let frame = self.access(gfn, Access::WRITE)?;
        word(frame, offset).store(value, Relaxed);
        Ok(())
    }

    /// What went wrong in the last access, once.
    pub(super) fn take_misled(&mut self) -> Option<Misled> {
        self.misled.take()
    }

    /// Translates an access and makes it possible, however many faults that takes.
    #[inline]
    fn access(&mut self, gfn: Gfn, access: Access) -> Result<NonNull<u8>, VcpuEnd> {
        self.unchecked += 1;
        if self.unchecked >= CHECK_EVERY {
            self.look();
            self.speculate(gfn + 1)?;
        }
        loop {
            match self.tlb.find(gfn) {
                Some(page) if page.allows(access) => {
                    return self.frame(gfn, page);
                }
                Some(_) if !F::FAULTS_FORGET => self.fault(gfn, access, Found::Present)?,
                Some(_) => {
                    // What is walked to takes its place, also where that is of another size.
                    self.tlb.forget(gfn);
                    self.walk(gfn, access)?;
                }
                None => self.walk(gfn, access)?,
            }
        }
    }

    /// Where the translation leads, as hardware follows it; noted, if that is not where the page is.
    #[inline]
    fn frame(&mut self, gfn: Gfn, page: Translation) -> Result<NonNull<u8>, VcpuEnd> {
        let ram = &self.machine.ram;
        let now = ram.generation(page.pfn);
        if now != page.generation || now.is_multiple_of(2) {
            self.mislead(RecordKind::Stale, gfn, page.generation.into(), now.into());
            // Noted once for each time that it was walked to.
            self.tlb.forget(gfn);
        }
        self.machine.ram.frame(page.pfn).ok_or_else(|| VcpuEnd::Died {
            what: format!("its tables led to frame {}, and there is no such frame", page.pfn),
            gfn,
        })
    }

    #[cold]
    fn mislead(&mut self, kind: RecordKind, gfn: Gfn, expected: u64, found: u64) {
        self.misled = Some(Misled { kind, gfn, expected, found });
    }

    /// Walks, and remembers what was found; takes a fault where the access is not allowed.
    fn walk(&mut self, gfn: Gfn, access: Access) -> Result<(), VcpuEnd> {
        match walk::<F>(&self.machine.tables, self.root, &mut self.tlb, gfn, Why::Access(access)) {
            Walk::Page { first, size, writable, executable } => {
                self.remember(gfn, size, Translation { pfn: first, writable, executable, generation: 0 });
                self.astray = 0;
                Ok(())
            }
            Walk::Fault(found) => self.fault(gfn, access, found),
            Walk::FreedTable { level, table } => self.stray(gfn, level, table),
        }
    }

    /// Notes that the walk for `gfn` came to a freed table, and forgets how.
    #[cold]
    fn stray(&mut self, gfn: Gfn, level: Level, table: Pfn) -> Result<(), VcpuEnd> {
        self.mislead(RecordKind::FreedTable, gfn, level.number().into(), table.as_u64());
        self.tlb.flush();
        self.astray += 1;
        if self.astray > 1 {
            // Not what it remembers is wrong, but what the tables say.
            let what = format!("its tables lead to the freed table {table} of level {}", level.number());
            return Err(VcpuEnd::Died { what, gfn });
        }
        Ok(())
    }

    /// The translation of the page of `size` around `gfn`, with the generation that its frame has now.
    fn remember(&mut self, gfn: Gfn, size: PageSize, page: Translation) {
        let inside = gfn.as_u64() & (size.frames() - 1);
        let generation = self.machine.ram.generation(page.pfn + inside);
        if page.executable && size > PageSize::Size4K && self.machine.fetches == Fetches::FromSmallPages {
            self.mislead(RecordKind::LargeFetch, gfn, 0, size.bytes());
        }
        if F::BREAK_BEFORE_MAKE && self.tlb.conflicts(gfn, size) {
            self.mislead(RecordKind::Conflict, gfn, 0, size.bytes());
            self.tlb.flush();
        }
        self.tlb.put(gfn, size, Translation { generation, ..page });
    }

    /// Walks for an address that nobody has asked for, whether it is cached or not: hardware may, at any time.
    fn speculate(&mut self, gfn: Gfn) -> Result<(), VcpuEnd> {
        match walk::<F>(&self.machine.tables, self.root, &mut self.tlb, gfn, Why::Speculation) {
            Walk::Page { first, size, writable, executable } => {
                self.remember(gfn, size, Translation { pfn: first, writable, executable, generation: 0 });
                self.astray = 0;
                Ok(())
            }
            Walk::Fault(_) => Ok(()),
            Walk::FreedTable { level, table } => self.stray(gfn, level, table),
        }
    }

    /// Leaves the guest if somebody wants that, serves what is requested, and enters again.
    fn look(&mut self) {
        self.unchecked = 0;
        if self.vcpu.is_kicked() {
            self.leave();
            self.enter();
        }
    }

    /// Enters the guest, when every request has been served.
    pub(super) fn enter(&mut self) {
        while let Err(requests) = self.vcpu.enter_guest() {
            self.serve(requests);
        }
        self.unchecked = 0;
    }

    /// Leaves the guest. From here on the caches are not used until requests are served.
    pub(super) fn leave(&mut self) {
        let requests = self.vcpu.leave_guest();
        self.serve(requests);
        self.exits.store(self.exits.load(Relaxed) + 1, Relaxed);
    }

    fn serve(&mut self, requests: Requests) {
        if requests.contains(Requests::RELOAD_ROOTS) {
            self.root = self.machine.root();
            self.tlb.flush();
        }
        if requests.contains(Requests::FLUSH_TLB) {
            self.tlb.flush_part(self.vcpu.take_flush());
        }
    }

    /// Not while a fault is to be tried again, and nobody is left who makes that worth while.
    fn unless_stopped(&self) -> Result<(), VcpuEnd> {
        if self.block.stop.flag.load(Relaxed) != 0 { Err(VcpuEnd::Stopped) } else { Ok(()) }
    }

    /// Takes one fault to the engine and comes back, whatever became of it: the access is tried again.
    #[cold]
    fn fault(&mut self, gfn: Gfn, access: Access, found: Found) -> Result<(), VcpuEnd> {
        if F::FAULTS_FORGET {
            self.tlb.forget(gfn);
            self.tlb.forget_tables(gfn);
        }
        self.leave();
        let fault = Fault { space: SpaceId(0), gfn, access, found, ..Fault::default() };
        let died = |what: &str| VcpuEnd::Died { what: what.to_owned(), gfn };
        match self.vcpu.handle_fault(&*self.machine.primary, &fault) {
            Ok(FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious) => {
                if found == Found::Present {
                    // Some CPUs cache what forbids. (On Arm: TLBI IPAS2LE1.)
                    self.tlb.forget(gfn);
                }
            }
            Ok(FaultOutcome::Retry(retry)) => {
                // Who takes memory away may go on until the guest has ended: it could be retried for ever.
                self.unless_stopped()?;
                if self.machine.after_retry == AfterRetry::Park && retry.point != RetryPoint::SlotChanging {
                    self.machine.mmu.wait(retry.range);
                } else {
                    // KVM: cond_resched, between two entries.
                    std::thread::yield_now();
                }
            }
            Ok(FaultOutcome::Emulate(_)) => return Err(died("it touched memory that is in no memslot")),
            Ok(FaultOutcome::WriteProtected) => return Err(died("it wrote to a page that is write-tracked")),
            Err(FaultError::Interrupted(_)) => {}
            Err(FaultError::DirtyRingFull(_)) => {
                // Until somebody has collected and reset it.
                self.unless_stopped()?;
                std::thread::sleep(RING_PAUSE);
            }
            Err(FaultError::Poisoned { gfn, .. }) => return Err(VcpuEnd::Poisoned { gfn }),
            Err(error) => return Err(died(&error.to_string())),
        }
        self.enter();
        Ok(())
    }
}

/// The word at byte `offset`, a multiple of 8, of the frame at `frame`.
#[inline]
fn word<'f>(frame: NonNull<u8>, offset: usize) -> &'f AtomicU64 {
    assert!(offset < FRAME_BYTES as usize && offset.is_multiple_of(8));
    // SAFETY: (1) the word lies in the frame and is aligned, as was checked; (2) the machine's memory stays mapped as
    // long as the vCPU runs, and the reference is used at once; (3) all who share it use atomics, or own the frame.
    unsafe { frame.cast::<AtomicU64>().add(offset / 8).as_ref() }
}

#[cfg(test)]
mod tests;
