//! Bytes that come from files and firmware.

use galvan_boot::config::Config;
use galvan_boot::info::{MemoryKind, MemoryRange, PhysRange};
use galvan_boot::mbi::{Handed, Memory, v1, v2};
use galvan_boot::memory_map::{MapBuilder, capacity};
use galvan_boot::options::LoadOptions;
use galvan_kernel::cmdline;
use galvan_kernel::dom0_build::acpi::{HostAcpi, dom0_tables, find_rsdp};
use galvan_kernel::dom0_build::bzimage::Kernel;
use galvan_kernel::dom0_build::elf;
use galvan_kernel::iommu::ivrs::Ivrs;

/// A kernel file of any kind, unpacked and looked through.
pub fn kernels(data: &[u8]) {
    let Ok(kernel) = Kernel::parse(data) else {
        return;
    };
    // What it claims to be may be huge; the builder checks that against memory before it allocates.
    if kernel.unpacked_len() > 4 << 20 {
        return;
    }
    let mut out = vec![0; kernel.unpacked_len()];
    if kernel.unpack(&mut out).is_ok() {
        let _ = elf::Image::parse(&out);
    }
}

/// Tables anywhere below 64 KiB of input.
pub fn acpi(data: &[u8]) {
    let phys = |at: u64, len: usize| {
        let at = usize::try_from(at).ok()?;
        data.get(at..at.checked_add(len)?)
    };
    let _ = find_rsdp(&phys);
    if let Ok(host) = HostAcpi::read(0, &phys) {
        let ioapics = host.madt.as_ref().map(|m| m.ioapics.clone());
        let tables = dom0_tables(
            Some(&host),
            0x10_0000,
            3,
            &ioapics.unwrap_or_default(),
            &|_| true,
        );
        assert!(tables.rsdp >= 0x10_0000);
    }
    if let Ok(ivrs) = Ivrs::parse(data) {
        for id in [0u16, 1, 0x10, 0xff, 0xffff] {
            let _ = ivrs.unit_of(galvan_base::hw::Sbdf::new(0, (id >> 8) as u8, id as u8));
        }
    }
}

/// `galvan.cfg`, the hypervisor's command line, dom0's.
pub fn config(data: &[u8]) {
    let _ = cmdline::Options::parse(data, &mut |_| ());
    if let Ok(config) = Config::parse(data) {
        let sections: Vec<_> = config.entries().map(|e| e.section).collect();
        for section in core::iter::once(None).chain(sections.into_iter().map(Some)) {
            let _ = config.select(section);
        }
    }
    if let Ok(text) = core::str::from_utf8(data) {
        let _ = LoadOptions::parse(text, "fuzz.efi");
    }
}

/// A multiboot loader's information, by both versions: at address 0, where all it refers to is too.
pub fn multiboot(data: &[u8]) {
    struct Input<'a>(&'a [u8]);
    impl<'a> Memory<'a> for Input<'a> {
        fn bytes(&self, start: u64, len: usize) -> Option<&'a [u8]> {
            self.0.get(usize::try_from(start).ok()?..)?.get(..len)
        }
    }
    for magic in [v1::MAGIC, v2::MAGIC] {
        let Ok(handed) = Handed::read(magic, 0, &Input(data)) else {
            continue;
        };
        let own = PhysRange::new(0x20_0000, 0x10_0000);
        if let Ok((kernel, Some(ramdisk))) = handed.checked_modules(own) {
            assert!(!kernel.data.overlaps(&ramdisk.data) && !kernel.data.overlaps(&own));
        }
        let blank = MemoryRange::new(0, 0, MemoryKind::RESERVED, 0);
        let mut buffer = vec![blank; capacity(handed.map.entries(), 1)];
        let mut map = MapBuilder::new(&mut buffer);
        // The capacity is enough for whatever the map says.
        assert_eq!(handed.map.add_to(&mut map), Ok(()));
        let _ = map.take_highest(1 << 20, 2 << 20, 1 << 32, MemoryKind::LOADER);
        for pair in map.finish().windows(2) {
            assert!(pair[0].end() <= pair[1].start);
        }
    }
}
