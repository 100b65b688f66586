//! The accesses that are judged, and what the crate says of each. This file is all that knows the tables.
//!
//! Every access has an entry of its own, so that the marks in it are of that access alone.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_mmu::{Access, Found, Gfn, Level, Mapped, PageSize, Pfn};
use afterimage_stage2::{
    ENTRIES, Entry, Execute, Format, HeapMemory, Leaf, MemoryType, TableCache, TableMemory, Tables,
    Translation, Writable,
};
use anyhow::{Context, Result, bail, ensure};

use crate::image::{FRAMES, GUEST_CODE, Image, RECORD, RECORDS, TABLE_PAGES, TABLES};
use crate::machine::Machine;
use crate::memory::ImageMemory;

/// Where the guest's code is for the guest.
const CODE: Gfn = Gfn::new(0x10);
/// The frames that are touched behind leaves of 4 KiB, 2 MiB and 1 GiB, in the image's page of 2 MiB.
const INSIDE: [u64; 3] = [0x11, 0x155, 0x1aa];
/// What a guest reads in a touched frame, but for the frame's own number.
const STAMP: u64 = 0x5eed_0000_0000_0000;
const WRITTEN: u64 = 0xd1d1_d1d1_d1d1_d1d1;
/// Where in a frame the code is that a guest calls.
const CODE_OFFSET: u64 = 16;
const FULL: Leaf = Leaf {
    pfn: Pfn::new(0),
    size: PageSize::Size4K,
    writable: Writable::Dirty,
    execute: Execute::Always,
    memory: MemoryType::WriteBack,
    accessed: true,
};

/// Whether the hardware sets the accessed and dirty marks, or faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marks {
    Set,
    Left,
}

/// What the entry is that an access meets.
#[derive(Clone, Copy, Debug)]
enum What {
    Leaf(Leaf),
    Absent,
    /// At the level of pages of this size.
    Frozen(PageSize),
}

/// One access.
#[derive(Clone, Copy, Debug)]
struct Case {
    gfn: Gfn,
    access: Access,
    what: What,
    /// The frame that is looked at.
    behind: Pfn,
}

/// How an access came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// Stopped for want of an entry, at this level of ours if the hardware says so.
    Absent(Option<Level>),
    /// Stopped by an entry that forbids it.
    Forbidden(Option<Level>),
    /// Stopped by a leaf that was not used before.
    Unused(Option<Level>),
}

/// What the machine says of one access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    pub(crate) outcome: Outcome,
    /// The access that the hardware names, and its address. Of accesses that were stopped.
    pub(crate) stopped: Option<(Access, u64)>,
}

struct Filled<F: Format, M: TableMemory> {
    memory: M,
    tables: Tables<F, M>,
    cache: TableCache<M>,
}

impl<F: Format, M: TableMemory> Filled<F, M> {
    fn new(memory: M) -> Result<Self> {
        let tables = Tables::new(memory.clone()).context("no room for a root")?;
        Ok(Self { memory, tables, cache: TableCache::default() })
    }

    fn map(&mut self, gfn: Gfn, leaf: Leaf) -> Result<()> {
        ensure!(self.tables.top_up(&mut self.cache), "no room for tables");
        let mapped = self.tables.map(gfn, leaf, &mut self.cache)?;
        ensure!(mapped == Mapped::Fixed, "{gfn:?} was mapped before");
        Ok(())
    }

    fn entry(&self, gfn: Gfn) -> Entry {
        self.tables.walk(gfn).entry
    }
}

impl<F: Format> Filled<F, ImageMemory> {
    /// The word of `gfn` in a table of `level`.
    fn word(&self, gfn: Gfn, level: Level) -> &AtomicU64 {
        let (mut here, mut table, mut entries) = (F::ROOT_LEVEL, self.tables.root(), F::ROOT_PAGES * ENTRIES);
        loop {
            let index = (gfn.as_u64() / here.frames() % entries as u64) as usize;
            let word = self.memory.entry(table, index);
            if here == level {
                return word;
            }
            table = F::child(word.load(Ordering::Relaxed), here).expect("the table is linked");
            here = Level::new(here.number() - 1).expect("a table below has a level");
            entries = ENTRIES;
        }
    }

