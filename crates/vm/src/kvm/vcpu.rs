//! A vCPU: set up for 64-bit code at CPL 3, run until the program ends or something stops it.
//!
//! It starts where the program starts, with no boot code. CPL 3, because some kinds of KVM interpret CPL 0 code and
//! no guest needs more; RFLAGS.IOPL is 3, so that `out` works there. There is no interrupt controller and no IDT: any
//! exception ends the vCPU (shutdown), and so is seen.

use core::sync::atomic::AtomicU8;
use core::sync::atomic::Ordering::SeqCst;

use std::io;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::tables::{CODE_SELECTOR, DATA_SELECTOR, GDT};
use crate::error::VmError;
use crate::layout::VcpuBlock;
use crate::program::EXIT_PORT;
use crate::signals::{self, Runner, Target};
use crate::system::{MANAGED_GPA, Plan, SYSTEM_GPA};

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_IOPL_3: u64 = 3 << 12;

/// How a vCPU left the guest for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// The program ended by itself.
    Ended,
    /// A signal of ours, see the block's signal state; for a kick this is the frame that the program was at.
    Signal { frame: u64 },
    /// KVM could not get a page.
    NoPage { frame: u64, poisoned: bool },
    /// Anything else.
    Died { what: String, frame: u64 },
}

/// A vCPU that has not run yet, or is running on its thread.
#[derive(Debug)]
pub(crate) struct KvmVcpu {
    fd: VcpuFd,
}

impl KvmVcpu {
    /// Points `fd` at the program's entry.
    pub(super) fn new(fd: VcpuFd, index: usize, plan: &Plan) -> Result<Self, VmError> {
        let mut sregs = fd.get_sregs().map_err(VmError::kvm("read a vCPU's segments"))?;
        sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
        sregs.cr3 = SYSTEM_GPA + plan.tables as u64;
        sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
        sregs.efer = EFER_LME | EFER_LMA;
        sregs.gdt = kvm_dtable { base: GDT.0, limit: GDT.1, ..Default::default() };
        sregs.cs = segment(CODE_SELECTOR, 0b1011, true);
        let data = segment(DATA_SELECTOR, 0b0011, false);
        (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
        fd.set_sregs(&sregs).map_err(VmError::kvm("set a vCPU's segments"))?;
        let regs = kvm_regs {
            rip: SYSTEM_GPA + plan.code as u64,
            rdi: SYSTEM_GPA + plan.block(index) as u64,
            rsp: SYSTEM_GPA + plan.stack_top(index) as u64,
            rflags: RFLAGS_FIXED | RFLAGS_IOPL_3,
            ..Default::default()
        };
        fd.set_regs(&regs).map_err(VmError::kvm("set a vCPU's registers"))?;
        Ok(Self { fd })
    }

    /// Cycles per millisecond of the guest's time stamp counter, if KVM can tell.
    pub(crate) fn tsc_khz(&self) -> Option<u64> {
        self.fd.get_tsc_khz().ok().filter(|&khz| khz > 0).map(u64::from)
    }

    /// Its descriptor.
    pub(super) const fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Runs the program on the calling thread until it ends or cannot go on. Calls `exit` whenever `KVM_RUN`
    /// returns. `memory`: the managed memory's host addresses.
    pub(crate) fn run(
        &mut self,
        block: &VcpuBlock,
        memory: core::ops::Range<u64>,
        mut exit: impl FnMut(),
    ) -> Left {
        let immediate_exit: *const AtomicU8 = (&raw mut self.fd.get_kvm_run().immediate_exit).cast();
        let target = Target { block, memory, runner: Runner::Kvm { immediate_exit } };
        signals::with_target(&target, || {
            loop {
                if let Some(left) = self.run_once(block, &mut exit) {
                    return left;
                }
            }
        })
    }

    fn run_once(&mut self, block: &VcpuBlock, exit: &mut impl FnMut()) -> Option<Left> {
        let result = self.fd.run();
        // `MemoryFault` comes with EFAULT or EHWPOISON, which `kvm-ioctls` does not hand on.
        let poisoned = io::Error::last_os_error().raw_os_error() == Some(libc::EHWPOISON);
        exit();
        let what = match result {
            Ok(VcpuExit::IoOut(EXIT_PORT, _)) => return Some(Left::Ended),
            Ok(VcpuExit::MemoryFault { gpa, .. }) if gpa >= MANAGED_GPA => {
                return Some(Left::NoPage { frame: (gpa - MANAGED_GPA) >> 12, poisoned });
            }
            Ok(other) => format!("unexpected exit {other:?}"),
            Err(error) => match error.errno() {
                libc::EINTR | libc::EAGAIN => {
                    let ours = block.signal.cause.load(SeqCst) != 0 || block.stop.kick.load(SeqCst) != 0;
                    return ours.then(|| Left::Signal { frame: self.frame() });
                }
                libc::EFAULT => return Some(Left::NoPage { frame: self.frame(), poisoned: false }),
                libc::EHWPOISON => return Some(Left::NoPage { frame: self.frame(), poisoned: true }),
                _ => format!("KVM_RUN failed: {error}"),
            },
        };
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        Some(Left::Died { what: format!("{what}, RIP {rip:#x}"), frame: self.frame() })
    }

    /// The frame that the program is at: it keeps it in R12.
    fn frame(&self) -> u64 {
        self.fd.get_regs().map_or(0, |regs| regs.r12)
    }
}

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
