//! The serial port, Galvan's console on headless machines.
//!
//! Owns COM1 (or the port that `com1=` names) from the first instruction on; dom0 does not see it.

use core::sync::atomic::{AtomicU16, Ordering};

use galvan_base::sync::RankedLock;
use uart_16550::{BaudRate, Config, Uart16550, backend::PioBackend};

/// Where COM1 is.
pub const COM1: u16 = 0x3f8;

/// How often a full FIFO is tried again before the byte is dropped: at 9600 baud a 16-byte FIFO
/// needs about 17 ms; a port access takes about a microsecond.
const PATIENCE: u32 = 100_000;

/// The port in use, 0 before there is one.
static BASE: AtomicU16 = AtomicU16::new(0);

static UART: RankedLock<
    Option<Uart16550<PioBackend>>,
    { galvan_base::sync::rank::CONSOLE_DEVICE },
> = RankedLock::new(None);

/// Takes hold of the port at `base`, if there is one there.
pub fn init(base: u16, baud: u32) -> bool {
    // SAFETY: nobody else in this program uses the port, and dom0 is denied it.
    let Ok(mut uart) = (unsafe { Uart16550::new_port(base) }) else {
        return false;
    };
    let config = Config {
        baud_rate: BaudRate::from_integer(baud),
        check_cts_before_sending: false,
        ..Config::DEFAULT
    };
    if !uart.check_present() || uart.init(config).is_err() {
        return false;
    }
    *UART.lock() = Some(uart);
    BASE.store(base, Ordering::Relaxed);
    true
}

/// Writes text, with line feeds turned into carriage return and line feed. Text is dropped when
/// the port stops taking it.
pub fn write(text: &[u8]) {
    let mut guard = UART.lock();
    let Some(uart) = guard.as_mut() else { return };
    for &b in text {
        if b == b'\n' {
            put(uart, b'\r');
        }
        put(uart, b);
    }
}

/// Where the port in use is.
pub fn base() -> Option<u16> {
    match BASE.load(Ordering::Relaxed) {
        0 => None,
        base => Some(base),
    }
}

/// Lets the port interrupt when something was received.
pub fn listen() {
    if let Some(uart) = UART.lock().as_mut() {
        uart.enable_interrupts(uart_16550::spec::registers::IER::DATA_READY);
    }
}

/// Takes a received byte.
pub fn read() -> Option<u8> {
    UART.lock().as_mut()?.try_receive_byte().ok()
}

/// Writes without regard to who holds the lock: for the last words of a machine.
///
/// # Safety
/// No other CPU may go on after this.
pub unsafe fn write_in_panic(text: &[u8]) {
    for _ in 0..PATIENCE {
        if let Some(mut guard) = UART.try_lock() {
            if let Some(uart) = guard.as_mut() {
                for &b in text {
                    if b == b'\n' {
                        put(uart, b'\r');
                    }
                    put(uart, b);
                }
            }
            return;
        }
        core::hint::spin_loop();
    }
    // The holder is not coming back: the registers may be used without the lock.
    let base = base().unwrap_or(COM1);
    for &b in text {
        for _ in 0..PATIENCE {
            // SAFETY: reading the line status and writing the transmit register of a UART.
            unsafe {
                if crate::cpu::port_in(base + 5, 1) & 0x20 != 0 {
                    crate::cpu::port_out(base, 1, u32::from(b));
                    break;
                }
            }
        }
    }
}

fn put(uart: &mut Uart16550<PioBackend>, b: u8) {
    for _ in 0..PATIENCE {
        if uart.try_send_byte(b).is_ok() {
            return;
        }
        core::hint::spin_loop();
    }
}