    /// Turns bits of a leaf over.
    fn turn_over(&self, gfn: Gfn, bits: u64) {
        self.word(gfn, self.tables.walk(gfn).level).fetch_xor(bits, Ordering::Relaxed);
    }
}

/// Judges format `F` on `machine`; how many accesses were compared.
pub(crate) fn judge<F: Format>(machine: &impl Machine, marks: Marks) -> Result<usize> {
    compare_all::<F>(machine, marks, 0)
}

/// Whether the judge is worth anything: with any of these bits turned over in every leaf, it must find fault.
pub(crate) fn must_notice<F: Format>(machine: &impl Machine, bits: &[u64]) -> Result<()> {
    for bit in bits {
        if compare_all::<F>(machine, Marks::Set, *bit).is_ok() {
            bail!("{}: nobody noticed that {bit:#x} was wrong in every leaf", F::NAME);
        }
    }
    println!("  {}: that a bit is wrong in every leaf was noticed, {} times", F::NAME, bits.len());
    Ok(())
}

/// `wrong`: bits that are turned over in every leaf that the machine gets to see.
fn compare_all<F: Format>(machine: &impl Machine, marks: Marks, wrong: u64) -> Result<usize> {
    let mut image = Image::new(machine.base(), &machine.program()?);
    let memory = ImageMemory::new(image.pfn(TABLES), TABLE_PAGES);
    let mut real = Filled::<F, _>::new(memory.clone())?;
    let mut twin = Filled::<F, _>::new(HeapMemory::default())?;
    let code = Leaf { pfn: image.pfn(GUEST_CODE), ..FULL };
    real.map(CODE, code)?;
    twin.map(CODE, code)?;
    let cases = cases::<F>(&image, machine.address_bits::<F>());
    for case in &cases {
        match case.what {
            What::Leaf(leaf) => {
                real.map(case.gfn, leaf)?;
                twin.map(case.gfn, leaf)?;
            }
            What::Frozen(size) => {
                real.map(case.gfn, Leaf { pfn: leaf_frame(&image, size), size, ..FULL })?;
                real.word(case.gfn, size.level()).store(F::FROZEN, Ordering::Relaxed);
            }
            What::Absent => {}
        }
    }
    for case in cases.iter().filter(|case| matches!(case.what, What::Leaf(_))) {
        real.turn_over(case.gfn, wrong);
    }
    let before = cases.iter().map(|case| twin.entry(case.gfn)).collect::<Vec<_>>();

    for inside in INSIDE {
        let pfn = image.pfn(FRAMES + inside * 4096);
        image.put(FRAMES + inside * 4096, [stamp(pfn), 0, machine.returning(code_value(inside))]);
    }
    let words = memory.words().iter().map(|word| word.load(Ordering::Relaxed));
    image.put(TABLES, words.collect::<Vec<_>>());
    for (index, case) in cases.iter().enumerate() {
        let inside = if case.access == Access::EXEC { CODE_OFFSET } else { 0 };
        let kind = [Access::READ, Access::WRITE, Access::EXEC].iter().position(|kind| *kind == case.access);
        image.put(
            RECORDS + (index * RECORD * 8) as u64,
            [
                case.gfn.gpa().as_u64() + inside,
                kind.expect("one of three") as u64,
                case.behind.as_u64() << 12,
                WRITTEN,
                0,
                0,
                0,
                0,
                0,
                stamp(case.behind),
            ],
        );
    }
    let record_bytes = (cases.len() * RECORD * 8) as u64;
    let table_bytes = (memory.used() * 4096) as u64;
    ensure!(RECORDS + record_bytes <= TABLES, "more records than there is room for");
    let (root, control) = machine.registers::<F>(real.tables.root(), marks);
    let code_at = CODE.gpa().as_u64();
    let base = image.base;
    image.put_parameters([
        cases.len() as u64,
        root,
        control,
        code_at,
        base + RECORDS,
        record_bytes,
        base + TABLES,
        table_bytes,
    ]);

    let sent = machine.run(&image)?;
    ensure!(
        sent.len() as u64 == record_bytes + table_bytes,
        "the machine sent {} bytes, not {}: {:?}",
        sent.len(),
        record_bytes + table_bytes,
        String::from_utf8_lossy(&sent[..sent.len().min(200)]),
    );
    let sent = sent.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    let sent = sent.collect::<Vec<_>>();
    let (records, tables) = sent.split_at(record_bytes as usize / 8);
    for (word, now) in memory.words().iter().zip(tables) {
        word.store(*now, Ordering::Relaxed);
    }
    // Back again: what was wrong must show in what the hardware did.
    for case in cases.iter().filter(|case| matches!(case.what, What::Leaf(_))) {
        real.turn_over(case.gfn, wrong);
    }
    for ((case, record), before) in cases.iter().zip(records.chunks_exact(RECORD)).zip(before) {
        compare(machine, case, record, before, &real, &twin, marks)
            .with_context(|| format!("{} with marks {marks:?}: {case:x?}", F::NAME))?;
    }
    Ok(cases.len())
}

