//! A store's memory, as the kernel counts it. The only test of its process, so that nothing else moves the number.

use afterimage_memory::{Scratch, Store};
use afterimage_mmu::Pfn;

const FRAMES: u64 = 8 << 10;
/// What 28 classes in 4 shards may keep: less than 32 KiB, and a page begun.
const KEPT: u64 = 4 * 28 * (36 << 10);
const MIB: u64 = 1 << 20;

/// Bytes of this process that are resident.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("a number") * 4096
}

/// A frame of which the first `noise` bytes do not compress.
fn page(state: &mut u64, noise: usize) -> Vec<u8> {
    let mut page = vec![1; 4096];
    for word in page[..noise].as_chunks_mut::<8>().0 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *word = (*state ^ *state >> 29).to_le_bytes();
    }
    page
}

#[test]
fn memory_follows_what_is_stored_and_all_of_it_comes_back() {
    let (store, mut scratch) = (Store::new(FRAMES).expect("address space"), Scratch::new());
    let (before, mut state) = (resident(), 1u64);

    // Pages come and go, and what is typical of their size drifts: the worst for a heap.
    for noise in [4096, 300, 2000, 900, 3000] {
        for round in 0..3 * FRAMES {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let frame = Pfn::new((state >> 33) % FRAMES);
            if round % 3 == 0 {
                store.remove(frame, 1).expect("in range");
            } else {
                let page = page(&mut state, noise);
                store.put(frame, &page, &mut scratch).expect("room");
            }
        }
        let (stats, grown) = (store.stats(), resident().saturating_sub(before));
        // An eighth for slots, and what each class has not given back.
        let allowed = stats.payload_bytes + stats.payload_bytes / 8 + KEPT;
        assert!(stats.resident_bytes <= allowed, "noise {noise}: {stats:?}");
        assert!(grown <= stats.resident_bytes + 2 * MIB, "noise {noise}: {grown} bytes resident, {stats:?}");
        assert!(grown + 2 * MIB >= stats.resident_bytes, "noise {noise}: {grown} bytes resident, {stats:?}");
    }

    store.remove(Pfn::new(0), FRAMES).expect("in range");
    assert!(store.stats().resident_bytes <= KEPT);
    assert!(resident() <= before + KEPT + MIB, "{} bytes stay", resident().saturating_sub(before));
}
