//! What each vCPU owns, and the handshake by which it is made to flush its TLB.
//!
//! # States of a vCPU
//!
//! ```text
//! Outside ──enter: store, full fence, look at requests──► InGuest ──kicked──► Exiting
//!    ▲                                                       │                   │
//!    └───────────────────────leave (wakes who waits)─────────┴───────────────────┘
//! ```
//!
//! A requester sets a request bit, full fence, then looks at the mode. Either the vCPU sees the request before it
//! runs guest code, or the requester sees it in the guest, marks it `Exiting`, kicks it, and waits until it has
//! left. In both cases, when the requester goes on, the vCPU runs no guest code before it has served the request.
//!
//! The words also say what a vCPU is about to install and whether it walks tables: see the module `intent`. Who walks and is
//! no vCPU (aging from outside, say) takes one of a few visitors' words.
//!
//! Source: Linux `kvm_make_all_cpus_request`, `kvm_request_needs_ipi`, `vcpu_enter_guest`.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::GfnRange;
use crate::flush::{Flush, FlushWords};
use crate::intent::{Barrier, Barriers, IntentWord, IntentWords, Waited};
use crate::mutation::{self, Mutation};
use crate::platform::Platform;
use crate::stats::FaultCounters;
use crate::sync::{AtomicU32, CachePadded, Ordering, Shared, fence};
use crate::turns::{Claim, Patience};

bitflags::bitflags! {
    /// What a vCPU must do before it runs guest code again.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Requests: u32 {
        /// Forget all cached translations, or what [`Vcpu::take_flush`](crate::Vcpu::take_flush) says.
        const FLUSH_TLB = 1;
        /// Drop roots that were invalidated, load new ones, and forget everything that was cached below the old. Asked of each new
        /// vCPU, too.
        const RELOAD_ROOTS = 2;
        /// Just leave the guest.
        const STOP = 4;
    }
}

const OUTSIDE: u32 = 0;
const IN_GUEST: u32 = 1;
const EXITING: u32 = 2;

/// The words of one vCPU. Only their owner writes `section`, `intents` and `counters`; requesters write the handshake words.
#[derive(Debug)]
pub(crate) struct VcpuShared {
    pub(crate) id: usize,
    /// Announced while a fault looks at the memslots.
    pub(crate) section: CachePadded<IntentWord>,
    pub(crate) intents: IntentWords,
    /// The frames that it claims the next turn for.
    pub(crate) claim: CachePadded<Claim>,
    pub(crate) counters: CachePadded<FaultCounters>,
    handshake: CachePadded<Handshake>,
}

#[derive(Debug)]
struct Handshake {
    mode: AtomicU32,
    requests: AtomicU32,
    flush: FlushWords,
}

impl VcpuShared {
    pub(crate) fn new(id: usize, barriers: Barriers) -> Self {
        Self {
            id,
            section: CachePadded(IntentWord::new(barriers)),
            intents: IntentWords::new(barriers),
            claim: CachePadded(Claim::new()),
            counters: CachePadded(FaultCounters::new()),
            handshake: CachePadded(Handshake {
                mode: AtomicU32::new(OUTSIDE),
                requests: AtomicU32::new(0),
                flush: FlushWords::new(),
            }),
        }
    }

    /// Enters the guest, unless requests wait: those are handed out and the vCPU stays outside.
    pub(crate) fn enter_guest<P: Platform>(&self) -> Result<(), Requests> {
        // Release: a requester may wait for the last stay in the guest and find this one. What was done there comes
        // before all the same.
        let ordering = mutation::unless(Mutation::GuestEnterRelaxed, Ordering::Release);
        self.handshake.mode.store(IN_GUEST, ordering);
        if !mutation::active(Mutation::EnterWithoutFence) {
            fence(Ordering::SeqCst);
        }
        if self.handshake.requests.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        self.leave_guest::<P>();
        Err(self.take_requests())
    }

    /// Leaves the guest and lets whoever kicked go on.
    pub(crate) fn leave_guest<P: Platform>(&self) {
        let ordering = mutation::unless(Mutation::GuestLeaveRelaxed, Ordering::Release);
        let mode = self.handshake.mode.swap(OUTSIDE, ordering);
        if mode == EXITING && !mutation::active(Mutation::LeaveWithoutWake) {
            P::wake_all(&self.handshake.mode);
        }
    }

    /// Has the vCPU itself serve `requests` before it enters the guest. It is outside.
    pub(crate) fn owe(&self, requests: Requests) {
        self.handshake.requests.fetch_or(requests.bits(), Ordering::Relaxed);
    }

    /// Takes the requests that wait. They must be served before the guest is entered.
    pub(crate) fn take_requests(&self) -> Requests {
        // Acquire: what the requester changed before it asked is seen by whoever serves it.
        Requests::from_bits_retain(self.handshake.requests.swap(0, Ordering::Acquire))
    }

