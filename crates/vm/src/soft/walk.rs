//! The walk of the tables, as hardware of each format does it.
//!
//! It reads words of physical memory and knows nothing of who writes them: not the engine's state, not the walk functions
//! of [`Tables`](afterimage_stage2::Tables). Nothing protects it but that its vCPU is in the guest: what is flushed waits for
//! that, and what is freed was flushed first.
//!
//! | | x86 (EPT, NPT) | Arm, RISC-V |
//! |---|---|---|
//! | accessed and dirty marks | set by compare-exchange; who loses walks again | a fault where one is missing, as without FEAT_HAFDBS and with Svade |
//! | an access that a cached translation forbids | is looked up again before it faults | faults |
//! | after a fault | all that was cached for the address is gone | what was cached stays until software flushes it |
//!
//! Sources: SDM 29.3 and 29.4.3; APM volume 2, 15.25; Arm ARM chapter D8; RISC-V privileged specification, Sv39 and
//! "Two-Stage Address Translation".

use core::sync::atomic::Ordering;

use afterimage_mmu::{Access, Found, Gfn, Level, PageSize, Pfn};
use afterimage_stage2::{ENTRIES, Entry, Ept, Execute, Format, Leaf, Npt, Svx4, Vmsa, Writable};

use super::tables::TablePool;
use super::tlb::Tlb;

/// How a CPU with tables of this format behaves.
pub trait Hardware: Format {
    /// It sets accessed and dirty marks by itself.
    const SETS_MARKS: bool;
    /// It looks a forbidden access up again before it faults, and forgets what it has cached for the address when it does.
    const FAULTS_FORGET: bool;
}

impl<const LEVELS: u8, const FEATURES: u8> Hardware for Ept<LEVELS, FEATURES> {
    const SETS_MARKS: bool = true;
    const FAULTS_FORGET: bool = true;
}

impl<const LEVELS: u8> Hardware for Npt<LEVELS> {
    const SETS_MARKS: bool = true;
    const FAULTS_FORGET: bool = true;
}

impl<const IPA_BITS: u8> Hardware for Vmsa<IPA_BITS> {
    const SETS_MARKS: bool = false;
    const FAULTS_FORGET: bool = false;
}

impl<const LEVELS: u8> Hardware for Svx4<LEVELS> {
    const SETS_MARKS: bool = false;
    const FAULTS_FORGET: bool = false;
}

/// What a walk comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Walk {
    /// The access is allowed.
    Page {
        /// The first frame of the page.
        first: Pfn,
        /// Its size.
        size: PageSize,
        /// Whether stores are, with every mark that they leave already there.
        writable: bool,
    },
    /// It is not.
    Fault(Found),
    /// It met a table that is free, or no table at all.
    FreedTable {
        /// The level at which it was taken for a table.
        level: Level,
        /// What was taken for one.
        table: Pfn,
    },
}

/// Walks for `gfn` from the lowest table that is cached, else from `root`.
pub(super) fn walk<F: Hardware>(
    tables: &TablePool,
    root: Pfn,
    tlb: &mut Tlb,
    gfn: Gfn,
    access: Access,
) -> Walk {
    if gfn.as_u64() >> (F::GPA_BITS - 12) != 0 {
        return Walk::Fault(Found::Absent);
    }
    'again: loop {
        let (mut table, mut level) = tlb.lowest_table(gfn).unwrap_or((root, F::ROOT_LEVEL));
        loop {
            let pages = if level == F::ROOT_LEVEL { F::ROOT_PAGES } else { 1 };
            let index = (gfn.as_u64() / level.frames()) as usize & (pages * ENTRIES - 1);
            let Some(entry) = tables.entry(table, index) else { return Walk::FreedTable { level, table } };
            let raw = entry.load(Ordering::Acquire);
            if raw == TablePool::POISON {
                return Walk::FreedTable { level, table };
            }
            if let (Some(child), Some(below)) = (F::child(raw, level), Level::new(level.number() - 1)) {
                tlb.put_table(gfn, below, child);
                (table, level) = (child, below);
                continue;
            }
            let leaf = match F::decode(raw, level) {
                Entry::Leaf(leaf) => leaf,
                Entry::Mmio(_) => return Walk::Fault(Found::Reserved),
                Entry::Absent | Entry::Frozen | Entry::Foreign | Entry::Table(_) => {
                    return Walk::Fault(Found::Absent);
                }
            };
            let marked = match judge::<F>(leaf, access) {
                Ok(marked) => marked,
                Err(found) => return Walk::Fault(found),
            };
            if marked != leaf {
                let word = F::encode_leaf(marked).expect("a decoded leaf can be encoded with more marks");
                if entry.compare_exchange(raw, word, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue 'again;
                }
            }
            return Walk::Page {
                first: marked.pfn,
                size: marked.size,
                writable: marked.writable == Writable::Dirty,
            };
        }
    }
}

/// The leaf as the access leaves it, or why it may not be made.
fn judge<F: Hardware>(leaf: Leaf, access: Access) -> Result<Leaf, Found> {
    let is_write = access.contains(Access::WRITE);
    if F::HIDES_UNUSED && !leaf.accessed {
        return Err(Found::Absent);
    }
    let forbidden = is_write && !leaf.writable.is_allowed()
        || access.contains(Access::EXEC) && leaf.execute == Execute::Never;
    let writable = if is_write { Writable::Dirty } else { leaf.writable };
    let marked = Leaf { writable, accessed: true, ..leaf };
    if forbidden || marked != leaf && !F::SETS_MARKS { Err(Found::Present) } else { Ok(marked) }
}
