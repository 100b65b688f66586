//! The guest's own page tables and segments.
//!
//! Everything is mapped where it is (virtual = physical), with 2 MiB pages and with the U bit in all levels, since
//! the program runs at CPL 3. Accessed and dirty bits are set in advance: nobody has to write the tables.
//!
//! ```text
//! page 0  PML4     one entry
//! page 1  PDPT     entries 0 to 3 for system memory, from 4 on for managed memory
//! page 2  GDT
//! page 3… PDs      one per GiB: 4 for system memory, then managed memory's
//! ```

use crate::system::{MANAGED_GPA, PAGE, SYSTEM_GPA};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;

const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const FIRST_PD: usize = 3;

/// Code segment: 64 bit, DPL 3, selector 0x33.
pub(super) const CODE_SELECTOR: u16 = 0x33;
/// Data segment: DPL 3, selector 0x2b.
pub(super) const DATA_SELECTOR: u16 = 0x2b;
const GDT_PAGE: usize = 2;
/// Address and limit of the GDT.
pub(super) const GDT: (u64, u16) = (SYSTEM_GPA + (GDT_PAGE * PAGE) as u64, 7 * 8 - 1);

fn gibs(managed_bytes: u64) -> u64 {
    MANAGED_GPA / GIB + managed_bytes.div_ceil(GIB)
}

/// Pages that [`build`] fills.
pub(crate) fn pages(managed_bytes: u64) -> usize {
    FIRST_PD + gibs(managed_bytes) as usize
}

/// The tables, to be placed at [`SYSTEM_GPA`].
pub(crate) fn build(managed_bytes: u64) -> Vec<u8> {
    let mut words = vec![0_u64; pages(managed_bytes) * PAGE / 8];
    let page = PAGE / 8;
    let table = |index: usize| (SYSTEM_GPA + (index * PAGE) as u64) | PRESENT | WRITE | USER | ACCESSED;
    words[0] = table(1);
    for gib in 0..gibs(managed_bytes) as usize {
        words[page + gib] = table(FIRST_PD + gib);
    }
    let leaves = &mut words[FIRST_PD * page..];
    for (index, leaf) in leaves.iter_mut().enumerate() {
        let gib = index as u64 / ENTRIES;
        // The first GiBs hold system memory, up to where managed memory begins.
        debug_assert!(gib < gibs(managed_bytes));
        *leaf = (index as u64 * LARGE_PAGE) | PRESENT | WRITE | USER | ACCESSED | DIRTY | LARGE;
    }
    words[GDT_PAGE * page + usize::from(DATA_SELECTOR) / 8] = 0x00cf_f300_0000_ffff;
    words[GDT_PAGE * page + usize::from(CODE_SELECTOR) / 8] = 0x00af_fb00_0000_ffff;
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the CPU does.
    fn translate(tables: &[u8], address: u64) -> Option<u64> {
        let read = |at: u64| {
            let at = (at - SYSTEM_GPA) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().expect("8 bytes"))
        };
        let mut table = SYSTEM_GPA;
        for shift in [39, 30, 21] {
            let entry = read(table + (address >> shift & 511) * 8);
            if entry & (PRESENT | USER) != PRESENT | USER {
                return None;
            }
            table = entry & 0x000f_ffff_ffff_f000;
            if entry & LARGE != 0 {
                return Some(table + address % LARGE_PAGE);
            }
        }
        None
    }

    #[test]
    fn all_of_a_guest_is_mapped_where_it_is() {
        let bytes = 3 * GIB + 5 * 4096;
        let tables = build(bytes);
        for address in
            [SYSTEM_GPA, SYSTEM_GPA + 12345, MANAGED_GPA, MANAGED_GPA + GIB + 7, MANAGED_GPA + bytes - 1]
        {
            assert_eq!(translate(&tables, address), Some(address));
        }
        assert_eq!(translate(&tables, MANAGED_GPA + 4 * GIB), None);
    }
}
