//! How often each instruction of some code was executed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The code between two addresses, with a counter for each byte, as an instruction may begin at any.
#[derive(Debug)]
pub struct Code {
    start: u64,
    counts: Vec<AtomicU64>,
}

impl Code {
    /// More is no code of a hypervisor.
    const LIMIT: u64 = 64 << 20;

    /// Reads `START:END`.
    pub fn parse(text: &str) -> Option<Self> {
        let (start, end) = text.split_once(':')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let start = number(start)?;
        let size = number(end)?.checked_sub(start)?;
        (size <= Self::LIMIT).then(|| Self {
            start,
            counts: (0..size).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// The counter of the instruction at an address.
    pub fn counter(&self, at: u64) -> Option<&AtomicU64> {
        let index = usize::try_from(at.checked_sub(self.start)?).ok()?;
        self.counts.get(index)
    }

    /// Addresses and counts of what was executed since the last call.
    pub fn take(&self) -> impl Iterator<Item = (u64, u64)> {
        (self.start..).zip(&self.counts).filter_map(|(at, count)| {
            let n = count.swap(0, Relaxed);
            (n > 0).then_some((at, n))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_executed_is_taken_once() {
        let code = Code::parse("ffffffff80200000:ffffffff80200010").unwrap();
        let at = 0xffff_ffff_8020_000f;
        code.counter(at).unwrap().fetch_add(3, Relaxed);
        assert!(code.counter(at + 1).is_none());
        assert!(code.counter(0x10_0000).is_none());
        assert_eq!(code.take().collect::<Vec<_>>(), [(at, 3)]);
        assert_eq!(code.take().count(), 0);
    }

    #[test]
    fn what_is_no_code_is_refused() {
        for text in ["", "1", "2:1", "0:ffffffff", "x:2"] {
            assert!(Code::parse(text).is_none(), "{text}");
        }
    }
}
