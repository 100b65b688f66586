//! RISC-V Sv39x4 and Sv48x4: QEMU's `virt` with the H extension. Registers and causes: privileged specification.

use std::path::Path;

use afterimage_mmu::{Access, Pfn};
use afterimage_stage2::{Format, Sv39x4, Sv48x4};
use anyhow::{Result, bail};

use crate::cases::{self, Marks, Outcome, Report};
use crate::image::Image;
use crate::machine::{self, Machine};

struct RiscV<'d> {
    directory: &'d Path,
}

/// Judges both formats. The emulator sets the marks itself.
pub(crate) fn judge(directory: &Path) -> Result<()> {
    let machine = RiscV { directory };
    let accesses =
        cases::judge::<Sv39x4>(&machine, Marks::Set)? + cases::judge::<Sv48x4>(&machine, Marks::Set)?;
    println!("  Sv39x4 and Sv48x4: {accesses} accesses are as the crate says");
    // V, W, X, U, frame.
    cases::must_notice::<Sv39x4>(&machine, &[1, 1 << 2, 1 << 3, 1 << 4, 1 << 11])
}

impl Machine for RiscV<'_> {
    fn base(&self) -> u64 {
        0x8000_0000
    }

    fn program(&self) -> Result<Vec<u8>> {
        machine::assemble(
            self.directory,
            "riscv64-linux-gnu",
            &["-march=rv64gc"],
            include_str!("../riscv.s"),
            self.base(),
        )
    }

    fn returning(&self, value: u16) -> u64 {
        const LUI_A1: u64 = 0x5b7;
        const RET: u64 = 0x8067;
        LUI_A1 | u64::from(value) << 12 | RET << 32
    }

    fn returned(&self, value: u16) -> u64 {
        u64::from(value) << 12
    }

    fn registers<F: Format>(&self, root: Pfn, _marks: Marks) -> (u64, u64) {
        // hgatp: 8 is Sv39x4, 9 Sv48x4. menvcfg: memory types in the entries (Svpbmt).
        let mode = u64::from(F::ROOT_LEVEL.number()) + 5;
        (mode << 60 | root.as_u64(), 1 << 62)
    }

    /// QEMU 7.2 takes the highest bit for a sign, which it is not here, and stops every access that has it.
    fn address_bits<F: Format>(&self) -> u32 {
        F::GPA_BITS - 1
    }

    fn report(&self, record: &[u64]) -> Result<Report> {
        let (cause, gpa) = (record[4], record[5] << 2);
        let access = match cause {
            10 => return Ok(Report { outcome: Outcome::Done, stopped: None }),
            20 => Access::EXEC,
            21 => Access::READ,
            23 => Access::WRITE,
            _ => bail!("the guest was left for cause {cause}, at {:#x}", record[6]),
        };
        // A guest page fault does not say why.
        Ok(Report { outcome: Outcome::Absent(None), stopped: Some((access, gpa)) })
    }

    fn run(&self, image: &Image) -> Result<Vec<u8>> {
        let options = ["-M", "virt", "-cpu", "rv64,h=true,svpbmt=true", "-bios", "none", "-m", "256M"];
        machine::qemu(self.directory, "qemu-system-riscv64", &options, image)
    }
}
