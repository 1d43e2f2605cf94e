//! Words of machine frames where this program has RAM mapped, for the paths that are taken most: no
//! indirect call, and no question whether it is RAM for what has been asked before: a [`KnownWord`],
//! [`KnownBytes`] at any alignment, and a [`Piece`] of several words, which may [move](MovingPiece).
//!
//! The functions do what those of [`HostMem`] of the same names do, and leave to it what they cannot
//! do: everything, where no window was [opened](open), as in host tests. When guests' memory is to
//! be mapped only while it is used, this is what goes.
//!
//! UNSAFETY: memory that guests write too is reached by atomics only, within the window, of which
//! the one who opened it has promised that it is RAM and stays mapped.
#![allow(
    unsafe_code,
    reason = "atomics at addresses that the compiler does not know"
)]

use core::cell::Cell;
use core::num::NonZeroU64;
use core::ptr::{null_mut, with_exposed_provenance};
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use crate::hw::{HostMem, MemFault};
use crate::{Mfn, Mpa, PAGE_SHIFT, PAGE_SIZE};

/// A bit for each frame below [`FRAMES`], set if it is in the window.
static RAM: AtomicPtr<u64> = AtomicPtr::new(null_mut());
/// Frames from here on are not in the window; written last.
static FRAMES: AtomicU64 = AtomicU64::new(0);
/// Where physical address 0 would be mapped.
static BASE: AtomicUsize = AtomicUsize::new(0);

/// Opens the window: the frames that have a bit in `ram` are mapped at `base` + their physical
/// address.
///
/// # Safety
/// All of them are RAM, mapped for reading and writing for ever, with provenance exposed. Called
/// once. Nobody has a reference to anything there that is given to these functions.
pub unsafe fn open(base: usize, ram: &'static [u64]) {
    BASE.store(base, Ordering::Relaxed);
    RAM.store(ram.as_ptr().cast_mut(), Ordering::Relaxed);
    FRAMES.store(ram.len() as u64 * 64, Ordering::Release);
}

/// The address of an aligned value of type `T` at an offset of a frame in the window.
#[inline(always)]
fn place<T>(m: Mfn, off: usize) -> Option<*const T> {
    let f = m.get();
    if f >= FRAMES.load(Ordering::Acquire)
        || off >= PAGE_SIZE
        || !off.is_multiple_of(size_of::<T>())
    {
        return None;
    }
    // SAFETY: `open` was given so many words, which stay as they are.
    let word = unsafe { RAM.load(Ordering::Relaxed).add((f / 64) as usize).read() };
    if word >> (f % 64) & 1 == 0 {
        return None;
    }
    let at = BASE.load(Ordering::Relaxed) + ((m.get() as usize) << PAGE_SHIFT) + off;
    Some(with_exposed_provenance(at))
}

macro_rules! cell {
    ($name:ident, $t:ty) => {
        #[inline(always)]
        fn $name(m: Mfn, off: usize) -> Option<&'static $t> {
            // SAFETY: `place` gives aligned addresses in the window, which is mapped RAM for ever.
            place::<$t>(m, off).map(|p| unsafe { &*p })
        }
    };
}
cell!(cell64, AtomicU64);
cell!(cell32, AtomicU32);
cell!(cell8, AtomicU8);

macro_rules! forward {
    ($(#[$doc:meta])* $name:ident, $cell:ident, ($($arg:ident: $t:ty),*) -> $r:ty, |$c:ident| $do:expr) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name<M: HostMem + ?Sized>(mem: &M, m: Mfn, off: usize, $($arg: $t),*) -> Result<$r, MemFault> {
            match $cell(m, off) {
                Some($c) => Ok($do),
                None => mem.$name(m, off, $($arg),*),
            }
        }
    };
}
forward!(/** [`HostMem::load_u32`] */ load_u32, cell32, () -> u32, |c| c.load(Ordering::Acquire));
forward!(/** [`HostMem::store_u32`] */ store_u32, cell32, (v: u32) -> (), |c| c.store(v, Ordering::Release));
forward!(/** [`HostMem::load_u64`] */ load_u64, cell64, () -> u64, |c| c.load(Ordering::Acquire));
forward!(/** [`HostMem::store_u64`] */ store_u64, cell64, (v: u64) -> (), |c| c.store(v, Ordering::Release));
forward!(/** [`HostMem::or_u64`] */ or_u64, cell64, (bits: u64) -> u64, |c| c.fetch_or(bits, Ordering::SeqCst));
forward!(/** [`HostMem::and_u64`] */ and_u64, cell64, (mask: u64) -> u64, |c| c.fetch_and(mask, Ordering::SeqCst));
forward!(/** [`HostMem::swap_u8`] */ swap_u8, cell8, (v: u8) -> u8, |c| c.swap(v, Ordering::SeqCst));
forward!(/** [`HostMem::cmpxchg_u64`] */ cmpxchg_u64, cell64, (old: u64, new: u64) -> u64,
    |c| c.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).unwrap_or_else(|v| v));

