//! PAGEMAP_SCAN against the kernel: a dirty log without faults.

mod facility;

use std::sync::atomic::Ordering::Relaxed;

use afterimage_mmu::HvaRange;
use afterimage_testing::skip;
use afterimage_uffd::{
    Features, Mapping, PageCategories, PageQuery, PageRegion, Pagemap, Protect, RegisterModes, Resolved,
    Uffd, UffdError,
};
use facility::{Kind, Memory, uffd};
use rustix::io::Errno;

const WRITTEN: PageQuery = PageQuery::all_of(PageCategories::WRITTEN);

fn logged(kind: Kind, test: &str, pages: u64) -> Option<(Uffd, Memory, Pagemap)> {
    let uffd = uffd(test, Features::WP_ASYNC | Features::WP_HUGETLBFS_SHMEM)?;
    assert!(uffd.features().contains(Features::WP_UNPOPULATED), "WP_ASYNC brings it");
    let mapping = kind.map(test, pages)?;
    for page in 0..pages {
        mapping.word(page * kind.page().bytes()).expect("inside").store(1, Relaxed);
    }
    mapping.register(&uffd, RegisterModes::WP).expect("register");
    let pagemap = Pagemap::of_self().inspect_err(|error| skip(test, error)).ok()?;
    Some((uffd, mapping, pagemap))
}

/// All regions, read through a buffer of `room`.
fn regions(
    pagemap: &Pagemap,
    range: HvaRange,
    query: PageQuery,
    room: usize,
) -> Result<Vec<PageRegion>, UffdError> {
    let mut buffer = vec![PageRegion::EMPTY; room];
    let mut scan = pagemap.scan(range, query);
    let mut all = vec![];
    loop {
        let batch = scan.fill(&mut buffer)?;
        if batch.is_empty() {
            assert!(scan.rest().is_empty());
            return Ok(all);
        }
        all.extend_from_slice(batch);
    }
}

/// The pages of `mapping` that `query` finds, by number.
fn pages(pagemap: &Pagemap, mapping: &Mapping, query: PageQuery, room: usize) -> Vec<u64> {
    let size = mapping.page_size().bytes();
    let found = regions(pagemap, mapping.range(), query, room).expect("scan");
    let start = mapping.range().start;
    let number = |address| (address - start) / size;
    found.iter().flat_map(|region| number(region.range().start)..number(region.range().end)).collect()
}

fn write(mapping: &Mapping, page: u64) {
    mapping.word(page * mapping.page_size().bytes() + 16).expect("inside").store(2, Relaxed);
}

#[test]
fn a_scan_sees_the_writes_since_the_last_one() {
    for kind in Kind::ALL {
        let Some((uffd, mapping, pagemap)) = logged(kind, "dirty log", 8) else { continue };
        assert_eq!(uffd.write_protect(mapping.range()).expect("protect"), Resolved::Done);
        assert_eq!(pages(&pagemap, &mapping, WRITTEN, 8), [0u64; 0], "{kind:?}: all is clean");
        for page in [1, 2, 5] {
            write(&mapping, page);
        }
        assert_eq!(pages(&pagemap, &mapping, WRITTEN, 8), [1, 2, 5], "{kind:?}");
        assert_eq!(
            pages(&pagemap, &mapping, WRITTEN, 1),
            [1, 2, 5],
            "{kind:?}: through a buffer of one region"
        );

        let harvest = WRITTEN.protecting(Protect::MatchingStrict);
        assert_eq!(pages(&pagemap, &mapping, harvest, 1), [1, 2, 5], "{kind:?}: read and armed again");
        assert_eq!(pages(&pagemap, &mapping, WRITTEN, 8), [0u64; 0], "{kind:?}");
        write(&mapping, 2);
        assert_eq!(pages(&pagemap, &mapping, harvest, 8), [2], "{kind:?}");
    }
}

