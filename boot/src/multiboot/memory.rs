//! Physical memory, all of which (up to 4 GiB) is mapped at its own address.

use core::cell::UnsafeCell;
use core::slice;

use galvan_boot::info::{BootInfo, LoaderKind, MemoryKind, MemoryRange, PhysRange};
use galvan_boot::mbi::{MAX_TEXT, Memory};
use galvan_boot::paging::TableMemory;

/// Where the mapping ends; multiboot loaders put nothing beyond.
pub const TOP: u64 = 1 << 32;

/// Below this are the real mode's interrupt vectors, and with them the null pointer.
const BOTTOM: u64 = 0x400;

const PAGE: u64 = 4096;

/// What the loader and the BIOS have left in memory.
#[derive(Debug)]
pub struct Left {
    /// This program, where they have left nothing.
    pub own: PhysRange,
}

impl Memory<'static> for Left {
    fn bytes(&self, start: u64, len: usize) -> Option<&'static [u8]> {
        let range = PhysRange::new(start, len as u64);
        if range.is_empty() {
            return Some(&[]);
        }
        if start < BOTTOM || range.end() > TOP || range.overlaps(&self.own) {
            return None;
        }
        // SAFETY: mapped, and not this program's, so that no reference to it can be mutable. The
        // caller (`app`) is done with all of it before it writes to memory that is not this
        // program's.
        Some(unsafe { slice::from_raw_parts(start as *const u8, len) })
    }
}

/// Memory that was taken from the memory map for one purpose.
#[derive(Debug)]
pub struct Block {
    range: PhysRange,
}

impl Block {
    /// The `len` bytes at physical address `start`.
    ///
    /// # Safety
    ///
    /// They are RAM below 4 GiB that nobody else uses.
    pub unsafe fn new(start: u64, len: u64) -> Self {
        Self {
            range: PhysRange::new(start, len),
        }
    }

    /// Where it is.
    pub fn range(&self) -> PhysRange {
        self.range
    }

    /// All of it, to be written to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: by the promise made to `new`; the exclusive borrow of `self` is the borrow of
        // the memory, and any byte is a valid u8.
        unsafe { slice::from_raw_parts_mut(self.range.start as *mut u8, self.range.len as usize) }
    }
}

/// Frames for page tables.
#[derive(Debug)]
pub struct TableFrames {
    block: Block,
    used: u64,
}

impl TableFrames {
    /// Those of `block`.
    pub fn new(mut block: Block) -> Self {
        block.bytes_mut().fill(0);
        Self { block, used: 0 }
    }

    fn entry(&mut self, table: u64, index: usize) -> Option<&mut [u8; 8]> {
        let at = usize::try_from(table.checked_sub(self.block.range.start)?).ok()?;
        self.block
            .bytes_mut()
            .get_mut(at..)?
            .get_mut(index * 8..)?
            .first_chunk_mut()
    }
}

impl TableMemory for TableFrames {
    fn allocate(&mut self) -> Option<u64> {
        let at = self.used;
        self.used = at + PAGE;
        (self.used <= self.block.range.len).then_some(self.block.range.start + at)
    }

    fn read(&self, table: u64, index: usize) -> u64 {
        let offset = table
            .wrapping_sub(self.block.range.start)
            .saturating_add(index as u64 * 8);
        assert!(offset % 8 == 0 && offset < self.block.range.len);
        // SAFETY: just checked to be an aligned u64 inside the block, which is this value's.
        unsafe { ((self.block.range.start + offset) as *const u64).read() }
    }

    fn write(&mut self, table: u64, index: usize, entry: u64) {
        if let Some(bytes) = self.entry(table, index) {
            *bytes = entry.to_le_bytes();
        }
    }
}

/// How many ranges the memory map may have, of the firmware's and of ours.
pub const MAP_ENTRIES: usize = 2048;

/// Three command lines, the GDT, ACPI's root pointer.
const ARENA: usize = 3 * MAX_TEXT + PAGE as usize;

/// What stays in this program's memory for the hypervisor.
#[derive(Debug)]
pub struct Kept {
    /// The hand-over.
    pub info: BootInfo,
    /// Its memory map.
    pub map: [MemoryRange; MAP_ENTRIES],
    /// Its texts.
    pub arena: Arena,
}

struct Place(UnsafeCell<Kept>);

// SAFETY: one processor runs, and `Kept::take` gives out one reference.
unsafe impl Sync for Place {}

static KEPT: Place = Place(UnsafeCell::new(Kept {
    info: BootInfo::new(LoaderKind::MULTIBOOT2),
    map: [MemoryRange::new(0, 0, MemoryKind(0), 0); MAP_ENTRIES],
    arena: Arena {
        bytes: [0; ARENA],
        used: 0,
    },
}));

impl Kept {
    /// The one there is.
    ///
    /// # Safety
    ///
    /// Called once.
    pub unsafe fn take() -> &'static mut Self {
        // SAFETY: by the caller's promise this is the only reference.
        unsafe { &mut *KEPT.0.get() }
    }
}

/// Memory that holds small things one after the other.
#[derive(Debug)]
pub struct Arena {
    bytes: [u8; ARENA],
    used: usize,
}

impl Arena {
    /// Puts `bytes` in, on a 16-byte boundary; `None` if there is no more room.
    pub fn put(&mut self, bytes: &[u8]) -> Option<PhysRange> {
        let start = self.used.next_multiple_of(16);
        let place = self.bytes.get_mut(start..)?.get_mut(..bytes.len())?;
        place.copy_from_slice(bytes);
        self.used = start + bytes.len();
        Some(PhysRange::new(place.as_ptr() as u64, bytes.len() as u64))
    }
}