/// An aligned u64 of RAM that is looked at again and again.
#[derive(Clone, Copy, Debug)]
pub struct KnownWord {
    at: Mpa,
    cell: Option<&'static AtomicU64>,
}

impl KnownWord {
    /// The one at this address; whether it is RAM is found out here.
    pub fn new(at: Mpa) -> KnownWord {
        KnownWord {
            at,
            cell: cell64(at.frame(), at.offset()),
        }
    }

    /// [`HostMem::load_u64`]
    #[inline(always)]
    pub fn load<M: HostMem + ?Sized>(&self, mem: &M) -> Result<u64, MemFault> {
        match self.cell {
            Some(c) => Ok(c.load(Ordering::Acquire)),
            None => mem.load_u64(self.at.frame(), self.at.offset()),
        }
    }

    /// [`HostMem::store_u64`]
    #[inline(always)]
    pub fn store<M: HostMem + ?Sized>(&self, mem: &M, v: u64) -> Result<(), MemFault> {
        match self.cell {
            Some(c) => {
                c.store(v, Ordering::Release);
                Ok(())
            }
            None => mem.store_u64(self.at.frame(), self.at.offset(), v),
        }
    }

    /// [`HostMem::or_u64`]
    #[inline(always)]
    pub fn or<M: HostMem + ?Sized>(&self, mem: &M, bits: u64) -> Result<u64, MemFault> {
        match self.cell {
            Some(c) => Ok(c.fetch_or(bits, Ordering::SeqCst)),
            None => mem.or_u64(self.at.frame(), self.at.offset(), bits),
        }
    }

    /// [`HostMem::and_u64`]
    #[inline(always)]
    pub fn and<M: HostMem + ?Sized>(&self, mem: &M, mask: u64) -> Result<u64, MemFault> {
        match self.cell {
            Some(c) => Ok(c.fetch_and(mask, Ordering::SeqCst)),
            None => mem.and_u64(self.at.frame(), self.at.offset(), mask),
        }
    }

    /// [`HostMem::cmpxchg_u64`]
    #[inline(always)]
    pub fn cmpxchg<M: HostMem + ?Sized>(
        &self,
        mem: &M,
        old: u64,
        new: u64,
    ) -> Result<u64, MemFault> {
        match self.cell {
            Some(c) => Ok(c
                .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
                .unwrap_or_else(|v| v)),
            None => mem.cmpxchg_u64(self.at.frame(), self.at.offset(), old, new),
        }
    }
}

impl Default for KnownWord {
    fn default() -> Self {
        KnownWord {
            at: Mpa::new_truncate(0),
            cell: None,
        }
    }
}

/// Whether each of these has this value.
#[inline(always)]
pub fn all_equal<M: HostMem + ?Sized>(mem: &M, words: &[Cell<(KnownWord, u64)>]) -> bool {
    let is = |w: &Cell<(KnownWord, u64)>| {
        let (word, v) = w.get();
        word.load(mem) == Ok(v)
    };
    // As many as walks to large and to small pages have: without a loop.
    match words {
        [a, b, c] => is(a) && is(b) && is(c),
        [a, b, c, d] => is(a) && is(b) && is(c) && is(d),
        _ => words.iter().all(is),
    }
}

/// Four bytes of a frame, at any offset, that are looked at again and again.
#[derive(Clone, Copy, Debug)]
pub struct KnownBytes {
    at: Mpa,
    /// Where they are mapped; 0 if they are not.
    mapped: usize,
}

