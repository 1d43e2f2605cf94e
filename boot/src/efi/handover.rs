//! The point of no return: boot services end, the hypervisor begins.

use core::sync::atomic::{AtomicBool, Ordering};

use galvan_boot::info::{BootInfo, DIRECT_MAP_BASE, MemoryKind, MemoryRange, PhysRange};
use galvan_boot::memory_map::{MapBuilder, capacity};
use uefi::Status;
use uefi::boot::{self, MemoryDescriptor, MemoryType};
use uefi::mem::memory_map::MemoryMap;
use uefi::runtime::{self, ResetType};

use crate::edge::enter::{State, enter};
use crate::failure::Failure;
use crate::memory::Pages;

/// How many ranges are marked as holding something of ours.
pub const MARKS: usize = 4;

/// How many descriptors the firmware's map may grow by between [`prepare`] and the end.
const GROWTH: usize = 64;

/// Whether boot services are ending or have ended: there is no console, and no way back.
pub static BEGUN: AtomicBool = AtomicBool::new(false);

/// The firmware's descriptors as `galvan_boot::memory_map` wants them.
pub fn plain(descriptor: &MemoryDescriptor) -> (u32, u64, u64, u64) {
    (
        descriptor.ty.0,
        descriptor.phys_start,
        descriptor.page_count,
        descriptor.att.bits(),
    )
}

/// All that is needed to jump.
#[derive(Debug)]
pub struct Jump {
    /// The state the hypervisor is entered in.
    pub state: State,
    /// Whether the memory of boot services stays theirs.
    pub keep_boot_services: bool,
    /// What memory holds.
    pub marks: [(PhysRange, MemoryKind); MARKS],
}

/// Memory for the final memory map, whose size is not known before it is too late to allocate.
pub fn prepare(entries_now: usize) -> Result<Pages, Failure> {
    let entries = capacity(entries_now.saturating_add(GROWTH), MARKS);
    Pages::new(entries * MemoryRange::SIZE, "the memory map")
}

/// Ends boot services and enters the hypervisor.
///
/// # Safety
///
/// The tables at `jump.state` map this application's code, data and stack at their own addresses,
/// its entry leads to a hypervisor's image that takes what `galvan_boot::info` describes, and
/// all of `jump` and `info` refers to memory that is allocated and not going to be freed.
pub unsafe fn go(jump: &Jump, mut map_pages: Pages, mut info_page: Pages, mut info: BootInfo) -> ! {
    BEGUN.store(true, Ordering::Relaxed);
    // SAFETY: no protocol is open any more but the console's, which is not used again; no value
    // whose drop would call boot services is dropped from here on, as nothing returns from here.
    let efi_map = unsafe { boot::exit_boot_services(Some(MemoryType::LOADER_DATA)) };

    let phys = map_pages.phys();
    let mut map = MapBuilder::new(map_pages.slice_mut::<MemoryRange>());
    let descriptors = efi_map.entries().map(plain);
    let mut built = map.add_efi(descriptors, jump.keep_boot_services);
    for (range, kind) in jump.marks {
        built = built.and_then(|()| map.mark(range.start, range.len, kind));
    }
    if built.is_err() {
        // The map has grown beyond all expectation, and there is no console left to say so.
        runtime::reset(ResetType::COLD, Status::BUFFER_TOO_SMALL, None);
    }
    let entries = map.finish().len();
    info.memory_map = PhysRange::new(phys, (entries * MemoryRange::SIZE) as u64);

    let info_address = DIRECT_MAP_BASE + info_page.phys();
    if let Some(slot) = info_page.slice_mut::<BootInfo>().first_mut() {
        *slot = info;
    }
    // SAFETY: passed on to the caller.
    unsafe { enter(&jump.state, info_address) }
}
