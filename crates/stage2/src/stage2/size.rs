//! How large a leaf a fault installs: the largest that slot, page, attributes and policy allow.
//!
//! A large leaf is verified as a whole: [`block`](afterimage_mmu::SecondaryMmu::block) names the largest block that the slot
//! alone allows, before the sequence is sampled, and what is installed lies within the verdict. KVM verifies the faulting
//! frame alone and relies on the primary MMU to announce whole blocks when it splits its own.
//!
//! | limit | from |
//! |---|---|
//! | the block lies in the slot, and its guest and host addresses are aligned alike | the slot |
//! | the slot logs writes: 4 KiB | the slot |
//! | the page is that large, and aligned as the guest frame is | the page |
//! | all frames of the block are private, or all are shared | the host |
//!
//! What is fetched from where large pages are never executable is mapped singly for that reason alone (`nx.rs`).
//!
//! Source: Linux `kvm_mmu_hugepage_adjust`, `kvm_max_level_for_fault_and_order`.

use afterimage_mmu::{
    Block, FRAME_BYTES, Fault, Fresh, Gfn, GfnRange, Memslot, PageRef, PageSize, SlotFlags,
};

use super::{Host, Stage2};
use crate::format::Format;
use crate::mutation::{self, Mutation};

const LARGE: [PageSize; 2] = [PageSize::Size1G, PageSize::Size2M];

impl<F: Format, H: Host> Stage2<F, H> {
    /// Whether the slot allows one leaf of `size` around `gfn`.
    fn slot_allows(&self, slot: &Memslot, gfn: Gfn, size: PageSize) -> bool {
        let block = gfn.block(size);
        let logs = slot.flags.contains(SlotFlags::LOG_DIRTY) && !mutation::active(Mutation::LoggedLarge);
        !logs
            && size <= self.large.largest
            && slot.gfns().covers(block)
            && slot.hva_of(block.start).as_u64().is_multiple_of(size.frames() * FRAME_BYTES)
    }

    /// The largest block around `gfn` that the slot allows.
    #[inline]
    pub(super) fn largest_block(&self, slot: &Memslot, gfn: Gfn) -> Block {
        if self.large.largest == PageSize::Size4K || mutation::active(Mutation::LargeBeyondVerdict) {
            return Block::frame(gfn);
        }
        LARGE
            .into_iter()
            .find(|size| self.slot_allows(slot, gfn, *size))
            .map_or(Block::frame(gfn), |size| Block::of(gfn, size))
    }

    /// The largest leaf that can be installed for `fault`, which `page` answers.
    pub(super) fn size(&self, slot: &Memslot, fault: &Fault, page: &H::Page, fresh: &Fresh<'_>) -> PageSize {
        let gfn = fault.gfn;
        if self.large.largest == PageSize::Size4K {
            return PageSize::Size4K;
        }
        LARGE
            .into_iter()
            .find(|size| {
                let block = gfn.block(*size);
                (fresh.range().covers(block) || mutation::active(Mutation::LargeBeyondVerdict))
                    && self.slot_allows(slot, gfn, *size)
                    && *size <= page.block()
                    && (page.pfn().as_u64() ^ gfn.as_u64()) & (size.frames() - 1) == 0
                    && !self.is_mixed(slot, block)
            })
            .unwrap_or(PageSize::Size4K)
    }

    fn is_mixed(&self, slot: &Memslot, block: GfnRange) -> bool {
        !mutation::active(Mutation::MixedLarge) && self.host.is_mixed(slot.space, block)
    }

    /// Whether frames around `gfn` that are mapped singly, to pages from a block of `backing` on, may be mapped by one leaf
    /// of `size`.
    pub(super) fn may_recover(&self, slot: &Memslot, gfn: Gfn, size: PageSize, backing: PageSize) -> bool {
        size <= backing && self.slot_allows(slot, gfn, size) && !self.is_mixed(slot, gfn.block(size))
    }
}
