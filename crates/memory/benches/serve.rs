//! What a served userfaultfd fault costs from end to end, as a ratio to a bare loop of the same system calls.
//!
//! A guest thread touches pages that are in the page cache and not mapped, one after the other. In the one case a bare
//! loop reads each message and answers it by one `UFFDIO_CONTINUE`; in the other the workers do, through the engine and
//! the memory object. Both wait for messages in the same way. The two take turns, and the medians of their rounds are
//! compared, and the best: `cargo bench -p afterimage-memory --bench serve`.

// UNSAFETY: the bare loop makes its system calls itself.
#![expect(unsafe_code)]

use std::hint::black_box;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage_memory::{MemoryObject, ObjectOptions, ObjectPage};
use afterimage_mmu::{Gfn, GuestMmu, Memslot, Notifier, PageSize, Policy, SlotId};
use afterimage_uffd::{
    Backing, Features, Mapping, OpenOptions, RegisterModes, ServeOptions, Uffd, UffdMmu, Workers, memfd,
};
use criterion::{Criterion, Throughput};
use rustix::thread::{CpuSet, sched_setaffinity};

const PAGES: u64 = 2048;
const BYTES: u64 = PAGES * 4096;
/// Of each kind, in turns.
const ROUNDS: usize = 61;
/// The guest's CPU, and that of whoever serves.
const GUEST: usize = 0;
const SERVER: usize = 1;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    // Not longer: both servers have one CPU, and the one whose turn is over has to leave it.
    let busy = ServeOptions { spin: Duration::from_millis(1), ..ServeOptions::default() };
    for (name, idle) in [("looking", busy), ("default", ServeOptions::default()), ("sleeping", asleep())] {
        let (bare, served) = (Bare::start(idle.spin), Served::start(idle));
        let mut rounds = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            rounds[0].push(touch_all(&bare.mapping));
            rounds[1].push(touch_all(&served.mapping));
        }
        for (which, of) in [("median", 0.5), ("best", 0.0)] {
            let [bare_ns, served_ns] = rounds.each_ref().map(|rounds| quantile_ns(rounds, of));
            let ratio = served_ns / bare_ns;
            println!(
                "{name}, {which} round: bare {bare_ns:.0} ns, served {served_ns:.0} ns a fault, ratio {ratio:.3}"
            );
        }

        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(PAGES)).sample_size(20);
        for (loop_name, mapping) in [("bare", &bare.mapping), ("served", &served.mapping)] {
            let rounds = |count: u64| (0..count).map(|_| touch_all(mapping)).sum();
            group.bench_function(loop_name, |bencher| bencher.iter_custom(rounds));
        }
        group.finish();
        bare.stop();
        served.stop();
    }
    criterion.final_summary();
}

fn asleep() -> ServeOptions {
    ServeOptions { spin: Duration::ZERO, ..ServeOptions::default() }
}

/// Unmaps all pages, and takes the time to touch them again.
fn touch_all(mapping: &Mapping) -> Duration {
    mapping.zap(mapping.range()).expect("zap");
    let started = Instant::now();
    for page in 0..PAGES {
        black_box(mapping.word(page * 4096).expect("inside").load(Relaxed));
    }
    started.elapsed()
}

/// Nanoseconds a fault. The best round says most where other work disturbs the others.
fn quantile_ns(rounds: &[Duration], quantile: f64) -> f64 {
    let mut rounds = rounds.to_vec();
    rounds.sort_unstable();
    rounds[(rounds.len() as f64 * quantile) as usize].as_nanos() as f64 / PAGES as f64
}

/// Runs `start` where its threads inherit the server's CPU; the caller goes on on the guest's.
fn on_server_cpu<T>(start: impl FnOnce() -> T) -> T {
    pin(SERVER);
    let started = start();
    pin(GUEST);
    started
}

fn pin(cpu: usize) {
    let mut only = CpuSet::new();
    only.set(cpu);
    if sched_setaffinity(None, &only).is_err() {
        eprintln!("CPU {cpu} is not to be had: the numbers have the scheduler in them");
    }
}

fn uffd() -> Uffd {
    let needed =
        Features::PAGEFAULT_FLAG_WP | Features::POISON | Features::MINOR_SHMEM | Features::WP_HUGETLBFS_SHMEM;
    OpenOptions::new().require(needed).open().expect("this benchmark needs userfaultfd")
}

