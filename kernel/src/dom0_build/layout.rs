//! Which memory dom0 gets, what its memory map says, and where its kernel, ramdisk and start-up
//! data are put.
//!
//! Dom0's RAM is identity-mapped: its frame numbers *are* machine frame numbers, so that a device
//! without an IOMMU in front of it still reaches dom0's buffers. Hence dom0 does not get "so many
//! pages" but certain ones: the lowest usable RAM up to its size, because its real-mode code, its
//! 32-bit devices and its kernel need low memory. Galvan's own memory and everything that lives on
//! until dom0 runs has to be elsewhere, that is as high as possible: [`highest_free`].
//!
//! In the map that dom0 sees (E820 types; ACPI specification, "System Address Map Interfaces"), the
//! firmware's reserved and ACPI ranges stand as they are, and RAM that is not dom0's as unusable:
//! dom0 then puts no device memory there, and Linux from 6.9 on uses those addresses as its scratch
//! space for foreign pages, rather than holes that something else may need.
//!
//! The call sequence of the boot code:
//!
//! 1. [`highest_free`] for Galvan's own memory, then for the unpacked kernel
//!    ([`super::bzimage`]), whose plan is [`super::elf`]'s.
//! 2. [`Plan::make`].
//! 3. Copy the ramdisk to [`Plan::ramdisk`] if it is not there; *then* each segment to its address
//!    moved by [`Plan::kernel_address`]; the kernel may be on top of where the ramdisk was.
//! 4. [`super::acpi`] fills [`Plan::acpi`], [`Plan::start_info_bytes`] the start info.
//! 5. Enter at [`Plan::entry`] with EBX = `start_info.start`. Give [`Plan::free`] to the allocator
//!    of frames.

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use galvan_dom0_proto::hvm::{
    HvmMemmapTableEntry, HvmModlistEntry, HvmStartInfo, XEN_HVM_START_MAGIC_VALUE,
};
use zerocopy::IntoBytes;

use super::elf::Image;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Entries for which Linux has room, less the one it adds for the hole below 1 MiB.
const MAX_REGIONS: usize = 127;
/// The page of each CPU's local APIC and the range of interrupt messages.
const LAPIC: Range<u64> = 0xfee0_0000..0xfef0_0000;

/// What a range of physical memory is. The order is that of precedence where a firmware's ranges
/// overlap; the values are E820 types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Kind {
    /// RAM that the firmware has given up, whatever loader or hypervisor use it for.
    Usable = 1,
    /// Not RAM, or RAM of the firmware. What is of no other kind.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
    /// RAM that the firmware saves and restores over sleep.
    Nvs = 4,
    /// RAM with errors; in dom0's map also RAM that is not dom0's.
    Unusable = 5,
}

/// A range of physical memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// Byte addresses, any alignment.
    pub range: Range<u64>,
    /// What it is.
    pub kind: Kind,
}

impl Region {
    /// A region.
    pub const fn new(range: Range<u64>, kind: Kind) -> Self {
        Self { range, kind }
    }
}

/// What a [`Plan`] is made from.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The machine's memory map, in any order.
    pub host: &'a [Region],
    /// RAM that Galvan keeps for itself.
    pub galvan: &'a [Range<u64>],
    /// RAM that is in use until dom0 runs and may be dom0's then: the unpacked kernel, command lines,
    /// the loader's data. Parts that are the ramdisk's do not count.
    pub busy: &'a [Range<u64>],
    /// Bytes of RAM for dom0.
    pub size: u64,
    /// The kernel.
    pub kernel: &'a Image<'a>,
    /// Where the ramdisk is now; empty if there is none.
    pub ramdisk: &'a Range<u64>,
    /// Length of both command lines together.
    pub cmdline_len: usize,
    /// Bytes needed for dom0's ACPI tables; 0 if it gets none.
    pub acpi_len: u64,
}

/// The memory of dom0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The RAM it owns, whole pages by ascending address, including [`Plan::acpi`].
    pub ram: Vec<Range<u64>>,
    /// Usable RAM that is neither dom0's nor Galvan's, whole pages by ascending address.
    pub free: Vec<Range<u64>>,
    /// Its memory map by ascending address, without overlap, neighbours of one kind merged.
    pub map: Vec<Region>,
    /// Physical address of its entry point.
    pub entry: u32,
    /// Where the ramdisk has to be; empty if there is none.
    pub ramdisk: Range<u64>,
    /// Where start info, module list, memory map and command lines go, from a page boundary.
    pub start_info: Range<u64>,
    /// Where its ACPI tables go, whole pages; empty if it gets none.
    pub acpi: Range<u64>,
    kernel_delta: u64,
}

