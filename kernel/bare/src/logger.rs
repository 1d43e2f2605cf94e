//! The log: every line goes to the console ring, the serial port and the screen.

use core::fmt::Write;

use galvan_kernel::console::ConsoleRing;
use log::{Level, LevelFilter, Log, Metadata, Record};

/// The ring that `xl dmesg` reads.
pub static RING: ConsoleRing = ConsoleRing::new();

struct Logger;

static LOGGER: Logger = Logger;

/// A line under construction; longer ones are cut.
struct Line {
    text: [u8; 256],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        let n = s.len().min(self.text.len() - 1 - self.len);
        self.text[self.len..self.len + n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}

impl Log for Logger {
    fn enabled(&self, m: &Metadata<'_>) -> bool {
        m.level() <= log::max_level()
    }

    fn log(&self, r: &Record<'_>) {
        if !self.enabled(r.metadata()) {
            return;
        }
        let mut line = Line {
            text: [0; 256],
            len: 0,
        };
        let us = crate::clock::now_ns() / 1000;
        let mark = match r.level() {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            _ => "",
        };
        let _ = write!(
            line,
            "(galvan) [{:5}.{:06}] {mark}{}",
            us / 1_000_000,
            us % 1_000_000,
            r.args()
        );
        line.text[line.len] = b'\n';
        emit(&line.text[..=line.len]);
    }

    fn flush(&self) {}
}

/// Writes text to all consoles.
pub fn emit(text: &[u8]) {
    RING.write(text);
    crate::serial::write(text);
    crate::screen::write(text);
}

/// Starts logging at this level.
pub fn init(level: LevelFilter) {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(level);
    }
}