impl KnownBytes {
    /// The most that there is place for behind an offset.
    pub const LAST: usize = PAGE_SIZE - size_of::<u32>();

    /// Those at this address, of which the offset is at most [`KnownBytes::LAST`]; whether they are RAM is found
    /// out here.
    pub fn new(at: Mpa) -> KnownBytes {
        let mapped = place::<AtomicU8>(at.frame(), at.offset());
        KnownBytes {
            at,
            mapped: mapped
                .filter(|_| at.offset() <= Self::LAST)
                .map_or(0, |p| p.addr()),
        }
    }

    /// [`HostMem::read`]
    #[inline(always)]
    pub fn load<M: HostMem + ?Sized>(&self, mem: &M) -> Result<u32, MemFault> {
        if self.mapped == 0 {
            return self.load_from(mem);
        }
        let v: u32;
        // SAFETY: four bytes of a frame of the window, which is mapped RAM for ever. There is no atomic for
        // an address that is not aligned; the processor reads what is there, at worst in two pieces.
        unsafe {
            core::arch::asm!(
                "mov {v:e}, dword ptr [{p}]",
                v = lateout(reg) v,
                p = in(reg) self.mapped,
                options(nostack, preserves_flags, readonly)
            );
        }
        Ok(v)
    }

    #[cold]
    fn load_from<M: HostMem + ?Sized>(&self, mem: &M) -> Result<u32, MemFault> {
        let mut b = [0; 4];
        mem.read(self.at.frame(), self.at.offset(), &mut b)?;
        Ok(u32::from_le_bytes(b))
    }
}

/// A frame of which short pieces are read and written again and again.
#[derive(Clone, Copy, Debug)]
pub struct KnownPage {
    mfn: Mfn,
    words: Option<&'static [AtomicU64; PAGE_SIZE / 8]>,
}

impl KnownPage {
    /// This one; whether it is RAM is found out here.
    pub fn new(mfn: Mfn) -> KnownPage {
        // SAFETY: `place` gives addresses in the window, which is mapped RAM for ever, here of the
        // beginning of a frame; each value is an atomic.
        let words = place::<AtomicU64>(mfn, 0).map(|p| unsafe { &*p.cast() });
        KnownPage { mfn, words }
    }

    /// Its number.
    #[inline(always)]
    pub fn mfn(&self) -> Mfn {
        self.mfn
    }

    /// An aligned word.
    #[inline(always)]
    fn word(&self, off: usize) -> Option<&'static AtomicU64> {
        if !off.is_multiple_of(8) {
            return None;
        }
        self.words?.get(off / 8)
    }

    /// The word at this offset, which is a multiple of 8 within the frame.
    #[inline(always)]
    pub fn at(&self, off: usize) -> KnownWord {
        KnownWord {
            at: Mpa::new_truncate(self.mfn.get() << PAGE_SHIFT | off as u64),
            cell: self.word(off),
        }
    }

    /// The aligned words of so many bytes.
    #[inline(always)]
    fn piece(&self, off: usize, len: usize) -> Option<&'static [AtomicU64]> {
        if !len.is_multiple_of(8) || len > SHORT || !off.is_multiple_of(8) {
            return None;
        }
        self.words?.get(off / 8..)?.get(..len / 8)
    }

    /// [`HostMem::read`]
    #[inline(always)]
    pub fn read<M: HostMem + ?Sized>(
        &self,
        mem: &M,
        off: usize,
        buf: &mut [u8],
    ) -> Result<(), MemFault> {
        if buf.len() == 4
            && off.is_multiple_of(4)
            && let Some(w) = self.words.and_then(|w| w.get(off / 8))
        {
            let v = w.load(Ordering::Relaxed) >> (off % 8 * 8);
            buf.copy_from_slice(&(v as u32).to_le_bytes());
            return Ok(());
        }
        match self.piece(off, buf.len()) {
            Some(words) => {
                for (to, word) in buf.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                    *to = word.load(Ordering::Relaxed).to_ne_bytes();
                }
                Ok(())
            }
            None => mem.read(self.mfn, off, buf),
        }
    }

    /// [`HostMem::write`]
    #[inline(always)]
    pub fn write<M: HostMem + ?Sized>(
        &self,
        mem: &M,
        off: usize,
        buf: &[u8],
    ) -> Result<(), MemFault> {
        match self.piece(off, buf.len()) {
            Some(words) => {
                for (from, word) in buf.as_chunks::<8>().0.iter().zip(words) {
                    word.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
                }
                Ok(())
            }
            None => mem.write(self.mfn, off, buf),
        }
    }
}