/// Why dom0 cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// It was to get more memory than there is.
    Memory {
        /// Bytes it was to get.
        wanted: u64,
        /// Bytes there are for it.
        available: u64,
    },
    /// Its kernel cannot be where it has to be.
    Kernel {
        /// Where that is.
        range: Range<u64>,
    },
    /// There is no room for the ramdisk.
    Ramdisk {
        /// Its length in bytes.
        len: u64,
    },
    /// There is no room for start-up data or ACPI tables.
    Data {
        /// Their length in bytes.
        len: u64,
    },
    /// The machine's memory map has more entries than Linux takes.
    Regions(usize),
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: &u64| bytes / MIB;
        match self {
            Self::Memory { wanted, available } => write!(
                f,
                "dom0_mem: {} MiB wanted, the machine has {} MiB for dom0",
                mib(wanted),
                mib(available)
            ),
            Self::Kernel { range } => write!(
                f,
                "dom0's kernel has to be at {:#x}-{:#x}, where dom0 has no free memory",
                range.start, range.end
            ),
            Self::Ramdisk { len } => write!(
                f,
                "dom0's ramdisk of {} MiB does not fit into its memory below 4 GiB; raise dom0_mem",
                mib(len)
            ),
            Self::Data { len } => write!(
                f,
                "no room for {len} bytes of start-up data in dom0's memory; raise dom0_mem"
            ),
            Self::Regions(n) => write!(f, "memory map of {n} entries, at most {MAX_REGIONS} fit"),
        }
    }
}

impl Plan {
    /// Lays dom0 out.
    pub fn make(request: &Request<'_>) -> Result<Self, LayoutError> {
        let host = normalise(request.host);
        let available = pages_of(&host, request.galvan);
        let total = available.iter().map(len).sum::<u64>();
        let size = request.size & !(PAGE - 1);
        if size > total {
            return Err(LayoutError::Memory {
                wanted: size,
                available: total,
            });
        }
        let (ram, free) = split_at_size(available, size);

        // Room in which to place things. What is busy now cannot be written to.
        let mut room = ram.clone();
        let mut busy = merge(request.busy.to_vec());
        cut(&mut busy, request.ramdisk);
        for busy in &busy {
            cut(&mut room, busy);
        }
        // Real-mode code and firmware data; dom0 shall find it as the firmware left it.
        cut(&mut room, &(0..MIB));

        let delta = place_kernel(request.kernel, &room)?;
        let kernel = request.kernel.range();
        let moved = kernel.start.wrapping_add(delta)..kernel.end.wrapping_add(delta);
        cut(&mut room, &moved);

        let ramdisk = request.ramdisk;
        let stays = len(ramdisk) == 0
            || ramdisk.start.is_multiple_of(PAGE)
                && ramdisk.end <= 4 * GIB
                && contains(&room, ramdisk);
        // If it has to move, then not onto itself: the copy goes forward. For the rest it costs
        // little to stay away from it, and leaves the order of copying free.
        cut(&mut room, ramdisk);

        // At the very top, so that dom0's RAM is not split.
        let acpi_len = request.acpi_len.next_multiple_of(PAGE);
        let acpi = match acpi_len {
            0 => 0..0,
            n => find_high(&room, n, PAGE, 4 * GIB).ok_or(LayoutError::Data { len: n })?,
        };
        cut(&mut room, &acpi);

        let place = if stays {
            ramdisk.clone()
        } else {
            // Linux prefers it below 2 GiB and can express 4.
            [2 * GIB, 4 * GIB]
                .into_iter()
                .find_map(|below| find_high(&room, len(ramdisk), PAGE, below))
                .ok_or(LayoutError::Ramdisk { len: len(ramdisk) })?
        };
        cut(&mut room, &place);

        let map = memory_map(&host, &ram, &acpi);
        if map.len() > MAX_REGIONS {
            return Err(LayoutError::Regions(map.len()));
        }
        // Linux reads module list and memory map while it has the first 1 GiB mapped only.
        let data_len = start_info_len(map.len(), request.cmdline_len);
        let start_info =
            find_low(&room, data_len, PAGE, MIB, GIB).ok_or(LayoutError::Data { len: data_len })?;

        Ok(Self {
            ram,
            free,
            map,
            // The whole kernel lies below 4 GiB, moved or not.
            entry: u64::from(request.kernel.entry).wrapping_add(delta) as u32,
            ramdisk: place,
            start_info,
            acpi,
            kernel_delta: delta,
        })
    }

    /// Where the kernel's memory at `paddr` (of a [`super::elf::Segment`]) goes.
    pub fn kernel_address(&self, paddr: u64) -> u64 {
        paddr.wrapping_add(self.kernel_delta)
    }

