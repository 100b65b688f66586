//! Judges for machines that Rust is not at hand for: arm64 stage 2 and RISC-V G-stage, on QEMU.
//!
//! This program makes tables with the crate, puts them into an image of a machine's memory beside a few lines of
//! assembly, and lets QEMU run it: the assembly enters a guest for each access of a list, and sends back how each came out and
//! what became of the tables. Then it compares with what the crate says of the same accesses.
//!
//! `judge-images arm64 DIRECTORY` or `judge-images riscv DIRECTORY`, with a directory for files. It needs the emulator
//! and the cross assembler of that architecture.

mod arm64;
mod cases;
mod image;
mod machine;
mod memory;
mod riscv;

use anyhow::{Result, bail};

fn main() -> Result<()> {
    let arguments = std::env::args().collect::<Vec<_>>();
    let [_, architecture, directory] = arguments.as_slice() else {
        bail!("say arm64 or riscv, and a directory");
    };
    match architecture.as_str() {
        "arm64" => arm64::judge(directory.as_ref()),
        "riscv" => riscv::judge(directory.as_ref()),
        other => bail!("say arm64 or riscv, not {other:?}"),
    }
}
