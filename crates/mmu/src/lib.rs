//! KVM's guest page-fault and invalidation protocol, for `no_std` and any page tables.
//!
//! A virtual machine's memory is mapped twice. The *primary MMU* owns the real pages and may take one away at any time:
//! to evict it, to move it, to free it. A *secondary MMU* holds a second set of translations to the same pages, the
//! guest's. Between looking a page up in the one and installing it in the other lies a gap, in which the page can go.
//! This crate is the protocol that closes that gap, with KVM's names and KVM's rules:
//!
//! > When an invalidation has begun, no CPU can reach the range through a translation of the secondary MMU, and nobody
//! > installs one until it has ended. After it, only the new page can appear.
//!
//! It starts from Linux commit d02c357e5bfa, *KVM: x86/mmu: Retry fault before acquiring mmu_lock if mapping is changing*: a
//! fault that is doomed finds that out before it has touched a page or a lock.
//!
//! # One fault from end to end
//!
//! ```text
//! guest touches gfn                                      primary MMU changes a page
//!   │                                                      │
//!   ├─ fast path: only permissions missing? done           ├─ invalidate(range)
//!   ├─ snapshot the sequence                               │    mmu_lock for write: begin, zap, flush
//!   ├─ hint: doomed? ─────────► Retry(BeforeFaultIn)       │    (between two entries the zap may flush and give way)
//!   ├─ fault the page in (may sleep, may do I/O)           │    unlock
//!   ├─ hint: doomed? ─────────► Retry(AfterFaultIn)        ├─ changes the page, with the guard in its hand
//!   ├─ witness: mmu_lock for read, or an intent            ├─ drop the guard
//!   ├─ verify: stale? ────────► Retry(UnderLock)           │    mmu_lock for write: sequence + 1, count − 1
//!   ├─ map: someone else? ────► Retry(LostRace)            │    unlock, wake who waits
//!   └─ give the page back, then unlock                     ▼
//! ```
//!
//! [`Vcpu::handle_fault`] is the left side, [`GuestMmu::invalidate`] the right. A fault that overlaps the invalidation sees
//! its count and range; one that began before its end and verifies after it sees the sequence moved. Who gets a
//! [`Retry`] holds nothing: let the guest fault again, or [`wait`](GuestMmu::wait) for the end first.
//!
//! # Witnesses
//!
//! A verdict ("no invalidation covers this, and none has ended since the snapshot") is worth something only while
//! something keeps it true. That something is a [`Witness`]: `mmu_lock`, held for read or for write, since invalidations
//! change their words only with it held for write; or an announced [`Intent`], which the invalidations of its frames wait for
//! before they zap. [`Policy::witness`] chooses. [`Witness::verify`] gives [`Fresh`], which cannot outlive the witness, and only a
//! `Fresh` makes [`SecondaryMmu::map`] install anything. [`Snapshot::hint`] needs no witness, and gives only a reason to retry. So the three mistakes that reviewers of the kernel look for do not compile:
//!
//! | mistake | why it does not compile |
//! |---|---|
//! | install on the strength of a hint | `map` takes a `Fresh`; a hint gives none |
//! | look the page up before the sequence is sampled | [`PrimaryMmu::fault_in`] takes the [`Snapshot`] |
//! | drop the lock, or clear the intent, between check and install | the `Fresh` borrows the witness |
//!
//! # How to embed it
//!
//! Implement two traits: [`PrimaryMmu`] for whoever owns the pages, [`SecondaryMmu`] for the tables. Then faults come in
//! through a [`Vcpu`], and every change of a page goes inside an [`Invalidation`]. The smallest machine that works:
//!
//! ```
//! use std::sync::atomic::{AtomicU64, Ordering::{AcqRel, Acquire, Release}};
//!
//! use afterimage_mmu::{
//!     Access, Blocking, FRAME_BYTES, Fault, FaultInError, FaultOutcome, Fresh, Gfn, GfnRange, GuestMmu, Hva, HvaRange,
//!     Mapped, Memslot, PageRef, PageUse, Patience, Pfn, Policy, PrimaryMmu, Retry, RetryPoint, SecondaryMmu, SlotId,
//!     Snapshot, Spin, Walk, Zap, ZapWalk, Zapped,
//! };
//!
//! const BASE: Hva = Hva::new(0x10_0000);
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
//! /// The primary MMU: the frame behind each page of host memory.
//! struct Backing([AtomicU64; 16]);
//!
//! impl Backing {
//!     fn behind(&self, hva: Hva) -> &AtomicU64 {
//!         &self.0[((hva - BASE) / FRAME_BYTES) as usize]
//!     }
//! }
//!
//! impl PrimaryMmu for Backing {
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
//!         Ok(Page(Pfn::new(self.behind(slot.hva_of(fault.gfn)).load(Acquire))))
//!     }
//! }
//!
//! /// The secondary MMU: one word for each guest frame, 0 where nothing is mapped.
//! struct Table([AtomicU64; 16]);
//!
//! impl SecondaryMmu for Table {
//!     type Platform = Spin;
//!     type Page = Page;
//!     type Cache = ();
//!     type Error = &'static str;
//!
//!     fn map(
//!         &self,
//!         fresh: Fresh<'_>,
//!         _slot: &Memslot,
//!         _fault: &Fault,
//!         page: &Page,
//!         _cache: &mut (),
//!     ) -> Result<Mapped, &'static str> {
//!         let entry = &self.0[fresh.range().start.as_u64() as usize];
//!         match entry.compare_exchange(0, page.pfn().as_u64() << 1 | 1, AcqRel, Acquire) {
//!             Ok(_) => Ok(Mapped::Fixed),
//!             Err(_) => Ok(Mapped::Spurious),
//!         }
//!     }
//!
//!     fn poison(&self, _fresh: Fresh<'_>, _slot: &Memslot, _gfn: Gfn) -> Result<Mapped, &'static str> {
//!         Err("no page is ever lost here")
//!     }
//!
//!     // What it reports as unflushed, the engine flushes: by default it asks the vCPUs that are in the guest.
//!     fn zap(&self, _slot: &Memslot, gfns: GfnRange, _zap: Zap, walk: &mut ZapWalk<'_, Self>) {
//!         let mut next = gfns.start;
//!         while next < gfns.end {
//!             let was = self.0[next.as_u64() as usize].swap(0, AcqRel);
//!             let zapped = if was == 0 { Zapped::Nothing } else { Zapped::Unflushed(1) };
//!             // Nothing is kept between two steps, so a restart goes on in the same place.
//!             let (Walk::GoOn | Walk::Restart) = walk.step(GfnRange::frame(next), zapped);
//!             next = next + 1;
//!         }
//!     }
//! }
//!
//! let backing = Backing(std::array::from_fn(|page| AtomicU64::new(100 + page as u64)));
//! let mmu = GuestMmu::new(Table(Default::default()), Policy::default());
//! mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), 16, BASE)).unwrap();
//! let mut vcpu = mmu.vcpu();
//! let entry = |gfn: usize| mmu.secondary().0[gfn].load(Acquire) >> 1;
//!
//! // A fault is served until the guest can go on.
//! let fault = Fault::new(Gfn::new(3), Access::READ);
//! loop {
//!     match vcpu.handle_fault(&backing, &fault).unwrap() {
//!         FaultOutcome::Fixed | FaultOutcome::FixedFast | FaultOutcome::Spurious => break,
//!         FaultOutcome::Retry(retry) => mmu.wait(retry.range),
//!         FaultOutcome::Emulate(_) | FaultOutcome::WriteProtected => panic!("this is ordinary memory"),
//!     }
//! }
//! assert_eq!(entry(3), 103);
//!
//! // The page behind frame 3 becomes another one. Until the guard is dropped, nothing maps the frame.
//! let page = HvaRange::from_len(BASE + 3 * FRAME_BYTES, FRAME_BYTES).unwrap();
//! let invalidation = mmu.invalidate(page, Zap::Unmap, Blocking::Allowed);
//! assert_eq!(entry(3), 0);
//! let doomed = vcpu.handle_fault(&backing, &fault);
//! assert!(matches!(doomed, Ok(FaultOutcome::Retry(Retry { point: RetryPoint::BeforeFaultIn, .. }))));
//! backing.behind(page.start).store(203, Release);
//! drop(invalidation);
//!
//! assert_eq!(vcpu.handle_fault(&backing, &fault), Ok(FaultOutcome::Fixed));
//! assert_eq!(entry(3), 203);
//! ```
//!
//! A real host has more to say: what it runs on ([`Platform`]: how to park, wake and tell the time), how a vCPU is made to
//! leave the guest ([`SecondaryMmu::kick`]), what a vCPU does around guest code ([`Vcpu::enter_guest`],
//! [`Vcpu::leave_guest`]), permissions that come back without a lock ([`SecondaryMmu::fast_fault`]), and the marks of past
//! accesses ([`SecondaryMmu::age`]). `UffdMmu` in `afterimage-uffd` is a secondary MMU over a mapping of a Linux process,
//! `MemoryObject` in `afterimage-memory` a primary one.
//!
//! # What it asks of the machine
//!
//! `alloc`, and 64-bit atomics. The engine allocates nothing while a witness is held. On its way a fault writes no cache
//! line of the engine's that another vCPU writes, but for that of `mmu_lock`, and with intents not even that;
//! and, where writes are logged in a bitmap, but for its word.
//!
//! `docs/protocol.md` in the repository has the states, the orderings and what differs from KVM; the feature `mutations`
//! removes one rule at a time, for tests alone.
#![no_std]
#![warn(clippy::std_instead_of_core, clippy::std_instead_of_alloc, clippy::alloc_instead_of_core)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod active;
mod addr;
mod block;
mod dirty_bitmap;
mod dirty_log;
mod dirty_ring;
mod fault;
mod flush;
mod guest_mmu;
mod host;
mod intent;
mod invalidation;
mod large;
mod lock;
#[cfg(all(loom, test))]
mod loom_tests;
mod mmu_lock;
pub mod mutation;
mod notifier;
mod outcome;
mod platform;
mod ranges;
mod regions;
mod roots;
mod slots;
mod snapshot;
mod stats;
mod sync;
mod turns;
mod vcpu;
mod vcpu_words;
mod zap;