    /// What has to be written to [`Plan::start_info`], not longer than it. A command line ends at
    /// its first zero.
    ///
    /// Version 1, with the memory map: Linux (since 4.20) and FreeBSD take the map from there if
    /// there is one and ask by `XENMEM_memory_map` otherwise. Stock Xen before 4.20 left it out for
    /// dom0, but it is what every PVH guest of every hypervisor boots by, works before hypercalls
    /// do, and says the same as the hypercall: both come from [`Plan::map`].
    pub fn start_info_bytes(&self, cmdline: &[u8], ramdisk_cmdline: &[u8], rsdp: u64) -> Vec<u8> {
        /// `SIF_PRIVILEGED | SIF_INITDOMAIN`
        const SIF_DOM0: u32 = 3;
        let base = self.start_info.start;
        let modules = base + size_of::<HvmStartInfo>() as u64;
        let memmap = modules + size_of::<HvmModlistEntry>() as u64;
        let texts = memmap + (self.map.len() * size_of::<HvmMemmapTableEntry>()) as u64;
        let to_nul = |text: &[u8]| text.split(|&b| b == 0).next().map_or(0, <[u8]>::len);
        let cmdline = &cmdline[..to_nul(cmdline)];
        let ramdisk_cmdline = &ramdisk_cmdline[..to_nul(ramdisk_cmdline)];
        let has_ramdisk = !self.ramdisk.is_empty();

        let mut out = Vec::with_capacity(len(&self.start_info) as usize);
        out.extend_from_slice(
            HvmStartInfo {
                magic: XEN_HVM_START_MAGIC_VALUE,
                version: 1,
                flags: SIF_DOM0,
                nr_modules: has_ramdisk.into(),
                modlist_paddr: if has_ramdisk { modules } else { 0 },
                cmdline_paddr: texts,
                rsdp_paddr: rsdp,
                memmap_paddr: memmap,
                memmap_entries: self.map.len() as u32,
                _pad: 0,
            }
            .as_bytes(),
        );
        out.extend_from_slice(
            HvmModlistEntry {
                paddr: self.ramdisk.start,
                size: len(&self.ramdisk),
                cmdline_paddr: texts + cmdline.len() as u64 + 1,
                _pad: 0,
            }
            .as_bytes(),
        );
        for region in &self.map {
            out.extend_from_slice(
                HvmMemmapTableEntry {
                    addr: region.range.start,
                    size: len(&region.range),
                    kind: region.kind as u32,
                    _pad: 0,
                }
                .as_bytes(),
            );
        }
        for text in [cmdline, ramdisk_cmdline] {
            out.extend_from_slice(text);
            out.push(0);
        }
        out
    }
}

/// The highest `length` bytes of usable RAM that end at or below `below` and touch nothing of
/// `avoid`, at a multiple of `align` (a power of two, at least a page).
///
/// For what must stay clear of dom0's memory: Galvan's own, and what is used up to dom0's start.
pub fn highest_free(
    host: &[Region],
    avoid: &[Range<u64>],
    length: u64,
    align: u64,
    below: u64,
) -> Option<Range<u64>> {
    find_high(&pages_of(&normalise(host), avoid), length, align, below)
}

/// What dom0 sees at its machine address beside its RAM: the firmware's ranges, and below 1 MiB
/// everything that is not RAM (screen, option ROMs, BIOS). By ascending address, whole pages.
///
/// `trapped` are ranges that are emulated or hidden: IO-APICs, configuration space, MSI-X tables,
/// Galvan's devices. The local APIC's range is always among them, and so is `galvan`.
pub fn identity_ranges(
    host: &[Region],
    galvan: &[Range<u64>],
    trapped: &[Range<u64>],
) -> Vec<Range<u64>> {
    let host = normalise(host);
    let top_of_ram = host
        .iter()
        .filter(|r| r.kind == Kind::Usable)
        .map(|r| r.range.end)
        .max();
    let limit = top_of_ram.unwrap_or(0).max(4 * GIB);
    let mut out = Vec::new();
    // Below 1 MiB: all, less the RAM.
    out.push(0..MIB);
    for region in &host {
        let outward = align_down(region.range.start)..align_up(region.range.end);
        match region.kind {
            Kind::Acpi | Kind::Nvs => out.push(outward),
            Kind::Reserved if outward.start < limit => {
                out.push(outward.start..outward.end.min(limit));
            }
            _ => {}
        }
    }
    let mut out = merge(out);
    for region in host.iter().filter(|r| r.kind == Kind::Usable) {
        // Partly usable pages are RAM of the firmware as well.
        cut(
            &mut out,
            &(align_up(region.range.start)..align_down(region.range.end)),
        );
    }
    for hidden in trapped.iter().chain(galvan) {
        cut(&mut out, &(align_down(hidden.start)..align_up(hidden.end)));
    }
    cut(&mut out, &LAPIC);
    out
}

fn start_info_len(regions: usize, cmdline_len: usize) -> u64 {
    let tables = size_of::<HvmStartInfo>()
        + size_of::<HvmModlistEntry>()
        + regions * size_of::<HvmMemmapTableEntry>();
    // Each command line has its zero.
    (tables + cmdline_len + 2) as u64
}

