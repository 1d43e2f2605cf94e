//! The words by which entry injects an event and an exit tells which delivery it interrupted, which
//! share one form, and what to do with an interrupted delivery. Pure. (Intel SDM "VM-Entry Controls
//! for Event Injection", "Information for VM Exits That Occur During Event Delivery".)
//!
//! A word here is the information field, with the error code in its upper half.

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
const TYPE_ICEBP: u64 = 5;
const TYPE_SOFTWARE_EXCEPTION: u64 = 6;
/// What an information field may have set: bit 12 tells of NMI unblocking at exits only.
const INJECTABLE: u64 = 0xffff_ffff_8000_0fff;

/// Whether a vector's exception has an error code (outside real mode).
fn has_error(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// The word to inject an external interrupt.
#[inline]
pub fn interrupt(vector: u8) -> u64 {
    VALID | TYPE_INTR << TYPE_SHIFT | u64::from(vector)
}

/// Whether a word has an error code.
#[inline]
pub fn has_code(word: u64) -> bool {
    word & ERROR_VALID != 0
}

/// The word to inject, or `None` where entry would refuse it. An exception has an error code where
/// its vector has one and the guest is in protected mode, whatever `e` says: entry insists.
pub fn encode(e: Event, protected: impl FnOnce() -> bool) -> Option<u64> {
    let (kind, vector, error) = match e {
        Event::Interrupt(v) => (TYPE_INTR, v, None),
        Event::Nmi => (TYPE_NMI, 2, None),
        Event::Exception(v, _) if v > 31 || v == 2 => return None,
        Event::Exception(v, error) => (
            TYPE_EXCEPTION,
            v,
            (has_error(v) && protected()).then(|| error.unwrap_or(0)),
        ),
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

/// Whether the event needs an instruction length: INT n.
pub fn is_soft(word: u64) -> bool {
    matches!(
        kind(word),
        TYPE_SOFTWARE | TYPE_ICEBP | TYPE_SOFTWARE_EXCEPTION
    )
}

/// Whether it is an NMI.
pub fn is_nmi(word: u64) -> bool {
    word & VALID != 0 && kind(word) == TYPE_NMI
}

/// Whether it is an external interrupt.
pub fn is_interrupt(word: u64) -> bool {
    word & VALID != 0 && kind(word) == TYPE_INTR
}

/// What to inject at the next entry after an exit that interrupted a delivery.
///
/// An event of the outside world and a fault are lost if they are not injected again. INT n, INT3,
/// INTO and ICEBP are not lost: RIP still points at the instruction, so the guest executes it
/// again. That is so unless the interrupted event is the very one that was injected at the last
/// entry (`injected`): then RIP is its return address and no instruction stands behind it.
pub fn after_exit(interrupted: u64, injected: u64, rip_before: u64, rip_now: u64) -> u64 {
    if interrupted & VALID == 0 {
        return 0;
    }
    if is_soft(interrupted) && !(same(interrupted, injected) && rip_before == rip_now) {
        return 0;
    }
    let word = interrupted & INJECTABLE;
    if word & ERROR_VALID == 0 {
        word & 0xffff_ffff
    } else {
        word
    }
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
        assert_eq!(encode(Event::Interrupt(0x31), || true), Some(0x8000_0031));
        assert_eq!(interrupt(0x31), 0x8000_0031);
        assert_eq!(encode(Event::Nmi, || true), Some(0x8000_0202));
        assert_eq!(encode(Event::UD, || true), Some(0x8000_0306));
        assert_eq!(encode(Event::GP, || true), Some(0x8000_0b0d));
        assert_eq!(
            encode(Event::page_fault(7), || true),
            Some(0x7_0000_0000 | 0x8000_0b0e)
        );
        assert_eq!(encode(Event::Software(0x80), || true), Some(0x8000_0480));
        assert_eq!(encode(Event::Exception(2, None), || true), None);
        assert_eq!(encode(Event::Exception(32, None), || true), None);
    }

    #[test]
    fn error_codes_follow_vector_and_mode() {
        assert_eq!(encode(Event::GP, || false), Some(0x8000_030d));
        assert_eq!(
            encode(Event::Exception(13, None), || true),
            Some(0x8000_0b0d),
            "entry insists"
        );
        assert_eq!(
            encode(Event::Exception(6, Some(1)), || true),
            Some(0x8000_0306)
        );
    }

    #[test]
    fn every_event_survives_encoding() {
        for v in 0..=255 {
            for e in [Event::Interrupt(v), Event::Software(v)] {
                assert_eq!(decode(encode(e, || true).unwrap()), Some(e));
            }
        }
        for e in [Event::UD, Event::GP, Event::page_fault(9), Event::Nmi] {
            assert_eq!(decode(encode(e, || true).unwrap()), Some(e));
        }
        assert_eq!(decode(0x31), None);
    }

    #[test]
    fn interrupted_hardware_events_are_injected_again() {
        for e in [Event::Interrupt(0x40), Event::Nmi, Event::GP] {
            let w = encode(e, || true).unwrap();
            assert_eq!(after_exit(w, 0, 1, 2), w);
            assert_eq!(
                after_exit(w | 1 << 12, w, 1, 1),
                w,
                "bit 12 is not for entry"
            );
        }
        let stale = encode(Event::Interrupt(0x40), || true).unwrap() | 0xdead << 32;
        assert_eq!(after_exit(stale, 0, 1, 2), 0x8000_0040);
    }

    #[test]
    fn interrupted_software_interrupts_are_executed_again() {
        for w in [0x8000_0480u64, 0x8000_0603, 0x8000_0501] {
            assert_eq!(after_exit(w, 0, 0x1000, 0x1000), 0);
            assert_eq!(after_exit(w, w, 0x1000, 0x2000), 0);
            assert_eq!(after_exit(w, w, 0x1000, 0x1000), w);
        }
    }

    #[test]
    fn nothing_interrupted_nothing_injected() {
        assert_eq!(after_exit(0x40, 0x8000_0040, 1, 2), 0);
    }
}
