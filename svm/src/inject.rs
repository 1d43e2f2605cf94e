//! EVENTINJ and EXITINTINFO, which share one form, and what to do with a delivery that an exit
//! interrupted. Pure. (AMD APM "Event Injection", "Exits During IDT Delivery".)

use galvan_base::state::Event;

/// The event is to be injected, or was being delivered.
pub const VALID: u64 = 1 << 31;
const ERROR_VALID: u64 = 1 << 11;
const TYPE_SHIFT: u32 = 8;
const TYPE_MASK: u64 = 7;
const TYPE_INTR: u64 = 0;
const TYPE_NMI: u64 = 2;
const TYPE_EXCEPTION: u64 = 3;
const TYPE_SOFTWARE: u64 = 4;
const BP: u8 = 3;
const OF: u8 = 4;

/// The vectors that VMRUN takes for exceptions: those that are defined, apart from 2 (NMI, which
/// has its own type) and those of features that guests do not have (#CP, #HV, #VC).
const EXCEPTIONS: u32 = 0x400f_7dfb;

/// The word for EVENTINJ, or `None` where VMRUN would refuse it.
pub fn encode(e: Event) -> Option<u64> {
    let (kind, vector, error) = match e {
        Event::Interrupt(v) => (TYPE_INTR, v, None),
        Event::Nmi => (TYPE_NMI, 2, None),
        Event::Exception(v, _) if v > 31 || EXCEPTIONS & (1 << v) == 0 => return None,
        Event::Exception(v, error) => (TYPE_EXCEPTION, v, error),
        Event::Software(v) => (TYPE_SOFTWARE, v, None),
    };
    Some(
        VALID
            | kind << TYPE_SHIFT
            | u64::from(vector)
            | error.map_or(0, |code| ERROR_VALID | u64::from(code) << 32),
    )
}

/// The event of a valid word; `None` for an invalid or unknown one.
pub fn decode(word: u64) -> Option<Event> {
    if word & VALID == 0 {
        return None;
    }
    let vector = word as u8;
    Some(match kind(word) {
        TYPE_INTR => Event::Interrupt(vector),
        TYPE_NMI => Event::Nmi,
        TYPE_EXCEPTION => Event::Exception(
            vector,
            (word & ERROR_VALID != 0).then_some((word >> 32) as u32),
        ),
        TYPE_SOFTWARE => Event::Software(vector),
        _ => return None,
    })
}

/// Whether delivery pushes the address after an instruction, as INT n, INT3 and INTO do. The
/// processor takes that address from the next-RIP field where it has one, else from RIP.
pub fn is_soft(word: u64) -> bool {
    match kind(word) {
        TYPE_SOFTWARE => true,
        TYPE_EXCEPTION => matches!(word as u8, BP | OF),
        _ => false,
    }
}

/// A valid external interrupt.
#[inline]
pub fn is_interrupt(word: u64) -> bool {
    word & VALID != 0 && kind(word) == TYPE_INTR
}

/// What to inject at the next entry after an exit.
///
/// `interrupted` is EXITINTINFO. An event of the outside world and a fault are lost if they are not
/// injected again: a fault may have been raised by state that is gone. INT n, INT3 and INTO are not
/// lost: RIP still points at the instruction, so the guest executes it again, which also pushes
/// the right return address without anybody knowing the length of the instruction. That is so
/// unless the interrupted event is the very one that was injected at the last entry (`injected`):
/// then RIP is its return address and no instruction stands behind it.
#[inline]
pub fn after_exit(interrupted: u64, injected: u64, rip_before: u64, rip_now: u64) -> u64 {
    if interrupted & VALID == 0 {
        return 0;
    }
    if is_soft(interrupted) && !(same(interrupted, injected) && rip_before == rip_now) {
        return 0;
    }
    interrupted
}

/// Both are valid, of one kind and vector.
fn same(a: u64, b: u64) -> bool {
    let key = VALID | TYPE_MASK << TYPE_SHIFT | 0xff;
    a & b & VALID != 0 && a & key == b & key
}

fn kind(word: u64) -> u64 {
    word >> TYPE_SHIFT & TYPE_MASK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_the_form_the_manual_gives() {
        assert_eq!(encode(Event::Interrupt(0x31)), Some(0x8000_0031));
        assert_eq!(encode(Event::Nmi), Some(0x8000_0202));
        assert!(is_interrupt(0x8000_0031) && !is_interrupt(0x31) && !is_interrupt(0x8000_0202));
        assert_eq!(encode(Event::UD), Some(0x8000_0306));
        assert_eq!(encode(Event::GP), Some(0x8000_0b0d));
        assert_eq!(
            encode(Event::page_fault(7)),
            Some(0x7_0000_0000 | 0x8000_0b0e)
        );
        assert_eq!(encode(Event::Software(0x80)), Some(0x8000_0480));
    }

    #[test]
    fn every_event_survives_encoding() {
        for v in 0..=255 {
            for e in [Event::Interrupt(v), Event::Software(v)] {
                assert_eq!(decode(encode(e).unwrap()), Some(e));
            }
            for e in [Event::Exception(v, None), Event::Exception(v, Some(9))] {
                if let Some(w) = encode(e) {
                    assert_eq!(decode(w), Some(e));
                }
            }
        }
        assert_eq!(decode(encode(Event::Nmi).unwrap()), Some(Event::Nmi));
        assert_eq!(decode(0x31), None);
        assert_eq!(decode(VALID | 5 << 8), None, "reserved type");
    }

    #[test]
    fn vectors_that_are_no_exception_are_refused() {
        for v in [2, 9, 15, 20, 21, 22, 27, 28, 29, 31, 32, 255] {
            assert_eq!(encode(Event::Exception(v, None)), None, "{v}");
        }
        for v in [
            0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 30,
        ] {
            assert!(encode(Event::Exception(v, None)).is_some(), "{v}");
        }
    }

    #[test]
    fn interrupted_hardware_events_are_injected_again() {
        for e in [
            Event::Interrupt(0x40),
            Event::Nmi,
            Event::GP,
            Event::page_fault(2),
            Event::Exception(1, None),
        ] {
            let w = encode(e).unwrap();
            assert_eq!(after_exit(w, 0, 1, 2), w);
            assert_eq!(after_exit(w, w, 1, 1), w);
        }
    }

    #[test]
    fn interrupted_software_interrupts_are_executed_again() {
        for e in [
            Event::Software(0x80),
            Event::Exception(3, None),
            Event::Exception(4, None),
        ] {
            let w = encode(e).unwrap();
            // Executed by the guest.
            assert_eq!(after_exit(w, 0, 0x1000, 0x1000), 0);
            // Another event was injected, the guest came to an INT later.
            let other = encode(Event::Interrupt(0x80)).unwrap();
            assert_eq!(after_exit(w, other, 0x1000, 0x2000), 0);
            // Injected and delivered, then executed elsewhere.
            assert_eq!(after_exit(w, w, 0x1000, 0x2000), 0);
            // Injected and not delivered.
            assert_eq!(after_exit(w, w, 0x1000, 0x1000), w);
        }
    }

    #[test]
    fn nothing_interrupted_nothing_injected() {
        let w = encode(Event::Interrupt(0x40)).unwrap();
        assert_eq!(after_exit(0, w, 1, 2), 0);
        assert_eq!(after_exit(w & !VALID, w, 1, 2), 0);
    }
}
