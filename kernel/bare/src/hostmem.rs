//! Access to machine frames through the direct map, for the policy crate.
//!
//! Guests and devices write the same memory at the same time, so it is only touched by copies made
//! in assembly and by atomics, never through references. A bitmap with one bit per frame says what
//! is RAM; anything else is refused.

use core::arch::asm;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

use galvan_base::hw::MemFault;
use galvan_base::{Mfn, Mpa, PAGE_SIZE};

/// A bit for each frame, set if it is RAM. Written before [`FRAMES`], and never again.
static RAM: AtomicPtr<u64> = AtomicPtr::new(null_mut());
/// For how many frames there is a bit.
static FRAMES: AtomicU64 = AtomicU64::new(0);

/// Takes note of what is RAM: ranges in bytes, page aligned, below `top`.
pub fn init(top: u64, ranges: impl Iterator<Item = (u64, u64)>) {
    let frames = (top / PAGE_SIZE as u64) as usize;
    let words = frames.div_ceil(64);
    let a = crate::bootmem::alloc((words * 8).div_ceil(PAGE_SIZE).max(1));
    // SAFETY: fresh zeroed pages, kept for ever.
    let map = unsafe {
        core::slice::from_raw_parts(crate::paging::direct_ptr(a).cast::<AtomicU64>(), words)
    };
    for (start, end) in ranges {
        for f in start / PAGE_SIZE as u64..end / PAGE_SIZE as u64 {
            if let Some(w) = map.get((f / 64) as usize) {
                w.fetch_or(1 << (f % 64), Ordering::Relaxed);
            }
        }
    }
    RAM.store(map.as_ptr().cast_mut().cast(), Ordering::Relaxed);
    FRAMES.store(words as u64 * 64, Ordering::Release);
    let base = crate::paging::direct_ptr(Mpa::new_truncate(0)).expose_provenance();
    // SAFETY: as above; nobody writes the words any more. The direct map of RAM stays, and what
    // guests and devices write there is reached by atomics and string instructions alone.
    unsafe {
        galvan_base::direct::open(
            base,
            core::slice::from_raw_parts(map.as_ptr().cast(), words),
        );
    }
}

/// Whether the frame is RAM.
#[inline]
pub fn is_ram(m: Mfn) -> bool {
    let f = m.get();
    if f >= FRAMES.load(Ordering::Acquire) {
        return false;
    }
    // SAFETY: `init` has made so many words, which stay, and has not written them since.
    let word = unsafe { RAM.load(Ordering::Relaxed).add((f / 64) as usize).read() };
    word & 1 << (f % 64) != 0
}

/// The address of `len` bytes at `off` in a frame that is RAM.
#[inline]
fn ptr(m: Mfn, off: usize, len: usize) -> Result<*mut u8, MemFault> {
    if off > PAGE_SIZE || len > PAGE_SIZE - off || !is_ram(m) {
        return Err(MemFault);
    }
    // SAFETY: stays within the frame.
    Ok(unsafe { crate::paging::direct_ptr(m.addr()).add(off) })
}

/// Copies with string instructions, 8 bytes at a time.
///
/// # Safety
/// Both ranges must be mapped, the destination writable; they may be written by others meanwhile.
#[inline]
unsafe fn copy_bytes(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: by the caller's promise; DF is clear everywhere in this program.
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, {tail:e}",
            "rep movsb",
            tail = in(reg) len & 7,
            inout("rcx") len >> 3 => _,
            inout("rdi") dst => _,
            inout("rsi") src => _,
            options(nostack, preserves_flags)
        );
    }
}

/// See [`galvan_base::hw::HostMem::read`].
pub fn read(m: Mfn, off: usize, buf: &mut [u8]) -> Result<(), MemFault> {
    let p = ptr(m, off, buf.len())?;
    // SAFETY: `ptr` checked the source, `buf` is ours.
    unsafe { copy_bytes(buf.as_mut_ptr(), p, buf.len()) };
    Ok(())
}

