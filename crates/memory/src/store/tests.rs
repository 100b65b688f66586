//! The store as its callers see it.

use self::class::TRIM_BYTES;
use super::*;
use proptest::prelude::*;
use std::thread;

use crate::pattern::pattern_word;
use afterimage_mmu::Gfn;

/// The kinds of frames that the store tells apart.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Zeros,
    Packed,
    Raw,
}

fn page(kind: Kind, seed: u64) -> Vec<u8> {
    let noise = |index| pattern_word(seed, Gfn::new(index), 0).rotate_left(index as u32).to_le_bytes();
    match kind {
        Kind::Zeros => vec![0; FRAME_LEN],
        // From a few bytes up to almost a whole frame of noise: every class.
        Kind::Packed => {
            let mut page = vec![seed as u8 | 1; FRAME_LEN];
            for index in 0..(seed % 440) as usize {
                page[index * 8..][..8].copy_from_slice(&noise_of(seed, index));
            }
            page
        }
        Kind::Raw => (0..FRAME_LEN / 8).flat_map(|index| noise(index as u64)).collect::<Vec<u8>>(),
    }
}

fn noise_of(seed: u64, index: usize) -> [u8; 8] {
    (pattern_word(seed, Gfn::new(index as u64), 256) >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
}

fn store(frames: u64) -> (Store, Scratch) {
    (Store::new(frames).expect("address space"), Scratch::new())
}

/// Nothing is held, and no class keeps more than it may.
fn is_empty(store: &Store) -> bool {
    let stats = store.stats();
    let kept = (SHARDS * CLASSES * (TRIM_BYTES + arena::HOST_PAGE)) as u64;
    (stats.frames(), stats.payload_bytes) == (0, 0) && stats.resident_bytes <= kept
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Zeros), Just(Kind::Packed), Just(Kind::Raw)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Against a plain map, any sequence of moves.
    #[test]
    fn what_is_got_is_what_was_put(
        moves in proptest::collection::vec((0u64..16, 0u8..4, kinds(), 0u64..2000), 1..200)
    ) {
        let (store, mut scratch) = store(16);
        let mut model: [Option<Vec<u8>>; 16] = Default::default();
        let mut out = vec![0xaa; FRAME_LEN];
        for (frame, verb, kind, seed) in moves {
            let (pfn, slot) = (Pfn::new(frame), &mut model[frame as usize]);
            match verb {
                0 | 1 => {
                    let page = page(kind, seed);
                    store.put(pfn, &page, &mut scratch).expect("room");
                    *slot = Some(page);
                }
                2 => {
                    let removed = store.remove(pfn, 1).expect("in range");
                    prop_assert_eq!(removed == 1, slot.take().is_some());
                }
                _ => match (store.take(pfn, &mut out, &mut scratch), slot.take()) {
                    (Ok(Content::Zeros), Some(page)) => prop_assert!(is_zero(&page)),
                    (Ok(Content::Bytes), Some(page)) => prop_assert_eq!(&out, &page),
                    (Err(MemoryError::NotStored { .. }), None) => {}
                    (got, expected) => prop_assert!(false, "{:?}, stored: {}", got, expected.is_some()),
                },
            }
        }
        for (frame, page) in model.iter().enumerate() {
            let got = store.get(Pfn::new(frame as u64), &mut out, &mut scratch);
            match page {
                None => prop_assert!(got.is_err(), "never put or gone"),
                Some(page) if is_zero(page) => prop_assert_eq!(got.expect("zeros"), Content::Zeros),
                Some(page) => {
                    prop_assert_eq!(got.expect("bytes"), Content::Bytes);
                    prop_assert_eq!(&out, page);
                }
            }
        }
        prop_assert_eq!(store.stats().frames(), model.iter().flatten().count() as u64);
        store.remove(Pfn::new(0), 16).expect("in range");
        prop_assert!(is_empty(&store));
    }

    /// Any bytes at all, and any bit of what is stored of them.
    #[test]
    fn one_changed_bit_is_noticed(
        bytes in proptest::collection::vec(any::<u8>(), 1..FRAME_LEN), byte in any::<u16>(), other in any::<u8>()
    ) {
        let (store, mut scratch) = store(8);
        let mut page = bytes;
        page.resize(FRAME_LEN, other | 1);
        store.put(Pfn::new(5), &page, &mut scratch).expect("room");
        let mut out = vec![0; FRAME_LEN];
        prop_assert_eq!(store.get(Pfn::new(5), &mut out, &mut scratch).expect("stored"), Content::Bytes);
        prop_assert_eq!(&out, &page);
        prop_assert!(store.corrupt(Pfn::new(5), byte.into()));
        let error = store.take(Pfn::new(5), &mut out, &mut scratch).expect_err("corrupt");
        prop_assert!(matches!(error, MemoryError::CorruptStore { frame, .. } if frame == Pfn::new(5)), "{}", error);
        prop_assert!(store.holds(Pfn::new(5)), "an error removes nothing");
        prop_assert_eq!(store.stats().corrupt, 1);
    }
}

