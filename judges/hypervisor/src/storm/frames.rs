//! The frames behind the guests' pages: what one says when it is a page, and when it is nobody's.

use core::sync::atomic::{AtomicU64, Ordering};

use afterimage_mmu::Pfn;

use super::stale;
use crate::boot::MAX_CPUS;
use crate::guest::{self, COUNT_OFFSET};
use crate::ram;

/// What a page says whose it is with.
pub(super) const TAG: u64 = 0x7a67_0000_0000_0000;
/// What fills a frame that is nobody's.
pub(super) const POISON: u64 = 0xdead_dead_dead_dead;

/// The words of a page that are used: its tag, the counts, the code.
pub(super) fn used(pfn: Pfn) -> impl Iterator<Item = &'static AtomicU64> {
    let (tag, counts, code) = (0..1, COUNT_OFFSET as usize / 8, guest::CODE_OFFSET as usize / 8);
    let words = ram::words(pfn);
    tag.chain(counts..counts + MAX_CPUS).chain(code..code + 2).map(|word| &words[word])
}

/// Makes a frame page number `page`.
pub(super) fn fill(pfn: Pfn, page: u64) {
    used(pfn).for_each(|word| word.store(0, Ordering::Relaxed));
    let words = ram::words(pfn);
    words[0].store(TAG ^ page, Ordering::Relaxed);
    ram::set_code(words, page);
}

pub(super) fn poison(pfn: Pfn) {
    used(pfn).for_each(|word| word.store(POISON, Ordering::Relaxed));
    ram::set_code(ram::words(pfn), POISON);
}

/// Copies a page, and leaves poison.
pub(super) fn move_page(from: Pfn, to: Pfn) {
    if let Some(word) = poison_is_gone(to) {
        stale(format_args!("word {word} of {to:?} was written while it was nobody's"));
    }
    for (old, new) in used(from).zip(used(to)) {
        new.store(old.load(Ordering::Relaxed), Ordering::Relaxed);
    }
    poison(from);
}

/// The word of a poisoned frame, where guests write, that is not as it was left.
pub(super) fn poison_is_gone(pfn: Pfn) -> Option<usize> {
    let first = COUNT_OFFSET as usize / 8;
    (first..first + MAX_CPUS).find(|word| ram::words(pfn)[*word].load(Ordering::Relaxed) != POISON)
}