/// Level and outcome that the crate's words mean on hardware with these marks.
fn expected<F: Format>(case: &Case, before: Entry, twin: &Filled<F, HeapMemory>, marks: Marks) -> Outcome {
    let level = Some(twin.tables.walk(case.gfn).level);
    if marks == Marks::Left
        && let Entry::Leaf(leaf) = before
    {
        if !leaf.accessed {
            return Outcome::Unused(level);
        }
        if case.access == Access::WRITE && leaf.writable != Writable::Dirty {
            return Outcome::Forbidden(level);
        }
    }
    match twin.tables.translate(case.gfn, case.access) {
        Translation::Frame(_) => Outcome::Done,
        Translation::Fault(Found::Absent | Found::Reserved) => Outcome::Absent(match case.what {
            What::Frozen(size) => Some(size.level()),
            _ => level,
        }),
        Translation::Fault(Found::Present) => Outcome::Forbidden(level),
    }
}

fn compare<F: Format>(
    machine: &impl Machine,
    case: &Case,
    record: &[u64],
    before: Entry,
    real: &Filled<F, ImageMemory>,
    twin: &Filled<F, HeapMemory>,
    marks: Marks,
) -> Result<()> {
    let report = machine.report(record)?;
    let outcome = expected(case, before, twin, marks);
    let agree = match (report.outcome, outcome) {
        (Outcome::Absent(None), Outcome::Absent(_) | Outcome::Forbidden(_)) => true,
        (done, said) => done == said,
    };
    ensure!(agree, "the hardware says {:?}, the crate {outcome:?}", report.outcome);
    if let Some((access, address)) = report.stopped {
        ensure!(access == case.access, "the hardware names another access: {access:?}");
        let page = address >> 12;
        ensure!(page == case.gfn.as_u64(), "the hardware names another address: {address:#x}");
    }
    let done = outcome == Outcome::Done;
    let held = if done && case.access == Access::WRITE { WRITTEN } else { stamp(case.behind) };
    ensure!(record[8] == held, "the frame holds {:#x} and not {held:#x}", record[8]);
    let register = match case.access {
        Access::READ => stamp(case.behind),
        Access::EXEC => machine.returned(code_value(case.behind.as_u64() & 511)),
        _ => WRITTEN,
    };
    ensure!(!done || record[7] == register, "the guest got {:#x} and not {register:#x}", record[7]);
    let now = real.entry(case.gfn);
    let then = match case.what {
        What::Frozen(_) => Entry::Frozen,
        _ if marks == Marks::Left => before,
        _ => twin.entry(case.gfn),
    };
    ensure!(now == then, "the hardware left {now:?} behind, the crate {then:?}");
    Ok(())
}

