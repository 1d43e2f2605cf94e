//! Lines of text: to the hypervisor's console as dom0, to its debug port (`xl dmesg`) as a guest.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use galvan_dom0_proto::xen::{CONSOLEIO_WRITE, HYPERVISOR_CONSOLE_IO, XEN_HVM_DEBUGCONS_IOPORT};

use crate::{cpu, hypercall};

static PRIVILEGED: AtomicBool = AtomicBool::new(false);

/// Whether this is dom0.
pub fn is_privileged() -> bool {
    PRIVILEGED.load(Ordering::Relaxed)
}

pub(crate) fn set_privileged(yes: bool) {
    PRIVILEGED.store(yes, Ordering::Relaxed);
}

/// A line that is being put together; written as a whole, so that nothing comes between.
struct Line {
    text: [u8; 240],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for &b in s.as_bytes() {
            if let Some(to) = self.text.get_mut(self.len) {
                *to = b;
                self.len += 1;
            }
        }
        Ok(())
    }
}

#[doc(hidden)]
pub fn print_line(args: fmt::Arguments<'_>) {
    let mut line = Line {
        text: [0; 240],
        len: 0,
    };
    let _ = line.write_fmt(args);
    line.len = line.len.min(239);
    let _ = line.write_str("\n");
    let text = &line.text[..line.len];
    if is_privileged() {
        hypercall::call(
            HYPERVISOR_CONSOLE_IO,
            [
                CONSOLEIO_WRITE.into(),
                text.len() as u64,
                text.as_ptr() as u64,
                0,
                0,
            ],
        );
    } else {
        for &b in text {
            cpu::outb(XEN_HVM_DEBUGCONS_IOPORT as u16, b);
        }
    }
}

/// Writes a line of at most 239 bytes.
#[macro_export]
macro_rules! println {
    ($($t:tt)*) => { $crate::console::print_line(format_args!($($t)*)) };
}
