//! Other roots in the place of all, and what becomes of the old ones.
//!
//! An old root is zapped as KVM does it: its leaves first, so that their marks are kept, then tables level by level from the lowest
//! up, then the root itself. Each step is short, and the lock is given up between two where somebody wants it. Who had found
//! the root before it was replaced may install below it until then: a table that it links is found in the next round, and there
//! is no more than one such install for each of those walkers. The engine frees all of it when they have moved on.
//!
//! Source: Linux `kvm_tdp_mmu_invalidate_roots`, `tdp_mmu_zap_root`.

use core::mem::ManuallyDrop;

use alloc::vec::Vec;

use afterimage_mmu::{Flush, RetiredTable, SlotSet, SpaceId, ZapWalk};

use super::zap::{Faults, Of, take_away};
use super::{Host, Stage2};
use crate::format::Format;
use crate::leaves::Change;
use crate::mutation::{self, Mutation};
use crate::tables::Tables;

/// Tables that are not freed by being dropped: somebody may walk them.
type Kept<F, M> = ManuallyDrop<Tables<F, M>>;

impl<F: Format, H: Host> Stage2<F, H> {
    /// `false`: there is no memory for other roots.
    pub(super) fn replace_each(&self, slots: &SlotSet, walk: &mut ZapWalk<'_, Self>) -> bool {
        let mut roots = None;
        walk.give_way_for(|| roots = self.new_roots());
        let Some(mut roots) = roots else { return false };
        walk.replace_roots(|| {
            for (tables, other) in self.spaces.iter().zip(&mut roots) {
                tables.exchange_roots(other);
            }
            if mutation::active(Mutation::FreeBeforeReload) {
                roots.drain(..).for_each(|old| drop(ManuallyDrop::into_inner(old)));
            }
        });
        for (space, old) in (0..).map(SpaceId).zip(roots) {
            self.zap_replaced(space, old, slots, walk);
        }
        true
    }

    /// Empty tables for each address space; `None` if there is no memory for their roots.
    fn new_roots(&self) -> Option<Vec<Kept<F, H::Memory>>> {
        let roots: Option<Vec<_>> = self.spaces.iter().map(Tables::empty_like).collect();
        roots.map(|roots| roots.into_iter().map(ManuallyDrop::new).collect())
    }

    /// Takes away all that `old` leads to, which was `space` until now, and `old` itself.
    fn zap_replaced(
        &self,
        space: SpaceId,
        mut old: Kept<F, H::Memory>,
        slots: &SlotSet,
        walk: &mut ZapWalk<'_, Self>,
    ) {
        for slot in slots.iter().filter(|slot| slot.space == space) {
            self.each_leaf(&Of::Replaced(&old), slot, slot.gfns(), walk, |entry, log| {
                let before = take_away(entry, log);
                if let Change::Did(leaf) = before
                    && leaf.accessed
                {
                    self.host.note_used(space, entry.gfns());
                }
                before
            });
        }
        let root = loop {
            self.zap_tables(&Of::Replaced(&old), old.reach(), F::ROOT_LEVEL, Faults::Excluded, walk);
            if let Some(root) = old.take_root() {
                break root;
            }
        };
        let (_, mut steps) = walk.parts();
        steps.retire(RetiredTable { first: root, pages: F::ROOT_PAGES }, Flush::NOTHING);
        if steps.room() == 0 {
            walk.give_way();
        }
        drop(ManuallyDrop::into_inner(old));
    }
}
