use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const LEVEL: u32 = 1 << 15;
const LOW: u32 = 1 << 13;
const MASKED: u32 = 1 << 16;

fn ioapic() -> Vioapic {
    Vioapic::new(1, VERSION_82093AA, 0, 24)
}

impl Vioapic {
    fn rd(&mut self, index: u32) -> u32 {
        self.mmio_write(0, 4, index, |_| panic!("index has no effect"));
        self.mmio_read(0x10, 4)
    }
    fn wr(&mut self, index: u32, v: u32) -> Vec<Effect> {
        self.mmio_write(0, 4, index, |_| panic!("index has no effect"));
        let mut e = Vec::new();
        self.mmio_write(0x10, 4, v, |x| e.push(x));
        e
    }
    fn rte(&mut self, pin: u32, low: u32) -> Vec<Effect> {
        self.wr(0x10 + 2 * pin, low)
    }
    fn line(&mut self, pin: u32, asserted: bool) -> Vec<Effect> {
        let mut e = Vec::new();
        self.set_line(pin, asserted, |x| e.push(x));
        e
    }
    fn eoi(&mut self, vector: u8) -> Vec<Effect> {
        let mut e = Vec::new();
        self.eoi_broadcast(vector, |x| e.push(x));
        e
    }
    fn remote_irr(&mut self, pin: u32) -> bool {
        self.rd(0x10 + 2 * pin) & 1 << 14 != 0
    }
}

fn delivered(pin: u32, vector: u8, level: bool) -> Effect {
    Effect::Deliver {
        pin,
        interrupt: Interrupt {
            vector,
            mode: DeliveryMode::Fixed,
            dest: Destination {
                id: 0,
                logical: false,
            },
            level,
        },
    }
}

fn deliveries(e: &[Effect]) -> usize {
    e.iter()
        .filter(|e| matches!(e, Effect::Deliver { .. }))
        .count()
}

#[test]
fn identifies_itself_like_the_hardware() {
    let mut a = ioapic();
    assert_eq!(a.rd(0), 0x0100_0000);
    assert_eq!(a.rd(1), 0x0017_0011);
    assert_eq!(a.rd(2), 0x0100_0000);
    assert_eq!(a.rd(0x10), 0x1_0000);
    assert_eq!(a.rd(0x11), 0);
    assert_eq!(a.rd(0x40), 0, "beyond the last pin");
    assert_eq!(a.rd(0x0f), 0);
    a.wr(0, 0x0500_0000);
    assert_eq!(a.rd(0), 0x0500_0000);
}

#[test]
fn gsis_map_to_pins() {
    let a = Vioapic::new(2, VERSION_82093AA, 24, 32);
    assert_eq!(a.pin_of_gsi(23), None);
    assert_eq!(a.pin_of_gsi(24), Some(0));
    assert_eq!(a.pin_of_gsi(55), Some(31));
    assert_eq!(a.pin_of_gsi(56), None);
}

#[test]
fn rising_edge_is_delivered_once() {
    let mut a = ioapic();
    a.rte(4, 0x31);
    assert_eq!(a.line(4, true), [delivered(4, 0x31, false)]);
    assert_eq!(a.line(4, true), []);
    assert_eq!(a.line(4, false), []);
    assert_eq!(a.line(4, true), [delivered(4, 0x31, false)]);
    assert!(!a.remote_irr(4));
}

#[test]
fn edge_while_masked_is_lost() {
    let mut a = ioapic();
    a.rte(4, 0x31 | MASKED);
    assert_eq!(a.line(4, true), []);
    assert_eq!(deliveries(&a.rte(4, 0x31)), 0);
}

#[test]
fn unmask_with_asserted_level_line_delivers() {
    let mut a = ioapic();
    a.rte(9, 0x41 | LEVEL | MASKED);
    assert_eq!(a.line(9, true), []);
    assert_eq!(
        a.rte(9, 0x41 | LEVEL),
        [
            Effect::RteChanged {
                pin: 9,
                was_masked: true,
                now_masked: false,
                level: true,
                active_low: false
            },
            delivered(9, 0x41, true)
        ]
    );
}

