//! What the judge says, through port 0xe9 of the emulator; and the end of the machine.

// UNSAFETY: ports of the emulator, and the command line that the boot sector left in memory.
#![expect(unsafe_code)]

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use x86_64::instructions::port::Port;

use crate::boot::COMMAND_LINE;

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the port takes bytes to print, and does nothing else.
            unsafe { Port::<u8>::new(0xe9).write(byte) };
        }
        Ok(())
    }
}

static SPEAKING: AtomicBool = AtomicBool::new(false);

/// Prints one line; lines of several CPUs do not mix.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    while SPEAKING.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let _ = writeln!(Console, "{text}");
    SPEAKING.store(false, Ordering::Release);
}

/// Prints one line.
macro_rules! say {
    ($($part:tt)*) => { $crate::console::line(format_args!($($part)*)) };
}
pub(crate) use say;

/// The words of the command line.
pub(crate) fn command_line() -> impl Iterator<Item = &'static str> {
    let start = core::ptr::with_exposed_provenance::<u8>(COMMAND_LINE as usize);
    // SAFETY: the boot sector put one sector of the disk there, and nobody writes there after.
    let sector = unsafe { core::slice::from_raw_parts(start, 512) };
    let end = sector.iter().position(|byte| *byte == 0).unwrap_or(sector.len());
    core::str::from_utf8(&sector[..end]).unwrap_or("").split_ascii_whitespace()
}

/// Ends the machine. What was said last is the verdict.
pub(crate) fn end() -> ! {
    // SAFETY: (1) QEMU's isa-debug-exit; (2) Bochs' way out, which other machines do not have. Nothing else is at either.
    unsafe {
        Port::<u32>::new(0xf4).write(0);
        for byte in b"Shutdown" {
            Port::<u8>::new(0x8900).write(*byte);
        }
    }
    loop {
        x86_64::instructions::hlt();
    }
}
