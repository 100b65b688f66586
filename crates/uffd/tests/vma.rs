//! What memory a [`UffdMmu`] takes, and how it is split.

#![expect(unsafe_code, reason = "memory is locked by address")]

mod facility;

use std::sync::Arc;

use afterimage_mmu::{
    FRAME_BYTES, Gfn, GuestMmu, HvaRange, Initially, LogBy, Memslot, PageRef, PageSize, PageUse, Pfn, Policy,
    SlotError, SlotFlags, SlotId, SpaceId,
};
use afterimage_testing::HugePages;
use afterimage_uffd::{
    Backing, Features, Mapping, PageCategories, PageQuery, PageRegion, Pagemap, Place, UffdError, UffdMmu,
    VmaPage,
};
use facility::uffd;

fn tables(mapping: &Arc<Mapping>, descriptors: usize, workers: usize) -> Option<Result<(), UffdError>> {
    let uffds =
        (0..descriptors).map(|_| uffd("UffdMmu", Features::PAGEFAULT_FLAG_WP)).collect::<Option<_>>()?;
    Some(UffdMmu::<()>::new(Arc::clone(mapping), Backing::Anonymous, uffds, workers).map(drop))
}

#[test]
fn locked_memory_is_taken_without_the_pages_that_it_came_with() {
    let bytes = PageSize::Size4K.bytes() * 4;
    let mapping = Arc::new(Mapping::anonymous(bytes, PageSize::Size4K).expect("memory"));
    // SAFETY: the mapping is that long, and locking changes no contents.
    unsafe { rustix::mm::mlock(mapping.as_ptr().cast(), bytes as usize) }.expect("16 KiB may be locked");
    assert_eq!(present(&mapping), [mapping.range()]);
    let Some(taken) = tables(&mapping, 2, 1) else { return };
    taken.expect("locked memory can be taken away");
    assert_eq!(present(&mapping), []);
}

/// Which pages a read would find.
fn present(mapping: &Mapping) -> Vec<HvaRange> {
    let pagemap = Pagemap::of_self().expect("pagemap");
    let mut regions = [PageRegion::EMPTY; 4];
    let mut scan = pagemap.scan(mapping.range(), PageQuery::all_of(PageCategories::PRESENT));
    scan.fill(&mut regions).expect("a scan").iter().map(PageRegion::range).collect()
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

#[test]
fn descriptors_that_would_let_faults_or_writes_by_are_refused() {
    let mapping =
        Arc::new(Mapping::anonymous(PageSize::Size4K.bytes() * 4, PageSize::Size4K).expect("memory"));
    for unfit in [
        Features::EVENT_FORK,
        Features::EVENT_REMAP,
        Features::EVENT_REMOVE,
        Features::EVENT_UNMAP,
        Features::SIGBUS,
        Features::WP_UNPOPULATED,
        Features::WP_UNPOPULATED | Features::WP_ASYNC,
    ] {
        // One that fits does not help.
        let fits = uffd("UffdMmu", Features::PAGEFAULT_FLAG_WP | Features::THREAD_ID);
        let (Some(fits), Some(other)) = (fits, uffd("UffdMmu", unfit)) else { continue };
        let uffds = vec![fits, other];
        let Err(refused) = UffdMmu::<()>::new(Arc::clone(&mapping), Backing::Anonymous, uffds, 1) else {
            panic!("{unfit} was taken");
        };
        assert!(
            matches!(refused, UffdError::UnfitFeatures { features } if features == unfit),
            "{unfit}: {refused}"
        );
        assert!(refused.to_string().contains(&unfit.to_string()), "{refused}");
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
fn memslots_are_whole_pages_of_the_mapping() {
    let Some(pool) = HugePages::claim("memslots of whole pages", 2) else { return };
    for (page_size, frames) in [(PageSize::Size4K, 4), (PageSize::Size2M, 1024)] {
        let bytes = frames * FRAME_BYTES;
        let mapping = Arc::new(Mapping::anonymous(bytes, page_size).expect("memory"));
        let Some(uffd) = uffd("memslots", Features::PAGEFAULT_FLAG_WP) else { return };
        let tables = UffdMmu::<NoPage>::new(Arc::clone(&mapping), Backing::Anonymous, vec![uffd], 1);
        let mmu = GuestMmu::new(tables.expect("they fit"), Policy::default());
        let (start, page) = (mapping.range().start, page_size.frames());
        let create = |first: u64, frames: u64| {
            let slot = Memslot::new(SlotId(0), Gfn::new(1), frames, start + first * FRAME_BYTES);
            mmu.create_slot(slot).and_then(|()| mmu.delete_slot(SpaceId(0), SlotId(0)))
        };
        for (first, count) in [(0, frames), (0, page), (frames - page, page)] {
            assert_eq!(create(first, count), Ok(()), "{page_size:?}: {count} from {first} on");
        }
        let refused = SlotError::NotOfMapping {
            id: SlotId(0),
            hvas: HvaRange::new(start, start + (bytes + FRAME_BYTES)),
            mapping: mapping.range(),
            page_bytes: page_size.bytes(),
        };
        assert_eq!(create(0, frames + 1), Err(refused), "{page_size:?}");
        for (first, count) in [(frames, page), (frames - page, 2 * page), (4 * frames, page)] {
            let refused = create(first, count);
            assert!(matches!(refused, Err(SlotError::NotOfMapping { .. })), "{page_size:?}: {refused:?}");
        }
        for (first, count) in [(0, page / 2), (page / 2, page / 2), (page / 2, page)] {
            let is_whole = first.is_multiple_of(page) && count.is_multiple_of(page);
            if page > 1 && !is_whole {
                let refused = create(first, count);
                assert!(matches!(refused, Err(SlotError::NotOfMapping { .. })), "{page_size:?}: {refused:?}");
            }
        }
        // Guest frames elsewhere are the same memory.
        mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(1), page, start)).expect("nothing is there");
        assert_eq!(mmu.move_slot(SpaceId(0), SlotId(0), Gfn::new(7)), Ok(()));
    }
    drop(pool);
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
