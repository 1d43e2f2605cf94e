//! Start-up on the boot CPU, in the order in which one thing needs the other.
//!
//! | where | what |
//! |---|---|
//! | loader's tables and stack | serial port, log, boot memory, own tables, heap, ACPI, areas for all CPUs |
//! | own stack | descriptors, clock, local APIC, IO-APICs, PCI, other CPUs, IOMMUs, SVM |
//! | [`crate::dom0`] | frame table, hypervisor, dom0 |

use alloc::string::ToString;
use alloc::vec::Vec;

use galvan_base::hw::EcamWindow;
use galvan_base::{Mpa, PAGE_SIZE};
use galvan_boot::info::{BootInfo, LoaderKind, MemoryKind, MemoryMap, PhysRange};
use galvan_kernel::cmdline::Options;
use galvan_kernel::dom0_build::acpi::find_rsdp;
use galvan_kernel::dom0_build::acpi::host::{HostAcpi, IoApic, Madt, Register};
use spin::Once;

/// What the loader handed over, copied out of its memory.
static BOOT: Once<BootInfo> = Once::new();
/// The memory map, copied out of the loader's memory, which ends up free.
static MEMORY_MAP: Once<&'static [u8]> = Once::new();
/// The command line.
static OPTIONS: Once<Options<'static>> = Once::new();
/// The IO-APICs.
static IOAPICS: Once<Vec<IoApic>> = Once::new();
/// What firmware says.
static ACPI: Once<Option<HostAcpi<'static>>> = Once::new();

/// The bytes of a physical range of the loader's, through the direct map.
pub fn bytes(r: PhysRange) -> &'static [u8] {
    // SAFETY: the loader mapped all memory at `DIRECT_MAP_BASE`, as our own tables do; what the
    // hand-over refers to is not written after it.
    unsafe {
        core::slice::from_raw_parts(
            crate::paging::direct_ptr(Mpa::new_truncate(r.start)),
            r.len as usize,
        )
    }
}

/// What the loader handed over.
pub fn boot_info() -> &'static BootInfo {
    BOOT.get().expect("the hand-over is read first of all")
}

/// The command line, read.
pub fn options() -> &'static Options<'static> {
    OPTIONS
        .get()
        .expect("the command line is read before it is asked for")
}

/// The machine's memory map.
pub fn memory_map() -> MemoryMap<'static> {
    boot_info().memory_map(|loaders| MEMORY_MAP.get().copied().unwrap_or_else(|| bytes(loaders)))
}

/// A copy for ever of what the loader left in memory that ends up free.
fn keep(r: PhysRange) -> &'static [u8] {
    if r.is_empty() {
        &[]
    } else {
        Vec::leak(bytes(r).to_vec())
    }
}

/// What firmware says of the machine, if it has tables.
pub fn acpi() -> Option<&'static HostAcpi<'static>> {
    ACPI.get().and_then(Option::as_ref)
}

/// The entry point of the image.
#[unsafe(no_mangle)]
extern "C" fn _start(info: *const BootInfo) -> ! {
    let entered = crate::cpu::rdtsc();
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

    log::debug!(
        "TSC {} at the loader's entry, {entered} at this image's",
        info.entry_tsc
    );
    crate::bootmem::init(memory_map().iter());
    crate::paging::init(info, memory_map().iter());
    crate::heap::init();
    MEMORY_MAP.call_once(|| keep(info.memory_map));
    read_options(keep(info.cmdline));
    if options().console.vga
        && let Some(f) = info.screen()
    {
        crate::screen::init(f);
    }
    for r in memory_map().iter() {
        log::debug!(
            "memory {:#014x}-{:#014x} {}",
            r.start,
            r.end() - 1,
            r.kind.name()
        );
    }
    let acpi = ACPI.call_once(read_acpi).as_ref();
    crate::smp::init(&apic_ids(acpi), on_own_stack);
}

fn read_options(line: &'static [u8]) {
    log::info!(
        "command line: {}",
        core::str::from_utf8(line).unwrap_or("?")
    );
    let mut issues = Vec::new();
    let options =
        OPTIONS.call_once(|| Options::parse(line, &mut |issue| issues.push(issue.to_string())));
    if let Some(com) = &options.com[0] {
        crate::serial::init(com.io_base.unwrap_or(crate::serial::COM1), com.baud);
    }
    crate::panic::NOREBOOT.store(options.noreboot, core::sync::atomic::Ordering::Relaxed);
    galvan_kernel::shutdown::NOREBOOT
        .store(options.noreboot, core::sync::atomic::Ordering::Relaxed);
    for text in issues {
        log::warn!("command line: {text}");
    }
}

/// Memory that firmware says holds tables, for reading them.
fn firmware_memory(at: u64, len: usize) -> Option<&'static [u8]> {
    let end = at.checked_add(len as u64)?;
    let known = memory_map()
        .iter()
        .any(|r| r.start <= at && end <= r.end() && r.kind != MemoryKind::USABLE);
    // Below 1 MiB firmware's areas are in no map.
    if !known && end > 0x10_0000 {
        return None;
    }
    let a = Mpa::new(at)?;
    // Each page of it: where a BIOS keeps its tables in reserved memory, the first and the last may
    // have been mapped for the tables around this one.
    let mut pages = (at / PAGE_SIZE as u64..end.div_ceil(PAGE_SIZE as u64))
        .map(|page| Mpa::new(page * PAGE_SIZE as u64));
    if !pages.all(|page| page.is_some_and(crate::paging::is_mapped)) {
        crate::paging::map_device(a, len);
    }
    Some(bytes(PhysRange::new(at, len as u64)))
}

