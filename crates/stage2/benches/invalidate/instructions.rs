//! Instructions of what is done to the leaves of a range: for each page, the whole of the operation around it.

use std::process::ExitCode;

use afterimage_mmu::{Age, Blocking, SlotId, SpaceId, Spin, Zap};

use crate::compare::instructions::{self, Counted, UNITS};
use crate::machine::{WITNESSES, hvas, machine};
use crate::zaps::fill;

/// Without a clock: valgrind hides the kernel's, which needs no call.
type Machine = crate::machine::Machine<Spin>;

const COUNTED: [Counted; 1] = [Counted {
    title: "what is done to a page of many, flush included",
    all: &[
        ("invalidation: taken away", |pages| invalidate(&full(), pages, Zap::Unmap)),
        ("the same, writes logged", |pages| {
            let mmu = full();
            mmu.set_dirty_logging(SpaceId(0), SlotId(0), true).expect("the slot is there");
            fill(&mmu, 2 * UNITS);
            invalidate(&mmu, pages, Zap::Unmap);
        }),
        ("the same once more, nothing is there", |pages| {
            let mmu = full();
            invalidate(&mmu, 2 * UNITS, Zap::Unmap);
            invalidate(&mmu, pages, Zap::Unmap);
        }),
        ("invalidation: write-protected", |pages| invalidate(&full(), pages, Zap::WriteProtect)),
        ("aged", |pages| {
            full().age(hvas(0, pages), Age::Clear);
        }),
    ],
}];

fn invalidate(mmu: &Machine, pages: u64, zap: Zap) {
    drop(mmu.invalidate(hvas(0, pages), zap, Blocking::Allowed));
}

/// With as many pages as any run changes, so that what maps them is the same in each.
fn full() -> Machine {
    let (_, witness, barrier) = WITNESSES[1];
    let mmu = machine(witness, barrier);
    fill(&mmu, 2 * UNITS);
    mmu
}

pub(crate) fn child() -> Option<ExitCode> {
    instructions::child(&COUNTED)
}

pub(crate) fn count_all() {
    instructions::count_all(&COUNTED);
}