#[test]
fn level_that_went_away_while_masked_is_not_delivered() {
    let mut a = ioapic();
    a.rte(9, 0x41 | LEVEL | MASKED);
    a.line(9, true);
    a.line(9, false);
    assert_eq!(deliveries(&a.rte(9, 0x41 | LEVEL)), 0);
}

#[test]
fn remote_irr_blocks_second_delivery() {
    let mut a = ioapic();
    a.rte(9, 0x41 | LEVEL);
    assert_eq!(a.line(9, true), [delivered(9, 0x41, true)]);
    assert!(a.remote_irr(9));
    assert_eq!(a.line(9, false), []);
    assert_eq!(a.line(9, true), []);
    assert_eq!(deliveries(&a.rte(9, 0x41 | LEVEL | MASKED)), 0);
    assert_eq!(deliveries(&a.rte(9, 0x41 | LEVEL)), 0);
    assert!(!a.pulse(9, |_| panic!("in service")));
}

#[test]
fn level_line_that_stays_asserted_across_eoi_is_delivered_again() {
    let mut a = ioapic();
    a.rte(9, 0x41 | LEVEL);
    a.line(9, true);
    assert_eq!(
        a.eoi(0x41),
        [Effect::Eoi { pin: 9 }, delivered(9, 0x41, true)]
    );
    assert!(a.remote_irr(9));
    a.line(9, false);
    assert_eq!(a.eoi(0x41), [Effect::Eoi { pin: 9 }]);
    assert!(!a.remote_irr(9));
    assert_eq!(a.eoi(0x41), []);
}

#[test]
fn eoi_while_masked_delivers_after_unmask() {
    let mut a = ioapic();
    a.rte(9, 0x41 | LEVEL);
    a.line(9, true);
    a.rte(9, 0x41 | LEVEL | MASKED);
    assert_eq!(a.eoi(0x41), [Effect::Eoi { pin: 9 }]);
    assert_eq!(deliveries(&a.rte(9, 0x41 | LEVEL)), 1);
}

#[test]
fn eoi_reaches_all_pins_of_the_vector_and_no_others() {
    let mut a = ioapic();
    for (pin, v) in [(3, 0x41), (9, 0x41), (10, 0x42)] {
        a.rte(pin, v | LEVEL);
        a.line(pin, true);
        a.line(pin, false);
    }
    assert_eq!(
        a.eoi(0x41),
        [Effect::Eoi { pin: 3 }, Effect::Eoi { pin: 9 }]
    );
    assert!(a.remote_irr(10));
}

#[test]
fn changing_the_trigger_mode_clears_remote_irr() {
    // Mask and edge, then level again: how Linux ends an interrupt without EOI register.
    let mut a = ioapic();
    a.rte(9, 0x41 | LEVEL);
    a.line(9, true);
    let e = a.rte(9, 0x41 | MASKED);
    assert!(e.contains(&Effect::Eoi { pin: 9 }));
    assert!(!a.remote_irr(9));
    assert_eq!(deliveries(&a.rte(9, 0x41 | LEVEL | MASKED)), 0);
    assert_eq!(deliveries(&a.rte(9, 0x41 | LEVEL)), 1, "still asserted");
}

#[test]
fn guest_cannot_write_the_status_bits() {
    let mut a = ioapic();
    a.rte(9, 0x41 | LEVEL | 1 << 14 | 1 << 12);
    assert_eq!(a.rd(0x10 + 18), 0x41 | LEVEL);
    assert_eq!(deliveries(&a.line(9, true)), 1);
    a.rte(9, 0x41 | LEVEL);
    assert!(a.remote_irr(9), "not cleared by writing 0 to it");
}

#[test]
fn host_driven_line_is_lowered_by_the_eoi() {
    let mut a = ioapic();
    a.set_host_driven(9, true);
    a.rte(9, 0x41 | LEVEL | LOW);
    assert_eq!(deliveries(&a.line(9, true)), 1);
    assert_eq!(a.eoi(0x41), [Effect::Eoi { pin: 9 }]);
    assert_eq!(deliveries(&a.line(9, true)), 1, "the next host interrupt");
    // By the workaround as well, or the host's pin would stay masked.
    assert!(a.rte(9, 0x41 | MASKED).contains(&Effect::Eoi { pin: 9 }));
    assert_eq!(deliveries(&a.rte(9, 0x41 | LEVEL)), 0);
}