/// Writes every page, so that each is in the page cache.
fn fill(mapping: &Mapping) {
    for page in 0..PAGES {
        mapping.word(page * 4096).expect("inside").store(page, Relaxed);
    }
}

/// A loop of nothing but system calls.
struct Bare {
    mapping: Mapping,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Bare {
    fn start(spin: Duration) -> Self {
        let file = memfd("bare", BYTES, PageSize::Size4K).expect("a file");
        let mapping = Mapping::shared(&file, 0, BYTES, PageSize::Size4K).expect("a mapping");
        fill(&mapping);
        let uffd = uffd();
        mapping.register(&uffd, RegisterModes::all()).expect("register");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = on_server_cpu(|| thread::spawn(move || serve(&uffd, spin, &stopped)));
        Self { mapping, stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Relaxed);
        self.mapping.zap(self.mapping.range()).expect("zap");
        // One more fault wakes it.
        black_box(self.mapping.word(0).expect("inside").load(Relaxed));
        self.thread.join().expect("the bare loop");
    }
}

/// `struct uffd_msg`: the event, and the address of a page fault.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    unused: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// `struct uffdio_continue`.
#[repr(C)]
struct Continue {
    start: u64,
    bytes: u64,
    mode: u64,
    mapped: i64,
}

const UFFDIO_CONTINUE: u64 = 0xc020_aa07;

fn serve(uffd: &Uffd, spin: Duration, stop: &AtomicBool) {
    let fd = uffd.as_fd().as_raw_fd();
    let mut messages = [Message { event: 0, unused: [0; 7], flags: 0, address: 0, thread: 0 }; 32];
    let mut quiet_since = None;
    while !stop.load(Relaxed) {
        // SAFETY: the buffer is that long, and any bytes are a message.
        let read = unsafe { libc::read(fd, messages.as_mut_ptr().cast(), size_of_val(&messages)) };
        let count = usize::try_from(read).unwrap_or(0) / size_of::<Message>();
        for message in &messages[..count] {
            let mut argument = Continue { start: message.address & !4095, bytes: 4096, mode: 0, mapped: 0 };
            // SAFETY: the structure is the one that the call takes, and the memory is a guest's.
            let done = unsafe { libc::ioctl(fd, UFFDIO_CONTINUE, &raw mut argument) };
            assert_eq!((done, argument.mapped), (0, 4096));
        }
        if count > 0 {
            quiet_since = None;
            continue;
        }
        let now = Instant::now();
        if now - *quiet_since.get_or_insert(now) < spin {
            std::hint::spin_loop();
            continue;
        }
        let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one live structure.
        unsafe { libc::poll(&raw mut polled, 1, -1) };
        quiet_since = None;
    }
}

/// The engine, the memory object and its worker.
struct Served {
    mapping: Arc<Mapping>,
    object: Arc<MemoryObject>,
    workers: Workers,
}

impl Served {
    fn start(idle: ServeOptions) -> Self {
        let object = MemoryObject::shared(ObjectOptions::new(BYTES)).expect("an object");
        let file = object.file().expect("a file");
        let mapping =
            Arc::new(Mapping::shared_unreserved(file, 0, BYTES, PageSize::Size4K).expect("a mapping"));
        let tables: UffdMmu<ObjectPage> =
            UffdMmu::new(Arc::clone(&mapping), Backing::Shared, vec![uffd()], 1).expect("tables");
        let mmu = Arc::new(GuestMmu::new(tables, Policy::default()));
        let base = mapping.range().start;
        mmu.create_slot(Memslot::new(SlotId(0), Gfn::new(0), PAGES, base)).expect("a slot");
        object.attach(base, Arc::clone(&mmu) as Arc<dyn Notifier>);
        let view = Arc::new(object.view(base));
        let report = |report| panic!("{report:?}");
        let workers = on_server_cpu(|| Workers::start(&mmu, &view, idle, report).expect("workers"));
        fill(&mapping);
        Self { mapping, object, workers }
    }

    fn stop(self) {
        self.workers.stop().expect("the workers");
        self.object.detach_all();
    }
}
