//! What an architecture adds: its program, its registers, its way to say how an access came out; and QEMU.

use std::fs;
use std::path::Path;
use std::process::Command;

use afterimage_mmu::Pfn;
use afterimage_stage2::Format;
use anyhow::{Context, Result, ensure};

use crate::cases::{Marks, Report};
use crate::image::Image;

/// A machine that walks tables.
pub(crate) trait Machine {
    /// Where images are loaded.
    fn base(&self) -> u64;

    /// The program, assembled for that address.
    fn program(&self) -> Result<Vec<u8>>;

    /// Two instructions: put `value` into the guest's register, return.
    fn returning(&self, value: u16) -> u64;

    /// What is in the guest's register then.
    fn returned(&self, value: u16) -> u64;

    /// The root register, and the other that the program is given.
    fn registers<F: Format>(&self, root: Pfn, marks: Marks) -> (u64, u64);

    /// Guest-physical addresses that the emulator gets right have as many bits.
    fn address_bits<F: Format>(&self) -> u32 {
        F::GPA_BITS
    }

    /// Reads a record that the program filled.
    fn report(&self, record: &[u64]) -> Result<Report>;

    /// Runs the image; what the machine sent.
    fn run(&self, image: &Image) -> Result<Vec<u8>>;
}

fn succeed(command: &mut Command) -> Result<()> {
    let output =
        command.output().with_context(|| format!("{command:?} cannot be started: is it installed?"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr),
    );
    Ok(())
}

/// Assembles `source` to run at `base`.
pub(crate) fn assemble(
    directory: &Path,
    prefix: &str,
    options: &[&str],
    source: &str,
    base: u64,
) -> Result<Vec<u8>> {
    let file = |name: &str| directory.join(name);
    fs::write(file("program.s"), source)?;
    succeed(
        Command::new(format!("{prefix}-as"))
            .args(options)
            .arg("-o")
            .args([file("program.o"), file("program.s")]),
    )?;
    succeed(
        Command::new(format!("{prefix}-ld"))
            .args(["-e", "start", &format!("-Ttext={base:#x}"), "-o"])
            .args([file("program.elf"), file("program.o")]),
    )?;
    succeed(
        Command::new(format!("{prefix}-objcopy"))
            .args(["-O", "binary", "-j", ".text"])
            .args([file("program.elf"), file("program")]),
    )?;
    Ok(fs::read(file("program"))?)
}

/// Runs QEMU until the machine turns itself off, for a minute at most; what came out of its UART.
pub(crate) fn qemu(directory: &Path, emulator: &str, options: &[&str], image: &Image) -> Result<Vec<u8>> {
    let (memory, uart) = (directory.join("memory"), directory.join("uart"));
    fs::write(&memory, &image.bytes)?;
    let path = |path: &Path| path.display().to_string();
    succeed(
        Command::new("timeout")
            .args(["--kill-after=5", "60", emulator])
            .args(["-display", "none", "-nodefaults", "-monitor", "none", "-no-reboot"])
            .args(options)
            .args(["-serial", &format!("file:{}", path(&uart))])
            .args([
                "-device",
                &format!("loader,file={},addr={:#x},force-raw=on,cpu-num=0", path(&memory), image.base),
            ]),
    )?;
    Ok(fs::read(uart)?)
}
