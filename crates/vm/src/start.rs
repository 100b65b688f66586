//! From a specification to running vCPUs.

use core::ops::Range;
use core::sync::atomic::Ordering::Relaxed;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use afterimage_mmu::Gfn;

use crate::error::VmError;
use crate::guest::{State, frame_at};
use crate::kvm::{KvmVcpu, KvmVm, Left, tables};
use crate::layout::{Ended, WorkloadNumber, fold};
use crate::program::{Host, Program};
use crate::report::VcpuEnd;
use crate::signals::{self, CAUSE_BUS, CAUSE_KICK};
use crate::soft::Processor;
use crate::spec::{GuestKind, GuestSpec, Workload};
use crate::system::{MANAGED_GPA, Plan, SYSTEM_GPA, SystemMemory};
use crate::thread::Code;
use crate::tsc;

/// Starts `spec`; see [`Guest::start`](crate::Guest::start).
pub(crate) fn start(spec: GuestSpec, initial: impl FnMut(Gfn) -> [u64; 3]) -> Result<Started, VmError> {
    spec.check()?;
    let host = match spec.kind {
        GuestKind::Kvm => Host::Kvm,
        GuestKind::Thread => Host::Thread,
        GuestKind::Soft => return Err(VmError::spec("a software guest is started on its machine")),
    };
    signals::install()?;
    let program = Program::assemble(host).map_err(|error| VmError::Assemble { what: error.to_string() })?;
    let managed_bytes = spec.memory.bytes() as u64;
    let (table_pages, code_bytes) = match host {
        Host::Kvm => (tables::pages(managed_bytes), program.code.len()),
        Host::Thread => (0, 0),
    };
    let plan = Plan::new(spec.vcpus, spec.memory.frames(), table_pages, code_bytes);
    let system = Arc::new(SystemMemory::new(plan)?);
    fill_expected(&system, initial);
    let bases = match host {
        Host::Kvm => Bases { system: SYSTEM_GPA, memory: MANAGED_GPA },
        Host::Thread => Bases { system: system.address(0), memory: spec.memory.addresses().start },
    };
    for vcpu in 0..spec.vcpus {
        fill_block(&system, &spec, vcpu, bases);
    }
    match host {
        Host::Kvm => {
            system.write(system.plan.tables, &tables::build(managed_bytes));
            system.write(system.plan.code, &program.code);
            let (vm, vcpus) = KvmVm::new(&system, spec.memory, spec.dirty_log)?;
            let khz = vcpus[0].tsc_khz().unwrap_or_else(tsc::khz);
            let state = Arc::new(State::new(&spec, system, Some(vm), khz));
            Ok(spawn(state, vcpus.into_iter().map(Vcpu::Kvm)))
        }
        Host::Thread => {
            let code = Arc::new(Code::map(&program)?);
            let state = Arc::new(State::new(&spec, system, None, tsc::khz()));
            Ok(spawn(state, (0..spec.vcpus).map(|_| Vcpu::Thread(Arc::clone(&code)))))
        }
    }
}

/// Starts `spec` on a software machine; see [`Guest::start_soft`](crate::Guest::start_soft).
pub(crate) fn start_soft(
    spec: GuestSpec,
    machine: Arc<dyn Processor>,
    initial: impl FnMut(Gfn) -> [u64; 3],
) -> Result<Started, VmError> {
    spec.check()?;
    if spec.kind != GuestKind::Soft {
        return Err(VmError::spec(format!("a {} guest does not run on a software machine", spec.kind)));
    }
    let system = Arc::new(SystemMemory::new(Plan::new(spec.vcpus, spec.memory.frames(), 0, 0))?);
    fill_expected(&system, initial);
    // Its program reaches the structures by itself.
    let bases = Bases { system: 0, memory: 0 };
    for vcpu in 0..spec.vcpus {
        fill_block(&system, &spec, vcpu, bases);
    }
    let state = Arc::new(State::new(&spec, system, None, tsc::khz()));
    Ok(spawn(state, (0..spec.vcpus).map(|_| Vcpu::Soft(Arc::clone(&machine)))))
}

/// Where the guest sees system memory and managed memory.
#[derive(Clone, Copy)]
struct Bases {
    system: u64,
    memory: u64,
}

fn fill_expected(system: &SystemMemory, mut initial: impl FnMut(Gfn) -> [u64; 3]) {
    for page in 0..system.plan.pages {
        let words = initial(Gfn::new(page));
        if words == [0; 3] {
            // So are the entries; a table of zeros takes no memory.
            continue;
        }
        let [first, middle, last] = words;
        let expected = system.expected(page);
        expected.first.store(first, Relaxed);
        expected.rest.store(fold(middle, last), Relaxed);
    }
}