/// Where a [`Piece`] is, which may move while others look for it.
///
/// 0: nowhere; odd: at that physical address less 1, out of the window; even: mapped at this address.
#[derive(Debug)]
pub struct MovingPiece(AtomicU64);

impl MovingPiece {
    /// At this address, or nowhere.
    pub fn new(at: Option<Mpa>) -> MovingPiece {
        let piece = MovingPiece(AtomicU64::new(0));
        piece.set(at);
        piece
    }

    /// Moves it. One that does not begin at a multiple of 8, or not end in its frame, is nowhere.
    pub fn set(&self, at: Option<Mpa>) {
        let fits =
            |at: &Mpa| at.offset().is_multiple_of(8) && at.offset() <= PAGE_SIZE - Piece::LEN;
        let mapped = |at: Mpa| {
            let words = place::<AtomicU64>(at.frame(), at.offset());
            words.map_or(at.get() | 1, |w| w.addr() as u64)
        };
        let v = at.filter(fits).map_or(0, mapped);
        self.0.store(v, Ordering::Release);
    }

    /// Where it is now.
    #[inline(always)]
    pub fn get(&self) -> Option<Piece> {
        NonZeroU64::new(self.0.load(Ordering::Acquire)).map(Piece)
    }
}

/// [`Piece::LEN`] bytes of a frame, at a multiple of 8, that are read and written again and again.
#[derive(Clone, Copy, Debug)]
pub struct Piece(NonZeroU64);

impl Piece {
    /// Its bytes.
    pub const LEN: usize = 64;

    /// Its address.
    pub fn mpa(&self) -> Mpa {
        let v = self.0.get();
        let physical = match v & 1 {
            0 => v - BASE.load(Ordering::Relaxed) as u64,
            _ => v - 1,
        };
        Mpa::new_truncate(physical)
    }

    /// A value in it where it is mapped; `T` is an atomic integer.
    #[inline(always)]
    fn mapped<T>(&self, off: usize) -> Option<*const T> {
        let fits = off < Self::LEN && off.is_multiple_of(size_of::<T>());
        (fits && self.0.get() & 1 == 0)
            .then(|| with_exposed_provenance(self.0.get() as usize + off))
    }

    /// The word at this offset, which is a multiple of 8 below [`Piece::LEN`].
    #[inline(always)]
    pub fn word(&self, off: usize) -> KnownWord {
        KnownWord {
            at: Mpa::new_truncate(self.mpa().get() + off as u64),
            // SAFETY: an aligned word of a piece that `MovingPiece::set` has found in the window.
            cell: self.mapped(off).map(|p| unsafe { &*p }),
        }
    }

    /// [`HostMem::swap_u8`] for a byte below [`Piece::LEN`].
    #[inline(always)]
    pub fn swap_u8<M: HostMem + ?Sized>(&self, mem: &M, off: usize, v: u8) -> Result<u8, MemFault> {
        match self.mapped::<AtomicU8>(off) {
            // SAFETY: as in `word`.
            Some(p) => Ok(unsafe { &*p }.swap(v, Ordering::SeqCst)),
            None => mem.swap_u8(self.mpa().frame(), self.mpa().offset() + off, v),
        }
    }
}

/// The aligned words of `len` bytes at an offset of a frame in the window.
#[inline(always)]
fn words(m: Mfn, off: usize, len: usize) -> Option<&'static [AtomicU64]> {
    if !len.is_multiple_of(8) || len > SHORT || off > PAGE_SIZE - len {
        return None;
    }
    // SAFETY: aligned, within one frame of the window, which is mapped RAM for ever.
    place(m, off).map(|p| unsafe { core::slice::from_raw_parts(p, len / 8) })
}

/// So many bytes are copied word by word.
const SHORT: usize = 96;

