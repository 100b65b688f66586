//! Whose instructions are counted, of an install, and of taking a page away again.

use std::process::ExitCode;

use afterimage_mmu::{Barrier, Gfn, GfnRange};

use crate::compare::instructions::{self, Counted, UNITS};
use crate::peers::{LockedX86, Multiarch, X86};
use crate::whole::{Locked, Whole};
use crate::{Map, Order, Ours, tables, timed};

/// Tables that are linked for the installs count with them.
const COUNTED: [Counted; 2] = [
    Counted {
        title: "an install, in sequence, one thread",
        all: &[
            ("x86_64, one writer", |installs| install(installs, &mut X86::new())),
            ("page_table_multiarch, one writer", |installs| install(installs, &mut Multiarch::new())),
            ("x86_64, mutex", |installs| install(installs, &mut LockedX86::new().mapper())),
            ("ours, bare", |installs| install(installs, &mut Ours::new(&tables()))),
            ("ours, intent, heavy barrier", |installs| {
                install(installs, &mut Whole::new(Barrier::Heavy).mapper());
            }),
            ("ours, intent, fences", |installs| {
                install(installs, &mut Whole::new(Barrier::Symmetric).mapper());
            }),
            ("ours, lock", |installs| install(installs, &mut Locked::new().mapper())),
        ],
    },
    Counted {
        title: "taking a page away, no flush",
        all: &[
            ("x86_64, one writer", |pages| full(X86::new()).unmap(pages)),
            ("page_table_multiarch, one writer", |pages| full(Multiarch::new()).unmap(pages)),
            ("ours, bare", |pages| {
                let tables = tables();
                full(Ours::new(&tables)).tables.zap(GfnRange::new(Gfn::new(0), Gfn::new(pages)));
            }),
        ],
    },
];

fn install(installs: u64, map: &mut impl Map) {
    let _ = timed(Order::Sequential, 0..installs, map);
}

/// With as many pages as any run takes away, so that what maps them is the same in each.
fn full<M: Map>(mut map: M) -> M {
    install(2 * UNITS, &mut map);
    map
}

pub(crate) fn child() -> Option<ExitCode> {
    instructions::child(&COUNTED)
}

pub(crate) fn count_all() {
    instructions::count_all(&COUNTED);
}