fn fill_block(system: &SystemMemory, spec: &GuestSpec, vcpu: usize, bases: Bases) {
    let (block, plan) = (system.block(vcpu), &system.plan);
    let set = |field: &core::sync::atomic::AtomicU64, value: u64| field.store(value, Relaxed);
    let at = |offset: usize| bases.system + offset as u64;
    let (own_blocks, own_pages) = spec.owned_by(vcpu);
    set(&block.memory, bases.memory);
    set(&block.expected, at(plan.expected(0)));
    set(&block.windows, at(plan.windows()));
    set(&block.mailbox, at(plan.mailbox(vcpu)));
    set(&block.mailboxes, at(plan.mailbox(0)));
    set(&block.outside, at(plan.histogram(vcpu, false)));
    set(&block.inside, at(plan.histogram(vcpu, true)));
    set(&block.limit, spec.max_accesses.unwrap_or(u64::MAX));
    set(&block.pages, plan.pages);
    set(&block.vcpus, spec.vcpus as u64);
    set(&block.owner, vcpu as u64);
    set(&block.block_pages, spec.block_frames);
    set(&block.block_shift, u64::from(spec.block_frames.trailing_zeros()));
    set(&block.own_pages, own_pages);
    set(&block.own_blocks, own_blocks);
    set(&block.tag_check, u64::from(spec.tag_check));
    set(&block.write_share, threshold(spec.write_share));
    set(&block.later_write_share, threshold(spec.write_share));
    set(&block.discard_share, threshold(spec.discards.share));
    // A vCPU without a whole block has nothing to give up.
    let discard_every = if own_blocks > 0 { spec.discards.every } else { 0 };
    set(&block.discard_every, discard_every);
    set(&block.discard_countdown, discard_every);
    set(&block.cross_every, spec.cross_every);
    set(&block.cross_countdown, spec.cross_every);
    set(&block.rng, mix(spec.seed.wrapping_add(vcpu as u64)) | 1);
    set(&block.version, 1);
    let number = match spec.workload {
        Workload::Stamp { locality } => {
            if let Some(locality) = locality {
                let pages = locality.pages.min(own_pages);
                set(&block.window_share, threshold(locality.probability));
                set(&block.window_pages, pages);
                set(&block.window_bases, own_pages - pages + 1);
                set(&block.window_stay, locality.accesses);
            }
            WorkloadNumber::Stamp
        }
        Workload::Scan => {
            set(&block.write_share, 0);
            WorkloadNumber::Scan
        }
        Workload::Hot { one_in, share } => {
            set(&block.hot_pages, (own_pages / one_in).max(1));
            set(&block.hot_share, threshold(share));
            WorkloadNumber::Hot
        }
    };
    set(&block.workload, number as u64);
}

/// The number that 32 random bits stay below with probability `share`.
fn threshold(share: f64) -> u64 {
    (share * (1_u64 << 32) as f64).round() as u64
}

/// Spreads neighbouring seeds over all 64 bits (the finaliser of SplitMix64).
fn mix(seed: u64) -> u64 {
    let seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

/// A guest's state, its threads, and whether all of them could be started. Those that could are to be stopped.
pub(crate) type Started = (Arc<State>, Vec<JoinHandle<()>>, Result<(), VmError>);

/// What runs one vCPU.
pub(crate) enum Vcpu {
    Kvm(KvmVcpu),
    Thread(Arc<Code>),
    Soft(Arc<dyn Processor>),
}

/// Starts a thread for each vCPU.
pub(crate) fn spawn(state: Arc<State>, vcpus: impl Iterator<Item = Vcpu>) -> Started {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    for (index, vcpu) in vcpus.enumerate() {
        let shared = Arc::clone(&state);
        let body = move || {
            let run = AssertUnwindSafe(|| vcpu.run(index, &shared));
            let end = catch_unwind(run)
                .unwrap_or_else(|_| VcpuEnd::Died { what: "its thread panicked".into(), gfn: Gfn::new(0) });
            shared.end(index, end);
        };
        match thread::Builder::new().name(format!("vcpu-{index}")).spawn(body) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                for missing in index..state.system.plan.vcpus {
                    state.end(missing, VcpuEnd::Stopped);
                }
                return (state, threads, Err(VmError::System { what: "start a vCPU's thread", error }));
            }
        }
    }
    (state, threads, Ok(()))
}

impl Vcpu {
    fn run(self, index: usize, state: &State) -> VcpuEnd {
        let block = state.system.block(index);
        let memory = state.memory.addresses();
        let count_exit = || {
            state.exits[index].fetch_add(1, Relaxed);
        };
        let left = match self {
            Self::Soft(machine) => return machine.run(index, state),
            Self::Kvm(mut vcpu) => vcpu.run(block, memory.clone(), count_exit),
            Self::Thread(code) => {
                code.run(block, memory.clone());
                count_exit();
                match block.signal.cause.load(Relaxed) {
                    0 => Left::Ended,
                    _ => Left::Signal { frame: block.signal.address.load(Relaxed) },
                }
            }
        };
        let end = match block.progress.ended.load(Relaxed) {
            ended if ended == Ended::Stopped as u64 => return VcpuEnd::Stopped,
            ended if ended == Ended::Limit as u64 => return VcpuEnd::Limit,
            _ => left,
        };
        let died = |what: &str, frame| VcpuEnd::Died { what: what.into(), gfn: Gfn::new(frame) };
        match end {
            Left::Ended => died("the program ended without saying why", 0),
            Left::Signal { frame } => signalled(block, &memory, frame),
            Left::NoPage { frame, poisoned: true } => VcpuEnd::Poisoned { gfn: Gfn::new(frame) },
            Left::NoPage { frame, poisoned: false } => VcpuEnd::Unresolved { gfn: Gfn::new(frame) },
            Left::Died { what, frame } => died(&what, frame),
        }
    }
}

/// The end of a vCPU that a signal got out of the guest. `frame`: where a kick found it.
fn signalled(block: &crate::layout::VcpuBlock, memory: &Range<u64>, frame: u64) -> VcpuEnd {
    let (cause, address) = (block.signal.cause.load(Relaxed), block.signal.address.load(Relaxed));
    if cause == CAUSE_BUS {
        let gfn = frame_at(address - memory.start);
        return match block.signal.code.load(Relaxed) as i32 {
            libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO => VcpuEnd::Poisoned { gfn },
            _ => VcpuEnd::Unresolved { gfn },
        };
    }
    debug_assert!(cause == CAUSE_KICK || cause == 0);
    VcpuEnd::Kicked { gfn: Gfn::new(frame) }
}
