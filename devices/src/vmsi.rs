//! Message-signalled interrupts: what a device's write to the interrupt address range means.
//!
//! Pure decoding, called by virtual PCI (a guest's MSI and MSI-X registers), by the device model's
//! `inject_msi`, and for guest stores to the range. (Intel SDM "Message Signalled Interrupts":
//! "Message Address Register Format", "Message Data Register Format".)

use crate::interrupt::{DeliveryMode, Destination, Interrupt};

/// Decodes an address and data pair. `None` where it cannot be an interrupt: an address outside
/// 0xfeexxxxx, a reserved or start-up delivery mode, or the de-assertion of a level-triggered
/// message, which has no effect on processors.
#[inline]
pub fn decode(address: u64, data: u32) -> Option<Interrupt> {
    if address >> 20 != 0xfee {
        return None;
    }
    let address = address as u32;
    let logical = address & (1 << 2) != 0;
    let redirect = address & (1 << 3) != 0;
    let level = data & (1 << 15) != 0;
    if level && data & (1 << 14) == 0 {
        return None;
    }
    let mode = match DeliveryMode::decode(data >> 8)? {
        // The redirection hint asks for one processor out of the logical set.
        DeliveryMode::Fixed if redirect && logical => DeliveryMode::LowestPriority,
        DeliveryMode::Startup => return None,
        m => m,
    };
    Some(Interrupt {
        vector: data as u8,
        mode,
        dest: Destination::from_message((address >> 12) as u8, (address >> 5) as u8, logical),
        level: level && mode.is_vectored(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn physical_fixed_edge() {
        assert_eq!(
            decode(0xfee0_2000, 0x0031),
            Some(Interrupt {
                vector: 0x31,
                mode: DeliveryMode::Fixed,
                dest: Destination {
                    id: 2,
                    logical: false
                },
                level: false
            })
        );
    }

    #[test]
    fn redirection_hint_on_a_logical_set_asks_for_one_processor() {
        let i = decode(0xfee0_300c, 0x4051).unwrap();
        assert_eq!(i.mode, DeliveryMode::LowestPriority);
        assert_eq!(
            i.dest,
            Destination {
                id: 3,
                logical: true
            }
        );
        assert_eq!(
            decode(0xfee0_3008, 0x51).unwrap().mode,
            DeliveryMode::Fixed,
            "a physical destination is one processor already"
        );
    }

    #[test]
    fn physical_ff_is_broadcast_and_logical_ff_is_a_set() {
        assert_eq!(
            decode(0xfeef_f000, 0x40).unwrap().dest.id,
            Destination::BROADCAST
        );
        assert_eq!(decode(0xfeef_f004, 0x40).unwrap().dest.id, 0xff);
    }

    #[test]
    fn extended_destination_bits_widen_the_id() {
        // Address bits 11:5 are id bits 14:8.
        assert_eq!(decode(0xfee0_2020, 0x40).unwrap().dest.id, 0x102);
        assert_eq!(decode(0xfeef_f020, 0x40).unwrap().dest.id, 0x1ff);
    }

    #[test]
    fn nmi_and_level_messages() {
        let nmi = decode(0xfee0_0000, 0xc400).unwrap();
        assert_eq!((nmi.mode, nmi.level), (DeliveryMode::Nmi, false));
        assert!(decode(0xfee0_0000, 0xc031).unwrap().level);
        assert_eq!(decode(0xfee0_0000, 0x8031), None, "de-assertion");
    }

    #[test]
    fn what_is_not_an_interrupt_is_refused() {
        assert_eq!(decode(0xfed0_0000, 0x31), None);
        assert_eq!(decode(0x1_fee0_0000, 0x31), None);
        assert_eq!(decode(0xfee0_0000, 0x0331), None, "reserved mode");
        assert_eq!(decode(0xfee0_0000, 0x0631), None, "start-up");
    }
}