#[test]
fn a_log_can_start_without_a_report() {
    for kind in Kind::ALL {
        let Some((_uffd, mapping, pagemap)) = logged(kind, "log start", 4) else { continue };
        assert_eq!(
            pages(&pagemap, &mapping, WRITTEN, 4),
            [0, 1, 2, 3],
            "{kind:?}: never protected is written"
        );
        pagemap.write_protect(mapping.range(), WRITTEN.protecting(Protect::MatchingStrict)).expect("protect");
        assert_eq!(pages(&pagemap, &mapping, WRITTEN, 4), [0u64; 0], "{kind:?}");
        write(&mapping, 3);
        assert_eq!(pages(&pagemap, &mapping, WRITTEN, 4), [3], "{kind:?}");
    }
}

#[test]
fn strict_protection_needs_a_registered_range() {
    let Some(mapping) = Kind::Anonymous.map("strict", 2) else { return };
    let Ok(pagemap) = Pagemap::of_self().inspect_err(|error| skip("strict", error)) else { return };
    write(&mapping, 0);
    let error = regions(&pagemap, mapping.range(), WRITTEN.protecting(Protect::MatchingStrict), 4)
        .expect_err("nothing is registered");
    assert!(matches!(error, UffdError::Scan { errno: Errno::PERM, .. }), "{error}");
    assert!(error.to_string().contains("WP_ASYNC"), "{error}");
    let lax = regions(&pagemap, mapping.range(), WRITTEN.protecting(Protect::Matching), 4).expect("skips it");
    assert!(lax.is_empty(), "{lax:?}");
}

#[test]
fn categories_tell_what_a_page_is() {
    for kind in Kind::ALL {
        let Some(mapping) = kind.map("categories", 4) else { continue };
        let pid = rustix::process::getpid();
        let Ok(pagemap) = Pagemap::of_process(pid).inspect_err(|error| skip("categories", error)) else {
            return;
        };
        write(&mapping, 2);
        let mut query = PageQuery::all_of(PageCategories::PRESENT);
        query.report = PageCategories::PRESENT | PageCategories::FILE | PageCategories::HUGE;
        let found = regions(&pagemap, mapping.range(), query, 4).expect("scan");
        assert_eq!(found.len(), 1, "{kind:?}: {found:?}");
        assert_eq!(found[0].range(), mapping.pages(2, 1).expect("inside"), "{kind:?}");
        let is_file = found[0].categories().contains(PageCategories::FILE);
        assert_eq!(is_file, Kind::SHARED.contains(&kind), "{kind:?}: {found:?}");

        query.inverted = PageCategories::PRESENT;
        let absent = pages(&pagemap, &mapping, query, 4);
        if mapping.page_size() == afterimage_mmu::PageSize::Size4K {
            assert_eq!(absent, [0, 1, 3], "{kind:?}");
        }
    }
}

#[test]
fn either_of_two_categories() {
    let Some(mapping) = Kind::Anonymous.map("either", 3) else { return };
    let Ok(pagemap) = Pagemap::of_self().inspect_err(|error| skip("either", error)) else { return };
    assert_eq!(mapping.word(0).expect("inside").load(Relaxed), 0);
    write(&mapping, 1);
    let query = PageQuery::any_of(PageCategories::PFNZERO | PageCategories::PRESENT);
    assert_eq!(pages(&pagemap, &mapping, query, 4), [0, 1]);
    let zero = PageQuery::all_of(PageCategories::PFNZERO);
    assert_eq!(pages(&pagemap, &mapping, zero, 4), [0], "a read maps the zero page");
}

#[test]
fn a_buffer_needs_room() {
    let Ok(pagemap) = Pagemap::of_self().inspect_err(|error| skip("room", error)) else { return };
    let Some(mapping) = Kind::Anonymous.map("room", 1) else { return };
    assert!(matches!(pagemap.scan(mapping.range(), WRITTEN).fill(&mut []), Err(UffdError::NoRoom)));
}
