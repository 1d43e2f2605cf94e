//! The end of the machine, told as well as possible: reason, registers, a backtrace with names, the
//! domain that was running; then a reboot, or a stop with `noreboot`.

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use elf::ElfBytes;
use elf::endian::LittleEndian;
use spin::Once;

/// The image's ELF file, for symbol names.
static SYMBOLS: Once<&'static [u8]> = Once::new();
/// The CPU that reports, + 1.
static REPORTER: AtomicU32 = AtomicU32::new(0);
/// Stay, instead of rebooting.
pub static NOREBOOT: AtomicBool = AtomicBool::new(false);

/// Makes the image's ELF file known.
pub fn set_symbols(file: &'static [u8]) {
    SYMBOLS.call_once(|| file);
}

struct LastWords;

impl Write for LastWords {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        // SAFETY: the machine does not go on after a panic.
        unsafe { crate::serial::write_in_panic(s.as_bytes()) };
        crate::screen::write_in_panic(s.as_bytes());
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    begin();
    let _ = writeln!(LastWords, "\n*** Galvan has panicked: {}", info.message());
    if let Some(at) = info.location() {
        let _ = writeln!(LastWords, "    at {at}");
    }
    let rsp: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) rsp, options(nomem, nostack)) };
    backtrace(0, rsp);
    place();
    end()
}

/// Ends because of what the machine is or what it was told, and not by a fault of Galvan's.
pub fn give_up(why: fmt::Arguments<'_>) -> ! {
    begin();
    let _ = writeln!(LastWords, "\n*** Galvan cannot start dom0: {why}");
    end()
}

/// An exception in the hypervisor itself.
pub fn exception(frame: &crate::traps::Frame) -> ! {
    begin();
    let _ = writeln!(LastWords, "\n*** Galvan has crashed: {frame}");
    let (rip, rsp) = frame.rip_rsp();
    backtrace(rip, rsp);
    place();
    end()
}

/// One CPU reports; the others stop.
fn begin() {
    x86_64::instructions::interrupts::disable();
    let me = crate::smp::cpu_or_zero() + 1;
    match REPORTER.compare_exchange(0, me, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => crate::apic::stop_others(),
        Err(other) if other == me => crate::cpu::halt_forever(),
        Err(_) => crate::cpu::halt_forever(),
    }
}

/// Where it happened.
fn place() {
    let _ = writeln!(
        LastWords,
        "    on CPU {}, running {}",
        crate::smp::cpu_or_zero(),
        crate::platform::running()
    );
}

fn end() -> ! {
    if NOREBOOT.load(Ordering::Relaxed) {
        let _ = writeln!(LastWords, "*** Stopped (noreboot).");
        crate::cpu::halt_forever();
    }
    let _ = writeln!(LastWords, "*** Rebooting in 5 seconds.");
    crate::clock::spin_ns(5_000_000_000);
    crate::platform::reset()
}

/// Words of the stack that are looked at, and lines that are printed.
const DEPTH: (u64, u32) = (1024, 40);

/// Prints what on the stack from `rsp` on looks like return addresses. There are no frame pointers, which would cost
/// some instructions in each exit of a guest: what an earlier call has left in a hole of the stack is among them.
fn backtrace(rip: u64, rsp: u64) {
    let _ = writeln!(LastWords, "Call trace (return addresses on the stack):");
    if rip != 0 {
        line(rip);
    }
    let mut lines = 0;
    for n in 0..DEPTH.0 {
        let at = (rsp & !7) + n * 8;
        if lines == DEPTH.1 || !on_a_stack(at) {
            break;
        }
        // SAFETY: an aligned address inside a mapped stack.
        let word = unsafe { (at as *const u64).read() };
        if follows_a_call(word) {
            line(word - 1);
            lines += 1;
        }
    }
}

/// Whether the instruction that ends before `address` may be a CALL, and the address is in a function.
fn follows_a_call(address: u64) -> bool {
    // The image is in the last 2 GiB (`code-model=kernel`).
    if address < !0 << 31 {
        return false;
    }
    let Some((_, offset)) = symbol(address - 1) else {
        return false;
    };
    // SAFETY: of a function that is so long, mapped for as long as there is Galvan.
    let byte = |back: u64| unsafe { ((address - back) as *const u8).read() };
    let is = |back: u64| match back {
        _ if offset + 1 < back => false,
        // CALL rel32, or CALL by register or memory (Intel SDM "CALL—Call Procedure").
        5 if byte(5) == 0xe8 => true,
        _ => byte(back) == 0xff && byte(back - 1) >> 3 & 7 == 2,
    };
    (2..=7).any(is)
}

/// Whether a word at `a` is inside one of this CPU's stacks, or the loader's.
fn on_a_stack(a: u64) -> bool {
    let in_cpu_area = crate::percpu::stack_contains(a);
    in_cpu_area
        || (a >= galvan_boot::info::DIRECT_MAP_BASE
            && a < galvan_boot::info::DIRECT_MAP_BASE + (1 << 40)
            && crate::smp::cpu_or_zero() == 0
            && !crate::smp::own_stack())
}

fn line(address: u64) {
    match symbol(address) {
        Some((name, offset)) => {
            let _ = writeln!(
                LastWords,
                "  {address:016x} {:#}+{offset:#x}",
                rustc_demangle::demangle(name)
            );
        }
        None => {
            let _ = writeln!(LastWords, "  {address:016x}");
        }
    }
}

/// The function that holds `address`, and how far into it.
fn symbol(address: u64) -> Option<(&'static str, u64)> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(SYMBOLS.get()?).ok()?;
    let (table, names) = file.symbol_table().ok()??;
    let best = table
        .iter()
        .filter(|s| s.st_value <= address && s.st_symtype() == elf::abi::STT_FUNC)
        .max_by_key(|s| s.st_value)
        // Assembly may leave out its length.
        .filter(|s| s.st_size == 0 || address - s.st_value < s.st_size)?;
    let name = names.get(best.st_name as usize).ok()?;
    Some((name, address - best.st_value))
}

/// Whether some CPU is reporting the end of the machine.
pub fn is_reporting() -> bool {
    REPORTER.load(Ordering::Relaxed) != 0
}