/// [`HostMem::read`]
#[inline(always)]
pub fn read<M: HostMem + ?Sized>(
    mem: &M,
    m: Mfn,
    off: usize,
    buf: &mut [u8],
) -> Result<(), MemFault> {
    let len = buf.len();
    if len == 4
        && let Some(c) = cell32(m, off)
    {
        buf.copy_from_slice(&c.load(Ordering::Relaxed).to_ne_bytes());
        return Ok(());
    }
    if let Some(words) = words(m, off, len) {
        for (to, word) in buf.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *to = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        return Ok(());
    }
    mem.read(m, off, buf)
}

/// [`HostMem::write`]
#[inline(always)]
pub fn write<M: HostMem + ?Sized>(mem: &M, m: Mfn, off: usize, buf: &[u8]) -> Result<(), MemFault> {
    if let Some(words) = words(m, off, buf.len()) {
        for (from, word) in buf.as_chunks::<8>().0.iter().zip(words) {
            word.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
        }
        return Ok(());
    }
    mem.write(m, off, buf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMachine;
    use std::boxed::Box;

    /// The only test of this process that opens the window: others use frames of other numbers.
    #[test]
    fn words_in_the_window_are_those_of_memory_and_others_are_left_to_it() {
        const FIRST: u64 = 0x7_0000;
        #[repr(align(4096))]
        struct Frames([AtomicU64; 1024]);
        let ours: &'static Frames =
            Box::leak(Box::new(Frames([const { AtomicU64::new(0) }; 1024])));
        let mfn = |n: u64| Mfn::new(FIRST + n).unwrap();
        let base = ours
            .0
            .as_ptr()
            .expose_provenance()
            .wrapping_sub((FIRST as usize) << PAGE_SHIFT);
        let mem = FakeMachine::with_ram(std::vec![0x100..0x101, FIRST..FIRST + 3]);
        let ram: &'static mut [u64] = Box::leak(std::vec![0; FIRST as usize / 64 + 1].into());
        ram[FIRST as usize / 64] = 3;
        // SAFETY: two frames, which stay, of atomics.
        unsafe { open(base, ram) };

        store_u64(&mem, mfn(1), 8, 0x0102_0304_0506_0708).unwrap();
        assert_eq!(ours.0[513].load(Ordering::Relaxed), 0x0102_0304_0506_0708);
        assert_eq!(load_u64(&mem, mfn(1), 8), Ok(0x0102_0304_0506_0708));
        assert_eq!(or_u64(&mem, mfn(1), 8, 0xf0), Ok(0x0102_0304_0506_0708));
        assert_eq!(and_u64(&mem, mfn(1), 8, 0xff), Ok(0x0102_0304_0506_07f8));
        assert_eq!(swap_u8(&mem, mfn(1), 8, 1), Ok(0xf8));
        store_u32(&mem, mfn(1), 12, 0x0102_0305).unwrap();
        assert_eq!(load_u32(&mem, mfn(1), 12), Ok(0x0102_0305));
        store_u32(&mem, mfn(1), 12, 0).unwrap();
        assert_eq!(cmpxchg_u64(&mem, mfn(1), 8, 2, 3), Ok(1));
        assert_eq!(cmpxchg_u64(&mem, mfn(1), 8, 1, 3), Ok(1));
        let known = KnownWord::new(Mpa::new_truncate((FIRST + 1) * 4096 + 8));
        let elsewhere = KnownWord::new(Mpa::new_truncate((FIRST + 2) * 4096));
        let both = [Cell::new((known, 3)), Cell::new((elsewhere, 0))];
        assert!(all_equal(&mem, &both));
        let four =
            [0, 1, 2, 3].map(|n| Cell::new(if n == 3 { (elsewhere, 0) } else { (known, 3) }));
        assert!(all_equal(&mem, &four));
        assert!(all_equal(&mem, &four[1..]));
        four[2].set((known, 4));
        assert!(!all_equal(&mem, &four) && !all_equal(&mem, &four[1..]));
        let mut b = [0; 16];
        read(&mem, mfn(1), 0, &mut b).unwrap();
        assert_eq!(b, [0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        write(&mem, mfn(0), 4080, &[7; 16]).unwrap();
        let mut w = [0; 4];
        read(&mem, mfn(0), 4092, &mut w).unwrap();
        assert_eq!(w, [7; 4]);

        // Beyond the window and outside of a frame it is the machine that answers.
        store_u64(&mem, mfn(2), 0, 5).unwrap();
        assert_eq!(mem.load_u64(mfn(2), 0), Ok(5));
        assert!(!all_equal(&mem, &both));
        assert_eq!(load_u64(&mem, Mfn::new(0x100).unwrap(), 0), Ok(0));
        assert!(load_u64(&mem, Mfn::new(0x200).unwrap(), 0).is_err());
        // Pages that are looked at often.
        for page in [KnownPage::new(mfn(1)), KnownPage::new(mfn(2))] {
            let mfn = page.mfn();
            page.write(
                &mem,
                4080,
                &[9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 6],
            )
            .unwrap();
            let word = page.at(4088);
            assert_eq!(word.load(&mem), Ok(0x0605_0403_0201_0001));
            word.store(&mem, 6).unwrap();
            assert_eq!(word.and(&mem, 3), Ok(6));
            assert_eq!(word.cmpxchg(&mem, 3, 9), Ok(2));
            assert_eq!(word.cmpxchg(&mem, 2, 0x0605_0403_0201_0001), Ok(2));
            assert_eq!(word.or(&mem, 0x80), Ok(0x0605_0403_0201_0001));
            assert_eq!(word.load(&mem), Ok(0x0605_0403_0201_0081));
            page.write(&mem, 4088, &[1, 0, 1, 2, 3, 4, 5, 6]).unwrap();
            let mut quarter = [0; 4];
            for (off, want) in [
                (4080, [9, 8, 7, 6]),
                (4084, [5, 4, 3, 2]),
                (4092, [3, 4, 5, 6]),
            ] {
                page.read(&mem, off, &mut quarter).unwrap();
                assert_eq!(quarter, want);
            }
            let mut b = [0; 16];
            page.read(&mem, 4080, &mut b).unwrap();
            assert_eq!(b, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 6]);
            // The machine does these.
            page.write(&mem, 3, &[1, 2]).unwrap();
            let mut odd = [0; 3];
            page.read(&mem, 2, &mut odd).unwrap();
            assert_eq!(odd, [0, 1, 2]);
            assert!(page.read(&mem, 4088, &mut b).is_err());
            assert!(page.read(&mem, 4094, &mut quarter).is_err());
            assert!(page.write(&mem, 4088, &b).is_err());
            assert_eq!(page.mfn(), mfn);
        }
        // At offsets that are no multiples of anything.
        store_u64(&mem, mfn(1), 4088, 0x0807_0605_0403_0201).unwrap();
        mem.store_u64(mfn(2), 4088, 0x1817_1615_1413_1211).unwrap();
        for (n, high) in [(1, 0), (2, 0x1010_1010)] {
            for off in 0..5 {
                let at = Mpa::new_truncate((FIRST + n) * 4096 + 4088 + off);
                let v = 0x0403_0201 + off as u32 * 0x0101_0101 + high;
                assert_eq!(KnownBytes::new(at).load(&mem), Ok(v));
            }
            let over = Mpa::new_truncate((FIRST + n) * 4096 + 4093);
            assert!(KnownBytes::new(over).load(&mem).is_err());
        }
        // Pieces that move.
        let moving = MovingPiece::new(None);
        assert!(moving.get().is_none());
        let at = |n: u64, off: u64| Mpa::new_truncate((FIRST + n) * 4096 + off);
        // In the window, and beyond it.
        for at in [at(1, 128), at(2, 4032)] {
            moving.set(Some(at));
            let piece = moving.get().unwrap();
            assert_eq!(piece.mpa(), at);
            piece.word(24).store(&mem, 0x0102).unwrap();
            assert_eq!(piece.swap_u8(&mem, 25, 9), Ok(1));
            assert_eq!(load_u64(&mem, at.frame(), at.offset() + 24), Ok(0x0902));
        }
        for nowhere in [Some(at(1, 4040)), Some(at(1, 4)), None] {
            moving.set(nowhere);
            assert!(moving.get().is_none());
        }
        assert!(load_u64(&mem, mfn(0), 4096).is_err());
        assert!(load_u64(&mem, mfn(0), 4).is_err());
        assert!(read(&mem, mfn(0), 4088, &mut b).is_err());
        assert!(write(&mem, mfn(0), 4088, &b).is_err());
    }
}
