//! Random sequences of operations, against a model of what the guest must read.

use afterimage_memory::State;
use afterimage_uffd::Backing;
use proptest::prelude::*;

use crate::support::{Machine, Setup, Stamps, stamp};

const PAGES: u64 = 24;
const BUDGET: u64 = 12;
const BATCH: u64 = 4;

#[derive(Clone, Copy, Debug)]
enum Step {
    Read(u64),
    Write(u64, u64),
    Evict(u64, u64),
    Discard(u64, u64),
    Protect(u64, u64),
    Populate(u64, u64),
    Reclaim,
    Slot,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..PAGES, 1..=PAGES).prop_map(|(start, len)| (start, (start + len).min(PAGES)));
    prop_oneof![
        4 => (0..PAGES).prop_map(Step::Read),
        4 => (0..PAGES, 1..1000_u64).prop_map(|(page, word)| Step::Write(page, word)),
        2 => range().prop_map(|(start, end)| Step::Evict(start, end)),
        2 => range().prop_map(|(start, end)| Step::Discard(start, end)),
        1 => range().prop_map(|(start, end)| Step::Protect(start, end)),
        1 => range().prop_map(|(start, end)| Step::Populate(start, end)),
        1 => Just(Step::Reclaim),
        1 => Just(Step::Slot),
    ]
}

fn take(machine: &Machine, model: &mut [u64], step: Step) {
    match step {
        Step::Read(page) => assert_eq!(machine.reading(page).finish(), model[page as usize], "page {page}"),
        Step::Write(page, word) => {
            machine.write(page, word);
            model[page as usize] = word;
        }
        Step::Evict(start, end) => {
            machine.evict(machine.pages(start, end));
            assert!((start..end).all(|page| machine.state(page) != State::Resident));
        }
        Step::Discard(start, end) => {
            machine.discard(machine.pages(start, end));
            model[start as usize..end as usize].fill(0);
            assert!((start..end).all(|page| machine.state(page) == State::Zero));
        }
        Step::Protect(start, end) => {
            let check = |page: afterimage_mmu::Pfn, bytes: Option<&[u8]>| {
                let word =
                    bytes.map_or(0, |bytes| u64::from_ne_bytes(bytes[..8].try_into().expect("8 bytes")));
                assert_eq!(word, model[page.as_u64() as usize], "page {page} of the checkpoint");
            };
            machine.object.protect(machine.pages(start, end), check).expect("a checkpoint");
        }
        Step::Populate(start, end) => {
            let mut vcpu = machine.mmu.vcpu();
            machine.view.view.populate(&mut vcpu, machine.pages(start, end)).expect("populate");
        }
        Step::Reclaim => drop(machine.object.reclaim().expect("reclaim")),
        Step::Slot => {
            if machine.mmu.secondary().backing() == Backing::Anonymous {
                machine.evict(machine.all());
            }
            machine.delete_slot();
            machine.create_slot();
        }
    }
    let resident = (0..PAGES).filter(|page| machine.state(*page) == State::Resident).count() as u64;
    // An anonymous page is mapped a moment before it is counted as resident.
    assert!(resident <= BUDGET + BATCH);
}

fn run(backing: Backing, steps: &[Step]) {
    let source = Stamps::new(PAGES);
    let setup = Setup {
        budget: Some(BUDGET),
        batch: BATCH,
        uffds: 2,
        ..Setup::new("model", backing, PAGES).source(&source)
    };
    let Some(machine) = setup.start() else { return };
    let mut model: Vec<_> = (0..PAGES).map(stamp).collect();
    for step in steps {
        take(&machine, &mut model, *step);
    }
    for page in 0..PAGES {
        assert_eq!(machine.read(page), model[page as usize], "page {page} at the end");
    }
    assert!(machine.stats().peak_bytes <= (BUDGET + BATCH) * 4096);
    let frames = machine.evict(machine.all());
    assert!(frames <= BUDGET + BATCH);
    assert_eq!(machine.stats().resident_bytes, 0);
    machine.stop_clean();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 2_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn shared_memory_reads_as_the_model(steps in prop::collection::vec(step(), 1..60)) {
        run(Backing::Shared, &steps);
    }

    #[test]
    fn anonymous_memory_reads_as_the_model(steps in prop::collection::vec(step(), 1..60)) {
        run(Backing::Anonymous, &steps);
    }
}
