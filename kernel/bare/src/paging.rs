//! The hypervisor's own address space.
//!
//! | virtual | what |
//! |---|---|
//! | `DIRECT_MAP_BASE` + x | physical address x: RAM write-back; device memory only where it was asked for, uncached |
//! | `PERCPU_BASE` | the calling CPU's own area and stacks (`percpu`); a different mapping in each CPU's table |
//! | the image | text read-execute, constants read-only, the rest read-write |
//!
//! Nothing is both writable and executable. All CPUs share every table but their top level, so a
//! mapping that is added reaches them all; the hypervisor never removes one.
//! (AMD APM "Long-Mode Page Translation"; Intel SDM "4-Level Paging".)

use galvan_base::sync::{RankedLock, rank};
use galvan_base::{Mpa, PAGE_SIZE};
use galvan_boot::info::{BootInfo, DIRECT_MAP_BASE, MemoryRange};
use x86_64::registers::control::Cr3;
use x86_64::structures::paging::mapper::{MapToError, MappedFrame, TranslateResult};
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageTable, PageTableFlags as F, PhysFrame,
    Size2MiB, Size4KiB, Translate,
};
use x86_64::{PhysAddr, VirtAddr};

/// Where each CPU's own area is: the second-highest top-level entry.
pub const PERCPU_BASE: u64 = 0xffff_ff00_0000_0000;

const UNCACHED: F = F::NO_CACHE.union(F::WRITE_THROUGH);

/// Serialises changes of the shared tables.
static TABLES: RankedLock<Option<Mpa>, { rank::PLATFORM_PAGING }> = RankedLock::new(None);

/// The direct-map pointer of a physical address.
#[inline]
pub fn direct_ptr(a: Mpa) -> *mut u8 {
    (DIRECT_MAP_BASE + a.get()) as *mut u8
}

struct TableFrames;

// SAFETY: `bootmem` hands out each page once, zeroed and unused.
unsafe impl FrameAllocator<Size4KiB> for TableFrames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let a = if crate::platform::frames_ready() {
            crate::platform::table_frame()?
        } else {
            crate::bootmem::alloc(1)
        };
        Some(PhysFrame::containing_address(PhysAddr::new(a.get())))
    }
}

/// The mapper over the tables with this root.
///
/// # Safety
/// `root` must be a top-level table that only this caller changes meanwhile.
unsafe fn mapper(root: Mpa) -> OffsetPageTable<'static> {
    // SAFETY: the caller's promise; the direct map covers all table memory.
    unsafe {
        OffsetPageTable::new(
            &mut *direct_ptr(root).cast::<PageTable>(),
            VirtAddr::new(DIRECT_MAP_BASE),
        )
    }
}

unsafe extern "C" {
    static __text_start: u8;
    static __text_end: u8;
    static __rodata_start: u8;
    static __rodata_end: u8;
    static __data_start: u8;
    static __data_end: u8;
}

