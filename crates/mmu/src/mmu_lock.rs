//! `mmu_lock` with the words it guards, and the witnesses it gives.

use core::fmt;

use crate::addr::GfnRange;
use crate::block::Block;
use crate::intent::Walking;
use crate::invalidation::{Begun, InvalidationError, Invalidations, SequenceScope};
use crate::lock::RawMmuLock;
use crate::platform::Platform;
use crate::ranges::Coverage;
use crate::snapshot::{Fresh, Snapshot, Stale};
use crate::sync::CachePadded;

/// Something whose life keeps the [`Invalidations`] still, so that a verdict on them holds as long as it lives.
///
/// Sealed: what may be a witness is decided by proof. `mmu_lock`, held for read or for write, keeps the words as they are. An
/// [`Intent`](crate::Intent) lets them move, but an invalidation of the announced frames waits for it before it zaps.
pub trait Witness: sealed::Sealed {
    /// The words that are kept still.
    fn invalidations(&self) -> &Invalidations;

    /// Whether it keeps a verdict on `block` true.
    #[inline]
    fn protects(&self, _block: Block) -> bool {
        true
    }

    /// The check that counts: whether nothing has gone stale since, and nothing can while the witness lives.
    ///
    /// # Panics
    /// If it belongs to another machine than the snapshot, or was announced for other frames: it would keep nothing true.
    #[inline]
    fn verify(&self, since: Snapshot<'_>) -> Result<Fresh<'_>, Stale> {
        assert!(
            core::ptr::eq(self.invalidations(), since.invalidations()),
            "a witness of another virtual machine"
        );
        assert!(self.protects(since.block()), "an intent of other frames");
        since.verify()
    }

    /// The right to follow links between tables while it lives.
    #[inline]
    fn walking(&self) -> Walking<'_> {
        Walking::new(self.invalidations().machine())
    }
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// The lock of one virtual machine's secondary MMU, and the invalidation words under it.
pub struct MmuLock<P: Platform> {
    raw: CachePadded<RawMmuLock<P>>,
    /// On lines of their own: faults only read them, and readers of the lock write its words all the time.
    invalidations: CachePadded<Invalidations>,
}

impl<P: Platform> fmt::Debug for MmuLock<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmuLock")
            .field("raw", &self.raw.0)
            .field("invalidations", &self.invalidations.0)
            .finish()
    }
}

impl<P: Platform> Default for MmuLock<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: Platform> MmuLock<P> {
    /// An unlocked lock with no invalidation active, one sequence for all, and one hull.
    pub fn new() -> Self {
        Self::with(SequenceScope::Global, Coverage::Hull)
    }

    /// An unlocked lock with no invalidation active.
    pub fn with(scope: SequenceScope, coverage: Coverage) -> Self {
        let invalidations = CachePadded(Invalidations::new(scope, coverage));
        Self { raw: CachePadded(RawMmuLock::new()), invalidations }
    }

    /// The words, for what needs no lock: [`Invalidations::snapshot`].
    #[inline]
    pub fn invalidations(&self) -> &Invalidations {
        &self.invalidations
    }

    /// Whether anyone holds the lock or waits for it. For assertions: the answer may be old when it arrives.
    pub fn is_locked(&self) -> bool {
        self.raw.is_locked_now()
    }

    /// Takes the lock for reading: to install translations.
    #[inline]
    pub fn read(&self) -> MmuReadGuard<'_, P> {
        self.raw.read();
        MmuReadGuard { lock: self }
    }

    /// Takes the lock for reading if that needs no waiting.
    #[inline]
    pub fn try_read(&self) -> Option<MmuReadGuard<'_, P>> {
        self.raw.try_read().then(|| MmuReadGuard { lock: self })
    }

    /// Takes the lock for writing: to invalidate.
    pub fn write(&self) -> MmuWriteGuard<'_, P> {
        self.raw.write();
        MmuWriteGuard { lock: self }
    }

    /// Takes the lock for writing if that needs no waiting.
    pub fn try_write(&self) -> Option<MmuWriteGuard<'_, P>> {
        self.raw.try_write().then(|| MmuWriteGuard { lock: self })
    }
}

/// `mmu_lock` held for read.
#[must_use = "the lock is given up at once"]
pub struct MmuReadGuard<'l, P: Platform> {
    lock: &'l MmuLock<P>,
}

impl<P: Platform> fmt::Debug for MmuReadGuard<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MmuReadGuard")
    }
}

impl<P: Platform> sealed::Sealed for MmuReadGuard<'_, P> {}

impl<P: Platform> Witness for MmuReadGuard<'_, P> {
    #[inline]
    fn invalidations(&self) -> &Invalidations {
        &self.lock.invalidations
    }
}

impl<P: Platform> MmuReadGuard<'_, P> {
    /// Whether a writer waits.
    pub fn is_contended(&self) -> bool {
        self.lock.raw.is_contended_by_reader()
    }

    /// Gives the lock to whoever waits and takes it again. What was verified before is void: a
    /// [`Fresh`](crate::Fresh) borrows the guard, so none can be alive here.
    pub fn bump(&mut self) {
        self.lock.raw.unlock_read();
        self.lock.raw.read();
    }
}

impl<P: Platform> Drop for MmuReadGuard<'_, P> {
    #[inline]
    fn drop(&mut self) {
        self.lock.raw.unlock_read();
    }
}

/// `mmu_lock` held for write.
#[must_use = "the lock is given up at once"]
pub struct MmuWriteGuard<'l, P: Platform> {
    lock: &'l MmuLock<P>,
}

impl<P: Platform> fmt::Debug for MmuWriteGuard<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MmuWriteGuard")
    }
}

impl<P: Platform> sealed::Sealed for MmuWriteGuard<'_, P> {}

impl<P: Platform> Witness for MmuWriteGuard<'_, P> {
    #[inline]
    fn invalidations(&self) -> &Invalidations {
        &self.lock.invalidations
    }
}

impl<P: Platform> MmuWriteGuard<'_, P> {
    /// Announces that an invalidation of `ranges` is active, before anything in them is zapped (KVM's `begin` and `add_range`
    /// in one).
    pub fn begin(
        &mut self,
        ranges: impl Iterator<Item = GfnRange> + Clone,
    ) -> Result<Begun, InvalidationError> {
        self.lock.invalidations.begin(ranges)
    }

    /// Announces that an invalidation is over; the change of the primary MMU is visible by now.
    ///
    /// # Panics
    /// If it was begun with another lock.
    pub fn end(&mut self, begun: Begun) {
        self.lock.invalidations.end(begun);
    }

    /// Whether a reader or another writer waits.
    pub fn is_contended(&self) -> bool {
        self.lock.raw.is_contended_by_writer()
    }

    /// Gives the lock to whoever waits and takes it again, behind them.
    pub fn bump(&mut self) {
        self.bump_with(|| {});
    }

    /// Like [`bump`](Self::bump), with something to do while the lock is not held.
    pub fn bump_with(&mut self, meanwhile: impl FnOnce()) {
        self.lock.raw.unlock_write();
        // Also when `meanwhile` panics: the guard is dropped next, and gives the lock up.
        let _again = TakeAgain(&self.lock.raw);
        meanwhile();
    }
}

struct TakeAgain<'l, P: Platform>(&'l RawMmuLock<P>);

impl<P: Platform> Drop for TakeAgain<'_, P> {
    fn drop(&mut self) {
        self.0.write();
    }
}

impl<P: Platform> Drop for MmuWriteGuard<'_, P> {
    fn drop(&mut self) {
        self.lock.raw.unlock_write();
    }
}
