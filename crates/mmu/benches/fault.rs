//! What the engine costs, each piece beside the least that could do the same for one thread.

mod host;

use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

use afterimage_mmu::{
    Access, Block, Blocking, FRAME_BYTES, Fault, FaultOutcome, Gfn, HvaRange, MmuLock, Witness as _, Zap,
};
use criterion::{Criterion, criterion_group, criterion_main};

use host::{AllResident, BASE, Bare, FRAMES, machine};

const FRAME: Block = Block::frame(Gfn::new(7));

fn checks(c: &mut Criterion) {
    let mut group = c.benchmark_group("check");
    let lock = MmuLock::<Bare>::new();
    let words = lock.invalidations();
    let since = words.snapshot(FRAME);
    let (count, sequence) = (AtomicU64::new(0), AtomicU64::new(0));
    group.bench_function("two loads (baseline)", |b| {
        b.iter(|| {
            black_box(&count).load(Ordering::Relaxed) != 0
                || black_box(&sequence).load(Ordering::Relaxed) != black_box(0)
        });
    });
    group.bench_function("hint", |b| b.iter(|| black_box(since).hint()));
    let mutex = Mutex::new((0u64, 0u64));
    group.bench_function("mutex and two loads (baseline)", |b| {
        b.iter(|| {
            let words = black_box(&mutex).lock().expect("nothing panics");
            words.0 != 0 || words.1 != black_box(0)
        });
    });
    group.bench_function("snapshot, hint, verify under the lock", |b| {
        b.iter(|| {
            let since = black_box(words).snapshot(black_box(FRAME));
            let doomed = since.hint().is_some();
            let witness = lock.read();
            let fresh = witness.verify(since).is_ok();
            doomed || !fresh
        });
    });
}

#[expect(clippy::disallowed_types, reason = "it is what the engine's own lock is compared with")]
fn locks(c: &mut Criterion) {
    let mut group = c.benchmark_group("lock");
    let std = std::sync::RwLock::new(());
    group.bench_function("std read (baseline)", |b| b.iter(|| drop(black_box(&std).read())));
    let lock = MmuLock::<Bare>::new();
    group.bench_function("read", |b| b.iter(|| drop(black_box(&lock).read())));
    group.bench_function("std write (baseline)", |b| b.iter(|| drop(black_box(&std).write())));
    group.bench_function("write", |b| b.iter(|| drop(black_box(&lock).write())));
}

fn faults(c: &mut Criterion) {
    let mut group = c.benchmark_group("fault");
    let mutex = Mutex::new(vec![0u64; FRAMES as usize]);
    let mut gfn = 0;
    group.bench_function("mutex and a store (baseline)", |b| {
        b.iter(|| {
            gfn = (gfn + 1) % FRAMES;
            let mut words = black_box(&mutex).lock().expect("nothing panics");
            words[gfn as usize] = black_box(gfn) << 1 | 1;
        });
    });
    let mmu = machine();
    let mut vcpu = mmu.vcpu();
    group.bench_function("handle_fault", |b| {
        b.iter(|| {
            gfn = (gfn + 1) % FRAMES;
            let fault = Fault::new(Gfn::new(gfn), Access::WRITE);
            let outcome = vcpu.handle_fault(&AllResident, black_box(&fault));
            assert_eq!(outcome, Ok(FaultOutcome::Fixed));
        });
    });
    let doomed = mmu.invalidate(HvaRange::new(BASE, BASE + FRAME_BYTES), Zap::Unmap, Blocking::Allowed);
    let fault = Fault::new(Gfn::new(0), Access::WRITE);
    group.bench_function("handle_fault, doomed", |b| {
        b.iter(|| vcpu.handle_fault(&AllResident, black_box(&fault)));
    });
    drop(doomed);
}

fn invalidations(c: &mut Criterion) {
    let mut group = c.benchmark_group("invalidation");
    let mutex = Mutex::new(vec![0u64; FRAMES as usize]);
    group.bench_function("mutex twice and a store (baseline)", |b| {
        b.iter(|| {
            black_box(&mutex).lock().expect("nothing panics")[0] = 0;
            drop(black_box(&mutex).lock().expect("nothing panics"));
        });
    });
    let mmu = machine();
    let vcpu = mmu.vcpu();
    let hvas = HvaRange::new(BASE, BASE + FRAME_BYTES);
    group.bench_function("one page, not mapped", |b| {
        b.iter(|| drop(mmu.invalidate(black_box(hvas), Zap::Unmap, Blocking::Allowed)));
    });
    group.bench_function("one page, mapped, one vCPU outside", |b| {
        b.iter(|| {
            mmu.secondary().0[0].store(1, Ordering::Relaxed);
            drop(mmu.invalidate(black_box(hvas), Zap::Unmap, Blocking::Allowed));
        });
    });
    drop(vcpu);
}

criterion_group!(benches, checks, locks, faults, invalidations);
criterion_main!(benches);
