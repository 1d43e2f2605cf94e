//! Start-up on the boot CPU.

use galvan_base::Mpa;
use galvan_boot::info::{BootInfo, PhysRange};
use spin::Once;

/// What the loader handed over, copied out of its memory.
static BOOT: Once<BootInfo> = Once::new();

/// The bytes of a physical range of the loader's, through the direct map.
fn bytes(r: PhysRange) -> &'static [u8] {
    // SAFETY: the loader mapped all memory at `DIRECT_MAP_BASE`, as our own tables do; what the
    // hand-over refers to is not written after it.
    unsafe {
        core::slice::from_raw_parts(
            crate::paging::direct_ptr(Mpa::new_truncate(r.start)),
            r.len as usize,
        )
    }
}

/// The entry point of the image.
#[unsafe(no_mangle)]
extern "C" fn _start(info: *const BootInfo) -> ! {
    crate::serial::init(crate::serial::COM1, 115_200);
    crate::logger::init(log::LevelFilter::Debug);
    // SAFETY: the loader passes a pointer to its hand-over; it is checked before use.
    let info = unsafe { info.read() };
    if let Err(e) = info.check() {
        panic!("the loader and this image do not match: {e}");
    }
    let info = BOOT.call_once(|| info);
    crate::panic::set_symbols(bytes(info.symbols));
    log::info!(
        "Galvan {} (loaded by {} at {:#x})",
        env!("CARGO_PKG_VERSION"),
        info.loader.name(),
        info.image.phys.start
    );

    let map = info.memory_map(bytes);
    crate::bootmem::init(map.iter());
    crate::paging::init(info, map.iter());
    crate::heap::init();
    log::info!(
        "command line: {}",
        core::str::from_utf8(bytes(info.cmdline)).unwrap_or("?")
    );
    crate::smp::init(&[0], on_own_stack);
}

/// Goes on where nothing of the loader's is in use.
extern "C" fn on_own_stack() -> ! {
    crate::desc::init();
    crate::desc::init_pat();
    panic!("nothing to run");
}
