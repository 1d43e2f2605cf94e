//! The extended state of a vCPU while it is not in the processor, in XSAVE's standard format or,
//! without XSAVE, FXSAVE's.
//!
//! What comes from a save record is made fit for XRSTOR here, which would otherwise fault in the
//! hypervisor. Used by the vendor crates. (AMD APM "XSAVE Area", "Extended Control Register (XCR0)".)
//!
//! UNSAFETY: the instructions that move the state between memory and the processor.
#![allow(unsafe_code, reason = "XSAVE, XRSTOR, XSETBV")]

use alloc::boxed::Box;
use alloc::vec;
use core::arch::asm;

/// x87, SSE, AVX and the three parts of AVX-512: what guests can be given. Not PKRU, MPX, LWP.
const OFFERED: u64 = X87 | SSE | AVX | AVX512;
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 0b111 << 5;
/// Size of FXSAVE's area, with which XSAVE's begins.
pub const LEGACY: usize = 512;
/// Size of the header that follows it.
const HEADER: usize = 64;
const MXCSR_AT: usize = 24;
/// MXCSR bits that every 64-bit processor has.
const MXCSR_VALID: u32 = 0xffff;
const MXCSR_RESET: u32 = 0x1f80;
const FCW_RESET: u16 = 0x37f;

/// How XSAVE lays out what guests can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveLayout {
    /// The states of XCR0 that are saved.
    pub mask: u64,
    /// Size in bytes of the area for them.
    pub size: usize,
}

impl XsaveLayout {
    /// From CPUID Fn0000_000D.
    pub fn read(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let [lo, _, _, hi] = cpuid(0xd, 0);
        let has = u64::from(lo) | u64::from(hi) << 32;
        let mask = legal_xcr0(has, OFFERED);
        let size = (2..64)
            .filter(|n| mask >> n & 1 != 0)
            .map(|n| {
                let [size, offset, ..] = cpuid(0xd, n);
                offset as usize + size as usize
            })
            .fold(LEGACY + HEADER, usize::max);
        XsaveLayout { mask, size }
    }
}

/// `v` less what `max` does not have or the processor would refuse for want of another part.
pub fn legal_xcr0(v: u64, max: u64) -> u64 {
    let mut v = v & max | X87;
    if v & SSE == 0 {
        v &= !AVX;
    }
    if v & AVX == 0 || v & AVX512 != AVX512 {
        v &= !AVX512;
    }
    v
}

/// Writes XCR0.
///
/// # Safety
/// XSAVE is enabled, the value is [legal](legal_xcr0) on this processor, and the program uses none of what it
/// enables or disables.
#[inline]
pub unsafe fn set_xcr0(v: u64) {
    // SAFETY: as above.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") v as u32, in("edx") (v >> 32) as u32,
            options(nomem, nostack, preserves_flags));
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Block([u8; 64]);

/// A saved extended state.
pub struct FpuArea {
    blocks: Box<[Block]>,
    size: usize,
    /// The states in it; 0 where it is FXSAVE's.
    mask: u64,
}

impl FpuArea {
    /// The state after reset, in a layout or in that of FXSAVE.
    pub fn new(layout: Option<XsaveLayout>) -> Self {
        let size = layout.map_or(LEGACY, |l| l.size.max(LEGACY + HEADER));
        let mut area = FpuArea {
            blocks: vec![Block([0; 64]); size.div_ceil(64)].into(),
            size,
            mask: layout.map_or(0, |l| l.mask),
        };
        area.set(&[]);
        area
    }

    /// Saves what is in the processor.
    ///
    /// # Safety
    /// The layout is this processor's. SSE is enabled, and with it XSAVE where the area is XSAVE's.
    #[inline]
    pub unsafe fn save(&mut self) {
        let p = self.blocks.as_mut_ptr();
        match self.mask() {
            // SAFETY: the area is 64-byte aligned and as long as CPUID says the mask needs.
            Some(mask) => unsafe {
                asm!("xsave64 [{}]", in(reg) p, in("eax") mask as u32, in("edx") (mask >> 32) as u32,
                    options(nostack, preserves_flags));
            },
            // SAFETY: the area is 512 bytes long and aligned.
            None => unsafe {
                asm!("fxsave64 [{}]", in(reg) p, options(nostack, preserves_flags));
            },
        }
    }

    /// Puts it into the processor.
    ///
    /// # Safety
    /// As for [`FpuArea::save`], and the program uses none of the registers that are overwritten.
    #[inline]
    pub unsafe fn load(&self) {
        let p = self.blocks.as_ptr();
        match self.mask() {
            // SAFETY: as in `save`; `set` keeps what the processor would refuse out of the image.
            Some(mask) => unsafe {
                asm!("xrstor64 [{}]", in(reg) p, in("eax") mask as u32,
                    in("edx") (mask >> 32) as u32, options(nostack, preserves_flags, readonly));
            },
            // SAFETY: as above.
            None => unsafe {
                asm!("fxrstor64 [{}]", in(reg) p, options(nostack, preserves_flags, readonly));
            },
        }
    }

    /// The states in it; `None` where it is FXSAVE's.
    pub fn mask(&self) -> Option<u64> {
        (self.mask != 0).then_some(self.mask)
    }

