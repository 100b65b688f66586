//! Counters: each vCPU counts its own faults on its own cache line; invalidators share theirs.

use core::fmt;

use crate::outcome::{FaultError, FaultOutcome, RetryPoint};
use crate::sync::{AtomicU64, Ordering};

/// A counter that only its owner changes, and anyone may read.
#[derive(Debug)]
struct Owned(AtomicU64);

impl Owned {
    fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Plain load and store: no other thread writes this word.
    #[inline]
    fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! fault_counters {
    ($($(#[$meta:meta])* $name:ident),+ $(,)?) => {
        /// What one vCPU counts.
        #[derive(Debug)]
        pub(crate) struct FaultCounters {
            retries: [Owned; RetryPoint::COUNT],
            $($name: Owned,)+
        }

        impl FaultCounters {
            pub(crate) fn new() -> Self {
                Self { retries: core::array::from_fn(|_| Owned::new()), $($name: Owned::new(),)+ }
            }

            pub(crate) fn add_to(&self, total: &mut FaultStats) {
                for (point, count) in self.retries.iter().enumerate() {
                    total.retries[point] += count.get();
                }
                $(total.$name += self.$name.get();)+
            }
        }

        /// Faults of a virtual machine, all vCPUs together.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct FaultStats {
            /// Retries, indexed by [`RetryPoint`].
            pub retries: [u64; RetryPoint::COUNT],
            $($(#[$meta])* pub $name: u64,)+
        }

        impl FaultStats {
            /// Adds another count to this one.
            pub fn add(&mut self, other: &Self) {
                for (mine, theirs) in self.retries.iter_mut().zip(other.retries) {
                    *mine += theirs;
                }
                $(self.$name += other.$name;)+
            }
        }
    };
}

fault_counters! {
    /// Faults that entered the path, retries included (KVM: `pf_taken`).
    taken,
    /// A translation was installed or upgraded under the witness (`pf_fixed`, the fast ones apart).
    fixed,
    /// Permissions were upgraded without lock or sequence (`pf_fast`).
    fast,
    /// Someone else had installed the translation (`pf_spurious`).
    spurious,
    /// The access goes to the emulator: MMIO, or a write to a read-only slot (`pf_emulate`).
    emulated,
    /// The frame is write-tracked.
    write_protected,
    /// Writes that had to wait until the vCPU's dirty ring was reset.
    ring_full,
    /// Faults that ended in another error, poison included.
    failed,
    /// Poisoned pages installed.
    poisoned,
    /// Pages that were resolved and thrown away again.
    wasted_fault_ins,
    /// Times that `mmu_lock` was not free at once.
    lock_contended,
    /// Nanoseconds waited for `mmu_lock` then.
    lock_wait_ns,
}

impl FaultStats {
    /// Retries at one point of the path.
    pub fn retries_at(&self, point: RetryPoint) -> u64 {
        self.retries[point as usize]
    }

    /// All retries.
    pub fn retried(&self) -> u64 {
        self.retries.iter().sum()
    }
}

impl FaultCounters {
    pub(crate) fn count<E, M>(&self, result: &Result<FaultOutcome, FaultError<E, M>>)
    where
        E: fmt::Debug + fmt::Display,
        M: fmt::Debug + fmt::Display,
    {
        self.taken.add(1);
        match result {
            Ok(FaultOutcome::Fixed) => self.fixed.add(1),
            Ok(FaultOutcome::FixedFast) => self.fast.add(1),
            Ok(FaultOutcome::Spurious) => self.spurious.add(1),
            Ok(FaultOutcome::Emulate(_)) => self.emulated.add(1),
            Ok(FaultOutcome::WriteProtected) => self.write_protected.add(1),
            Ok(FaultOutcome::Retry(retry)) => self.retries[retry.point as usize].add(1),
            Err(FaultError::DirtyRingFull(_)) => self.ring_full.add(1),
            Err(_) => self.failed.add(1),
        }
    }

    pub(crate) fn poison_installed(&self) {
        self.poisoned.add(1);
    }

    pub(crate) fn fault_in_wasted(&self) {
        self.wasted_fault_ins.add(1);
    }

    pub(crate) fn waited_for_lock(&self, ns: u64) {
        self.lock_contended.add(1);
        self.lock_wait_ns.add(ns);
    }
}

macro_rules! invalidation_counters {
    ($($(#[$meta:meta])* $name:ident),+ $(,)?) => {
        /// What invalidators count together. They already share a lock; faults touch none of this.
        #[derive(Debug)]
        pub(crate) struct InvalidationCounters {
            pub(crate) longest_ns: AtomicU64,
            $(pub(crate) $name: AtomicU64,)+
        }

        impl InvalidationCounters {
            pub(crate) fn new() -> Self {
                Self { longest_ns: AtomicU64::new(0), $($name: AtomicU64::new(0),)+ }
            }

            pub(crate) fn get(&self) -> InvalidationStats {
                InvalidationStats {
                    longest_ns: self.longest_ns.load(Ordering::Relaxed),
                    $($name: self.$name.load(Ordering::Relaxed),)+
                }
            }
        }

        /// Invalidations of a virtual machine.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct InvalidationStats {
            /// The longest time from begin to the end of an end, in nanoseconds.
            pub longest_ns: u64,
            $($(#[$meta])* pub $name: u64,)+
        }
    };
}

invalidation_counters! {
    /// Notifier events, also those that touched no slot.
    events,
    /// Invalidations that touched a slot, from begin to end.
    completed,
    /// Nanoseconds of all of those together.
    total_ns,
    /// Translations that zaps removed or write-protected, in frames.
    zapped_frames,
    /// Flushes: before a yield, or before begin returned.
    flushes,
    /// Those of them that were owed before a yield to somebody who waited for the lock.
    flushes_for_waiters,
    /// Those of them that were owed before a yield to the scheduler.
    flushes_for_scheduler,
    /// Times that all roots were replaced.
    reloads,
    /// Times that a zap gave up `mmu_lock`.
    yields,
    /// Those of them that were for somebody who waited for the lock. The others were for the scheduler, or to free tables.
    yields_to_waiters,
    /// Nanoseconds that invalidators waited for `mmu_lock`.
    lock_wait_ns,
    /// Invalidations that had to wait for a fault that was installing one of their frames.
    drains,
    /// Nanoseconds of those waits together.
    drain_wait_ns,
    /// Faults that had been retried too often and that an invalidation let go first.
    turns,
}

impl InvalidationCounters {
    pub(crate) fn finished(&self, ns: u64) {
        self.completed.fetch_add(1, Ordering::Relaxed);
        self.total_ns.fetch_add(ns, Ordering::Relaxed);
        self.longest_ns.fetch_max(ns, Ordering::Relaxed);
    }
}