/// See [`galvan_base::hw::HostMem::write`].
pub fn write(m: Mfn, off: usize, buf: &[u8]) -> Result<(), MemFault> {
    let p = ptr(m, off, buf.len())?;
    // SAFETY: `ptr` checked the destination.
    unsafe { copy_bytes(p, buf.as_ptr(), buf.len()) };
    Ok(())
}

/// See [`galvan_base::hw::HostMem::copy`].
pub fn copy(
    dst: Mfn,
    dst_off: usize,
    src: Mfn,
    src_off: usize,
    len: usize,
) -> Result<(), MemFault> {
    let d = ptr(dst, dst_off, len)?;
    let s = ptr(src, src_off, len)?;
    // SAFETY: `ptr` checked both.
    unsafe { copy_bytes(d, s, len) };
    Ok(())
}

/// See [`galvan_base::hw::HostMem::zero`].
pub fn zero(m: Mfn) -> Result<(), MemFault> {
    let p = ptr(m, 0, PAGE_SIZE)?;
    // SAFETY: `ptr` checked the frame.
    unsafe {
        asm!("rep stosq", inout("rcx") PAGE_SIZE / 8 => _, inout("rdi") p => _, in("rax") 0u64, options(nostack, preserves_flags));
    }
    Ok(())
}

/// An aligned atomic in a frame that is RAM.
macro_rules! atomic {
    ($name:ident, $atomic:ty, $size:literal) => {
        #[inline]
        fn $name(m: Mfn, off: usize) -> Result<&'static $atomic, MemFault> {
            if off % $size != 0 {
                return Err(MemFault);
            }
            let p = ptr(m, off, $size)?;
            // SAFETY: mapped RAM, aligned; guests may write it at any time, which is what an atomic
            // allows. The direct map of RAM is never taken away.
            Ok(unsafe { &*p.cast::<$atomic>() })
        }
    };
}
atomic!(a64, AtomicU64, 8);
atomic!(a32, AtomicU32, 4);
atomic!(a8, AtomicU8, 1);

macro_rules! forward {
    ($(#[$m:meta])* $name:ident($cell:ident, $($arg:ident: $t:ty),*) -> $r:ty, |$a:ident| $body:expr) => {
        $(#[$m])*
        #[inline]
        pub fn $name(m: Mfn, off: usize, $($arg: $t),*) -> Result<$r, MemFault> {
            let $a = $cell(m, off)?;
            Ok($body)
        }
    };
}
forward!(/** Load, acquire. */ load_u64(a64,) -> u64, |a| a.load(Ordering::Acquire));
forward!(/** Store, release. */ store_u64(a64, v: u64) -> (), |a| a.store(v, Ordering::Release));
forward!(/** Load, acquire. */ load_u32(a32,) -> u32, |a| a.load(Ordering::Acquire));
forward!(/** Store, release. */ store_u32(a32, v: u32) -> (), |a| a.store(v, Ordering::Release));
forward!(/** Compare and exchange; the value found. */ cmpxchg_u64(a64, old: u64, new: u64) -> u64,
    |a| a.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).unwrap_or_else(|v| v));
forward!(/** Compare and exchange; the value found. */ cmpxchg_u32(a32, old: u32, new: u32) -> u32,
    |a| a.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).unwrap_or_else(|v| v));
forward!(/** Or; the value before. */ or_u64(a64, bits: u64) -> u64, |a| a.fetch_or(bits, Ordering::SeqCst));
forward!(/** And; the value before. */ and_u64(a64, mask: u64) -> u64, |a| a.fetch_and(mask, Ordering::SeqCst));
forward!(/** Or; the value before. */ or_u32(a32, bits: u32) -> u32, |a| a.fetch_or(bits, Ordering::SeqCst));
forward!(/** And; the value before. */ and_u32(a32, mask: u32) -> u32, |a| a.fetch_and(mask, Ordering::SeqCst));
forward!(/** Swap; the value before. */ swap_u8(a8, v: u8) -> u8, |a| a.swap(v, Ordering::SeqCst));