/// Builds the hypervisor's tables and makes them this CPU's. Runs once, on the loader's tables.
pub fn init(info: &BootInfo, map: impl Iterator<Item = MemoryRange> + Clone) {
    let root = crate::bootmem::alloc(1);
    // SAFETY: a new table that nobody uses yet.
    let mut m = unsafe { mapper(root) };

    // All top-level entries of the kernel half exist from the start, so that each CPU can copy them.
    let top = m.level_4_table_mut();
    for i in 256..512 {
        let in_direct = i < 256 + 8;
        if in_direct || i == 511 {
            let t = crate::bootmem::alloc(1);
            top[i].set_addr(PhysAddr::new(t.get()), F::PRESENT | F::WRITABLE);
        }
    }
    for r in map.filter(|r| r.kind.is_ram()) {
        map_direct(
            &mut m,
            r.start,
            r.end(),
            F::PRESENT | F::WRITABLE | F::NO_EXECUTE | F::GLOBAL,
        );
    }
    let data = F::PRESENT | F::NO_EXECUTE | F::GLOBAL;
    let parts = [
        (
            &raw const __text_start as u64,
            &raw const __text_end as u64,
            F::PRESENT | F::GLOBAL,
        ),
        (
            &raw const __rodata_start as u64,
            &raw const __rodata_end as u64,
            data,
        ),
        (
            &raw const __data_start as u64,
            &raw const __data_end as u64,
            data | F::WRITABLE,
        ),
    ];
    for (start, end, flags) in parts {
        for va in (start..end).step_by(PAGE_SIZE) {
            let pa = info.image.phys.start + (va - info.image.virt);
            let page = Page::<Size4KiB>::containing_address(VirtAddr::new(va));
            // SAFETY: the image's own pages, with the rights that its parts need.
            let r = unsafe {
                m.map_to(
                    page,
                    PhysFrame::containing_address(PhysAddr::new(pa)),
                    flags,
                    &mut TableFrames,
                )
            };
            r.expect("the image is mapped once").ignore();
        }
    }
    *TABLES.lock() = Some(root);
    activate(root);
}

/// Maps a physical range in the direct map with the largest pages that fit; parts that are mapped
/// already are left as they are.
fn map_direct(m: &mut OffsetPageTable<'_>, start: u64, end: u64, flags: F) {
    let mut a = start & !(PAGE_SIZE as u64 - 1);
    const BIG: u64 = 2 << 20;
    while a < end {
        let va = VirtAddr::new(DIRECT_MAP_BASE + a);
        // SAFETY: the direct map is this module's alone, and gives no address a second meaning.
        unsafe {
            if a % BIG == 0 && end - a >= BIG {
                let page = Page::<Size2MiB>::containing_address(va);
                match m.map_to(
                    page,
                    PhysFrame::containing_address(PhysAddr::new(a)),
                    flags,
                    &mut TableFrames,
                ) {
                    Ok(f) => {
                        f.ignore();
                        a += BIG;
                        continue;
                    }
                    Err(MapToError::PageAlreadyMapped(_)) => {}
                    Err(MapToError::ParentEntryHugePage) => {
                        a += BIG;
                        continue;
                    }
                    Err(MapToError::FrameAllocationFailed) => panic!("no memory for page tables"),
                }
            }
            let page = Page::<Size4KiB>::containing_address(va);
            match m.map_to(
                page,
                PhysFrame::containing_address(PhysAddr::new(a)),
                flags,
                &mut TableFrames,
            ) {
                Ok(f) => f.ignore(),
                Err(MapToError::FrameAllocationFailed) => panic!("no memory for page tables"),
                Err(_) => {}
            }
        }
        a += PAGE_SIZE as u64;
    }
}

/// Makes device memory reachable, uncached, and gives its address. What is mapped stays mapped;
/// mapping a range again costs a walk.
pub fn map_device(a: Mpa, len: usize) -> *mut u8 {
    let guard = TABLES.lock();
    if let Some(root) = *guard {
        // SAFETY: `TABLES` is held.
        let mut m = unsafe { mapper(root) };
        let flags = F::PRESENT | F::WRITABLE | F::NO_EXECUTE | F::GLOBAL | UNCACHED;
        map_direct(&mut m, a.get(), a.get() + len as u64, flags);
    }
    direct_ptr(a)
}

/// As [`map_device`] for a frame buffer: write-through, which PAT entry 1 turns into
/// write-combining once [`crate::desc::init_pat`] has run.
pub fn map_framebuffer(a: Mpa, len: usize) -> *mut u8 {
    let guard = TABLES.lock();
    if let Some(root) = *guard {
        // SAFETY: `TABLES` is held.
        let mut m = unsafe { mapper(root) };
        let flags = F::PRESENT | F::WRITABLE | F::NO_EXECUTE | F::GLOBAL | F::WRITE_THROUGH;
        map_direct(&mut m, a.get(), a.get() + len as u64, flags);
    }
    direct_ptr(a)
}

