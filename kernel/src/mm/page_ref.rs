//! A counted hold on a frame.

use core::mem::ManuallyDrop;

use galvan_base::Mfn;

use super::{FrameTable, NotOurs};

/// A reference to a frame of RAM: while it lives, the frame is not given to anybody else. Its
/// contents are reached through `HostMem`, by copying.
///
/// Dropping the last one may free the frame, which takes the lock of rank FRAMES.
#[derive(Debug)]
pub struct PageRef {
    frames: &'static FrameTable,
    mfn: Mfn,
}

impl PageRef {
    /// Takes a reference; see [`FrameTable::get_ref`] for what the caller must know.
    #[inline]
    pub fn take(frames: &'static FrameTable, mfn: Mfn) -> Result<PageRef, NotOurs> {
        frames.get_ref(mfn)?;
        Ok(PageRef { frames, mfn })
    }

    /// The frame.
    #[inline]
    pub fn mfn(&self) -> Mfn {
        self.mfn
    }

    /// Gives up the guard but not the reference, which is dropped later by
    /// [`FrameTable::put_ref`]: for references that live in a table entry.
    pub(crate) fn into_raw(self) -> Mfn {
        ManuallyDrop::new(self).mfn
    }
}

impl Drop for PageRef {
    #[inline]
    fn drop(&mut self) {
        self.frames.put_ref(self.mfn);
    }
}