    /// Copies as much as fits; gives the whole length.
    pub fn get(&self, buf: &mut [u8]) -> usize {
        let len = buf.len().min(self.size);
        for (out, block) in buf[..len].chunks_mut(64).zip(&self.blocks) {
            out.copy_from_slice(&block.0[..out.len()]);
        }
        self.size
    }

    /// Replaces the state. What `buf` does not reach is in its reset state; what the processor
    /// would refuse is dropped.
    pub fn set(&mut self, buf: &[u8]) {
        let len = buf.len().min(self.size);
        for block in &mut self.blocks {
            block.0.fill(0);
        }
        for (src, block) in buf[..len].chunks(64).zip(&mut self.blocks) {
            block.0[..src.len()].copy_from_slice(src);
        }
        let [first, ..] = &mut self.blocks[..] else {
            return;
        };
        if len < LEGACY {
            first.0[..2].copy_from_slice(&FCW_RESET.to_le_bytes());
            first.0[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        }
        let mut mxcsr = [0; 4];
        mxcsr.copy_from_slice(&first.0[MXCSR_AT..MXCSR_AT + 4]);
        let mxcsr = u32::from_le_bytes(mxcsr) & MXCSR_VALID;
        first.0[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&mxcsr.to_le_bytes());

        if let Some(header) = self.blocks.get_mut(LEGACY / 64) {
            let present = if len >= LEGACY + HEADER {
                let mut bits = [0; 8];
                bits.copy_from_slice(&header.0[..8]);
                u64::from_le_bytes(bits) & self.mask
            } else {
                X87 | SSE
            };
            // The rest of the header, which says "standard format" and is otherwise reserved, is 0.
            header.0 = [0; 64];
            header.0[..8].copy_from_slice(&present.to_le_bytes());
        }
    }
}

impl core::fmt::Debug for FpuArea {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "FpuArea({} bytes, {:#x})", self.size, self.mask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    const AVX_LAYOUT: XsaveLayout = XsaveLayout { mask: 7, size: 832 };

    fn bytes(a: &FpuArea) -> Vec<u8> {
        let mut v = vec![0xee; a.size];
        assert_eq!(a.get(&mut v), a.size);
        v
    }

    #[test]
    fn layout_covers_what_is_offered_and_no_more() {
        // AVX at 576, PKRU (bit 9) at 2688.
        let l = XsaveLayout::read(|_, sub| match sub {
            0 => [0x207, 0, 2696, 0],
            2 => [256, 576, 0, 0],
            9 => [8, 2688, 0, 0],
            _ => [0; 4],
        });
        assert_eq!(l, AVX_LAYOUT);
    }

    #[test]
    fn xcr0_is_kept_legal() {
        assert_eq!(legal_xcr0(0, 7), 1);
        assert_eq!(legal_xcr0(5, 7), 1, "AVX needs SSE");
        assert_eq!(legal_xcr0(7, 3), 3);
        assert_eq!(legal_xcr0(0xe3, 0xe7), 3, "AVX-512 needs AVX");
        assert_eq!(legal_xcr0(0x67, 0xe7), 7, "AVX-512 comes whole");
        assert_eq!(legal_xcr0(0xe7, 0xe7), 0xe7);
    }

    #[test]
    fn reset_state_is_the_architectures() {
        for layout in [None, Some(AVX_LAYOUT)] {
            let b = bytes(&FpuArea::new(layout));
            assert_eq!(b[..2], [0x7f, 3]);
            assert_eq!(b[24..28], [0x80, 0x1f, 0, 0]);
            assert_eq!(b.len(), layout.map_or(512, |l| l.size));
        }
    }

    #[test]
    fn state_survives_the_round_trip() {
        let mut image: Vec<u8> = (0..832).map(|n| n as u8).collect();
        image[24..28].copy_from_slice(&0x9fc0u32.to_le_bytes());
        image[512..576].fill(0);
        image[512] = 7;
        let mut a = FpuArea::new(Some(AVX_LAYOUT));
        a.set(&image);
        assert_eq!(bytes(&a), image);
        let mut small = [0; 100];
        assert_eq!(a.get(&mut small), 832);
        assert_eq!(small[..], image[..100]);
    }

    #[test]
    fn what_xrstor_would_refuse_is_dropped() {
        let mut a = FpuArea::new(Some(AVX_LAYOUT));
        a.set(&[0xff; 4096]);
        let b = bytes(&a);
        assert_eq!(b[24..28], [0xff, 0xff, 0, 0], "reserved MXCSR bits");
        assert_eq!(b[512..520], [7, 0, 0, 0, 0, 0, 0, 0], "unknown states");
        assert!(b[520..576].iter().all(|&x| x == 0), "format and reserved");
    }

    #[test]
    fn what_is_in_the_processor_is_saved() {
        let mut a = FpuArea::new(None);
        a.set(&[0; LEGACY]);
        // SAFETY: every 64-bit program has SSE, and the area is FXSAVE's.
        unsafe { a.save() };
        let b = bytes(&a);
        assert_eq!(
            b[24..28],
            MXCSR_RESET.to_le_bytes(),
            "as programs start with"
        );
        assert_eq!(b[..2], FCW_RESET.to_le_bytes());
    }

    #[test]
    fn a_legacy_image_restores_x87_and_sse() {
        let mut a = FpuArea::new(Some(AVX_LAYOUT));
        a.set(&[0x11; 512]);
        let b = bytes(&a);
        assert_eq!((b[0], b[511], b[512], b[600]), (0x11, 0x11, 3, 0));
    }
}
