//! Arrays of words in frames of Galvan's.
//!
//! What guests can make large does not lie in the heap: grant tables, the counts beside them and
//! the mapping handles are arrays of this kind, bounded by the domain's configuration.

use alloc::vec::Vec;

use galvan_base::hw::{Exhausted, HostMem};
use galvan_base::{Mfn, PAGE_SIZE, direct, nospec};

use crate::mm::{FrameTable, Owner};

/// Words in one frame.
pub(super) const PER_FRAME: usize = PAGE_SIZE / 8;

/// An array that grows by whole frames, zeroed.
#[derive(Debug, Default)]
pub(super) struct Words {
    frames: Vec<Mfn>,
}

impl Words {
    pub(super) const fn new() -> Self {
        Words { frames: Vec::new() }
    }

    pub(super) fn frames(&self) -> &[Mfn] {
        &self.frames
    }

    /// How many words there are.
    pub(super) fn len(&self) -> usize {
        self.frames.len() * PER_FRAME
    }

    pub(super) fn grow(&mut self, frames: &FrameTable) -> Result<(), Exhausted> {
        self.frames.try_reserve(1).map_err(|_| Exhausted)?;
        self.frames.push(frames.alloc_zeroed(Owner::Galvan)?);
        Ok(())
    }

    /// Frame and byte offset of word `i`.
    #[inline]
    pub(super) fn place(&self, i: usize) -> Option<(Mfn, usize)> {
        let i = nospec::clamp(i, self.len())?;
        let m = self.frames.get(i / PER_FRAME)?;
        Some((*m, i % PER_FRAME * 8))
    }

    #[inline]
    pub(super) fn get(&self, mem: &(impl HostMem + ?Sized), i: usize) -> Option<u64> {
        let (m, off) = self.place(i)?;
        direct::load_u64(mem, m, off).ok()
    }

    /// Changes word `i`, which must exist.
    #[inline]
    pub(super) fn set(&self, mem: &(impl HostMem + ?Sized), i: usize, v: u64) {
        let stored = self.place(i).map(|(m, off)| direct::store_u64(mem, m, off, v));
        debug_assert!(matches!(stored, Some(Ok(()))), "word {i} of {}", self.len());
    }

    /// Gives back the last frame; false if there is none. References to it that are left keep it
    /// from being reused.
    pub(super) fn shrink(&mut self, frames: &FrameTable) -> bool {
        let Some(m) = self.frames.pop() else {
            return false;
        };
        if frames.release(m, 1, Owner::Galvan).is_err() {
            log::error!("{m:?} of a grant table was not Galvan's");
            debug_assert!(false, "{m:?} is not Galvan's");
        }
        true
    }
}