fn read_acpi() -> Option<HostAcpi<'static>> {
    let rsdp = match (boot_info().rsdp, boot_info().loader) {
        (0, LoaderKind::UEFI) => 0,
        // A multiboot loader need not know, and there may be a BIOS.
        (0, _) => find_rsdp(&firmware_memory).unwrap_or(0),
        (known, _) => known,
    };
    if rsdp == 0 {
        log::warn!("firmware has no ACPI tables: one CPU, no memory-mapped configuration space");
        return None;
    }
    match HostAcpi::read(rsdp, &firmware_memory) {
        Ok(a) => {
            for t in &a.tables {
                log::debug!("ACPI: {t:?}");
            }
            Some(a)
        }
        Err(e) => {
            log::error!("ACPI: {e}");
            None
        }
    }
}

/// The IO-APICs: those of the MADT; without one, that at the usual place if it is there.
pub fn ioapics() -> &'static [IoApic] {
    const USUAL: u32 = 0xfec0_0000;
    IOAPICS.call_once(|| match acpi().and_then(|a| a.madt.as_ref()) {
        Some(m) => m.ioapics.clone(),
        None => crate::irq::probe(Mpa::new_truncate(u64::from(USUAL)))
            .map(|id| IoApic {
                id,
                address: USUAL,
                gsi_base: 0,
            })
            .into_iter()
            .collect(),
    })
}

/// APIC ids of the usable CPUs, the one that runs this first.
fn apic_ids(acpi: Option<&HostAcpi<'_>>) -> Vec<u32> {
    let me = crate::apic::initial_id();
    let mut ids = alloc::vec![me];
    let limit = options().maxcpus.unwrap_or(u32::MAX).max(1) as usize;
    if let Some(madt) = acpi.and_then(|a| a.madt.as_ref()) {
        ids.extend(
            madt.cpus
                .iter()
                .filter(|c| c.enabled && c.apic_id != me)
                .map(|c| c.apic_id),
        );
    }
    if ids.len() > limit {
        log::info!("maxcpus={limit}: {} CPUs are left alone", ids.len() - limit);
        ids.truncate(limit);
    }
    ids
}

/// Goes on where nothing of the loader's is in use.
extern "C" fn on_own_stack() -> ! {
    crate::desc::init();
    crate::desc::init_pat();
    let acpi = acpi();
    let fadt = acpi.and_then(|a| a.fadt.as_ref());
    let pm_timer = fadt.and_then(|f| f.pm_timer).and_then(|r| match r {
        Register::Port(p) => Some(p),
        _ => None,
    });
    crate::clock::init(pm_timer);
    let no = options().no;
    use galvan_kernel::cmdline::Features;
    crate::irq::mask_pics();
    crate::apic::init_boot_cpu(
        !no.contains(Features::X2APIC),
        !no.contains(Features::TSC_DEADLINE),
    );
    crate::apic::init_this_cpu();
    crate::apic::calibrate_timer();
    crate::irq::init(
        ioapics()
            .iter()
            .map(|i| (i.id, Mpa::new_truncate(u64::from(i.address)), i.gsi_base)),
    );
    listen_to_console(acpi.and_then(|a| a.madt.as_ref()));
    let ecam: Vec<EcamWindow> = acpi.map_or_else(Vec::new, |a| a.ecam.clone());
    crate::pci::init(ecam);

    let cpus = match start_page() {
        Some(page) => crate::smp::start_others(page),
        None => {
            log::error!("no usable page below 1 MiB: the other CPUs stay off");
            1
        }
    };
    log::info!("{cpus} CPUs");
    crate::iommu::init();
    crate::dom0::run()
}

/// The usual interrupts of the serial ports, by base address.
const SERIAL_IRQS: [(u16, u8); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

/// Takes the serial port's interrupt, so that dom0 hears what is typed.
fn listen_to_console(madt: Option<&Madt>) {
    let Some(base) = crate::serial::base() else {
        return;
    };
    let usual = SERIAL_IRQS
        .iter()
        .find(|(b, _)| *b == base)
        .map(|(_, irq)| *irq);
    let irq = options().com[0]
        .and_then(|c| c.irq)
        .or(usual)
        .filter(|irq| *irq != 0);
    let Some(irq) = irq else {
        log::warn!(
            "serial port {base:#x}: interrupt unknown (com1=...,IRQ): nothing can be typed there"
        );
        return;
    };
    let moved = madt.and_then(|m| m.overrides.iter().find(|o| o.isa_irq == irq));
    let gsi = moved.map_or(u32::from(irq), |o| o.gsi);
    let active_low = moved.is_some_and(|o| o.is_active_low());
    if crate::irq::bind_console(gsi, active_low, galvan_base::hw::CpuId(0)).is_err() {
        log::warn!("serial port {base:#x}: no IO-APIC has GSI {gsi}: nothing can be typed there");
        return;
    }
    crate::serial::listen();
}

/// A page for the start code of CPUs: real mode reaches it, and nobody else needs it now.
fn start_page() -> Option<Mpa> {
    memory_map()
        .iter()
        .filter(|r| r.kind == MemoryKind::USABLE || r.kind == MemoryKind::LOADER)
        .find_map(|r| {
            let at = r.start.max(0x1000).next_multiple_of(PAGE_SIZE as u64);
            (at + PAGE_SIZE as u64 <= r.end() && at < 0xa_0000).then(|| Mpa::new_truncate(at))
        })
}