/// Whether the direct map has this address.
pub fn is_mapped(a: Mpa) -> bool {
    let guard = TABLES.lock();
    let Some(root) = *guard else { return false };
    // SAFETY: `TABLES` is held; the tables are only read.
    let m = unsafe { mapper(root) };
    matches!(
        m.translate(VirtAddr::new(DIRECT_MAP_BASE + a.get())),
        TranslateResult::Mapped {
            frame: MappedFrame::Size4KiB(_) | MappedFrame::Size2MiB(_) | MappedFrame::Size1GiB(_),
            ..
        }
    )
}

/// A top-level table for one CPU: the shared half and its own area, into which `own` pages are
/// mapped: (offset from [`PERCPU_BASE`], address of the page). Built by the boot CPU.
pub fn new_cpu_root(own: impl Iterator<Item = (u64, Mpa)>) -> Mpa {
    let guard = TABLES.lock();
    let shared = guard.expect("paging is initialised before CPUs are made");
    // The start code of a CPU loads CR3 in 32-bit mode.
    let root =
        crate::bootmem::alloc_below(1, PAGE_SIZE as u64, 1 << 32).expect("a page below 4 GiB");
    // SAFETY: both are whole pages; the new one is nobody else's.
    unsafe {
        direct_ptr(root).write_bytes(0, PAGE_SIZE);
        core::ptr::copy_nonoverlapping(
            direct_ptr(shared).add(PAGE_SIZE / 2),
            direct_ptr(root).add(PAGE_SIZE / 2),
            PAGE_SIZE / 2,
        );
    }
    // SAFETY: a table that no CPU uses yet.
    let mut m = unsafe { mapper(root) };
    for (offset, a) in own {
        let page = Page::<Size4KiB>::containing_address(VirtAddr::new(PERCPU_BASE + offset));
        let flags = F::PRESENT | F::WRITABLE | F::NO_EXECUTE;
        // SAFETY: an area of the address space that only this CPU's table has.
        let r = unsafe {
            m.map_to(
                page,
                PhysFrame::containing_address(PhysAddr::new(a.get())),
                flags,
                &mut TableFrames,
            )
        };
        r.expect("each page of a CPU's area is mapped once")
            .ignore();
    }
    root
}

/// Maps the page of the CPU start code at its own address, executable, in a table made by
/// [`new_cpu_root`]; only ever in tables of CPUs that are being started.
pub fn map_start_page(root: Mpa, page: Mpa) {
    let _guard = TABLES.lock();
    // SAFETY: the CPU that will use the table has not been started.
    let mut m = unsafe { mapper(root) };
    let va = Page::<Size4KiB>::containing_address(VirtAddr::new(page.get()));
    // SAFETY: the lower half of these tables is empty otherwise.
    let r = unsafe {
        m.map_to(
            va,
            PhysFrame::containing_address(PhysAddr::new(page.get())),
            F::PRESENT | F::WRITABLE,
            &mut TableFrames,
        )
    };
    r.expect("the start page is mapped once per table").ignore();
}

/// Takes the page of the start code out of this CPU's table again: its lower half is empty from
/// here on.
pub fn unmap_start_page_of_this_cpu() {
    let _guard = TABLES.lock();
    let (frame, _) = Cr3::read();
    let table = direct_ptr(Mpa::new_truncate(frame.start_address().as_u64())).cast::<u64>();
    // SAFETY: this CPU's own top-level table; only the first entry, of the lower half, is cleared.
    unsafe { table.write_volatile(0) };
    x86_64::instructions::tlb::flush_all();
}

/// Loads a top-level table.
pub fn activate(root: Mpa) {
    let (_, flags) = Cr3::read();
    // SAFETY: every table made here maps the running image, its stack and the direct map alike.
    unsafe {
        Cr3::write(
            PhysFrame::containing_address(PhysAddr::new(root.get())),
            flags,
        )
    };
}
