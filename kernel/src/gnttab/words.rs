//! Arrays of words in frames of Galvan's.
//!
//! What guests can make large does not lie in the heap: grant tables, the counts beside them and
//! the mapping handles are arrays of this kind, bounded by the domain's configuration.

use alloc::vec::Vec;

use galvan_base::direct::{KnownPage, KnownWord};
use galvan_base::hw::{Exhausted, HostMem};
use galvan_base::{Mfn, PAGE_SIZE, nospec};

use crate::mm::{FrameTable, Owner};

/// Words in one frame.
pub(super) const PER_FRAME: usize = PAGE_SIZE / 8;

/// An array that grows by whole frames, zeroed.
#[derive(Debug, Default)]
pub(super) struct Words {
    frames: Vec<KnownPage>,
}

impl Words {
    pub(super) const fn new() -> Self {
        Words { frames: Vec::new() }
    }

    /// How many frames it has.
    pub(super) fn frames(&self) -> usize {
        self.frames.len()
    }

    /// One of them.
    pub(super) fn frame(&self, idx: usize) -> Option<Mfn> {
        self.frames.get(idx).map(KnownPage::mfn)
    }

    /// How many words there are.
    pub(super) fn len(&self) -> usize {
        self.frames.len() * PER_FRAME
    }

    pub(super) fn grow(&mut self, frames: &FrameTable) -> Result<(), Exhausted> {
        self.frames.try_reserve(1).map_err(|_| Exhausted)?;
        self.frames
            .push(KnownPage::new(frames.alloc_zeroed(Owner::Galvan)?));
        Ok(())
    }

    /// Word `i`.
    #[inline]
    pub(super) fn at(&self, i: usize) -> Option<KnownWord> {
        let i = nospec::clamp(i, self.len())?;
        Some(self.frames.get(i / PER_FRAME)?.at(i % PER_FRAME * 8))
    }

    /// Word `i` of this and of `other`, which is at least as long.
    #[inline]
    pub(super) fn both(&self, other: &Words, i: usize) -> Option<(KnownWord, KnownWord)> {
        let i = nospec::clamp(i, self.len())?;
        let (frame, off) = (i / PER_FRAME, i % PER_FRAME * 8);
        let (a, b) = (self.frames.get(frame)?, other.frames.get(frame)?);
        Some((a.at(off), b.at(off)))
    }

    /// Words `i` and `i` + 1, where `i` is even.
    #[inline]
    pub(super) fn pair(&self, i: usize) -> Option<[KnownWord; 2]> {
        let i = nospec::clamp(i, self.len())?;
        let (page, off) = (self.frames.get(i / PER_FRAME)?, i % PER_FRAME * 8);
        Some([page.at(off), page.at(off | 8)])
    }

    #[inline]
    pub(super) fn get(&self, mem: &(impl HostMem + ?Sized), i: usize) -> Option<u64> {
        self.at(i)?.load(mem).ok()
    }

    /// Gives back the last frame; false if there is none. References to it that are left keep it
    /// from being reused.
    pub(super) fn shrink(&mut self, frames: &FrameTable) -> bool {
        let Some(m) = self.frames.pop().map(|p| p.mfn()) else {
            return false;
        };
        if frames.release(m, 1, Owner::Galvan).is_err() {
            log::error!("{m:?} of a grant table was not Galvan's");
            debug_assert!(false, "{m:?} is not Galvan's");
        }
        true
    }
}