fn stamp(pfn: Pfn) -> u64 {
    STAMP | pfn.as_u64()
}

/// What the code in a touched frame returns; 16 bits.
fn code_value(inside: u64) -> u16 {
    0x4000 | inside as u16
}

fn leaf_frame(image: &Image, size: PageSize) -> Pfn {
    match size {
        PageSize::Size4K => image.pfn(FRAMES + INSIDE[0] * 4096),
        PageSize::Size2M => image.pfn(FRAMES),
        PageSize::Size1G => Pfn::new(image.pfn(0).as_u64() & !(size.frames() - 1)),
    }
}

/// The touched frame behind a leaf of that size.
fn behind(image: &Image, size: PageSize) -> Pfn {
    image.pfn(FRAMES + INSIDE[size as usize] * 4096)
}

/// Every leaf under every access, each at a guest frame of its own; then what is no leaf, and the last frame in reach.
fn cases<F: Format>(image: &Image, address_bits: u32) -> Vec<Case> {
    const GIB: u64 = 1 << 18;
    let mut cases = Vec::new();
    let reach = 1_u64 << (address_bits - 12);
    let accesses = [Access::READ, Access::WRITE, Access::EXEC];
    let sizes = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];
    // Pages of 4 KiB lie in the first 2 MiB of the second GiB, of 2 MiB in the rest of it and in the third, of 1 GiB behind.
    let mut next = [GIB, GIB + 1024, 3 * GIB];
    for size in sizes.into_iter().filter(|size| *size <= F::LARGEST_LEAF) {
        let mut places = std::iter::from_fn(|| {
            let gfn = next[size as usize];
            next[size as usize] += size.frames();
            (gfn + size.frames() < reach).then_some(gfn)
        });
        let offset = behind(image, size).as_u64() & (size.frames() - 1);
        let leaves = leaves(leaf_frame(image, size), size).map(What::Leaf);
        for what in leaves.chain([What::Frozen(size)]) {
            for access in accesses {
                let Some(start) = places.next() else { break };
                cases.push(Case { gfn: Gfn::new(start + offset), access, what, behind: behind(image, size) });
            }
        }
    }
    let small = behind(image, PageSize::Size4K);
    for access in accesses {
        // In a table of each level.
        for gfn in [GIB + 1000, GIB - 1, 2 * GIB + GIB / 2] {
            cases.push(Case { gfn: Gfn::new(gfn), access, what: What::Absent, behind: small });
        }
    }
    let leaf = What::Leaf(Leaf { pfn: small, ..FULL });
    for (back, access) in (1..).zip(accesses) {
        cases.push(Case { gfn: Gfn::new(reach - back), access, what: leaf, behind: small });
    }
    cases
}

fn leaves(pfn: Pfn, size: PageSize) -> impl Iterator<Item = Leaf> {
    let writable =
        [Writable::Never, Writable::HostOnly, Writable::Protected, Writable::Clean, Writable::Dirty];
    let memory = [MemoryType::WriteBack, MemoryType::Uncached, MemoryType::Device];
    memory.into_iter().flat_map(move |memory| {
        [true, false].into_iter().flat_map(move |accessed| {
            [Execute::Always, Execute::Never].into_iter().flat_map(move |execute| {
                writable.into_iter().map(move |writable| Leaf {
                    pfn,
                    size,
                    writable,
                    execute,
                    memory,
                    accessed,
                })
            })
        })
    })
}

impl<F: Format, M: TableMemory> fmt::Debug for Filled<F, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filled").field("tables", &self.tables).finish_non_exhaustive()
    }
}