pub use addr::{FRAME_BYTES, FRAME_SHIFT, Gfn, GfnRange, Gpa, Hva, HvaRange, Level, PageSize, Pfn, PfnRange};
pub use block::Block;
pub use dirty_bitmap::{Initially, SlotLog};
pub use dirty_log::LogBy;
pub use dirty_ring::{DirtyFrame, DirtyRing};
pub use flush::Flush;
pub use guest_mmu::{GuestMmu, Policy, Precheck, WitnessKind, YieldPolicy};
pub use host::{
    Access, Age, Blocking, CachedMmio, FastFault, Fault, FaultInError, FaultKind, Found, Mapped, Notifier,
    PageRef, PageUse, Patience, PrimaryMmu, Privacy, SecondaryMmu, Young, Zap,
};
pub use intent::{Barrier, Intent, WalkSection, Walker, Walking};
pub use invalidation::{Begun, InvalidationError, Invalidations, MachineId, SequenceScope};
pub use lock::RawMmuLock;
pub use mmu_lock::{MmuLock, MmuReadGuard, MmuWriteGuard, Witness};
pub use notifier::Invalidation;
pub use outcome::{Emulate, FaultError, FaultOutcome, Retry, RetryPoint};
pub use platform::{HeavyBarrier, Platform, Spin};
pub use ranges::Coverage;
pub use slots::{MAX_SPACES, Memslot, SlotError, SlotFlags, SlotId, SlotSet, SlotState, SpaceId};
pub use snapshot::{Fresh, Snapshot, Stale};
pub use stats::{FaultStats, InvalidationStats};
pub use sync::ParkWord;
pub use turns::Turns;
pub use vcpu::Vcpu;
pub use vcpu_words::{Requests, VcpuWords};
pub use zap::{Retired, RetiredTable, Steps, Turn, Walk, ZapWalk, Zapped};
