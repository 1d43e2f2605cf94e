//! Sets of machine frames, as sorted ranges: what a change of a function's memory decoding maps and
//! unmaps.

use alloc::vec::Vec;
use galvan_base::{Mfn, PAGE_SHIFT};

/// A run of machine frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    /// The first frame.
    pub start: Mfn,
    /// How many; never 0.
    pub count: u64,
}

impl Frames {
    /// The frames that `len` bytes at `base` touch; `None` for no bytes and for bytes beyond the
    /// address space.
    pub fn touched(base: u64, len: u64) -> Option<Self> {
        let last = base.checked_add(len.checked_sub(1)?)? >> PAGE_SHIFT;
        let first = base >> PAGE_SHIFT;
        Mfn::new(last)?;
        Some(Self {
            start: Mfn::new(first)?,
            count: last - first + 1,
        })
    }

    /// The number of the first frame behind the run.
    pub fn end(&self) -> u64 {
        self.start.get() + self.count
    }

    fn between(start: u64, end: u64) -> Option<Self> {
        Some(Self {
            start: Mfn::new(start)?,
            count: end.checked_sub(start).filter(|&n| n != 0)?,
        })
    }
}

/// A set of frames: runs in ascending order that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct FrameSet(Vec<Frames>);

impl FrameSet {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn into_ranges(self) -> Vec<Frames> {
        self.0
    }

    pub fn ranges(&self) -> &[Frames] {
        &self.0
    }

    pub fn insert(&mut self, new: Frames) {
        let (mut start, mut end) = (new.start.get(), new.end());
        self.0.retain(|r| {
            let joins = r.start.get() <= end && start <= r.end();
            if joins {
                start = start.min(r.start.get());
                end = end.max(r.end());
            }
            !joins
        });
        let at = self.0.partition_point(|r| r.start.get() < start);
        if let Some(run) = Frames::between(start, end) {
            self.0.insert(at, run);
        }
    }

    pub fn remove(&mut self, cut: Frames) {
        if self.0.iter().all(|r| disjoint(*r, cut)) {
            return;
        }
        let mut kept = Vec::with_capacity(self.0.len() + 1);
        for r in self.0.drain(..) {
            if disjoint(r, cut) {
                kept.push(r);
            } else {
                kept.extend(Frames::between(r.start.get(), cut.start.get()));
                kept.extend(Frames::between(cut.end(), r.end()));
            }
        }
        self.0 = kept;
    }

    pub fn remove_all(&mut self, other: &FrameSet) {
        for r in &other.0 {
            self.remove(*r);
        }
    }

    pub fn intersection(&self, other: &FrameSet) -> FrameSet {
        let mut common = FrameSet::default();
        for a in &self.0 {
            for b in &other.0 {
                let start = a.start.get().max(b.start.get());
                if let Some(run) = Frames::between(start, a.end().min(b.end())) {
                    common.insert(run);
                }
            }
        }
        common
    }
}

impl Extend<Frames> for FrameSet {
    fn extend<I: IntoIterator<Item = Frames>>(&mut self, runs: I) {
        for run in runs {
            self.insert(run);
        }
    }
}

fn disjoint(a: Frames, b: Frames) -> bool {
    a.end() <= b.start.get() || b.end() <= a.start.get()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn run(start: u64, count: u64) -> Frames {
        Frames {
            start: Mfn::new(start).unwrap(),
            count,
        }
    }

    fn members(s: &FrameSet) -> BTreeSet<u64> {
        s.0.iter().flat_map(|r| r.start.get()..r.end()).collect()
    }

    fn well_formed(s: &FrameSet) -> bool {
        s.0.iter().all(|r| r.count > 0) && s.0.windows(2).all(|w| w[0].end() < w[1].start.get())
    }

    #[test]
    fn bytes_touch_every_page_they_share() {
        assert_eq!(Frames::touched(0x1ff0, 0x20), Some(run(1, 2)));
        assert_eq!(Frames::touched(0x1000, 0x1000), Some(run(1, 1)));
        assert_eq!(Frames::touched(0x1000, 0), None);
        assert_eq!(Frames::touched(u64::MAX, 2), None);
        assert_eq!(Frames::touched((1 << 52) - 1, 2), None);
    }

    proptest! {
        #[test]
        fn sets_behave_like_sets_of_numbers(
            ops in prop::collection::vec((any::<bool>(), 0u64..40, 1u64..12), 0..24),
            other in prop::collection::vec((0u64..40, 1u64..12), 0..5),
        ) {
            let mut set = FrameSet::default();
            let mut model = BTreeSet::new();
            for (add, start, count) in ops {
                if add {
                    set.insert(run(start, count));
                    model.extend(start..start + count);
                } else {
                    set.remove(run(start, count));
                    model.retain(|n| !(start..start + count).contains(n));
                }
                prop_assert!(well_formed(&set), "{set:?}");
                prop_assert_eq!(&members(&set), &model);
            }
            let mut second = FrameSet::default();
            second.extend(other.iter().map(|&(s, c)| run(s, c)));
            let common = set.intersection(&second);
            prop_assert!(well_formed(&common));
            prop_assert_eq!(
                members(&common),
                model.intersection(&members(&second)).copied().collect::<BTreeSet<_>>()
            );
        }
    }
}