#[test]
fn host_driven_interrupt_that_arrives_while_masked_waits_for_the_unmask() {
    let mut a = ioapic();
    a.set_host_driven(9, true);
    a.rte(9, 0x41 | LEVEL);
    a.rte(9, 0x41 | LEVEL | MASKED);
    assert_eq!(a.line(9, true), []);
    assert_eq!(deliveries(&a.rte(9, 0x41 | LEVEL)), 1);
}

#[test]
fn pulse_delivers_where_nothing_prevents_it() {
    let mut a = ioapic();
    let pulse = |a: &mut Vioapic, pin| {
        let mut e = Vec::new();
        (a.pulse(pin, |x| e.push(x)), e.len())
    };
    assert_eq!(pulse(&mut a, 4), (false, 0), "masked");
    a.rte(4, 0x31);
    assert_eq!(pulse(&mut a, 4), (true, 1));
    assert_eq!(pulse(&mut a, 4), (true, 1), "edges are not held back");
    a.rte(9, 0x41 | LEVEL);
    assert_eq!(pulse(&mut a, 9), (true, 1));
    assert_eq!(pulse(&mut a, 9), (false, 0));
    assert_eq!(a.eoi(0x41), [Effect::Eoi { pin: 9 }]);
    assert_eq!(pulse(&mut a, 99), (false, 0));
}

#[test]
fn binding_is_told_of_unmask_trigger_and_polarity_but_not_of_routing() {
    let mut a = ioapic();
    assert_eq!(a.wr(0x10 + 19, 0x0200_0000), [], "destination");
    assert_eq!(a.rte(9, 0x42 | MASKED), [], "vector");
    assert_eq!(
        a.rte(9, 0x42 | MASKED | LEVEL | LOW),
        [Effect::RteChanged {
            pin: 9,
            was_masked: true,
            now_masked: true,
            level: true,
            active_low: true
        }]
    );
    assert_eq!(a.rte(9, 0x42 | LEVEL | LOW).len(), 1);
}

#[test]
fn delivery_carries_mode_and_destination() {
    let mut a = ioapic();
    a.wr(0x10 + 9, 0x0302_0000);
    let e = [a.rte(4, 0x0931), a.line(4, true)].concat();
    assert_eq!(
        e.last(),
        Some(&Effect::Deliver {
            pin: 4,
            interrupt: Interrupt {
                vector: 0x31,
                mode: DeliveryMode::LowestPriority,
                // Bit 49 is bit 8 of the id.
                dest: Destination {
                    id: 0x103,
                    logical: true
                },
                level: false
            }
        })
    );
}

#[test]
fn nmi_and_extint_pins_are_edges_whatever_the_trigger_mode_says() {
    let mut a = ioapic();
    for mode in [0x200, 0x400, 0x500, 0x700] {
        a.rte(2, mode | LEVEL);
        assert_eq!(deliveries(&a.line(2, true)), 1);
        assert!(!a.remote_irr(2));
        a.line(2, false);
    }
    for mode in [0x300, 0x600] {
        a.rte(2, mode);
        assert_eq!(a.line(2, true), [], "reserved mode");
        a.line(2, false);
    }
}

#[test]
fn eoi_register_exists_from_version_0x20() {
    for (version, works) in [(VERSION_82093AA, false), (VERSION_EOI, true)] {
        let mut a = Vioapic::new(0, version, 0, 24);
        a.rte(9, 0x41 | LEVEL);
        a.line(9, true);
        a.line(9, false);
        a.mmio_write(0x40, 4, 0x41, |_| {});
        assert_eq!(a.remote_irr(9), !works);
    }
}

