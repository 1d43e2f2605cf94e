//! Each CPU's own area, at the same virtual address on every CPU (design rule 6): reaching it needs
//! neither a segment register nor a look-up.
//!
//! Layout from [`crate::paging::PERCPU_BASE`], with an unmapped page before each stack, so that an
//! overflow faults instead of writing into its neighbour:
//!
//! | offset | what |
//! |---|---|
//! | 0 | [`PerCpu`] |
//! | 0x10000 | the stack on which everything runs |
//! | 0x40000, 0x50000, 0x60000 | stacks of #DF, NMI and #MC |

use core::cell::Cell;
use core::sync::atomic::{AtomicU32, AtomicU64};

use galvan_base::{CpuId, Mpa, PAGE_SIZE};
use x86_64::structures::gdt::GlobalDescriptorTable;
use x86_64::structures::tss::TaskStateSegment;

use crate::paging::PERCPU_BASE;

const AREA_PAGES: usize = size_of::<PerCpu>().div_ceil(PAGE_SIZE);
const STACK: u64 = 0x10000;
const STACK_PAGES: usize = 16;
/// Stacks of the three exceptions that need their own, in the order of their IST index.
const IST: [u64; 3] = [0x40000, 0x50000, 0x60000];
const IST_PAGES: usize = 4;

/// What a CPU keeps for itself.
#[derive(Debug)]
pub struct PerCpu {
    /// Which CPU this is.
    pub id: CpuId,
    /// Descriptor tables.
    pub gdt: GlobalDescriptorTable,
    /// Task state: the IST stacks.
    pub tss: TaskStateSegment,
    /// What each interrupt vector means here: 0 nothing, otherwise see [`crate::irq`].
    pub vectors: [AtomicU32; 256],
    /// System time for which the local timer is armed, `u64::MAX` for never.
    pub timer_armed: AtomicU64,
    /// How deep this CPU is in exceptions: a second one while reporting the first only halts.
    pub exceptions: Cell<u32>,
}

/// The calling CPU's area.
///
/// May be used only after [`crate::smp`] has made the area and this CPU runs on its own table.
#[inline]
pub fn this() -> &'static PerCpu {
    // SAFETY: every CPU's table maps an initialised PerCpu here before any code can call this; it
    // is only shared with the same CPU, and its mutable parts are cells and atomics.
    unsafe { &*(PERCPU_BASE as *const PerCpu) }
}

/// The top of the calling CPU's stack.
pub const STACK_TOP: u64 = PERCPU_BASE + STACK + (STACK_PAGES * PAGE_SIZE) as u64;

/// The top of the stack of IST entry `i`.
pub fn ist_top(i: usize) -> u64 {
    PERCPU_BASE + IST[i] + (IST_PAGES * PAGE_SIZE) as u64
}

/// Makes the area and stacks of a CPU and the table that maps them; gives both. Runs on the boot
/// CPU.
pub fn create(id: CpuId) -> (Mpa, Mpa) {
    let area = crate::bootmem::alloc(AREA_PAGES);
    let mut pages = alloc::vec::Vec::new();
    let mut add = |offset: u64, first: Mpa, n: usize| {
        for i in 0..n {
            let at = (i * PAGE_SIZE) as u64;
            pages.push((offset + at, Mpa::new_truncate(first.get() + at)));
        }
    };
    add(0, area, AREA_PAGES);
    add(STACK, crate::bootmem::alloc(STACK_PAGES), STACK_PAGES);
    for offset in IST {
        add(offset, crate::bootmem::alloc(IST_PAGES), IST_PAGES);
    }
    let root = crate::paging::new_cpu_root(pages.into_iter());
    let value = PerCpu {
        id,
        gdt: GlobalDescriptorTable::new(),
        tss: TaskStateSegment::new(),
        vectors: [const { AtomicU32::new(0) }; 256],
        timer_armed: AtomicU64::new(u64::MAX),
        exceptions: Cell::new(0),
    };
    // SAFETY: fresh pages, large enough and page aligned, that no CPU uses yet.
    unsafe {
        crate::paging::direct_ptr(area)
            .cast::<PerCpu>()
            .write(value)
    };
    (area, root)
}

/// The vector table of another CPU, through the direct map.
pub fn vectors_of(area: Mpa) -> &'static [AtomicU32; 256] {
    // SAFETY: `area` was given by `create`; only the atomics are shared between CPUs.
    unsafe { &(*crate::paging::direct_ptr(area).cast::<PerCpu>()).vectors }
}

/// Whether two words at `a` lie on one of the calling CPU's stacks.
pub fn stack_contains(a: u64) -> bool {
    let inside = |start: u64, pages: usize| {
        let start = PERCPU_BASE + start;
        a >= start && a + 16 <= start + (pages * PAGE_SIZE) as u64
    };
    inside(STACK, STACK_PAGES) || IST.into_iter().any(|s| inside(s, IST_PAGES))
}
