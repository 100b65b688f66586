//! Arm VMSAv8-64 stage 2: QEMU's `virt` with EL2. Registers and syndromes: Arm ARM, chapters D17 and D19.

use std::path::Path;

use afterimage_mmu::{Access, FRAME_BYTES, Level, Pfn};
use afterimage_stage2::{Format, Vmsa};
use anyhow::{Result, bail};

use crate::cases::{self, Marks, Outcome, Report};
use crate::image::Image;
use crate::machine::{self, Machine};

struct Arm64<'d> {
    directory: &'d Path,
}

/// Judges the tables for several sizes of address: each begins its walk in another way.
pub(crate) fn judge(directory: &Path) -> Result<()> {
    let machine = Arm64 { directory };
    let mut accesses = 0;
    for marks in [Marks::Set, Marks::Left] {
        accesses += cases::judge::<Vmsa<32>>(&machine, marks)?;
        accesses += cases::judge::<Vmsa<34>>(&machine, marks)?;
        accesses += cases::judge::<Vmsa<36>>(&machine, marks)?;
        accesses += cases::judge::<Vmsa<39>>(&machine, marks)?;
        accesses += cases::judge::<Vmsa<40>>(&machine, marks)?;
        accesses += cases::judge::<Vmsa<43>>(&machine, marks)?;
        accesses += cases::judge::<Vmsa<44>>(&machine, marks)?;
        accesses += cases::judge::<Vmsa<48>>(&machine, marks)?;
    }
    println!("  VMSAv8-64 stage 2, 32 to 48 bits: {accesses} accesses are as the crate says");
    // Valid, write, accessed, frame, never execute.
    cases::must_notice::<Vmsa<40>>(&machine, &[1, 1 << 7, 1 << 10, 1 << 13, 1 << 54])
}

impl Machine for Arm64<'_> {
    fn base(&self) -> u64 {
        0x4400_0000
    }

    fn program(&self) -> Result<Vec<u8>> {
        machine::assemble(self.directory, "aarch64-linux-gnu", &[], include_str!("../arm64.s"), self.base())
    }

    fn returning(&self, value: u16) -> u64 {
        const MOVZ_X1: u64 = 0xd280_0001;
        const RET: u64 = 0xd65f_03c0;
        MOVZ_X1 | u64::from(value) << 5 | RET << 32
    }

    fn returned(&self, value: u16) -> u64 {
        u64::from(value)
    }

    fn registers<F: Format>(&self, root: Pfn, marks: Marks) -> (u64, u64) {
        let size = 64 - u64::from(F::GPA_BITS);
        // The level where the walk begins: 0 is Arm's level 2.
        let start = u64::from(F::ROOT_LEVEL.number()) - 2;
        // Inner shareable, write-back; 48 bits of physical address; a reserved bit that is one.
        const REST: u64 = 1 << 8 | 1 << 10 | 3 << 12 | 5 << 16 | 1 << 31;
        const MARKS: u64 = 1 << 21 | 1 << 22;
        let control = size | start << 6 | REST | if marks == Marks::Set { MARKS } else { 0 };
        (root.as_u64() * FRAME_BYTES, control)
    }

    fn report(&self, record: &[u64]) -> Result<Report> {
        let (syndrome, gpa) = (record[4], (record[5] & !0xf) << 8);
        let level = Level::new(4 - (syndrome & 3) as u8);
        let access = match syndrome >> 26 {
            0x16 => return Ok(Report { outcome: Outcome::Done, stopped: None }),
            0x20 => Access::EXEC,
            0x24 if syndrome & 1 << 6 != 0 => Access::WRITE,
            0x24 => Access::READ,
            _ => bail!("the guest was left with syndrome {syndrome:#x}"),
        };
        let outcome = match syndrome >> 2 & 0xf {
            1 => Outcome::Absent(level),
            2 => Outcome::Unused(level),
            3 => Outcome::Forbidden(level),
            _ => bail!("the access was stopped with syndrome {syndrome:#x}"),
        };
        Ok(Report { outcome, stopped: Some((access, gpa)) })
    }

    fn run(&self, image: &Image) -> Result<Vec<u8>> {
        let options = ["-M", "virt,virtualization=on,gic-version=3", "-cpu", "max", "-m", "256M"];
        machine::qemu(self.directory, "qemu-system-aarch64", &options, image)
    }
}