/// Where the kernel goes, as the distance from where it wants to be.
fn place_kernel(kernel: &Image<'_>, room: &[Range<u64>]) -> Result<u64, LayoutError> {
    let wanted = kernel.range();
    let wanted = align_down(wanted.start)..align_up(wanted.end);
    if contains(room, &wanted) {
        return Ok(0);
    }
    kernel
        .relocation
        .and_then(|r| {
            let below = (r.max + 1).min(4 * GIB);
            find_low(room, len(&wanted), r.align, r.min.max(MIB), below)
        })
        // An image that does not begin at a multiple of its own alignment keeps that.
        .map(|found| found.start.wrapping_sub(wanted.start))
        .ok_or(LayoutError::Kernel { range: wanted })
}

/// Dom0's view of the machine's map.
fn memory_map(host: &[Region], ram: &[Range<u64>], acpi: &Range<u64>) -> Vec<Region> {
    let mut regions = Vec::new();
    for region in host {
        let kind = match region.kind {
            Kind::Usable => Kind::Unusable,
            other => other,
        };
        regions.push((region.range.clone(), kind));
    }
    // Later ones replace earlier ones.
    regions.extend(ram.iter().map(|r| (r.clone(), Kind::Usable)));
    regions.push((acpi.clone(), Kind::Acpi));
    sweep(&regions, |covering| covering.last())
}

/// The machine's map without overlaps and by ascending address.
fn normalise(host: &[Region]) -> Vec<Region> {
    let regions = host
        .iter()
        .map(|r| (r.range.clone(), r.kind))
        .collect::<Vec<_>>();
    sweep(&regions, |covering| covering.max())
}

/// Cuts overlapping regions up; `choose` picks the kind of each part from those that cover it, which
/// it gets in order.
fn sweep(
    regions: &[(Range<u64>, Kind)],
    choose: impl Fn(&mut dyn Iterator<Item = Kind>) -> Option<Kind>,
) -> Vec<Region> {
    let mut edges = regions
        .iter()
        .flat_map(|(range, _)| [range.start, range.end])
        .collect::<Vec<_>>();
    edges.sort_unstable();
    edges.dedup();
    let mut out: Vec<Region> = Vec::new();
    for pair in edges.windows(2) {
        let &[start, end] = pair else { continue };
        let mut covering = regions
            .iter()
            .filter(|(range, _)| range.start <= start && end <= range.end)
            .map(|(_, kind)| *kind);
        let Some(kind) = choose(&mut covering) else {
            continue;
        };
        match out.last_mut() {
            Some(last) if last.range.end == start && last.kind == kind => last.range.end = end,
            _ => out.push(Region::new(start..end, kind)),
        }
    }
    out
}

/// The whole pages of usable RAM that touch nothing of `avoid`.
fn pages_of(host: &[Region], avoid: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out = host
        .iter()
        .filter(|r| r.kind == Kind::Usable)
        .map(|r| align_up(r.range.start)..align_down(r.range.end))
        .filter(|r| r.start < r.end)
        .collect::<Vec<_>>();
    for range in avoid {
        cut(&mut out, &(align_down(range.start)..align_up(range.end)));
    }
    out
}

/// The lowest `size` bytes, and the rest.
fn split_at_size(ranges: Vec<Range<u64>>, size: u64) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
    let (mut low, mut high) = (Vec::new(), Vec::new());
    let mut left = size;
    for range in ranges {
        let taken = len(&range).min(left);
        left -= taken;
        let middle = range.start + taken;
        low.extend((taken != 0).then_some(range.start..middle));
        high.extend((middle != range.end).then_some(middle..range.end));
    }
    (low, high)
}

/// Takes `hole` out of ascending ranges; whole pages that it touches, so that whole pages remain.
fn cut(ranges: &mut Vec<Range<u64>>, hole: &Range<u64>) {
    if len(hole) == 0 {
        return;
    }
    let hole = align_down(hole.start)..align_up(hole.end);
    *ranges = ranges
        .iter()
        .flat_map(|r| {
            let before = r.start..r.end.min(hole.start);
            let after = r.start.max(hole.end)..r.end;
            [before, after]
        })
        .filter(|r| r.start < r.end)
        .collect();
}

fn merge(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|r| r.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}

fn find_high(ranges: &[Range<u64>], length: u64, align: u64, below: u64) -> Option<Range<u64>> {
    let align = align.max(PAGE);
    ranges.iter().rev().find_map(|r| {
        let end = r.end.min(below);
        let start = end.checked_sub(length)? & !(align - 1);
        (start >= r.start).then(|| start..start + length)
    })
}