#[test]
fn every_byte_of_a_header_is_covered() {
    let (store, mut scratch) = store(4);
    for kind in [Kind::Packed, Kind::Raw] {
        for byte in 0..HEADER_BYTES + 1 {
            store.put(Pfn::new(1), &page(kind, 100), &mut scratch).expect("room");
            assert!(store.corrupt(Pfn::new(1), byte));
            let got = store.get(Pfn::new(1), &mut [0; FRAME_LEN], &mut scratch);
            assert!(matches!(got, Err(MemoryError::CorruptStore { .. })), "byte {byte}: {got:?}");
        }
    }
    store.put(Pfn::new(2), &page(Kind::Zeros, 0), &mut scratch).expect("room");
    assert!(!store.corrupt(Pfn::new(2), 0), "zeros have no bytes");
    assert_eq!(store.get(Pfn::new(2), &mut [1; FRAME_LEN], &mut scratch).expect("zeros"), Content::Zeros);
}

#[test]
fn damage_to_one_entry_spares_the_others() {
    // Frames of one shard and class; every byte of the header of the one that is to move, and of the one removed.
    for victim in [0, 36] {
        for byte in 0..HEADER_BYTES {
            let (store, mut scratch) = store(64);
            let frames = (0..10).map(|frame| Pfn::new(frame * SHARDS as u64));
            for frame in frames.clone() {
                store.put(frame, &page(Kind::Raw, frame.as_u64()), &mut scratch).expect("room");
            }
            assert!(store.corrupt(Pfn::new(victim), byte));
            store.remove(Pfn::new(0), 1).expect("in range");
            store.remove(Pfn::new(16), 1).expect("in range");
            let stored =
                |frame: u64| frame < 40 && frame.is_multiple_of(SHARDS as u64) && ![0, 16].contains(&frame);
            for frame in 0..64 {
                assert_eq!(store.holds(Pfn::new(frame)), stored(frame), "frame {frame}, byte {byte}");
            }
            for frame in frames.filter(|frame| ![0, 16].contains(&frame.as_u64())) {
                let mut out = vec![0; FRAME_LEN];
                match store.get(frame, &mut out, &mut scratch) {
                    Err(MemoryError::CorruptStore { .. }) => assert_eq!(frame.as_u64(), victim),
                    Ok(Content::Bytes) => assert_eq!(out, page(Kind::Raw, frame.as_u64())),
                    other => panic!("frame {frame}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn an_entry_is_never_taken_for_another_frames() {
    let (store, mut scratch) = store(8);
    store.put(Pfn::new(1), &page(Kind::Raw, 1), &mut scratch).expect("room");
    store.put(Pfn::new(5), &page(Kind::Raw, 5), &mut scratch).expect("room");
    // The two share a shard: a flipped bit in the index makes one lead to the other.
    store.words[1].store(store.words[5].load(Relaxed), Relaxed);
    let got = store.get(Pfn::new(1), &mut [0; FRAME_LEN], &mut scratch);
    let found = Pfn::new(5);
    assert!(
        matches!(got, Err(MemoryError::CorruptStore { damage: Damage::Owner { found: owner }, .. }) if owner == found)
    );
    store.words[1].store(u32::MAX, Relaxed);
    let got = store.get(Pfn::new(1), &mut [0; FRAME_LEN], &mut scratch);
    assert!(matches!(got, Err(MemoryError::CorruptStore { damage: Damage::Slot { .. }, .. })));
    store.remove(Pfn::new(1), 1).expect("in range");
    assert_eq!(store.get(found, &mut [0; FRAME_LEN], &mut scratch).expect("spared"), Content::Bytes);
}

#[test]
fn a_flipped_bit_of_the_index_does_not_make_zeros() {
    let (store, mut scratch) = store(8);
    store.put(Pfn::new(1), &page(Kind::Raw, 1), &mut scratch).expect("room");
    for honest in [EMPTY, ZEROS, store.words[1].load(Relaxed)] {
        for bit in 0..32 {
            store.words[1].store(honest ^ 1 << bit, Relaxed);
            let got = store.get(Pfn::new(1), &mut [0; FRAME_LEN], &mut scratch);
            // What names the entry of this very frame after all is no damage.
            let right = matches!(State::of(honest ^ 1 << bit), State::Entry { class: RAW, slot: 0 });
            assert!(
                got.is_err() || right && got.as_ref().is_ok_and(|&got| got == Content::Bytes),
                "{bit}: {got:?}"
            );
        }
    }
}

#[test]
fn kinds_and_bytes_are_accounted() {
    let (store, mut scratch) = store(64);
    assert_eq!(store.stats(), StoreStats { index_bytes: 256, ..StoreStats::default() });
    for frame in 0..30 {
        let kind = [Kind::Zeros, Kind::Packed, Kind::Raw][frame as usize % 3];
        store.put(Pfn::new(frame), &page(kind, 100), &mut scratch).expect("room");
    }
    let stats = store.stats();
    assert_eq!((stats.zero_frames, stats.packed_frames, stats.raw_frames, stats.puts), (10, 10, 10, 30));
    let packed = lz4_flex::block::compress(&page(Kind::Packed, 100)).len() as u64;
    assert_eq!(stats.payload_bytes, 10 * (packed + 4096));
    assert!(stats.resident_bytes >= stats.payload_bytes && stats.resident_bytes < 2 * stats.payload_bytes);
    assert_eq!(store.remove(Pfn::new(0), 64).expect("in range"), 30);
    let stats = store.stats();
    assert!(is_empty(&store), "{stats:?}");
    assert_eq!(stats.held_bytes(), stats.resident_bytes + 256);
}

#[test]
fn a_huge_page_is_512_frames_of_all_kinds() {
    let (store, mut scratch) = store(1024);
    let kinds = [Kind::Zeros, Kind::Zeros, Kind::Packed, Kind::Raw, Kind::Zeros];
    let huge: Vec<u8> = (0..512).flat_map(|index| page(kinds[index % 5], index as u64)).collect();
    store.put(Pfn::new(512), &huge, &mut scratch).expect("room");
    let mut out = vec![0xaa; huge.len()];
    assert_eq!(store.get(Pfn::new(512), &mut out, &mut scratch).expect("stored"), Content::Bytes);
    assert!(out == huge);
    assert_eq!(
        store.get(Pfn::new(512), &mut out[..FRAME_LEN], &mut scratch).expect("one of them"),
        Content::Zeros
    );
    assert!(store.corrupt(Pfn::new(514), 50));
    let error = store.take(Pfn::new(512), &mut out, &mut scratch).expect_err("one frame is corrupt");
    assert!(
        error.to_string().starts_with("the stored bytes of frame 0x202 are corrupt: its checksum is 0x"),
        "{error}"
    );
    store.put(Pfn::new(512), &vec![0; huge.len()], &mut scratch).expect("room");
    assert_eq!(store.take(Pfn::new(512), &mut out, &mut scratch).expect("stored"), Content::Zeros);
    let error = store.take(Pfn::new(512), &mut out, &mut scratch).expect_err("taken");
    assert!(matches!(error, MemoryError::NotStored { frame } if frame == Pfn::new(512)));
}

#[test]
fn bad_ranges_are_errors() {
    let (store, mut scratch) = store(8);
    let mut out = vec![0; 2 * FRAME_LEN];
    assert!(matches!(store.put(Pfn::new(7), &out, &mut scratch), Err(MemoryError::OutOfRange { .. })));
    assert!(matches!(store.put(Pfn::new(0), &out[..100], &mut scratch), Err(MemoryError::PageBytes { .. })));
    assert!(matches!(
        store.get(Pfn::new(u64::MAX), &mut out, &mut scratch),
        Err(MemoryError::OutOfRange { .. })
    ));
    assert!(matches!(store.remove(Pfn::new(1), u64::MAX), Err(MemoryError::OutOfRange { .. })));
    assert!(!store.holds(Pfn::new(8)));
    assert!(matches!(Store::new(MAX_FRAMES + 1), Err(MemoryError::StoreTooLarge { .. })));
}

#[test]
fn a_full_store_stores_nothing_of_the_page_and_says_so() {
    let (mut store, mut scratch) = store(512);
    store.arena = Arena::reserve(SHARDS as u32, u64::MAX).expect("4 MiB");
    // 4 shards with one chunk each, all of them for frames that do not compress: there is room for more of those.
    let huge: Vec<u8> = (0..256).flat_map(|index| page(Kind::Raw, index)).collect();
    store.put(Pfn::new(0), &huge, &mut scratch).expect("room");
    let kinds = [Kind::Zeros, Kind::Raw, Kind::Zeros, Kind::Raw, Kind::Packed, Kind::Zeros];
    let small: Vec<u8> = kinds.iter().flat_map(|&kind| page(kind, 100)).collect();
    let error = store.put(Pfn::new(256), &small, &mut scratch).expect_err("no chunk for another class");
    assert!(matches!(error, MemoryError::StoreFull { .. }), "{error}");
    assert!((256..262).all(|frame| !store.holds(Pfn::new(frame))));
    assert_eq!((store.stats().frames(), store.stats().puts), (256, 261), "it is the fifth frame that fails");
}

#[test]
fn entries_take_no_more_memory_than_the_limit() {
    const LIMIT: u64 = 256 << 10;
    const FRAMES: u64 = 512;
    let (store, mut scratch) = (Store::with_limit(FRAMES, LIMIT).expect("address space"), Scratch::new());
    // The lists of chunks are not entries.
    let most = LIMIT + (SHARDS * CLASSES * 256) as u64;
    let (mut refused, mut state) = (0, 1u64);
    for _ in 0..5_000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let (frame, choice) = (Pfn::new(state >> 33 & (FRAMES - 1)), state >> 60);
        let kind = [Kind::Packed, Kind::Raw, Kind::Zeros][(choice % 3) as usize];
        if choice > 12 {
            store.remove(frame, 1).expect("in range");
            assert!(!store.is_full(), "something has left");
        } else if let Err(error) = store.put(frame, &page(kind, state >> 40), &mut scratch) {
            assert!(matches!(error, MemoryError::StoreFull { bytes: LIMIT, .. }), "{error}");
            assert!(store.is_full() && !store.holds(frame));
            refused += 1;
        }
        assert!(store.stats().resident_bytes <= most, "{:?}", store.stats());
    }
    assert!(refused > 100 && store.stats().frames() > 20, "{refused} refused, {:?}", store.stats());
    store.remove(Pfn::new(0), FRAMES).expect("in range");
    // What classes keep of those entries is in nobody's way.
    for frame in 0..LIMIT / (FRAME_LEN + 2 * arena::HOST_PAGE) as u64 {
        store.put(Pfn::new(frame), &page(Kind::Raw, frame), &mut scratch).expect("room");
    }
}

#[test]
fn pages_of_zeros_need_no_room() {
    let (store, mut scratch) = (Store::with_limit(8, 0).expect("address space"), Scratch::new());
    store.put(Pfn::new(0), &page(Kind::Zeros, 0), &mut scratch).expect("zeros");
    assert!(!store.is_full());
    let mixed = [page(Kind::Zeros, 0), page(Kind::Packed, 9)].concat();
    assert!(matches!(store.put(Pfn::new(2), &mixed, &mut scratch), Err(MemoryError::StoreFull { .. })));
    assert!(store.is_full() && !store.holds(Pfn::new(2)), "none of a page that does not go in whole");
    assert!(store.holds(Pfn::new(0)));
}

/// Four threads put, get and take frames of their own, which share shards and classes: entries move all the time.
#[test]
fn frames_of_different_threads_do_not_disturb_each_other() {
    const EACH: u64 = 64;
    let (store, _) = store(4 * EACH);
    thread::scope(|scope| {
        for thread in 0..4 {
            let store = &store;
            scope.spawn(move || {
                let (mut scratch, mut out) = (Scratch::new(), vec![0; FRAME_LEN]);
                let mut held = vec![None; EACH as usize];
                for round in 0..2500u64 {
                    let choice = pattern_word(thread, Gfn::new(round), 0) >> 33;
                    let index = (choice % EACH) as usize;
                    // Neighbouring frames belong to different threads.
                    let frame = Pfn::new(index as u64 * 4 + (thread + index as u64) % 4);
                    if let Some((kind, seed)) = held[index].take() {
                        let got = store.get(frame, &mut out, &mut scratch).expect("stored");
                        let expected = page(kind, seed);
                        assert_eq!(got == Content::Zeros, is_zero(&expected));
                        assert!(got == Content::Zeros || out == expected, "thread {thread}, frame {frame}");
                        assert_eq!(store.remove(frame, 1).expect("in range"), 1);
                    } else {
                        let kind =
                            [Kind::Zeros, Kind::Packed, Kind::Packed, Kind::Raw][choice as usize / 64 % 4];
                        store.put(frame, &page(kind, choice), &mut scratch).expect("room");
                        held[index] = Some((kind, choice));
                    }
                }
            });
        }
    });
    store.remove(Pfn::new(0), 4 * EACH).expect("in range");
    assert!(is_empty(&store), "{store:?}");
}

/// Three threads break the rule of one caller a frame: what they see is still a whole page of that frame, or none.
#[test]
fn two_callers_of_one_frame_see_whole_pages() {
    let (store, _) = store(8);
    // The last word of the page is the frame; all others are the same.
    let stamped = |frame: u64, kind: Kind, seed| {
        let mut page = page(kind, seed);
        page[FRAME_LEN - 8..].copy_from_slice(&frame.to_le_bytes());
        page
    };
    let pages = |frame| {
        [stamped(frame, Kind::Raw, 1), stamped(frame, Kind::Packed, 30), stamped(frame, Kind::Packed, 300)]
    };
    thread::scope(|scope| {
        for thread in 0..3 {
            let store = &store;
            scope.spawn(move || {
                let (mut scratch, mut out) = (Scratch::new(), vec![0; FRAME_LEN]);
                let pages = [pages(0), pages(4)];
                for round in 0..6_000u64 {
                    let choice = (pattern_word(thread, Gfn::new(round), 0) >> 33) as usize;
                    let (index, frame) = (choice % 2, Pfn::new(choice as u64 % 2 * 4));
                    match choice / 2 % 8 {
                        0..3 => store.put(frame, &pages[index][choice / 16 % 3], &mut scratch).expect("room"),
                        3 => store.put(frame, &[0; FRAME_LEN], &mut scratch).expect("room"),
                        4 => drop(store.remove(frame, 1).expect("in range")),
                        _ => match store.get(frame, &mut out, &mut scratch) {
                            Ok(Content::Bytes) => assert!(pages[index].contains(&out), "frame {frame}"),
                            Ok(Content::Zeros) | Err(MemoryError::NotStored { .. }) => {}
                            Err(error) => panic!("{error}"),
                        },
                    }
                }
            });
        }
    });
    store.remove(Pfn::new(0), 8).expect("in range");
    assert!(is_empty(&store), "{store:?}");
}
