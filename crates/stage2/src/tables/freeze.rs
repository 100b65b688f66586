//! Freezing every entry of a table, so that nobody installs in it: the first half of unlinking it.

use super::reach::TableRef;
use crate::format::{Entry, Format};
use crate::memory::TableMemory;
use crate::mutation::{self, Mutation};
use crate::sync::{AtomicU64, Ordering};

/// An entry kept a table from being frozen as a whole.
pub(super) struct Stopped {
    /// Its index; those before it are frozen.
    pub(super) at: usize,
}

impl<F: Format, M: TableMemory> TableRef<'_, F, M> {
    /// Freezes entry by entry, as long as `take` says yes to what the entry says, with every mark that was set by then.
    ///
    /// A table that is frozen as a whole stays as it is: an install that has found it loses its exchange.
    pub(super) fn freeze(self, mut take: impl FnMut(usize, Entry) -> bool) -> Result<(), Stopped> {
        for (index, entry) in self.entries().iter().enumerate() {
            let ordering = mutation::unless(Mutation::FreezeRelaxed, Ordering::Acquire);
            let mut raw = entry.load(ordering);
            loop {
                let said = F::decode(raw, self.level());
                if said == Entry::Frozen {
                    return Err(Stopped { at: index });
                }
                // Asked with the word that the exchange then takes: a mark that comes in between is another word.
                match entry.compare_exchange(raw, F::FROZEN, ordering, ordering) {
                    Ok(_) if take(index, said) => break,
                    Ok(_) => {
                        entry.store(raw, mutation::unless(Mutation::ThawRelaxed, Ordering::Release));
                        return Err(Stopped { at: index });
                    }
                    Err(now) => raw = now,
                }
            }
        }
        Ok(())
    }

    /// Gives the first `count` entries, which this thread froze, back as `word` says.
    pub(super) fn thaw(self, count: usize, word: impl Fn(usize) -> u64) {
        for (index, entry) in self.entries()[..count].iter().enumerate() {
            entry.store(word(index), mutation::unless(Mutation::ThawRelaxed, Ordering::Release));
        }
    }
}

/// Publishes what an entry says that this thread froze.
pub(super) fn publish(entry: &AtomicU64, raw: u64) {
    entry.store(raw, mutation::unless(Mutation::PublishRelaxed, Ordering::Release));
}

/// Gives back what this thread froze, should a flush in between end in a panic: a frozen entry has everyone else wait.
pub(super) struct Undo<F: FnMut()>(F);

impl<F: FnMut()> Undo<F> {
    pub(super) fn new(undo: F) -> Self {
        Self(undo)
    }

    /// There was no panic.
    pub(super) fn forget(self) {
        core::mem::forget(self);
    }
}

impl<F: FnMut()> Drop for Undo<F> {
    fn drop(&mut self) {
        if !mutation::active(Mutation::PanicStaysFrozen) {
            (self.0)();
        }
    }
}