fn find_low(
    ranges: &[Range<u64>],
    length: u64,
    align: u64,
    from: u64,
    below: u64,
) -> Option<Range<u64>> {
    ranges.iter().find_map(|r| {
        let start = r.start.max(from).checked_next_multiple_of(align)?;
        let end = start.checked_add(length)?;
        (end <= r.end.min(below)).then_some(start..end)
    })
}

fn contains(ranges: &[Range<u64>], inner: &Range<u64>) -> bool {
    ranges
        .iter()
        .any(|r| r.start <= inner.start && inner.end <= r.end)
}

fn len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

fn align_down(address: u64) -> u64 {
    address & !(PAGE - 1)
}

/// Saturates at the last page boundary of the address space.
fn align_up(address: u64) -> u64 {
    align_down(address.saturating_add(PAGE - 1))
}

#[cfg(test)]
mod tests {
    use super::super::elf::{Relocation, Segment};
    use super::*;
    use Kind::{Acpi, Nvs, Reserved, Unusable, Usable};
    use proptest::prelude::*;
    use std::string::ToString;
    use zerocopy::FromBytes;

    fn kernel(paddr: u64, mem: u64, relocation: Option<Relocation>) -> Image<'static> {
        Image {
            entry: (paddr + 0xb20) as u32,
            segments: std::vec![Segment {
                paddr,
                mem_len: mem,
                file: 0..0x1000
            }],
            relocation,
            guest_os: "linux",
            guest_version: "2.6",
        }
    }

    const RELOC: Relocation = Relocation {
        align: 0x20_0000,
        min: 0x100_0000,
        max: 0x3fff_ffff,
    };

    /// q35 with SeaBIOS and 4 GiB.
    fn q35() -> Vec<Region> {
        std::vec![
            Region::new(0..0x9_fc00, Usable),
            Region::new(0x9_fc00..0xa_0000, Reserved),
            Region::new(0xf_0000..0x10_0000, Reserved),
            Region::new(0x10_0000..0x7ffd_c000, Usable),
            Region::new(0x7ffd_c000..0x8000_0000, Reserved),
            Region::new(0xb000_0000..0xc000_0000, Reserved),
            Region::new(0xfed1_c000..0xfed2_0000, Reserved),
            Region::new(0xfeff_c000..0xff00_0000, Reserved),
            Region::new(0xfffc_0000..0x1_0000_0000, Reserved),
            Region::new(0x1_0000_0000..0x1_8000_0000, Usable),
        ]
    }

    /// What OVMF on q35 gave stock Xen in the lab (abridged).
    fn ovmf() -> Vec<Region> {
        std::vec![
            Region::new(0..0xa_0000, Usable),
            Region::new(0x10_0000..0x80_6000, Usable),
            Region::new(0x80_6000..0x80_8000, Nvs),
            Region::new(0x80_8000..0x81_0000, Usable),
            Region::new(0x81_0000..0x90_0000, Nvs),
            Region::new(0x90_0000..0x7ea8_a000, Usable),
            Region::new(0x7ea8_a000..0x7eb8_c000, Reserved),
            Region::new(0x7eb8_c000..0x7f4e_c000, Usable),
            Region::new(0x7f76_c000..0x7f77_e000, Acpi),
            Region::new(0x7f77_e000..0x7f7f_e000, Nvs),
            Region::new(0x7f7f_e000..0x7fee_c000, Usable),
            Region::new(0xb000_0000..0xc000_0000, Reserved),
            Region::new(0x1_0000_0000..0x1_8000_0000, Usable),
        ]
    }

    struct Case {
        host: Vec<Region>,
        galvan: Vec<Range<u64>>,
        busy: Vec<Range<u64>>,
        size: u64,
        kernel: Image<'static>,
        ramdisk: Range<u64>,
    }

    impl Case {
        fn new(host: Vec<Region>) -> Self {
            Self {
                host,
                galvan: Vec::new(),
                busy: Vec::new(),
                size: GIB,
                kernel: kernel(0x100_0000, 0x320_0000, Some(RELOC)),
                ramdisk: 0x7000_0000..0x7030_0123,
            }
        }

        fn plan(&self) -> Result<Plan, LayoutError> {
            Plan::make(&Request {
                host: &self.host,
                galvan: &self.galvan,
                busy: &self.busy,
                size: self.size,
                kernel: &self.kernel,
                ramdisk: &self.ramdisk,
                cmdline_len: 40,
                acpi_len: 500,
            })
        }
    }

    fn total(ranges: &[Range<u64>]) -> u64 {
        ranges.iter().map(len).sum()
    }

    fn apart(a: &Range<u64>, b: &Range<u64>) -> bool {
        len(a) == 0 || len(b) == 0 || a.end <= b.start || b.end <= a.start
    }

    /// What holds of every plan.
    fn check(case: &Case, plan: &Plan) {
        assert_eq!(total(&plan.ram), case.size & !0xfff);
        for r in plan.ram.iter().chain(&plan.free) {
            assert!(r.start % PAGE == 0 && r.end % PAGE == 0 && r.start < r.end);
            assert!(case.galvan.iter().all(|g| apart(g, r)), "{r:x?}");
        }
        for dom0 in &plan.ram {
            assert!(plan.free.iter().all(|f| apart(f, dom0)));
        }
        let k = case.kernel.range();
        let kernel = plan.kernel_address(k.start)..plan.kernel_address(k.end);
        let placed = [&kernel, &plan.ramdisk, &plan.start_info, &plan.acpi];
        for (n, a) in placed.iter().enumerate() {
            assert!(len(a) == 0 || contains(&plan.ram, a), "{a:x?}");
            assert!(a.end <= 4 * GIB);
            assert!(placed[..n].iter().all(|b| apart(a, b)), "{placed:x?}");
            let mut busy = merge(case.busy.clone());
            cut(&mut busy, &case.ramdisk);
            assert!(busy.iter().all(|b| apart(a, b)), "{a:x?} is busy");
        }
        assert!(plan.ramdisk == case.ramdisk || apart(&plan.ramdisk, &case.ramdisk));
        assert!(plan.start_info.end <= GIB);
        assert!(kernel.contains(&u64::from(plan.entry)));
        assert_eq!(len(&plan.ramdisk), len(&case.ramdisk));
        for pair in plan.map.windows(2) {
            assert!(pair[0].range.end <= pair[1].range.start, "{pair:x?}");
        }
        let of = |kind| {
            plan.map
                .iter()
                .filter(move |r| r.kind == kind)
                .map(|r| len(&r.range))
                .sum::<u64>()
        };
        assert_eq!(of(Usable) + len(&plan.acpi), total(&plan.ram));
        for host in normalise(&case.host) {
            let seen = |a: u64| {
                plan.map
                    .iter()
                    .find(|r| r.range.contains(&a))
                    .map(|r| r.kind)
            };
            let kind = seen(host.range.start);
            match host.kind {
                Usable => assert!(matches!(kind, Some(Usable | Unusable | Acpi)), "{host:x?}"),
                other => assert_eq!(kind, Some(other), "{host:x?}"),
            }
        }
    }

    #[test]
    fn dom0_gets_the_lowest_ram_and_the_rest_is_unusable_to_it() {
        let case = Case::new(q35());
        let plan = case.plan().unwrap();
        check(&case, &plan);
        assert_eq!(plan.ram, [0..0x9_f000, 0x10_0000..0x4006_1000]);
        assert_eq!(
            plan.free,
            [0x4006_1000..0x7ffd_c000, 0x1_0000_0000..0x1_8000_0000]
        );
        let map = plan
            .map
            .iter()
            .map(|r| (r.range.start, r.range.end, r.kind))
            .collect::<Vec<_>>();
        assert_eq!(
            map,
            [
                (0, 0x9_f000, Usable),
                (0x9_f000, 0x9_fc00, Unusable),
                (0x9_fc00, 0xa_0000, Reserved),
                (0xf_0000, 0x10_0000, Reserved),
                (0x10_0000, 0x4006_0000, Usable),
                (0x4006_0000, 0x4006_1000, Acpi),
                (0x4006_1000, 0x7ffd_c000, Unusable),
                (0x7ffd_c000, 0x8000_0000, Reserved),
                (0xb000_0000, 0xc000_0000, Reserved),
                (0xfed1_c000, 0xfed2_0000, Reserved),
                (0xfeff_c000, 0xff00_0000, Reserved),
                (0xfffc_0000, 0x1_0000_0000, Reserved),
                (0x1_0000_0000, 0x1_8000_0000, Unusable),
            ]
        );
    }

    #[test]
    fn a_uefi_machines_scattered_low_memory_is_used() {
        let case = Case::new(ovmf());
        let plan = case.plan().unwrap();
        check(&case, &plan);
        assert_eq!(plan.entry, 0x100_0b20);
        assert_eq!(plan.kernel_address(0x100_0000), 0x100_0000);
        // Start-up data in the first gap above 1 MiB.
        assert_eq!(plan.start_info.start, 0x10_0000);
    }

    #[test]
    fn galvans_memory_is_neither_dom0s_nor_free_and_counts_against_the_total() {
        let mut case = Case::new(q35());
        case.galvan = std::vec![0x2000_0000..0x2400_0000, 0x8000..0x9000];
        case.size = 3 * GIB;
        let plan = case.plan().unwrap();
        check(&case, &plan);
        case.size = 4 * GIB;
        assert_eq!(
            case.plan().unwrap_err().to_string(),
            "dom0_mem: 4096 MiB wanted, the machine has 4031 MiB for dom0"
        );
    }

    #[test]
    fn a_ramdisk_in_the_right_place_stays_there() {
        let mut case = Case::new(q35());
        case.ramdisk = 0x3000_0000..0x3030_0123;
        let plan = case.plan().unwrap();
        check(&case, &plan);
        assert_eq!(plan.ramdisk, case.ramdisk);
    }

    #[test]
    fn a_ramdisk_in_one_busy_range_with_the_kernel_file_does_not_keep_itself_busy() {
        let mut case = Case::new(q35());
        case.ramdisk = 0x3000_0000..0x3030_0123;
        case.busy = std::vec![0x2f00_0000..0x3030_1000];
        let plan = case.plan().unwrap();
        check(&case, &plan);
        assert_eq!(plan.ramdisk, case.ramdisk);
        case.ramdisk = 0x100_0000..0x130_0123;
        case.kernel.relocation = None;
        case.busy = std::vec![0xf0_0000..0x130_1000];
        let plan = case.plan().unwrap();
        check(&case, &plan);
    }

    #[test]
    fn a_ramdisk_under_the_kernel_is_moved_first() {
        let mut case = Case::new(q35());
        for start in [0xf0_0000, 0x200_0000, 0x410_0000, 0x3000_0001] {
            case.ramdisk = start..start + 0x60_0000;
            let plan = case.plan().unwrap();
            check(&case, &plan);
            assert_eq!(plan.kernel_address(0), 0);
            assert!(apart(&plan.ramdisk, &case.ramdisk));
        }
    }

    #[test]
    fn a_ramdisk_that_does_not_fit_is_an_error() {
        let mut case = Case::new(q35());
        case.size = 128 * MIB;
        case.ramdisk = 0x6000_0000..0x6000_0000 + 100 * MIB;
        assert_eq!(
            case.plan().unwrap_err().to_string(),
            "dom0's ramdisk of 100 MiB does not fit into its memory below 4 GiB; raise dom0_mem"
        );
    }

    #[test]
    fn a_kernel_that_can_move_does_when_its_place_is_taken() {
        let mut case = Case::new(q35());
        case.busy = std::vec![0x180_0000..0x190_0000];
        let plan = case.plan().unwrap();
        check(&case, &plan);
        assert_eq!(plan.kernel_address(0x100_0000), 0x1a0_0000);
        assert_eq!(plan.entry, 0x1a0_0b20);

        case.kernel.relocation = None;
        assert_eq!(
            case.plan().unwrap_err().to_string(),
            "dom0's kernel has to be at 0x1000000-0x4200000, where dom0 has no free memory"
        );
    }

    #[test]
    fn a_kernel_needs_its_whole_place_inside_dom0s_memory() {
        let mut case = Case::new(q35());
        case.size = 60 * MIB;
        case.kernel.relocation = None;
        assert!(matches!(case.plan(), Err(LayoutError::Kernel { .. })));
    }

    #[test]
    fn the_start_info_says_where_everything_is() {
        let case = Case::new(q35());
        let plan = case.plan().unwrap();
        let bytes = plan.start_info_bytes(b"root=/dev/nvme0n1 ro\0junk", b"", 0x1234);
        assert!(bytes.len() as u64 <= len(&plan.start_info));
        let at = |paddr: u64| &bytes[(paddr - plan.start_info.start) as usize..];
        let (info, _) = HvmStartInfo::read_from_prefix(&bytes).unwrap();
        assert_eq!((info.magic, info.version, info.flags), (0x336e_c578, 1, 3));
        assert_eq!((info.nr_modules, info.rsdp_paddr), (1, 0x1234));
        assert!(at(info.cmdline_paddr).starts_with(b"root=/dev/nvme0n1 ro\0"));
        let (module, _) = HvmModlistEntry::read_from_prefix(at(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (plan.ramdisk.start, 0x30_0123));
        assert_eq!(at(module.cmdline_paddr)[0], 0);
        assert_eq!(info.memmap_entries as usize, plan.map.len());
        for (n, region) in plan.map.iter().enumerate() {
            let entry = at(info.memmap_paddr + 24 * n as u64);
            let (entry, _) = HvmMemmapTableEntry::read_from_prefix(entry).unwrap();
            assert_eq!(entry.addr..entry.addr + entry.size, region.range);
            assert_eq!(entry.kind, region.kind as u32);
        }
    }

    #[test]
    fn without_a_ramdisk_there_is_no_module() {
        let mut case = Case::new(q35());
        case.ramdisk = 0..0;
        let plan = case.plan().unwrap();
        check(&case, &plan);
        let bytes = plan.start_info_bytes(b"", b"", 0);
        let (info, _) = HvmStartInfo::read_from_prefix(&bytes).unwrap();
        assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
    }

    #[test]
    fn memory_for_the_hypervisor_is_found_at_the_top() {
        let host = q35();
        let below_4g = highest_free(&host, &[], 16 * MIB, 2 * MIB, 4 * GIB).unwrap();
        assert_eq!(below_4g, 0x7ee0_0000..0x7fe0_0000);
        let next = highest_free(&host, &[below_4g], 16 * MIB, PAGE, 4 * GIB).unwrap();
        assert_eq!(next, 0x7de0_0000..0x7ee0_0000);
        let small = highest_free(&host, &[], PAGE, PAGE, u64::MAX).unwrap();
        assert_eq!(small, 0x1_7fff_f000..0x1_8000_0000);
        assert_eq!(highest_free(&host, &[], 4 * GIB, PAGE, u64::MAX), None);
    }

    #[test]
    fn overlapping_firmware_ranges_resolve_to_the_stricter() {
        let host = [
            Region::new(0x1000..0x9000, Usable),
            Region::new(0x3000..0x4000, Reserved),
            Region::new(0x3800..0x5000, Acpi),
            Region::new(0x8000..0xa000, Usable),
        ];
        let flat = normalise(&host);
        let flat = flat
            .iter()
            .map(|r| (r.range.start, r.range.end, r.kind))
            .collect::<Vec<_>>();
        assert_eq!(
            flat,
            [
                (0x1000, 0x3000, Usable),
                (0x3000, 0x3800, Reserved),
                (0x3800, 0x5000, Acpi),
                (0x5000, 0xa000, Usable),
            ]
        );
    }

    #[test]
    fn dom0_sees_the_firmwares_ranges_but_not_what_is_emulated() {
        let ioapic = 0xfec0_0000..0xfec0_1000;
        let ecam = 0xb000_0000..0xc000_0000;
        let mut host = ovmf();
        host.push(Region::new(0xfec0_0000..0xff00_0000, Reserved));
        host.push(Region::new(0x100_0000_0000..0x101_0000_0000, Reserved));
        let galvan = 0x7ea9_0000..0x7ea9_1000;
        assert_eq!(
            identity_ranges(&host, &[galvan], &[ioapic, ecam]),
            [
                0xa_0000..0x10_0000,
                0x80_6000..0x80_8000,
                0x81_0000..0x90_0000,
                0x7ea8_a000..0x7ea9_0000,
                0x7ea9_1000..0x7eb8_c000,
                0x7f76_c000..0x7f7f_e000,
                0xfec0_1000..0xfee0_0000,
                0xfef0_0000..0xff00_0000,
            ]
        );
    }

    fn any_region() -> impl Strategy<Value = Region> {
        let kind = prop::sample::select(std::vec![
            Usable, Usable, Usable, Reserved, Acpi, Nvs, Unusable
        ]);
        let range = (0u64..0x2_0000, 1u64..0x8000, 0u64..2, 0u64..3);
        (kind, range).prop_map(|(kind, (page, pages, odd, high))| {
            let start = page * PAGE * 8 + odd * 0x123 + high * 2 * GIB;
            Region::new(start..start + pages * PAGE * 16, kind)
        })
    }

    proptest! {
        #[test]
        fn every_plan_keeps_its_promises(
            host in prop::collection::vec(any_region(), 1..12),
            galvan in prop::collection::vec((0u64..0x4_0000, 1u64..64), 0..3),
            busy in prop::collection::vec((0u64..0x4_0000, 1u64..64), 0..3),
            mib in 0u64..2048,
            initrd in (0u64..0x4000_0000, 0u64..0x200_0000),
            movable: bool,
        ) {
            let mut host = host;
            host.push(Region::new(0..0x3000_0000, Usable));
            let pages = |v: Vec<(u64, u64)>| v.into_iter().map(|(p, n)| p * PAGE..(p + n) * PAGE).collect::<Vec<_>>();
            let case = Case {
                host,
                galvan: pages(galvan),
                busy: pages(busy),
                size: mib * MIB,
                kernel: kernel(0x100_0000, 0x80_0000, movable.then_some(RELOC)),
                ramdisk: initrd.0..initrd.0 + initrd.1,
            };
            match case.plan() {
                Ok(plan) => check(&case, &plan),
                Err(error) => { let _ = error.to_string(); }
            }
            let _ = identity_ranges(&case.host, &case.galvan, &case.busy);
        }

        #[test]
        fn senseless_maps_are_survived(
            edges in prop::collection::vec((any::<u64>(), any::<u64>()), 0..8), size: u64,
        ) {
            let mut case = Case::new(edges.into_iter().map(|(a, b)| Region::new(a..b, Usable)).collect());
            case.size = size;
            let _ = case.plan();
            let _ = identity_ranges(&case.host, &[], core::slice::from_ref(&(u64::MAX - 5..u64::MAX)));
            let _ = highest_free(&case.host, &[], size, PAGE, u64::MAX);
        }
    }
}
