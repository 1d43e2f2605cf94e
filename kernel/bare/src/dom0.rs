//! From the machine to a running dom0: decides who gets which memory, makes the frame table and the
//! hypervisor, loads dom0's kernel and enters the run loop.

use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use galvan_base::state::ArchState;
use galvan_base::{Gfn, Mfn, Mpa, PAGE_SIZE};
use galvan_boot::info::{LoaderKind, MemoryKind, PhysRange};
use galvan_dom0_proto::domctl::EmulationFlags;
use galvan_kernel::cmdline::{Features, Options};
use galvan_kernel::cpu_policy::{HostMsrs, HostPolicy, Setup, Virt, hidden_by};
use galvan_kernel::dom0_build::acpi::dom0_tables;
use galvan_kernel::dom0_build::bzimage::Kernel;
use galvan_kernel::dom0_build::elf::Image;
use galvan_kernel::dom0_build::layout::{self, Kind, Plan, Region, Request};
use galvan_kernel::domain::{Domain, DomainConfig};
use galvan_kernel::hv::{CpuState, Hypervisor};
use galvan_kernel::mm::{FrameInfo, FrameTable, Owner};
use galvan_kernel::p2m::P2mType;
use galvan_kernel::vcpu::block;

use crate::platform::{Facts, MACHINE};
use crate::start::{acpi, boot_info, bytes, memory_map, options};
use crate::virt::Caps;

const PAGE: u64 = PAGE_SIZE as u64;

/// The memory map as the layout wants it.
fn host_regions() -> Vec<Region> {
    memory_map()
        .iter()
        .map(|r| {
            let kind = match r.kind {
                MemoryKind::USABLE
                | MemoryKind::LOADER
                | MemoryKind::MODULE
                | MemoryKind::HYPERVISOR_IMAGE => Kind::Usable,
                MemoryKind::ACPI_RECLAIMABLE => Kind::Acpi,
                MemoryKind::ACPI_NVS => Kind::Nvs,
                MemoryKind::UNUSABLE => Kind::Unusable,
                _ => Kind::Reserved,
            };
            Region::new(r.start..r.end(), kind)
        })
        .collect()
}

fn range(r: PhysRange) -> Range<u64> {
    r.start..r.end()
}

/// Whole frames inside a range of bytes.
fn frames(r: &Range<u64>) -> Range<Mfn> {
    Mfn::new_truncate(r.start.div_ceil(PAGE))..Mfn::new_truncate(r.end / PAGE)
}

/// Whole frames touched by a range of bytes.
fn frames_touched(r: &Range<u64>) -> Range<Mfn> {
    Mfn::new_truncate(r.start / PAGE)..Mfn::new_truncate(r.end.div_ceil(PAGE))
}

/// Memory at a physical address, to be written during start-up.
///
/// # Safety
/// The range must be RAM that nobody else uses now.
unsafe fn memory(r: &Range<u64>) -> &'static mut [u8] {
    // SAFETY: by the caller's promise; the direct map covers all RAM.
    unsafe {
        core::slice::from_raw_parts_mut(
            crate::paging::direct_ptr(Mpa::new_truncate(r.start)),
            (r.end - r.start) as usize,
        )
    }
}

/// Copies within physical memory; the ranges may overlap.
///
/// # Safety
/// The destination must be RAM that nobody else uses now.
unsafe fn move_memory(to: u64, from: u64, len: u64) {
    let (to, from) = (
        crate::paging::direct_ptr(Mpa::new_truncate(to)),
        crate::paging::direct_ptr(Mpa::new_truncate(from)),
    );
    // SAFETY: by the caller's promise.
    unsafe { core::ptr::copy(from, to, len as usize) };
}

/// Says why the machine cannot go on, and ends: there is no loader to go back to.
macro_rules! give_up {
    ($($arg:tt)*) => {
        crate::panic::give_up(format_args!($($arg)*))
    };
}

/// What guests may see of the processor.
fn cpu_policy(caps: &Caps, options: &Options<'_>) -> HostPolicy {
    let mut virt = caps.guest_features();
    virt.set(
        Virt::IOMMU_MAPPINGS,
        galvan_base::Platform::iommu(&MACHINE).is_some(),
    );
    virt.set(
        Virt::TSC_RELIABLE,
        galvan_base::Platform::tsc_stable(&MACHINE),
    );
    let mut hidden = hidden_by(options.cpuid, &mut |word| {
        log::warn!("cpuid={word}: no such feature, or not no-NAME")
    });
    if options.no.contains(Features::PAGE1G) {
        hidden.insert(galvan_kernel::cpu_policy::Feature::PAGE1GB);
    }
    let msrs = HostMsrs {
        arch_caps: crate::cpu::rdmsr_safe(0x10a).unwrap_or(0),
        microcode: crate::cpu::rdmsr_safe(0x8b).unwrap_or(0),
    };
    let setup = Setup {
        virt,
        version: options.abi.version(),
        hidden,
    };
    HostPolicy::new(&mut crate::cpu::cpuid, msrs, &setup)
}