#[test]
fn odd_accesses_do_nothing() {
    let mut a = ioapic();
    a.mmio_write(0, 1, 0x12, |_| {});
    assert_eq!(a.mmio_read(0, 4), 0x12);
    a.mmio_write(0x10, 1, 0x31, |_| panic!());
    a.mmio_write(0x14, 4, 0x31, |_| panic!());
    assert_eq!(a.mmio_read(0x10, 4), MASKED);
    assert_eq!(a.mmio_read(0x20, 4), 0);
    a.wr(0x10 + 2 * 24, 0);
    a.wr(0xff, 0);
    assert_eq!(a.line(24, true), []);
    a.set_host_driven(u32::MAX, true);
    assert_eq!(a.line(u32::MAX, true), []);
}

#[test]
fn largest_io_apic_has_all_its_pins() {
    let mut a = Vioapic::new(0, VERSION_82093AA, 0, 1000);
    assert_eq!(a.pins(), MAX_PINS);
    a.rte(MAX_PINS - 1, 0x41 | LEVEL);
    assert_eq!(deliveries(&a.line(MAX_PINS - 1, true)), 1);
    assert_eq!(deliveries(&a.eoi(0x41)), 1);
}

#[test]
fn state_survives_save_and_load() {
    let mut a = Vioapic::new(1, VERSION_82093AA, 0, 48);
    a.rte(9, 0x41 | LEVEL);
    a.wr(0x10 + 9, 0x0200_0000);
    a.rte(4, 0x31);
    a.line(9, true);
    a.line(9, false);
    let mut buf = [0; 400];
    assert_eq!(a.record_len(), 400);
    assert!(a.save(0xfec0_0000, &mut buf));
    assert!(!a.save(0xfec0_0000, &mut buf[..399]));
    let mut b = Vioapic::new(0, VERSION_82093AA, 0, 48);
    assert_eq!(b.load(&buf), Some(0xfec0_0000));
    assert_eq!(a, b);
    assert_eq!(b.eoi(0x41), [Effect::Eoi { pin: 9 }]);
}

#[test]
fn impossible_records_are_refused() {
    let mut a = Vioapic::new(1, VERSION_82093AA, 0, 48);
    let mut buf = [0; 400];
    a.save(0, &mut buf);
    let before = a.clone();
    for (off, v) in [
        (9, 1),     // register index above 255
        (13, 1),    // id above 255
        (18, 2),    // reserved bit of an entry
        (17, 0x40), // remote IRR of an edge
    ] {
        let mut bad = buf;
        bad[off] = v;
        assert_eq!(a.load(&bad), None, "{off}");
    }
    assert_eq!(a.load(&buf[..392]), None);
    assert_eq!(a, before);
}

proptest! {
    /// A level interrupt is never lost and never doubled: at all times an unmasked asserted level
    /// pin has its remote IRR set, and each delivery is answered by exactly one EOI effect.
    #[test]
    fn level_interrupts_are_neither_lost_nor_doubled(
        ops in prop::collection::vec((0u8..5, 0u32..4, any::<bool>()), 1..200))
    {
        let mut a = ioapic();
        for pin in 0..4 {
            a.rte(pin, (0x40 + (pin & 1)) | LEVEL | MASKED);
        }
        let mut open = [0i32; 4];
        for (op, pin, flag) in ops {
            let e = match op {
                0 | 1 => a.line(pin, flag),
                2 => a.eoi(0x40 + (pin & 1) as u8),
                3 => a.rte(pin, (0x40 + (pin & 1)) | LEVEL | if flag { MASKED } else { 0 }),
                _ => a.rte(pin, (0x40 + (pin & 1)) | MASKED),
            };
            for e in e {
                match e {
                    Effect::Deliver { pin, .. } => open[pin as usize] += 1,
                    Effect::Eoi { pin } => open[pin as usize] -= 1,
                    Effect::RteChanged { .. } => {}
                }
            }
            for pin in 0..4u32 {
                let rte = a.rtes[pin as usize];
                let rirr = rte & RTE_REMOTE_IRR != 0;
                prop_assert_eq!(open[pin as usize], i32::from(rirr));
                prop_assert_eq!(a.in_service & bit(pin) != 0, rirr);
                if is_level(rte) && rte & RTE_MASKED == 0 && a.lines & bit(pin) != 0 {
                    prop_assert!(rirr);
                }
            }
        }
    }
}