    /// What is to be forgotten for the flushes that were requested. After their requests were taken.
    pub(crate) fn take_flush(&self) -> Flush {
        self.handshake.flush.take()
    }

    /// Whether the vCPU was kicked and should leave the guest (for vCPUs that are software).
    pub(crate) fn is_kicked(&self) -> bool {
        self.handshake.mode.load(Ordering::Relaxed) == EXITING
    }

    /// Says what to flush, and sets request bits; returns whether the vCPU must be kicked, which this caller then does.
    fn request(&self, requests: Requests, flush: Flush) -> Kick {
        let late = mutation::active(Mutation::FlushWidenedLate);
        if !late {
            self.handshake.flush.widen(flush);
        }
        self.handshake.requests.fetch_or(requests.bits(), Ordering::Release);
        if late {
            self.handshake.flush.widen(flush);
        }
        if !mutation::active(Mutation::RequestWithoutFence) {
            fence(Ordering::SeqCst);
        }
        match self.handshake.mode.compare_exchange(IN_GUEST, EXITING, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => Kick::Needed,
            Err(_) => Kick::NotNeeded,
        }
    }

    fn wait_until_left<P: Platform>(&self) {
        if mutation::active(Mutation::KickWithoutAck) {
            return;
        }
        for _ in 0..P::SPINS {
            if self.handshake.mode.load(Ordering::Acquire) != EXITING {
                return;
            }
            P::relax();
        }
        while self.handshake.mode.load(Ordering::Acquire) == EXITING {
            P::wait(&self.handshake.mode, EXITING);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kick {
    /// The vCPU is outside, or on its way out.
    NotNeeded,
    Needed,
}

/// How many threads that are no vCPU can walk tables without a lock at a time.
#[cfg(not(loom))]
const VISITORS: usize = 4;
/// One is enough to show it.
#[cfg(loom)]
const VISITORS: usize = 1;

/// The word of one who walks tables and is no vCPU.
struct Visitor {
    taken: AtomicU32,
    intent: IntentWord,
}

/// The words of every vCPU of a virtual machine.
pub struct VcpuWords<P: Platform> {
    words: Shared<P, Vec<Arc<VcpuShared>>>,
    visitors: [CachePadded<Visitor>; VISITORS],
    barriers: Barriers,
    flushes: CachePadded<crate::sync::AtomicU64>,
}

/// A visitor's word, until this is dropped.
pub(crate) struct Visit<'v>(&'v Visitor);

impl Visit<'_> {
    pub(crate) fn word(&self) -> &IntentWord {
        &self.0.intent
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        // Release: the next visitor continues the generations where this one left them.
        self.0.taken.store(0, Ordering::Release);
    }
}

impl<P: Platform> fmt::Debug for VcpuWords<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuWords").field("vcpus", &self.words.read().len()).finish()
    }
}

impl<P: Platform> VcpuWords<P> {
    pub(crate) fn new(barrier: Barrier) -> Self {
        let barriers = Barriers::of::<P>(barrier);
        let visitor = |_| Visitor { taken: AtomicU32::new(0), intent: IntentWord::new(barriers) };
        Self {
            words: Shared::new(Vec::new()),
            visitors: core::array::from_fn(|index| CachePadded(visitor(index))),
            barriers,
            flushes: CachePadded(crate::sync::AtomicU64::new(0)),
        }
    }

    /// A word for a walk by who is no vCPU; `None` if all are taken.
    pub(crate) fn visit(&self) -> Option<Visit<'_>> {
        let free = |visitor: &&CachePadded<Visitor>| {
            visitor.taken.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        self.visitors.iter().find(free).map(|visitor| Visit(visitor))
    }

    /// Returns when nobody holds an intent that was announced before the call for frames that `covers` says yes to, all of
    /// them in `frames`.
    /// Whoever announces one later sees what the caller published before the call. Holds up nobody else: no lock of the
    /// caller's may be needed by who installs.
    pub(crate) fn drain(&self, frames: GfnRange, covers: impl Fn(GfnRange) -> bool) -> Waited {
        if !mutation::active(Mutation::DrainWithoutFence) {
            self.barriers.announce.heavy::<P>();
        }
        let mut waited = Waited::No;
        if !mutation::active(Mutation::BeginWithoutDrain) {
            self.for_each_announced(
                |vcpu| vcpu.intents.named(frames, &covers),
                |vcpu, seen| {
                    waited = Waited::Yes;
                    vcpu.intents.wait_out::<P>(seen);
                },
            );
        }
        waited
    }

    /// Lets every vCPU go first that claims a turn for frames which `due` says yes to; how many went.
    pub(crate) fn give_turns(&self, due: impl Fn(GfnRange) -> bool) -> u64 {
        let mut given = 0;
        let mut patience = Patience::default();
        self.for_each_announced(
            |vcpu| vcpu.claim.named(&due),
            |vcpu, seen| given += u64::from(vcpu.claim.let_go_first::<P>(seen, &mut patience)),
        );
        given
    }

