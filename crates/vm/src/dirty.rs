//! A set of frames of the managed memory: those that a guest has written.

use afterimage_mmu::Gfn;

/// The frames that a guest has written since the log was last read; of a KVM guest maybe some that it has only read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyFrames {
    words: Vec<u64>,
}

impl DirtyFrames {
    pub(crate) fn new(words: Vec<u64>) -> Self {
        Self { words }
    }

    /// The log as bits: frame `n` is bit `n % 64` of word `n / 64`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether `gfn` is in the log.
    pub fn contains(&self, gfn: Gfn) -> bool {
        let (word, bit) = (gfn.as_u64() / 64, gfn.as_u64() % 64);
        self.words.get(word as usize).is_some_and(|word| word >> bit & 1 == 1)
    }

    /// Number of frames in the log.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the log is empty.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The frames, in order.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| Gfn::new(index as u64 * 64 + bit))
        })
    }
}
