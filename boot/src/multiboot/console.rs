//! What is said before the hypervisor has its own console: on the first serial port, and if it is
//! the last that is said, on a VGA's text screen as well.

use core::arch::asm;
use core::fmt::{self, Write};

const COM1: u16 = 0x3f8;
/// Polls of the line status before a port that takes nothing counts as absent.
const PATIENCE: u32 = 1 << 16;
/// The text memory of a VGA in colour mode, 80 columns.
const VGA: u64 = 0xb_8000;
const COLUMNS: usize = 80;
/// White on black.
const ATTRIBUTE: u16 = 0x0f00;

/// Says one line on the serial port.
pub fn say(line: impl fmt::Display) {
    let _ = writeln!(Serial, "galvan: {line}");
}

/// Says why the machine does not start, and stops.
pub fn fail(reason: impl fmt::Display) -> ! {
    say(&reason);
    let _ = write!(Vga(0), "galvan: {reason}. The machine is stopped.");
    loop {
        // SAFETY: interrupts are off and stay off; nothing is to happen any more.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Sets the port to 115200 bits a second, 8 bits, no parity, polled.
pub fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        outb(COM1 + register, value);
    }
}

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

fn put(byte: u8) {
    for _ in 0..PATIENCE {
        if inb(COM1 + 5) & 0x20 != 0 {
            break;
        }
    }
    outb(COM1, byte);
}

/// The screen from its first line on; the number of the next cell.
struct Vga(usize);

impl Write for Vga {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.0 = self.0.next_multiple_of(COLUMNS);
            } else if self.0 < COLUMNS * 25 {
                let cell = (VGA as *mut u16).wrapping_add(self.0);
                // SAFETY: inside the 4000 bytes of text memory, which nobody else uses; where there
                // is none, the addresses lead nowhere. They are below 4 GiB and so are mapped.
                unsafe { cell.write_volatile(ATTRIBUTE | u16::from(byte)) };
                self.0 += 1;
            }
        }
        Ok(())
    }
}

fn outb(port: u16, value: u8) {
    // SAFETY: only registers of the serial port are written, which is nobody else's now.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
}

fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: only the serial port's line status is read.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    };
    value
}
