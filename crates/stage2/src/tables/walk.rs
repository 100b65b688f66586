//! Looking up, and translating as hardware does.

use afterimage_mmu::{Access, Found, Gfn, Level, Pfn};

use super::Tables;
use super::reach::Place;
use crate::format::{Entry, Execute, Format, Leaf, Writable};
use crate::memory::TableMemory;

/// Where a walk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// The last entry: no link to a table.
    pub entry: Entry,
    /// The level of its table.
    pub level: Level,
}

/// What an access of the guest meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// This frame.
    Frame(Pfn),
    /// A fault.
    Fault(Found),
}

impl<F: Format, M: TableMemory> Tables<F, M> {
    /// Looks up `gfn`, without a lock. Nothing is changed, no mark is set. Out of reach of the tables nothing is mapped.
    #[inline]
    pub fn walk(&self, gfn: Gfn) -> Walked {
        match self.find(gfn) {
            Some(place) => Walked { entry: place.said(), level: place.level },
            None => Walked { entry: Entry::Absent, level: F::ROOT_LEVEL },
        }
    }

    /// The entry at which a walk for `gfn` ends; `None` out of reach.
    #[inline]
    pub(super) fn find(&self, gfn: Gfn) -> Option<Place<'_, F, M>> {
        if !self.reach().contains(gfn) {
            return None;
        }
        let mut table = self.root_table();
        loop {
            let place = table.look(gfn);
            match place.child {
                Some(child) => table = child,
                None => return Some(place),
            }
        }
    }

    /// Translates an access of the guest as hardware does, which sets the marks (a vCPU in software). Whoever may fetch may, guest
    /// kernel or user program.
    ///
    /// Hardware that leaves the marks to software faults where this sets them.
    pub fn translate(&self, gfn: Gfn, access: Access) -> Translation {
        let Some(mut place) = self.find(gfn) else { return Translation::Fault(Found::Absent) };
        loop {
            let leaf = match F::decode(place.raw, place.level) {
                Entry::Leaf(leaf) => leaf,
                Entry::Mmio(_) => return Translation::Fault(Found::Reserved),
                // It was split since: once more, as hardware does.
                Entry::Table(_) => match self.find(gfn) {
                    Some(again) => {
                        place = again;
                        continue;
                    }
                    None => return Translation::Fault(Found::Absent),
                },
                _ => return Translation::Fault(Found::Absent),
            };
            if F::HIDES_UNUSED && !leaf.accessed {
                return Translation::Fault(Found::Absent);
            }
            let is_write = access.contains(Access::WRITE);
            if is_write && !leaf.writable.is_allowed()
                || access.contains(Access::EXEC) && leaf.execute == Execute::Never
            {
                return Translation::Fault(Found::Present);
            }
            let writable = if is_write { Writable::Dirty } else { leaf.writable };
            match self.change(&place, leaf, Leaf { writable, accessed: true, ..leaf }) {
                Ok(()) => return Translation::Frame(leaf.pfn_of(gfn)),
                Err(now) => place.raw = now,
            }
        }
    }
}
