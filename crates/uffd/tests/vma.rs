//! What memory a [`UffdMmu`] takes, and how it is split.

#![expect(unsafe_code, reason = "memory is locked by address")]

mod facility;

use std::sync::Arc;

use afterimage_mmu::{
    Gfn, GuestMmu, Initially, LogBy, Memslot, PageRef, PageSize, PageUse, Pfn, Policy, SlotError, SlotFlags,
    SlotId, SpaceId,
};
use afterimage_uffd::{Backing, Features, Mapping, Place, UffdError, UffdMmu, VmaPage};
use facility::uffd;

fn tables(mapping: &Arc<Mapping>, descriptors: usize, workers: usize) -> Option<Result<(), UffdError>> {
    let uffds =
        (0..descriptors).map(|_| uffd("UffdMmu", Features::PAGEFAULT_FLAG_WP)).collect::<Option<_>>()?;
    Some(UffdMmu::<()>::new(Arc::clone(mapping), Backing::Anonymous, uffds, workers).map(drop))
}

#[test]
fn locked_memory_is_refused_since_it_could_not_be_taken_away() {
    let bytes = PageSize::Size4K.bytes() * 4;
    let mapping = Arc::new(Mapping::anonymous(bytes, PageSize::Size4K).expect("memory"));
    // SAFETY: the mapping is that long, and locking changes no contents.
    unsafe { rustix::mm::mlock(mapping.as_ptr().cast(), bytes as usize) }.expect("16 KiB may be locked");
    let Some(refused) = tables(&mapping, 1, 1) else { return };
    assert!(matches!(refused, Err(UffdError::Advise { .. })), "{refused:?}");
}

#[test]
fn memory_is_not_split_into_more_parts_than_pages_nor_served_by_nobody() {
    let mapping =
        Arc::new(Mapping::anonymous(PageSize::Size4K.bytes() * 4, PageSize::Size4K).expect("memory"));
    for (descriptors, workers, fits) in
        [(4, 1, true), (3, 2, true), (5, 1, false), (0, 1, false), (1, 0, false)]
    {
        let Some(result) = tables(&mapping, descriptors, workers) else { return };
        match result {
            Ok(()) => assert!(fits, "{descriptors} descriptors, {workers} workers"),
            Err(UffdError::NoParts { .. }) => assert!(!fits, "{descriptors} descriptors, {workers} workers"),
            Err(other) => panic!("{other}"),
        }
    }
}

/// The page of a machine that takes no fault.
struct NoPage;

impl PageRef for NoPage {
    fn pfn(&self) -> Pfn {
        Pfn::new(0)
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn release(self, _used: PageUse) {}
}

impl VmaPage for NoPage {
    fn place(&self) -> Place<'_> {
        Place::Mapped
    }
}

#[test]
fn a_dirty_log_that_would_miss_writes_is_refused() {
    let mapping =
        Arc::new(Mapping::anonymous(PageSize::Size4K.bytes() * 4, PageSize::Size4K).expect("memory"));
    let Some(uffd) = uffd("a dirty log", Features::PAGEFAULT_FLAG_WP) else { return };
    let tables = UffdMmu::<NoPage>::new(Arc::clone(&mapping), Backing::Anonymous, vec![uffd], 1);
    let mmu = GuestMmu::new(tables.expect("they fit"), Policy::default());
    let (space, id) = (SpaceId(0), SlotId(0));
    let slot = Memslot::new(id, Gfn::new(0), 4, mapping.range().start);
    let logged = Memslot { flags: SlotFlags::LOG_DIRTY, ..slot };
    assert_eq!(mmu.create_slot(logged), Err(SlotError::NoWriteLog(id)));
    mmu.create_slot(slot).expect("nothing is there");
    for by in [LogBy::Protection, LogBy::Marks] {
        assert_eq!(mmu.start_dirty_log(space, id, by, Initially::Clean), Err(SlotError::NoWriteLog(id)));
    }
    assert_eq!(mmu.set_dirty_logging(space, id, true), Err(SlotError::NoWriteLog(id)));
    assert_eq!(mmu.take_dirty_log(space, id), Err(SlotError::NotLogged(id)));
    assert_eq!(mmu.set_dirty_logging(space, id, false), Ok(()), "nothing is to be stopped");
}
