//! Indexing with numbers from a guest, safe under speculation.
//!
//! A bounds check is a branch, and a branch can be mispredicted: the load behind it may run with an
//! index that is out of bounds, and what it brings into the cache can be measured. [`clamp`] makes
//! the index depend on the check as data, so that a wrong guess reads element 0
//! (AMD "Software Techniques for Managing Speculation", mitigation V1-2).

use core::hint::black_box;

/// `index` if it is below `len`, otherwise `None`; on a mispredicted path the number is 0.
#[inline(always)]
pub fn clamp(index: usize, len: usize) -> Option<usize> {
    if index >= len {
        return None;
    }
    // The optimiser must not see that the mask is all ones here.
    let (i, n) = (black_box(index), black_box(len));
    let below = (i.wrapping_sub(n) as isize >> (usize::BITS - 1)) as usize;
    Some(i & below)
}

#[cfg(test)]
mod tests {
    use super::clamp;

    #[test]
    fn indices_in_bounds_are_kept_and_others_refused() {
        assert_eq!(clamp(0, 1), Some(0));
        assert_eq!(clamp(4095, 4096), Some(4095));
        assert_eq!(clamp(0, 0), None);
        assert_eq!(clamp(4096, 4096), None);
        assert_eq!(clamp(usize::MAX, 8), None);
    }
}
