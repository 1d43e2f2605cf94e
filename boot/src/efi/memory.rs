//! Memory from the firmware. It is identity-mapped, so that physical addresses are pointers, and
//! stays allocated (as `EfiLoaderData`) when boot services end.

use core::ptr::NonNull;
use core::slice;

use galvan_boot::elf_load::BLOCK_ALIGN;
use galvan_boot::info::PhysRange;
use galvan_boot::paging::TableMemory;
use uefi::Status;
use uefi::boot::{self, AllocateType, MemoryType};

use crate::failure::Failure;

const PAGE: usize = 4096;

/// Whole pages that nobody else uses. Freed when dropped, which does not happen any more once the
/// hypervisor is on its way.
#[derive(Debug)]
pub struct Pages {
    start: NonNull<u8>,
    count: usize,
}

impl Pages {
    /// At least `bytes` bytes, zeroed. `what` is for the error message.
    pub fn new(bytes: usize, what: &str) -> Result<Self, Failure> {
        let count = bytes.div_ceil(PAGE).max(1);
        let mut pages = Self::uninitialised(count, what)?;
        pages.bytes_mut().fill(0);
        Ok(pages)
    }

    /// The same, aligned to [`BLOCK_ALIGN`].
    pub fn new_block(bytes: usize, what: &str) -> Result<Self, Failure> {
        let align = BLOCK_ALIGN as usize;
        let count = bytes.div_ceil(PAGE).max(1);
        // Firmware aligns to 4 KiB only: take more, give back what is around the aligned part.
        let whole = Self::uninitialised(count + align / PAGE - 1, what)?;
        let before = whole.start.as_ptr().align_offset(align) / PAGE;
        let (_before, rest) = whole.split(before);
        let (mut block, _after) = rest.split(count);
        block.bytes_mut().fill(0);
        Ok(block)
    }

    fn uninitialised(count: usize, what: &str) -> Result<Self, Failure> {
        boot::allocate_pages(AllocateType::AnyPages, MemoryType::LOADER_DATA, count)
            .map(|start| Self { start, count })
            .map_err(|error| {
                Failure::new(
                    error.status(),
                    alloc::format!(
                        "not enough memory for {what} ({} KiB)",
                        count * (PAGE / 1024)
                    ),
                )
            })
    }

    /// The first `at` pages, and the rest.
    fn split(self, at: usize) -> (Self, Self) {
        let at = at.min(self.count);
        // SAFETY: still inside the allocation, or one past its end.
        let middle = unsafe { self.start.add(at * PAGE) };
        let rest = self.count - at;
        let start = self.start;
        // Its pages live on in the two halves.
        core::mem::forget(self);
        (
            Self { start, count: at },
            Self {
                start: middle,
                count: rest,
            },
        )
    }

    /// The physical address of the first byte.
    pub fn phys(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// All of it.
    pub fn range(&self) -> PhysRange {
        PhysRange::new(self.phys(), (self.count * PAGE) as u64)
    }

    /// All of it, to be written to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `start` begins `count` pages that firmware gave to this value alone; any byte is
        // a valid u8, and the exclusive borrow of `self` is the borrow of the memory.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.count * PAGE) }
    }

    /// All of it, as values of `T`.
    pub fn slice_mut<T: PlainData>(&mut self) -> &mut [T] {
        let len = self.count * PAGE / size_of::<T>();
        // SAFETY: as in `bytes_mut`; pages are aligned enough for any `T` that fits into one, and
        // `PlainData` promises that every bit pattern is a `T`.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr().cast(), len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.count > 0 {
            // SAFETY: these pages were allocated and belong to this value, whose borrows have
            // ended. Firmware takes back parts of what it gave (UEFI specification, FreePages()).
            // If it fails, the memory is lost until the next start of the machine.
            let _ = unsafe { boot::free_pages(self.start, self.count) };
        }
    }
}

/// Types of which every bit pattern is a value.
///
/// # Safety
///
/// That is what an implementation asserts, and that its alignment is at most that of a page.
pub unsafe trait PlainData: Copy {}

// SAFETY: integers (and newtypes of integers) only, without padding.
unsafe impl PlainData for galvan_boot::info::MemoryRange {}
// SAFETY: integers (and newtypes of integers) only, without padding.
unsafe impl PlainData for galvan_boot::info::BootInfo {}

/// Pages that hold small things one after the other.
#[derive(Debug)]
pub struct Arena {
    pages: Pages,
    used: usize,
}

impl Arena {
    /// Room for `bytes` bytes.
    pub fn new(bytes: usize) -> Result<Self, Failure> {
        Ok(Self {
            pages: Pages::new(bytes, "the boot information")?,
            used: 0,
        })
    }

    /// Puts `bytes` in, on a 16-byte boundary.
    pub fn put(&mut self, bytes: &[u8]) -> Result<PhysRange, Failure> {
        let start = self.used.next_multiple_of(16);
        self.pages
            .bytes_mut()
            .get_mut(start..)
            .and_then(|rest| rest.get_mut(..bytes.len()))
            .ok_or_else(|| Failure::new(Status::OUT_OF_RESOURCES, "boot information is too long"))?
            .copy_from_slice(bytes);
        self.used = start + bytes.len();
        Ok(PhysRange::new(
            self.pages.phys() + start as u64,
            bytes.len() as u64,
        ))
    }
}

/// Frames for page tables.
#[derive(Debug)]
pub struct TableFrames {
    pages: Pages,
    used: usize,
}

impl TableFrames {
    /// `count` frames.
    pub fn new(count: u64) -> Result<Self, Failure> {
        let bytes = usize::try_from(count)
            .unwrap_or(usize::MAX / PAGE)
            .saturating_mul(PAGE);
        Ok(Self {
            pages: Pages::new(bytes, "page tables")?,
            used: 0,
        })
    }

    /// All of them.
    pub fn range(&self) -> PhysRange {
        self.pages.range()
    }

    /// The byte offset of a table's entry, inside the pages.
    fn offset(&self, table: u64, index: usize) -> usize {
        table.wrapping_sub(self.pages.phys()) as usize + index * 8
    }
}

impl TableMemory for TableFrames {
    fn allocate(&mut self) -> Option<u64> {
        let frame = self.used;
        self.used = (frame < self.pages.count).then_some(frame + 1)?;
        Some(self.pages.phys() + (frame * PAGE) as u64)
    }

    fn read(&self, table: u64, index: usize) -> u64 {
        let at = self.offset(table, index);
        assert!(at % 8 == 0 && at < self.pages.count * PAGE);
        // SAFETY: just checked to be an aligned u64 inside pages that are this value's.
        unsafe { self.pages.start.add(at).cast().read() }
    }

    fn write(&mut self, table: u64, index: usize, entry: u64) {
        let at = self.offset(table, index);
        assert!(at % 8 == 0 && at < self.pages.count * PAGE);
        // SAFETY: as in `read`, and the borrow is exclusive.
        unsafe { self.pages.start.add(at).cast().write(entry) }
    }
}
