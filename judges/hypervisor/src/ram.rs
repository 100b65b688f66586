//! The host's memory: which frames are for what, and how to look into one.
//!
//! | host frames | what |
//! |---|---|
//! | from 16 MiB | the heap: tables too |
//! | from 64 MiB | [`guest_frame`]: the guest's own |
//! | from 96 MiB | [`MATRIX`] |
//! | from 128 MiB | [`STORM`] |
//! | from 1 GiB | [`GIB`]: behind pages of 1 GiB |

// UNSAFETY: memory by its address; what guests can write too is touched by atomics only.
#![expect(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use afterimage_mmu::{FRAME_BYTES, Gfn, Pfn};
use linked_list_allocator::LockedHeap;

use crate::guest::{self, CODE_OFFSET};

const HEAP: usize = 16 << 20;
const HEAP_BYTES: usize = 48 << 20;
const GUEST: u64 = 64 << 8;
/// Behind the pages of the matrix.
pub(crate) const MATRIX: Pfn = Pfn::new(96 << 8);
/// Behind the pages of the storm.
pub(crate) const STORM: Pfn = Pfn::new(128 << 8);
/// Behind pages of 1 GiB.
pub(crate) const GIB: Pfn = Pfn::new(1 << 18);

#[global_allocator]
static ALLOCATOR: LockedHeap = LockedHeap::empty();

/// Makes the heap, once, and fills the guest's own frames.
pub(crate) fn set_up() {
    // SAFETY: nobody else uses that memory, and this is called once.
    unsafe { ALLOCATOR.lock().init(core::ptr::with_exposed_provenance_mut(HEAP), HEAP_BYTES) };
    fill_guest_frames();
}

/// Writes the guest's own frames as they are at the start.
pub(crate) fn fill_guest_frames() {
    for number in 0..guest::SYSTEM_FRAMES {
        let gfn = Gfn::new(number);
        for (word, value) in words(guest_frame(gfn)).iter().zip(guest::frame(gfn)) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

/// The host's frame behind one of the guest's own.
pub(crate) fn guest_frame(gfn: Gfn) -> Pfn {
    Pfn::new(GUEST + gfn.as_u64())
}

/// The words of a frame that guests use.
pub(crate) fn words(pfn: Pfn) -> &'static [AtomicU64; 512] {
    assert!(pfn.as_u64() >= GUEST && pfn.as_u64() < GIB.as_u64() + 4096, "{pfn:?} is not the guests'");
    let at = core::ptr::with_exposed_provenance::<[AtomicU64; 512]>((pfn.as_u64() * FRAME_BYTES) as usize);
    // SAFETY: the memory is there (`main` says how much), mapped where it is, and only ever used through atomics.
    unsafe { &*at }
}

/// An entry of a table of [`HeapMemory`](afterimage_stage2::HeapMemory).
pub(crate) fn entry<'a>(entries: *const AtomicU64, index: usize) -> &'a AtomicU64 {
    // SAFETY: the caller has the table, and the index is within it; tables are atomics.
    unsafe { &*entries.add(index) }
}

/// Makes a frame say its own number, to who reads its first word and to who calls [`CODE_OFFSET`].
pub(crate) fn stamp(pfn: Pfn, with: u64) {
    let words = words(pfn);
    words[0].store(pfn.as_u64() | with, Ordering::SeqCst);
    set_code(words, pfn.as_u64() | with);
}

/// Code that returns `value`: `mov rax, value; ret`.
pub(crate) fn set_code(words: &[AtomicU64; 512], value: u64) {
    let at = CODE_OFFSET as usize / 8;
    words[at].store(0xb848 | value << 16, Ordering::SeqCst);
    words[at + 1].store(value >> 48 | 0xc3 << 16, Ordering::SeqCst);
}

/// The frame behind the matrix that holds `value` in its first word.
pub(crate) fn holding(value: u64) -> Option<Pfn> {
    let places = [(MATRIX, 1024), (Pfn::new(GIB.as_u64() + 0xa00), 512)];
    let mut found = places
        .into_iter()
        .flat_map(|(start, count)| (0..count).map(move |index| Pfn::new(start.as_u64() + index)))
        .filter(|pfn| words(*pfn)[0].load(Ordering::SeqCst) == value);
    let pfn = found.next();
    assert_eq!(found.next(), None, "what the guest wrote is in two places");
    pfn
}