/// Builds everything and runs dom0. The last step of start-up.
pub fn run() -> ! {
    let options = options();
    let info = boot_info();

    let caps = match crate::virt::settle(options.no) {
        Ok(c) => c,
        Err(e) => give_up!("{e}"),
    };

    // Modules.
    let Some(kernel_module) = info.kernel() else {
        give_up!("the boot loader gives no kernel for dom0")
    };
    let kernel_name = match info.loader {
        LoaderKind::UEFI => "the file of kernel= in galvan.cfg",
        _ => "dom0's kernel, the boot loader's first module",
    };
    let kernel_file = bytes(kernel_module.data);
    let kernel = match Kernel::parse(kernel_file) {
        Ok(k) => k,
        Err(e) => give_up!("{kernel_name}: {e}"),
    };
    let ramdisk = info.ramdisk().map_or(0..0, |m| range(m.data));
    let cmdline: Vec<u8> = bytes_of(kernel_module.cmdline).to_vec();
    let cmdline = dom0_cmdline(&cmdline, options.dom0_args);
    let ramdisk_cmdline: Vec<u8> = info
        .ramdisk()
        .map_or_else(Vec::new, |m| bytes_of(m.cmdline).to_vec());

    // Memory: Galvan's own first, since what boot memory has given out is known only now.
    let host = host_regions();
    let usable: Vec<Range<Mfn>> = host
        .iter()
        .filter(|r| r.kind == Kind::Usable)
        .map(|r| frames(&r.range))
        .filter(|r| r.start < r.end)
        .collect();
    let infos = frame_infos(FrameTable::infos_needed(&usable));
    let top = usable.iter().map(|r| r.end.addr().get()).max().unwrap_or(0);
    crate::hostmem::init(
        top,
        usable
            .iter()
            .map(|r| (r.start.addr().get(), r.end.addr().get())),
    );
    let mut galvan: Vec<Range<u64>> = crate::bootmem::taken()
        .into_iter()
        .map(|(s, e)| s..e)
        .collect();
    galvan.push(range(info.image.phys));
    galvan.push(range(info.symbols));

    let mut busy: Vec<Range<u64>> = memory_map()
        .iter()
        .filter(|r| r.kind == MemoryKind::LOADER || r.kind == MemoryKind::MODULE)
        .map(|r| r.start..r.end())
        .collect();
    let avoid: Vec<Range<u64>> = galvan.iter().chain(&busy).cloned().collect();
    let unpacked_len = kernel.unpacked_len() as u64;
    let Some(unpacked) = layout::highest_free(
        &host,
        &avoid,
        unpacked_len.next_multiple_of(PAGE),
        PAGE,
        u64::MAX,
    ) else {
        give_up!(
            "no room to unpack dom0's kernel: {} MiB",
            unpacked_len >> 20
        );
    };
    let unpacked = unpacked.start..unpacked.start + unpacked_len;
    let started = crate::clock::now_ns();
    // SAFETY: free memory by the map, which nobody has been given.
    let image_bytes = unsafe { memory(&unpacked) };
    if let Err(e) = kernel.unpack(image_bytes) {
        give_up!("{kernel_name}: {e}");
    }
    log::info!(
        "dom0's kernel: {} {} KiB, unpacked {} KiB in {} ms",
        kernel.codec().name(),
        kernel_file.len() >> 10,
        unpacked_len >> 10,
        (crate::clock::now_ns() - started) / 1_000_000
    );
    let image = match Image::parse(image_bytes) {
        Ok(i) => i,
        Err(e) => give_up!("{kernel_name}: {e}"),
    };
    busy.push(unpacked.start..unpacked.end.next_multiple_of(PAGE));

    let total: u64 = usable
        .iter()
        .map(|r| (r.end.get() - r.start.get()) * PAGE)
        .sum();
    let own: u64 = galvan.iter().map(|r| r.end - r.start).sum();
    let can_be_given = total.saturating_sub(own);
    // What is left over when dom0_mem= does not say: room for tables and a few small guests.
    let spare = (can_be_given / 16).clamp(64 << 20, 1 << 30);
    let size = options.dom0_mem.resolve(can_be_given, spare);
    let vcpus = options
        .dom0_max_vcpus
        .resolve(crate::smp::count(), galvan_kernel::domain::MAX_VCPUS);
    let acpi_facts = acpi();
    let ioapics = crate::start::ioapics();
    let visible = |r: Range<u64>| {
        memory_map().iter().any(|m| {
            matches!(
                m.kind,
                MemoryKind::ACPI_RECLAIMABLE | MemoryKind::ACPI_NVS | MemoryKind::RESERVED
            ) && m.start <= r.start
                && r.end <= m.end()
        })
    };
    let acpi_len = dom0_tables(acpi_facts, 0, vcpus, ioapics, &visible)
        .bytes
        .len() as u64;
    let request = Request {
        host: &host,
        galvan: &galvan,
        busy: &busy,
        size,
        kernel: &image,
        ramdisk: &ramdisk,
        cmdline_len: cmdline.len() + ramdisk_cmdline.len(),
        acpi_len,
    };
    let plan = match Plan::make(&request) {
        Ok(p) => p,
        Err(e) => give_up!("{e}"),
    };

    // Load dom0: ramdisk, kernel, tables, start info.
    let tables = dom0_tables(acpi_facts, plan.acpi.start, vcpus, ioapics, &visible);
    // SAFETY: dom0's memory by the plan, which keeps it apart from what is still needed.
    unsafe {
        if !ramdisk.is_empty() && plan.ramdisk.start != ramdisk.start {
            move_memory(
                plan.ramdisk.start,
                ramdisk.start,
                ramdisk.end - ramdisk.start,
            );
        }
        for s in &image.segments {
            let to = plan.kernel_address(s.paddr);
            let out = memory(&(to..to + s.mem_len));
            let file = image_bytes_of(&unpacked, &s.file);
            let (head, tail) = out.split_at_mut(file.len());
            head.copy_from_slice(file);
            tail.fill(0);
        }
        memory(&(plan.acpi.start..plan.acpi.start + tables.bytes.len() as u64))
            .copy_from_slice(&tables.bytes);
        let start_info = plan.start_info_bytes(&cmdline, &ramdisk_cmdline, tables.rsdp);
        memory(&(plan.start_info.start..plan.start_info.start + start_info.len() as u64))
            .copy_from_slice(&start_info);
    }

    // The frame table, with dom0's memory taken before anybody else can be given any.
    let reserved: Vec<Range<Mfn>> = galvan.iter().map(frames_touched).collect();
    let Ok(table) = FrameTable::new(infos, &MACHINE, &usable, &reserved, false) else {
        give_up!("the frame table cannot be made");
    };
    for r in &plan.ram {
        if table.alloc_at(frames(r), Owner::Guest(0)).is_err() {
            give_up!("dom0's memory {:#x}-{:#x} is in use", r.start, r.end);
        }
    }

    let cpus = crate::smp::count();
    let hv = crate::platform::set_hypervisor(Hypervisor {
        hw: &MACHINE,
        frames: table,
        domains: Default::default(),
        sched: galvan_kernel::sched::Scheduler::new(cpus),
        timers: galvan_kernel::timer::TimerQueues::new(cpus),
        console: &crate::logger::RING,
        input: galvan_kernel::console::ConsoleInput::new(),
        irqs: Default::default(),
        identity: galvan_kernel::xen_version::Identity::new(
            options.abi.version(),
            String::from_utf8_lossy(bytes_of(info.cmdline)).into_owned(),
        ),
        cpus: (0..cpus).map(|_| CpuState::default()).collect(),
        wallclock: galvan_kernel::time::WallClock::new(&MACHINE),
        cpu_policy: cpu_policy(&caps, options),
    });
    if crate::virt::init(caps, cpus).is_err() {
        give_up!("no memory for the structures of virtualisation");
    }

    let mut facts = Facts::default();
    if let Some(base) = crate::serial::base() {
        facts.private_ports.push((base, base + 7));
    }
    facts
        .private_mmio
        .push((Mpa::new_truncate(0xfee0_0000), 0x10_0000));
    for a in crate::irq::ioapics() {
        facts.private_mmio.push((a.base, PAGE));
    }
    for w in crate::pci::windows() {
        facts.private_mmio.push((
            w.base,
            (u64::from(w.last_bus) - u64::from(w.first_bus) + 1) << 20,
        ));
    }
    let (iommu_functions, iommu_windows) = crate::iommu::private();
    facts.private_pci.extend(iommu_functions);
    facts.private_mmio.extend(iommu_windows);
    facts.reset = acpi_facts
        .and_then(|a| a.fadt.as_ref())
        .and_then(|f| f.reset)
        .and_then(|(r, v)| match r {
            galvan_kernel::dom0_build::acpi::host::Register::Port(p) => Some((p, v)),
            _ => None,
        });
    crate::platform::set_facts(facts);

    // dom0.
    let config = DomainConfig {
        handle: [0; 16],
        max_vcpus: vcpus,
        max_evtchn_port: u32::MAX,
        max_grant_frames: 64,
        max_maptrack_frames: 1024,
        hardware_domain: true,
        emulation_flags: EmulationFlags::DOM0.bits(),
        flags: 0,
        ssidref: 0,
    };
    let d = match Domain::new(hv, 0, config) {
        Ok(d) => d,
        Err(e) => give_up!("dom0 cannot be created: {e:?}"),
    };
    let mut changes = d.p2m.changes();
    let to_gfn =
        |r: &Range<u64>| Gfn::new_truncate(r.start / PAGE)..Gfn::new_truncate(r.end.div_ceil(PAGE));
    let mut pages = 0;
    for r in &plan.ram {
        pages += (r.end - r.start) / PAGE;
        if changes.add_identity(to_gfn(r), &[], P2mType::Ram).is_err() {
            give_up!("no memory for dom0's tables");
        }
    }
    let trapped: Vec<Range<u64>> = hv
        .hw
        .private_mmio()
        .iter()
        .map(|&(a, len)| a.get()..a.get() + len)
        .collect();
    for r in layout::identity_ranges(&host, &galvan, &trapped) {
        if changes
            .add_identity(to_gfn(&r), &[], P2mType::MmioDirect)
            .is_err()
        {
            log::warn!(
                "firmware's memory {:#x}-{:#x} is not mapped to dom0",
                r.start,
                r.end
            );
        }
    }
    d.finish(hv, changes);
    d.tot_pages
        .store(pages, core::sync::atomic::Ordering::Relaxed);
    d.max_pages
        .store(u64::MAX >> 12, core::sync::atomic::Ordering::Relaxed);
    *d.memory_map.lock() = plan
        .map
        .iter()
        .map(|r| (r.range.start, r.range.end - r.range.start, r.kind as u32))
        .collect();
    if let Err(e) = galvan_kernel::vcpu::create_all(hv, &d, vcpus) {
        give_up!("dom0's vCPUs: {e:?}");
    }
    if let Err(e) = hv.domains.insert(d.clone()) {
        give_up!("dom0 cannot be entered in the table of domains: {e:?}");
    }
    galvan_kernel::time::write_wallclock(hv, &d);
    if let Some(h) = &d.hardware {
        h.scan_pci(hv, &d);
    }

    // What was in use up to now is free, apart from dom0's.
    let total_mib = total >> 20;
    log::info!(
        "dom0: {} MiB of {total_mib} MiB, {vcpus} vCPUs, kernel at {:#x}, {}; {} MiB free for guests",
        pages >> 8,
        plan.entry,
        if plan.ramdisk.is_empty() {
            "no ramdisk"
        } else {
            "with ramdisk"
        },
        hv.frames.free_frames() >> 8
    );
    if let Some(v) = d.vcpu(0) {
        let mut st = v.state();
        st.reset_to(&ArchState::at_pvh_entry(plan.entry));
        st.regs.rbx = plan.start_info.start;
        drop(st);
        v.set_initialised();
        v.unblock(hv, block::DOWN);
    }
    if d.controller_unpause(hv).is_err() {
        give_up!("dom0 does not start");
    }
    crate::screen::release();
    crate::smp::release();
    crate::platform::cpu_main()
}

/// The file bytes of a segment in the unpacked kernel.
fn image_bytes_of(unpacked: &Range<u64>, file: &Range<usize>) -> &'static [u8] {
    &bytes(PhysRange::new(
        unpacked.start,
        unpacked.end - unpacked.start,
    ))[file.clone()]
}

fn bytes_of(r: PhysRange) -> &'static [u8] {
    if r.is_empty() { &[] } else { bytes(r) }
}

/// dom0's command line: what galvan.cfg or the boot loader's menu says, and what the hypervisor's options add.
fn dom0_cmdline(line: &[u8], extra: &str) -> Vec<u8> {
    let mut out = line.to_vec();
    if !extra.is_empty() {
        out.push(b' ');
        out.extend_from_slice(extra.as_bytes());
    }
    out
}

/// Zeroed metadata for so many frames, kept for ever.
fn frame_infos(n: usize) -> &'static [FrameInfo] {
    let a = crate::bootmem::alloc((n * size_of::<FrameInfo>()).div_ceil(PAGE_SIZE));
    // SAFETY: fresh zeroed pages; all-zero is a valid `FrameInfo` (atomics of integers).
    unsafe { core::slice::from_raw_parts(crate::paging::direct_ptr(a).cast(), n) }
}
