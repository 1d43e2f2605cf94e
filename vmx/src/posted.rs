//! The posted-interrupt descriptor: where other CPUs leave interrupts for a guest that is running.
//!
//! A vCPU owns one, shared with whoever posts to it. While the VMCS says so, the vector
//! [`crate::Host::posted_vector`] does not exit: the processor clears ON, moves the requests to the
//! virtual-APIC page and delivers what can be delivered. Whatever the processor has not taken in when the
//! guest is left is taken by [`Posting::take`]. Neither order of posting and leaving loses an interrupt: the
//! requests are set before ON, and ON is cleared before they are taken. (Intel SDM "Posted-Interrupt
//! Processing".)

use core::sync::atomic::Ordering::SeqCst;

use galvan_base::Mpa;
use galvan_base::hw::{Exhausted, Posting};
use galvan_base::page::{PageSource, Pages, Words};

/// The word with ON, after the 256 requests.
const CONTROL: usize = 4;
/// ON: a notification is outstanding.
const ON: u64 = 1 << 0;

/// A descriptor. The processor wants 64 bytes; the rest of the page is not used.
#[derive(Debug)]
pub struct Descriptor(Pages<Words<512>>);

impl Descriptor {
    /// An empty one.
    pub fn new(source: &'static dyn PageSource) -> Result<Self, Exhausted> {
        Pages::new(source).map(Descriptor)
    }

    /// Its physical address.
    pub fn mpa(&self) -> Mpa {
        self.0.mpa()
    }
}

impl Posting for Descriptor {
    fn post(&self, vector: u8) -> bool {
        if let Some(word) = self.0.get(usize::from(vector >> 6)) {
            word.fetch_or(1 << (vector & 63), SeqCst);
        }
        self.0
            .get(CONTROL)
            .is_some_and(|c| c.fetch_or(ON, SeqCst) & ON == 0)
    }

    fn any(&self) -> bool {
        self.0
            .get(CONTROL)
            .is_some_and(|c| c.load(SeqCst) & ON != 0)
    }

    fn take(&self) -> [u64; 4] {
        if let Some(c) = self.0.get(CONTROL) {
            c.fetch_and(!ON, SeqCst);
        }
        core::array::from_fn(|n| self.0.get(n).map_or(0, |w| w.swap(0, SeqCst)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::source;

    #[test]
    fn the_first_to_post_tells_the_processor_and_all_is_taken_once() {
        let d = Descriptor::new(source()).unwrap();
        assert!(!d.any());
        assert!(d.post(0x41));
        assert!(!d.post(0xf3), "somebody has told it already");
        assert!(d.any());
        assert_eq!(d.take(), [0, 2, 0, 1 << 0x33]);
        assert!(!d.any());
        assert_eq!(d.take(), [0; 4]);
        assert!(d.post(0x41), "told anew");
    }

    #[test]
    fn the_layout_is_the_processors() {
        let d = Descriptor::new(source()).unwrap();
        assert_eq!(d.mpa().get() % 64, 0);
        for v in [0x20, 0x7f, 0xff] {
            d.post(v);
        }
        let words: [u64; 5] = core::array::from_fn(|n| d.0[n].load(SeqCst));
        assert_eq!(words, [1 << 32, 1 << 63, 0, 1 << 63, 1]);
    }
}
