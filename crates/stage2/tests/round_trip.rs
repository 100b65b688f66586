//! What is encoded is decoded as the same, in every format, and no word at all makes a decoder lie.
#![cfg(not(shuttle))]

use afterimage_mmu::{Level, PageSize, Pfn};
use afterimage_stage2::{
    Entry, Ept, Execute, Format, Leaf, MMIO_GENERATION_BITS, MemoryType, Npt, Refused, Sv39x4, Sv48x4, Vmsa,
    Writable,
};
use proptest::prelude::*;

fn level(number: u8) -> Level {
    Level::new(number).expect("tests ask for levels from 1 to 5")
}

fn leaves() -> impl Strategy<Value = Leaf> {
    let size = prop_oneof![Just(PageSize::Size4K), Just(PageSize::Size2M), Just(PageSize::Size1G)];
    let writable = prop_oneof![
        Just(Writable::Never),
        Just(Writable::HostOnly),
        Just(Writable::Protected),
        Just(Writable::Clean),
        Just(Writable::Dirty)
    ];
    let execute = prop_oneof![
        Just(Execute::Never),
        Just(Execute::Supervisor),
        Just(Execute::User),
        Just(Execute::Always)
    ];
    let memory =
        prop_oneof![Just(MemoryType::WriteBack), Just(MemoryType::Uncached), Just(MemoryType::Device)];
    (0..1_u64 << 48, size, writable, execute, memory, any::<bool>()).prop_map(
        |(frame, size, writable, execute, memory, accessed)| {
            // Few random frames are aligned, and few reach far: make most of them so.
            let frame = if frame % 8 == 0 { frame } else { (frame >> 14) & !(size.frames() - 1) };
            Leaf { pfn: Pfn::new(frame), size, writable, execute, memory, accessed }
        },
    )
}

/// The leaf comes back as it was, or is refused for a reason that holds.
fn check_leaf<F: Format>(leaf: Leaf) {
    match F::encode_leaf(leaf) {
        Ok(raw) => {
            let mut expected = leaf;
            if !F::HAS_DIRTY && leaf.writable == Writable::Clean {
                expected.writable = Writable::Dirty;
            }
            assert_eq!(F::decode(raw, leaf.size.level()), Entry::Leaf(expected), "{}: {raw:#x}", F::NAME);
            assert_ne!(raw, F::ABSENT);
            assert_ne!(raw, F::FROZEN);
            let others = (1..=F::ROOT_LEVEL.number()).filter(|number| level(*number) != leaf.size.level());
            for number in others {
                // At another level the same word is no leaf of the same size.
                if let Entry::Leaf(other) = F::decode(raw, level(number)) {
                    assert_eq!(other.size.level(), level(number));
                }
            }
        }
        Err(Refused::Misaligned { pfn, size }) => assert_ne!(pfn.as_u64() % size.frames(), 0),
        Err(Refused::OutOfReach { pfn, bits }) => {
            assert_eq!(bits, F::PFN_BITS);
            assert_ne!(pfn.as_u64() >> bits, 0);
        }
        Err(Refused::NoSuchSize(size)) => assert!(size > F::LARGEST_LEAF),
        Err(Refused::SplitExecute(execute)) => {
            assert!(matches!(execute, Execute::Supervisor | Execute::User));
        }
        Err(other) => panic!("{other}"),
    }
}

/// A word is not ours, or it is what we would write for what it says (marks of hardware and of tables aside).
fn check_word<F: Format>(raw: u64) {
    for number in 1..=F::ROOT_LEVEL.number() {
        let child = match F::decode(raw, level(number)) {
            Entry::Table(child) => Some(child),
            _ => None,
        };
        assert_eq!(F::child(raw, level(number)), child, "{}: {raw:#x} at level {number}", F::NAME);
        match F::decode(raw, level(number)) {
            Entry::Absent => assert_eq!(raw, F::ABSENT),
            Entry::Frozen => assert_eq!(raw, F::FROZEN),
            Entry::Mmio(generation) => assert_eq!(F::encode_mmio(generation), Some(raw)),
            Entry::Table(child) => {
                assert!(number > 1);
                let word = F::encode_table(child).expect("a decoded frame fits");
                assert_eq!(F::decode(word, level(number)), Entry::Table(child));
            }
            Entry::Leaf(leaf) => {
                assert_eq!(leaf.size.level().number(), number);
                assert!(leaf.size <= F::LARGEST_LEAF);
                let word = F::encode_leaf(leaf).expect("a decoded leaf can be encoded");
                assert_eq!(F::decode(word, level(number)), Entry::Leaf(leaf));
            }
            Entry::Foreign => {}
        }
    }
}

fn check_table<F: Format>(child: Pfn) {
    let fits = child.as_u64() >> F::PFN_BITS == 0;
    match F::encode_table(child) {
        Ok(raw) => {
            assert!(fits);
            for number in 2..=F::ROOT_LEVEL.number() {
                assert_eq!(F::decode(raw, level(number)), Entry::Table(child));
            }
        }
        Err(refused) => {
            assert!(!fits);
            assert_eq!(refused, Refused::OutOfReach { pfn: child, bits: F::PFN_BITS });
        }
    }
}

fn check_mmio<F: Format>(generation: u64) {
    if let Some(raw) = F::encode_mmio(generation) {
        assert_eq!(generation >> MMIO_GENERATION_BITS, 0);
        assert_eq!(F::decode(raw, level(1)), Entry::Mmio(generation));
    }
}

macro_rules! every_format {
    ($check:ident, $value:expr) => {
        $check::<Ept<4, 0>>($value);
        $check::<Ept<4, 1>>($value);
        $check::<Ept<4, 2>>($value);
        $check::<Ept<5, 3>>($value);
        $check::<Npt<4>>($value);
        $check::<Npt<5>>($value);
        $check::<Vmsa<34>>($value);
        $check::<Vmsa<40>>($value);
        $check::<Vmsa<48>>($value);
        $check::<Sv39x4>($value);
        $check::<Sv48x4>($value);
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_leaf_comes_back_as_it_was(leaf in leaves()) {
        every_format!(check_leaf, leaf);
    }

    #[test]
    fn any_word_is_read_as_what_we_would_write(raw in any::<u64>(), sparse in any::<u64>()) {
        every_format!(check_word, raw);
        every_format!(check_word, raw & sparse);
        // Words near to ours: an address and a few low and high bits.
        every_format!(check_word, (raw & 0x03ff_ffff_ffe0_0000) | (sparse & 0x0180_0000_0000_0fff));
        every_format!(check_word, sparse & 0xc1f8_0000_0000_0fff);
    }

    #[test]
    fn a_link_comes_back_as_it_was(frame in 0..1_u64 << 46) {
        every_format!(check_table, Pfn::new(frame));
        every_format!(check_table, Pfn::new(frame >> 8));
    }

    #[test]
    fn a_generation_comes_back_or_is_not_cached(generation in 0..1_u64 << 41) {
        every_format!(check_mmio, generation);
    }
}

#[test]
fn only_x86_caches_mmio() {
    assert!(Ept::<4, 1>::encode_mmio(0).is_some());
    assert!(Npt::<4>::encode_mmio(0).is_some());
    assert!(Vmsa::<40>::encode_mmio(0).is_none());
    assert!(Sv39x4::encode_mmio(0).is_none());
}