    /// Waits, for each vCPU in turn, for what `look` finds there. Nothing is locked and nothing allocated meanwhile: vCPUs may
    /// come and go. Who comes announces behind the caller's barrier, and need not be looked at.
    fn for_each_announced<A>(
        &self,
        look: impl Fn(&VcpuShared) -> Option<A>,
        mut wait: impl FnMut(&VcpuShared, A),
    ) {
        let mut next = 0;
        loop {
            let found = {
                let words = self.words.read();
                let from = words.iter().filter(|vcpu| vcpu.id >= next);
                let waiting = from.filter_map(|vcpu| Some((vcpu, look(vcpu)?)));
                waiting.min_by_key(|(vcpu, _)| vcpu.id).map(|(vcpu, found)| (Arc::clone(vcpu), found))
            };
            let Some((vcpu, found)) = found else { return };
            wait(&vcpu, found);
            // In the order of their numbers, each once: what they announce next is none of the caller's business.
            next = vcpu.id + 1;
        }
    }

    /// Whether any vCPU has announced anything.
    pub(crate) fn is_announced(&self) -> bool {
        self.words.read().iter().any(|vcpu| vcpu.intents.announced().is_some())
    }

    /// Returns when nobody walks who could have found a table that was unlinked before the call; holders of `mmu_lock` and
    /// those in the guest apart.
    pub(crate) fn quiesce(&self) {
        if mutation::active(Mutation::FreeWithoutQuiescence) {
            return;
        }
        self.barriers.announce.heavy::<P>();
        self.for_each_announced(
            |vcpu| vcpu.intents.announced(),
            |vcpu, seen| vcpu.intents.wait_out::<P>(seen),
        );
        for visitor in &self.visitors {
            if let Some(seen) = visitor.intent.announced() {
                visitor.intent.wait_out::<P>(seen);
            }
        }
    }

    pub(crate) fn register(&self) -> Arc<VcpuShared> {
        let mut words = self.words.write();
        let taken = |id: &usize| words.iter().any(|vcpu| vcpu.id == *id);
        let id = (0..).find(|id| !taken(id)).expect("there are more numbers than vCPUs");
        let vcpu = Arc::new(VcpuShared::new(id, self.barriers));
        words.push(Arc::clone(&vcpu));
        vcpu
    }

    pub(crate) fn unregister(&self, vcpu: &Arc<VcpuShared>) {
        self.words.write().retain(|other| !Arc::ptr_eq(other, vcpu));
    }

    pub(crate) fn for_each(&self, mut visit: impl FnMut(&VcpuShared)) {
        for vcpu in self.words.read().iter() {
            visit(vcpu);
        }
    }

    /// Waits for every read section that may still use a slot set that is published no more.
    pub(crate) fn wait_for_readers(&self) {
        self.barriers.announce.heavy::<P>();
        if mutation::active(Mutation::SwapWithoutReaders) {
            return;
        }
        self.for_each_announced(
            |vcpu| vcpu.section.announced(),
            |vcpu, seen| vcpu.section.wait_out::<P>(seen),
        );
    }

    /// Has every vCPU forget what `flush` says, as [`request_and_wait`](Self::request_and_wait) does.
    pub fn flush_and_wait(&self, flush: Flush, kick: impl Fn(usize)) {
        self.ask(Requests::FLUSH_TLB, flush, kick);
    }

    /// Asks every vCPU, kicks those that are in the guest, and returns when all of those have left it. A flush is one of
    /// everything.
    ///
    /// No vCPU can be made or dropped meanwhile. So the caller must not be in the guest itself, and a thread with a vCPU in
    /// the guest must leave it before it makes or drops another.
    pub fn request_and_wait(&self, requests: Requests, kick: impl Fn(usize)) {
        let flushes = requests.contains(Requests::FLUSH_TLB);
        self.ask(requests, if flushes { Flush::EVERYTHING } else { Flush::NOTHING }, kick);
    }

    fn ask(&self, requests: Requests, flush: Flush, kick: impl Fn(usize)) {
        self.flushes.fetch_add(u64::from(requests.contains(Requests::FLUSH_TLB)), Ordering::Relaxed);
        let words = self.words.read();
        for vcpu in words.iter() {
            if vcpu.request(requests, flush) == Kick::Needed {
                kick(vcpu.id);
            }
        }
        // Not a list of those that were kicked: flushes run under `mmu_lock`, where nothing allocates. One that was
        // outside can be on its way out by now for someone else; that wait is as short.
        for vcpu in words.iter() {
            vcpu.wait_until_left::<P>();
        }
    }

    /// Remote TLB flushes that were requested of the vCPUs so far.
    pub fn flushes_requested(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }
}
