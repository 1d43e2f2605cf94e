//! How often fields of VMCSs are read and written, which the feature `count-vmcs` has counted for
//! `cargo xtask bench --vtx`. Without it nothing is counted, and nothing is spent on that.

/// VMREAD or VMWRITE.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Access {
    /// VMREAD.
    Read,
    /// VMWRITE.
    Write,
}

#[cfg(feature = "count-vmcs")]
mod counted {
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::Access;

    static COUNTS: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

    /// Counts one.
    #[inline]
    pub(crate) fn count(a: Access) {
        COUNTS[a as usize].fetch_add(1, Relaxed);
    }

    /// The reads and writes of all CPUs since this was called last.
    pub(crate) fn take() -> [u64; 2] {
        COUNTS.each_ref().map(|n| n.swap(0, Relaxed))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn what_is_taken_is_taken_once() {
            count(Access::Read);
            count(Access::Read);
            count(Access::Write);
            assert_eq!(take(), [2, 1]);
            assert_eq!(take(), [0, 0]);
        }
    }
}
#[cfg(feature = "count-vmcs")]
pub(crate) use counted::{count, take};

/// Counts nothing.
#[cfg(not(feature = "count-vmcs"))]
#[inline(always)]
pub(crate) fn count(_: Access) {}
