use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const T0: Now = Now {
    ns: 1_000_000,
    guest_tsc: 5_000_000,
};

fn at(ns: u64) -> Now {
    Now {
        ns: T0.ns + ns,
        guest_tsc: T0.guest_tsc + ns * 3,
    }
}

fn config(id: u32) -> Config {
    Config {
        id,
        bsp: id == 0,
        x2apic: true,
        tsc_deadline: true,
    }
}

/// xAPIC mode, enabled by software.
fn xapic(id: u32) -> Vlapic {
    let mut a = Vlapic::new(config(id));
    a.mmio_write(0xf0, 4, 0x1ff, || T0);
    a
}

/// x2APIC mode, enabled by software.
fn x2apic(id: u32) -> Vlapic {
    let mut a = xapic(id);
    let base = a.rdmsr(MSR_APIC_BASE, || T0).unwrap();
    a.wrmsr(MSR_APIC_BASE, base | BASE_EXTEND, || T0).unwrap();
    a
}

impl Vlapic {
    fn rd(&self, r: u32) -> u64 {
        self.rdmsr(MSR_X2APIC + r, || T0).unwrap()
    }
    fn wr(&mut self, r: u32, v: u64) -> Result<Effect, Gp> {
        self.wrmsr(MSR_X2APIC + r, v, || T0)
    }
    fn page(&mut self, r: u32) -> u32 {
        self.mmio_read(r << 4, 4, || T0) as u32
    }
    fn set_page(&mut self, r: u32, v: u32) -> Effect {
        self.mmio_write(r << 4, 4, v.into(), || T0)
    }
    /// Takes the highest pending interrupt, as the run loop does.
    fn take(&mut self) -> Option<u8> {
        let v = self.highest_pending()?;
        self.accept(v);
        Some(v)
    }
}

fn physical(id: u32) -> Destination {
    Destination { id, logical: false }
}

fn logical(id: u32) -> Destination {
    Destination { id, logical: true }
}

// ---- priorities, EOI

fn sync(a: &mut Vlapic, taken: [u64; 4], level: [u64; 4]) {
    for (n, (t, l)) in taken.into_iter().zip(level).enumerate() {
        a.sync_posted(n, t, l);
    }
}

#[test]
fn higher_class_preempts_and_same_class_waits_for_eoi() {
    let mut a = x2apic(0);
    assert!(a.post(0x55, false));
    assert_eq!(a.take(), Some(0x55));
    a.post(0x5f, false);
    assert_eq!(a.highest_pending(), None);
    a.post(0x60, false);
    assert_eq!(a.take(), Some(0x60));
    assert_eq!(a.ppr(), 0x60);
    assert_eq!(a.eoi(), None);
    assert_eq!(a.ppr(), 0x50);
    assert_eq!(a.highest_pending(), None);
    assert_eq!(a.eoi(), None);
    assert_eq!(a.take(), Some(0x5f));
}

#[test]
fn tpr_holds_back_its_class_and_below() {
    let mut a = x2apic(0);
    a.wr(reg::TPR, 0x5a).unwrap();
    assert_eq!((a.cr8(), a.rd(reg::PPR)), (5, 0x5a));
    a.post(0x5f, false);
    assert_eq!(a.highest_pending(), None);
    a.set_cr8(4);
    assert_eq!(a.rd(reg::TPR), 0x40);
    assert_eq!(a.highest_pending(), Some(0x5f));
}

#[test]
fn cr8_write_of_the_same_class_keeps_the_low_bits_of_tpr() {
    let mut a = x2apic(0);
    a.wr(reg::TPR, 0x35).unwrap();
    a.set_cr8(3);
    assert_eq!(a.rd(reg::TPR), 0x35);
}

#[test]
fn only_level_interrupts_broadcast_their_eoi() {
    let mut a = x2apic(0);
    a.post(0x41, true);
    a.post(0x31, false);
    assert_eq!(a.rd(reg::TMR + 2), 2);
    a.take();
    assert_eq!(a.wr(reg::EOI, 0), Ok(Effect::Eoi(0x41)));
    a.take();
    assert_eq!(a.wr(reg::EOI, 0), Ok(Effect::None));
    assert_eq!(a.wr(reg::EOI, 0), Ok(Effect::None), "nothing in service");
}

#[test]
fn an_edge_after_a_level_of_the_same_vector_is_an_edge() {
    let mut a = x2apic(0);
    a.post(0x41, true);
    a.take();
    a.eoi();
    a.post(0x41, false);
    a.take();
    assert_eq!(a.eoi(), None);
}

#[test]
fn interrupt_arriving_while_in_service_stays_pending() {
    let mut a = x2apic(0);
    a.post(0x80, false);
    a.take();
    a.post(0x80, false);
    assert_eq!(a.rd(reg::ISR + 4), 1);
    assert_eq!(a.rd(reg::IRR + 4), 1);
    a.eoi();
    assert_eq!(a.take(), Some(0x80));
}

#[test]
fn posted_interrupts_enter_with_their_trigger_modes() {
    let mut a = x2apic(0);
    a.post(0x30, true);
    sync(&mut a, [0xffff | 1 << 0x30, 1, 0, 1 << 63], [0, 1, 0, 0]);
    for (vector, eoi) in [(0xff, None), (0x40, Some(0x40)), (0x30, None)] {
        assert_eq!(a.take(), Some(vector));
        assert_eq!(a.eoi(), eoi, "{vector:#x}");
    }
    assert_eq!(a.take(), None, "vectors below 16 never enter");
}

#[test]
fn software_disabled_apic_accepts_nothing_and_keeps_what_it_has() {
    let mut a = x2apic(0);
    a.post(0x40, false);
    assert_eq!(a.wr(reg::SVR, 0xff), Ok(Effect::Reconfigured));
    assert!(!a.post(0x50, false));
    sync(&mut a, [0, 0, 1, 0], [0; 4]);
    assert_eq!(a.take(), Some(0x40));
    assert_eq!(a.take(), None);
    assert!(!a.address().accepts_vectors());
}

#[test]
fn software_disabling_masks_all_lvt_entries_for_good() {
    let mut a = x2apic(0);
    a.wr(reg::LVT, 0x40).unwrap();
    a.wr(reg::SVR, 0xff).unwrap();
    assert_eq!(a.rd(reg::LVT), 0x10040);
    a.wr(reg::LVT, 0x41).unwrap();
    assert_eq!(a.rd(reg::LVT), 0x10041, "cannot be unmasked meanwhile");
    a.wr(reg::SVR, 0x1ff).unwrap();
    assert_eq!(a.rd(reg::LVT), 0x10041);
}

#[test]
fn global_disable_loses_pending_interrupts_and_registers() {
    let mut a = x2apic(2);
    a.post(0x40, false);
    a.wrmsr(MSR_APIC_BASE, MMIO_BASE, || T0).unwrap();
    assert_eq!((a.mode(), a.highest_pending()), (Mode::Disabled, None));
    assert!(!a.post(0x40, false));
    assert!(!a.address().matches(physical(2)));
    assert!(a.accepts_extint());
    a.wrmsr(MSR_APIC_BASE, MMIO_BASE | BASE_ENABLE, || T0)
        .unwrap();
    assert_eq!(a.page(reg::SVR), 0xff);
}

proptest! {
    /// The cached highest vectors and PPR against a model that recomputes everything from sets.
    #[test]
    fn priority_logic_matches_a_naive_model(ops in prop::collection::vec(
        (0u8..6, 0u8..=255u8, any::<bool>(), any::<[u64; 4]>(), any::<[u64; 4]>()), 1..200))
    {
        use std::collections::BTreeSet;
        let mut a = x2apic(0);
        let (mut irr, mut isr, mut level) =
            (BTreeSet::<u8>::new(), BTreeSet::<u8>::new(), BTreeSet::<u8>::new());
        let mut tpr = 0u8;
        for (op, v, lvl, t, l) in ops {
            match op {
                0 | 1 => {
                    prop_assert_eq!(a.post(v, lvl), v >= 16);
                    if v >= 16 {
                        irr.insert(v);
                        if lvl { level.insert(v); } else { level.remove(&v); }
                    }
                }
                2 => {
                    // Sparse, or everything is always pending.
                    let keep = |i: usize| t[i] & t[(i + 1) % 4] & l[(i + 2) % 4] & l[i];
                    let taken = core::array::from_fn(keep);
                    sync(&mut a, taken, l);
                    for v in 16..=255u8 {
                        if taken[usize::from(v) / 64] >> (v % 64) & 1 != 0 {
                            irr.insert(v);
                            if l[usize::from(v) / 64] >> (v % 64) & 1 != 0 {
                                level.insert(v);
                            } else {
                                level.remove(&v);
                            }
                        }
                    }
                }
                3 => {
                    if lvl { a.set_cr8(v & 15); } else { a.wr(reg::TPR, v.into()).unwrap(); }
                    if lvl { if v & 15 != tpr >> 4 { tpr = v << 4; } } else { tpr = v; }
                }
                4 => {
                    let top = isr.pop_last();
                    prop_assert_eq!(a.eoi(), top.filter(|v| level.contains(v)));
                }
                _ => {}
            }
            let in_service = isr.last().copied().unwrap_or(0);
            let ppr = if tpr >> 4 >= in_service >> 4 { tpr } else { in_service & 0xf0 };
            prop_assert_eq!(a.ppr(), ppr);
            let want = irr.last().copied().filter(|v| v >> 4 > ppr >> 4);
            prop_assert_eq!(a.highest_pending(), want);
            if op == 5 && let Some(v) = a.take() {
                irr.remove(&v);
                isr.insert(v);
            }
            for n in 0..8u32 {
                let word = |s: &BTreeSet<u8>| s.iter().filter(|&&v| u32::from(v) / 32 == n)
                    .fold(0u64, |w, &v| w | 1 << (v % 32));
                prop_assert_eq!(a.rd(reg::IRR + n), word(&irr));
                prop_assert_eq!(a.rd(reg::ISR + n), word(&isr));
                prop_assert_eq!(a.rd(reg::TMR + n), word(&level));
            }
        }
    }

    /// No access of a guest panics, and the invariant that vectors below 16 are never pending or
    /// in service survives all of them.
    #[test]
    fn any_guest_access_is_survived(ops in prop::collection::vec(
        (0u8..7, any::<u32>(), any::<u64>(), any::<u8>()), 1..200))
    {
        let mut a = x2apic(0);
        let mut now = T0;
        for (op, x, v, len) in ops {
            // Small values are what registers hold.
            let v = if len & 0x80 != 0 { v } else { v & 0x3ffff };
            match op {
                0 => { let _ = a.wrmsr(MSR_X2APIC + x % 0x48, v, || now); }
                1 => { let _ = a.rdmsr(MSR_X2APIC + x % 0x48, || now); }
                2 => { a.mmio_write(x % 0x410, len % 9, v, || now); }
                3 => { a.mmio_read(x % 0x410, len % 9, || now); }
                4 => {
                    let base = MMIO_BASE | [0, BASE_ENABLE, BASE_ENABLE | BASE_EXTEND][x as usize % 3];
                    let _ = a.wrmsr(MSR_APIC_BASE, base, || now);
                }
                5 => { let _ = a.wrmsr(MSR_TSC_DEADLINE, v, || now); }
                _ => {
                    now.ns = now.ns.saturating_add(v);
                    now.guest_tsc = now.guest_tsc.wrapping_add(v);
                    a.tick(now);
                    if let Some(v) = a.take() { prop_assert!(v >= 16); }
                }
            }
            prop_assert_eq!((a.irr.0[0] | a.isr.0[0]) & 0xffff, 0);
            if let Some(Deadline::Ns(d)) = a.timer_deadline() { prop_assert!(d > T0.ns); }
            // What can be saved can be loaded.
            let (h, r) = a.save(now);
            let mut b = Vlapic::new(a.config());
            prop_assert_eq!(b.load(&h, &r, now), Ok(()));
            prop_assert_eq!(b.highest_pending(), a.highest_pending());
        }
    }
}

// ---- APIC_BASE

#[test]
fn power_on_state_is_what_dom0_sees_first() {
    let mut a = Vlapic::new(config(0));
    assert_eq!(a.rdmsr(MSR_APIC_BASE, || T0), Ok(0xfee0_0900));
    assert_eq!(a.page(reg::VERSION), 0x50014);
    assert_eq!(a.page(reg::SVR), 0xff);
    assert_eq!(a.page(reg::DFR), !0);
    assert_eq!(a.page(reg::LVT + 3), 0x10000);
    assert_eq!(
        a.wrmsr(MSR_APIC_BASE, 0xfee0_0d00, || T0),
        Ok(Effect::Reconfigured)
    );
    assert_eq!((a.rd(reg::ID), a.rd(reg::LDR)), (0, 1));
}

#[test]
fn mode_transitions_follow_the_x2apic_state_diagram() {
    const OFF: u64 = MMIO_BASE;
    const XAPIC: u64 = MMIO_BASE | BASE_ENABLE;
    const X2APIC: u64 = XAPIC | BASE_EXTEND;
    let to = |path: &[u64], last: u64| {
        let mut a = Vlapic::new(config(0));
        for &v in path {
            a.wrmsr(MSR_APIC_BASE, v, || T0).unwrap();
        }
        a.wrmsr(MSR_APIC_BASE, last, || T0).map(|_| a.mode())
    };
    assert_eq!(to(&[], X2APIC), Ok(Mode::X2Apic));
    assert_eq!(to(&[X2APIC], XAPIC), Err(Gp));
    assert_eq!(to(&[X2APIC], OFF), Ok(Mode::Disabled));
    assert_eq!(to(&[OFF], X2APIC), Err(Gp));
    assert_eq!(to(&[OFF], XAPIC), Ok(Mode::XApic));
    assert_eq!(to(&[], MMIO_BASE | BASE_EXTEND), Err(Gp), "EXTD without EN");
    assert_eq!(to(&[], XAPIC | 1), Err(Gp), "reserved bit");
    assert_eq!(to(&[], XAPIC | 1 << 52), Err(Gp), "reserved bit");
    assert_eq!(to(&[], 0xfed0_0800), Err(Gp), "moved page");
}

#[test]
fn x2apic_mode_needs_the_cpuid_bit() {
    let mut a = Vlapic::new(Config {
        x2apic: false,
        ..config(0)
    });
    assert_eq!(a.wrmsr(MSR_APIC_BASE, 0xfee0_0d00, || T0), Err(Gp));
}

#[test]
fn bsp_bit_cannot_be_changed() {
    let mut a = Vlapic::new(config(2));
    a.wrmsr(MSR_APIC_BASE, 0xfee0_0d00, || T0).unwrap();
    assert_eq!(a.rdmsr(MSR_APIC_BASE, || T0), Ok(0xfee0_0c00));
}

#[test]
fn init_keeps_the_mode_and_reset_does_not() {
    let mut a = x2apic(4);
    a.post(0x40, true);
    a.wr(reg::TPR, 0x20).unwrap();
    let mut b = a.clone();
    a.init();
    assert_eq!(a.mode(), Mode::X2Apic);
    assert_eq!((a.rd(reg::SVR), a.rd(reg::TPR)), (0xff, 0));
    assert_eq!(a.highest_pending(), None);
    b.reset();
    assert_eq!(b, Vlapic::new(config(4)));
}

// ---- x2APIC MSRs

#[test]
fn x2apic_msrs_fault_outside_x2apic_mode() {
    let mut a = xapic(0);
    assert_eq!(a.rdmsr(0x802, || T0), Err(Gp));
    assert_eq!(a.wrmsr(0x80b, 0, || T0), Err(Gp));
    assert_eq!(a.wrmsr(0x830, 0x40_0fd0, || T0), Err(Gp));
}

#[test]
fn x2apic_registers_fault_exactly_where_the_table_says() {
    // Intel SDM "x2APIC Register Address Space": readable, writable.
    let mut a = x2apic(0);
    for r in 0..=0xff {
        let ro = matches!(r, 2 | 3 | 0xa | 0xd | 0x10..=0x27 | 0x39);
        let rw = matches!(r, 8 | 0xf | 0x28 | 0x30 | 0x32..=0x38 | 0x3e);
        let wo = matches!(r, 0xb | 0x3f);
        assert_eq!(
            a.rdmsr(MSR_X2APIC + r, || T0).is_ok(),
            ro || rw,
            "read {r:#x}"
        );
        assert_eq!(a.wr(r, 0).is_ok(), rw || wo, "write {r:#x}");
    }
}

#[test]
fn reserved_bits_of_x2apic_registers_fault() {
    let mut a = x2apic(0);
    for (r, v) in [
        (reg::TPR, 0x100),
        (reg::EOI, 1),
        (reg::SVR, 0x400),
        (reg::SVR, 1 << 12),
        (reg::ESR, 1),
        (reg::LVT, 1 << 19),
        (reg::LVT, 7 << 8),
        (reg::LVT + 1, 1 << 17),
        (reg::LVT + 5, 1 << 8),
        (reg::DCR, 4),
        (reg::SELF_IPI, 0x100),
        (reg::ICR, 1 << 13),
        (reg::ICR, 1 << 16),
        (reg::ICR, 1 << 20),
        (reg::TPR, 1 << 32),
        (reg::TMICT, 1 << 32),
    ] {
        assert_eq!(a.wr(r, v), Err(Gp), "{r:#x} = {v:#x}");
    }
    assert!(
        a.wr(reg::LVT + 3, 1 << 12 | 1 << 14).is_ok(),
        "status bits are read-only"
    );
    assert_eq!(a.rd(reg::LVT + 3), 0);
    assert!(a.wr(reg::ICR, 1 << 12 | 0x840).is_ok());
    assert_eq!(a.rd(reg::ICR), 0x840);
}

#[test]
fn x2apic_logical_id_is_derived_from_the_id() {
    for (id, ldr) in [(0, 1), (2, 4), (0x1f, 0x1_8000), (0x1234, 0x123_0010)] {
        assert_eq!(x2apic(id).rd(reg::LDR), ldr);
    }
}

// ---- IPIs

fn ipi(mode: DeliveryMode, vector: u8, dest: Destination, shorthand: Shorthand) -> Effect {
    Effect::Ipi(Ipi {
        mode,
        vector,
        dest,
        shorthand,
    })
}

#[test]
fn linux_starts_a_processor_by_init_and_sipi() {
    let mut a = x2apic(0);
    assert_eq!(
        a.wr(reg::ICR, 0x2_0000_c500),
        Ok(ipi(DeliveryMode::Init, 0, physical(2), Shorthand::None))
    );
    assert_eq!(
        a.wr(reg::ICR, 0x2_0000_8500),
        Ok(Effect::None),
        "de-assertion"
    );
    assert_eq!(
        a.wr(reg::ICR, 0x2_0000_869a),
        Ok(ipi(
            DeliveryMode::Startup,
            0x9a,
            physical(2),
            Shorthand::None
        ))
    );
    assert_eq!(a.rd(reg::ICR), 0x2_0000_869a);
}

#[test]
fn xapic_icr_sends_when_the_low_half_is_written() {
    let mut a = xapic(0);
    assert_eq!(a.set_page(reg::ICR2, 0x0200_0000), Effect::None);
    assert_eq!(
        a.set_page(reg::ICR, 0x40fd & !0x4000),
        ipi(DeliveryMode::Fixed, 0xfd, physical(2), Shorthand::None)
    );
    a.set_page(reg::ICR2, 0xff00_0000);
    assert_eq!(
        a.set_page(reg::ICR, 0x400),
        ipi(
            DeliveryMode::Nmi,
            0,
            physical(Destination::BROADCAST),
            Shorthand::None
        )
    );
    assert_eq!(a.page(reg::ICR2), 0xff00_0000);
}

#[test]
fn shorthands_and_logical_destinations_reach_the_caller() {
    let mut a = x2apic(0);
    assert_eq!(
        a.wr(reg::ICR, 0xc00fe),
        Ok(ipi(
            DeliveryMode::Fixed,
            0xfe,
            physical(0),
            Shorthand::AllExcludingSelf
        ))
    );
    assert_eq!(
        a.wr(reg::ICR, 0x80040),
        Ok(ipi(
            DeliveryMode::Fixed,
            0x40,
            physical(0),
            Shorthand::AllIncludingSelf
        ))
    );
    assert_eq!(
        a.wr(reg::ICR, 0x0001_0003_0000_0940),
        Ok(ipi(
            DeliveryMode::LowestPriority,
            0x40,
            logical(0x1_0003),
            Shorthand::None
        ))
    );
}

#[test]
fn ipi_to_oneself_becomes_pending_at_once() {
    let mut a = x2apic(0);
    assert_eq!(a.wr(reg::ICR, 0x400f6), Ok(Effect::None));
    assert_eq!(a.take(), Some(0xf6));
    a.eoi();
    assert_eq!(a.wr(reg::SELF_IPI, 0xf7), Ok(Effect::None));
    assert_eq!(a.take(), Some(0xf7));
}

#[test]
fn reserved_delivery_modes_send_nothing() {
    let mut a = x2apic(0);
    assert_eq!(a.wr(reg::ICR, 0x2_0000_0340), Ok(Effect::None));
    assert_eq!(a.wr(reg::ICR, 0x2_0000_0740), Ok(Effect::None));
    assert_eq!(a.wr(reg::ICR, 0x4_0440), Ok(Effect::None), "NMI to self");
}

// ---- destinations

#[test]
fn physical_destinations() {
    let x = xapic(4).address();
    let x2 = x2apic(4).address();
    for a in [x, x2] {
        assert!(a.matches(physical(4)));
        assert!(!a.matches(physical(5)));
        assert!(!a.matches(physical(0x104)));
        assert!(a.matches(physical(Destination::BROADCAST)));
        assert!(a.matches(logical(Destination::BROADCAST)));
        assert_eq!(ApicAddress::from_bits(a.bits()), a);
    }
    assert!(!x2.matches(physical(0xff)), "0xff is an id like any other");
}

#[test]
fn logical_destinations_flat_and_cluster() {
    let mut a = xapic(0);
    assert!(!a.address().matches(logical(1)), "no logical id yet");
    assert_eq!(a.set_page(reg::LDR, 0x2200_0000), Effect::Reconfigured);
    assert!(a.address().matches(logical(0x20)));
    assert!(a.address().matches(logical(0x0a)));
    assert!(!a.address().matches(logical(0x11)));
    a.set_page(reg::DFR, 0x0fff_ffff);
    assert_eq!(a.page(reg::DFR), 0x0fff_ffff);
    assert!(a.address().matches(logical(0x22)), "cluster 2, member 1");
    assert!(!a.address().matches(logical(0x12)), "cluster 1");
    assert!(!a.address().matches(logical(0x24)), "member 2");
    assert!(a.address().matches(logical(0xff)));
}

#[test]
fn logical_destinations_x2apic() {
    let a = x2apic(0x12).address();
    assert!(a.matches(logical(0x1_0004)));
    assert!(a.matches(logical(0x1_ffff)));
    assert!(!a.matches(logical(0x1_0008)));
    assert!(!a.matches(logical(0x2_0004)));
    // What an 8-bit message can name is cluster 0.
    assert!(x2apic(2).address().matches(logical(0xff)));
    assert!(!x2apic(8).address().matches(logical(0xff)));
}

#[test]
fn lowest_priority_takes_the_lowest_class_and_then_turns() {
    assert_eq!(
        lowest_priority([(0, 0x30), (1, 0x20), (2, 0x50)], 0),
        Some(1)
    );
    let idle = [(0, 0), (1, 5), (3, 0)];
    assert_eq!(lowest_priority(idle, 0), Some(1));
    assert_eq!(lowest_priority(idle, 1), Some(3));
    assert_eq!(lowest_priority(idle, 3), Some(0));
    assert_eq!(lowest_priority([], 0), None);
}

// ---- xAPIC page

#[test]
fn xapic_page_has_registers_at_16_byte_strides() {
    let mut a = xapic(2);
    assert_eq!(a.page(reg::ID), 0x0200_0000);
    assert_eq!(a.mmio_read(0x23, 1, || T0), 2);
    assert_eq!(a.mmio_read(0x20, 8, || T0), 0x0200_0000);
    assert_eq!(a.mmio_read(0x24, 4, || T0), 0);
    assert_eq!(a.page(reg::ESR), 0);
}

#[test]
fn partial_writes_are_dropped_except_where_a_byte_is_the_register() {
    let mut a = xapic(0);
    assert_eq!(a.mmio_write(0x300, 1, 0xfe, || T0), Effect::None);
    a.mmio_write(0xf0, 2, 0xff, || T0);
    assert_eq!(a.page(reg::SVR), 0x1ff);
    a.mmio_write(0x80, 1, 0x30, || T0);
    assert_eq!(a.page(reg::TPR), 0x30);
    a.post(0x40, true);
    a.take();
    assert_eq!(a.mmio_write(0xb0, 1, 0, || T0), Effect::Eoi(0x40));
}

#[test]
fn read_only_registers_ignore_writes_without_error() {
    let mut a = xapic(2);
    for r in [reg::ID, reg::VERSION, reg::PPR, reg::IRR, reg::TMCCT] {
        a.set_page(r, !0);
    }
    assert_eq!(a.page(reg::ID), 0x0200_0000);
    a.set_page(reg::ESR, 0);
    assert_eq!(a.page(reg::ESR), 0);
}

// ---- errors

#[test]
fn errors_show_in_esr_only_after_it_is_written() {
    let mut a = xapic(0);
    a.set_page(reg::ICR, 0x0f);
    a.post(3, false);
    a.page(0x3a);
    assert_eq!(a.page(reg::ESR), 0);
    a.set_page(reg::ESR, 0);
    assert_eq!(a.page(reg::ESR), 0xe0);
    a.set_page(reg::ESR, 0);
    assert_eq!(a.page(reg::ESR), 0);
}

#[test]
fn first_error_raises_the_error_interrupt_until_esr_is_written() {
    let mut a = x2apic(0);
    a.wr(reg::LVT + 5, 0xfe).unwrap();
    a.wr(reg::ICR, 1).unwrap();
    assert_eq!(a.take(), Some(0xfe));
    a.eoi();
    a.wr(reg::ICR, 1).unwrap();
    assert_eq!(a.highest_pending(), None);
    a.wr(reg::ESR, 0).unwrap();
    a.wr(reg::ICR, 1).unwrap();
    assert_eq!(a.take(), Some(0xfe));
}

#[test]
fn error_interrupt_with_an_illegal_vector_is_an_error_and_no_loop() {
    let mut a = x2apic(0);
    a.wr(reg::LVT + 5, 0x01).unwrap();
    a.wr(reg::SELF_IPI, 2).unwrap();
    assert_eq!(a.highest_pending(), None);
    a.wr(reg::ESR, 0).unwrap();
    assert_eq!(a.rd(reg::ESR), 0x60);
}

// ---- local interrupts

#[test]
fn local_sources_follow_their_lvt_entries() {
    let mut a = x2apic(0);
    assert_eq!(a.signal(Lvt::Lint1), None, "masked");
    a.wr(reg::LVT + 4, 0x400).unwrap();
    assert_eq!(a.signal(Lvt::Lint1), Some(DeliveryMode::Nmi));
    a.wr(reg::LVT + 2, 0x45).unwrap();
    assert_eq!(a.signal(Lvt::Perf), None);
    assert_eq!(a.take(), Some(0x45));
    assert!(!a.accepts_extint());
    a.wr(reg::LVT + 3, 0x700).unwrap();
    assert!(a.accepts_extint());
    assert_eq!(a.signal(Lvt::Lint0), Some(DeliveryMode::ExtInt));
}

// ---- timer

#[test]
fn one_shot_timer_counts_down_and_fires_once() {
    let mut a = x2apic(0);
    a.wr(reg::DCR, 0b0011).unwrap();
    a.wr(reg::LVT, 0xec).unwrap();
    assert_eq!(a.wr(reg::TMICT, 1000), Ok(Effect::TimerChanged));
    // Divide by 16: 160 ns per count.
    assert_eq!(a.timer_deadline(), Some(Deadline::Ns(T0.ns + 160_000)));
    let count = |a: &Vlapic, ns| a.rdmsr(0x839, || at(ns)).unwrap();
    assert_eq!(count(&a, 0), 1000);
    assert_eq!(count(&a, 80_000), 500);
    assert_eq!(count(&a, 159_999), 1);
    assert_eq!(count(&a, 160_000), 0);
    assert!(!a.tick(at(159_999)));
    assert!(a.tick(at(160_000)));
    assert_eq!(a.take(), Some(0xec));
    assert_eq!(a.timer_deadline(), None);
    assert!(!a.tick(at(1_000_000)));
}

#[test]
fn all_divisors() {
    let mut a = x2apic(0);
    for (dcr, div) in [
        (0, 2),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (10, 128),
        (11, 1),
    ] {
        a.wr(reg::DCR, dcr).unwrap();
        assert_eq!(a.timer.divisor(), div);
    }
}

#[test]
fn changing_the_divisor_goes_on_from_the_count() {
    let mut a = x2apic(0);
    a.wr(reg::DCR, 11).unwrap();
    a.wr(reg::LVT, 0xec).unwrap();
    a.wr(reg::TMICT, 100_000).unwrap();
    assert_eq!(
        a.wrmsr(0x83e, 0, || at(500_000)),
        Ok(Effect::TimerChanged),
        "half way, from /1 to /2"
    );
    assert_eq!(
        a.timer_deadline(),
        Some(Deadline::Ns(T0.ns + 500_000 + 50_000 * 20))
    );
}

#[test]
fn periodic_timer_keeps_its_phase_and_coalesces_missed_periods() {
    let mut a = x2apic(0);
    a.wr(reg::DCR, 11).unwrap();
    a.wr(reg::LVT, 0x2_00ec).unwrap();
    a.wr(reg::TMICT, 100_000).unwrap();
    assert!(a.tick(at(1_000_005)));
    assert_eq!(a.timer_deadline(), Some(Deadline::Ns(T0.ns + 2_000_000)));
    assert_eq!(a.rdmsr(0x839, || at(1_500_000)), Ok(50_000));
    assert!(a.tick(at(7_200_000)));
    assert_eq!(a.timer_deadline(), Some(Deadline::Ns(T0.ns + 8_000_000)));
    assert_eq!(a.take(), Some(0xec));
    assert_eq!(a.take(), None);
    assert_eq!(a.wr(reg::TMICT, 0), Ok(Effect::TimerChanged));
    assert_eq!(a.timer_deadline(), None);
}

#[test]
fn a_tiny_period_cannot_keep_the_host_busy() {
    let mut a = x2apic(0);
    a.wr(reg::DCR, 11).unwrap();
    a.wr(reg::LVT, 0x2_00ec).unwrap();
    a.wr(reg::TMICT, 1).unwrap();
    let mut now = T0.ns;
    for _ in 0..10 {
        let Some(Deadline::Ns(d)) = a.timer_deadline() else {
            panic!("disarmed")
        };
        now = now.max(d);
        assert!(a.tick(Now {
            ns: now,
            guest_tsc: 0
        }));
    }
    assert!(now >= T0.ns + 9 * MIN_PERIOD_NS);
    assert_eq!(
        a.rdmsr(0x839, || Now {
            ns: now,
            guest_tsc: 0
        }),
        Ok(1)
    );
}

#[test]
fn masked_timer_asks_for_no_host_timer_but_keeps_counting() {
    let mut a = x2apic(0);
    a.wr(reg::DCR, 11).unwrap();
    a.wr(reg::TMICT, 100_000).unwrap();
    assert_eq!(a.timer_deadline(), None);
    assert_eq!(a.rdmsr(0x839, || at(400_000)), Ok(60_000));
    assert_eq!(
        a.wrmsr(0x832, 0xec, || at(500_000)),
        Ok(Effect::TimerChanged)
    );
    assert_eq!(a.timer_deadline(), Some(Deadline::Ns(T0.ns + 1_000_000)));
}

#[test]
fn timer_that_expired_while_masked_does_not_fire_on_unmask() {
    let mut a = x2apic(0);
    a.wr(reg::DCR, 11).unwrap();
    a.wr(reg::TMICT, 100).unwrap();
    assert_eq!(a.wrmsr(0x832, 0xec, || at(500_000)), Ok(Effect::None));
    assert_eq!(a.highest_pending(), None);
}

#[test]
fn timer_due_before_it_is_masked_still_fires() {
    let mut a = x2apic(0);
    a.wr(reg::DCR, 11).unwrap();
    a.wr(reg::LVT, 0xec).unwrap();
    a.wr(reg::TMICT, 100).unwrap();
    a.wrmsr(0x832, 0x1_00ec, || at(500_000)).unwrap();
    assert_eq!(a.take(), Some(0xec));
}

#[test]
fn tsc_deadline_fires_once_and_reads_zero_after() {
    let mut a = x2apic(0);
    a.wr(reg::LVT, 0x4_00ec).unwrap();
    let d = T0.guest_tsc + 300;
    assert_eq!(
        a.wrmsr(MSR_TSC_DEADLINE, d, || T0),
        Ok(Effect::TimerChanged)
    );
    assert_eq!(a.timer_deadline(), Some(Deadline::GuestTsc(d)));
    assert_eq!(a.rdmsr(MSR_TSC_DEADLINE, || at(99)), Ok(d));
    assert_eq!(a.rdmsr(MSR_TSC_DEADLINE, || at(100)), Ok(0));
    assert_eq!(a.rd(reg::TMCCT), 0);
    assert!(a.tick(at(100)));
    assert_eq!(a.take(), Some(0xec));
    assert_eq!(a.timer_deadline(), None);
}

#[test]
fn tsc_deadline_can_be_disarmed_and_is_by_a_mode_change() {
    let mut a = x2apic(0);
    a.wr(reg::LVT, 0x4_00ec).unwrap();
    a.wrmsr(MSR_TSC_DEADLINE, !0, || T0).unwrap();
    assert_eq!(
        a.wrmsr(MSR_TSC_DEADLINE, 0, || T0),
        Ok(Effect::TimerChanged)
    );
    assert_eq!(a.timer_deadline(), None);
    a.wrmsr(MSR_TSC_DEADLINE, !0, || T0).unwrap();
    assert_eq!(a.wr(reg::LVT, 0xec), Ok(Effect::TimerChanged));
    assert_eq!(a.timer_deadline(), None);
    a.wrmsr(MSR_TSC_DEADLINE, !0, || T0).unwrap();
    assert_eq!(a.timer_deadline(), None, "ignored in one-shot mode");
}

#[test]
fn tsc_deadline_needs_the_cpuid_bit() {
    let mut a = Vlapic::new(Config {
        tsc_deadline: false,
        ..config(0)
    });
    a.set_page(reg::SVR, 0x1ff);
    assert_eq!(a.rdmsr(MSR_TSC_DEADLINE, || T0), Err(Gp));
    assert_eq!(a.wrmsr(MSR_TSC_DEADLINE, 1, || T0), Err(Gp));
    a.set_page(reg::LVT, 0x4_00ec);
    assert_eq!(a.page(reg::LVT), 0xec);
    a.set_page(reg::TMICT, 100);
    assert!(matches!(a.timer_deadline(), Some(Deadline::Ns(_))));
}

#[test]
fn the_clock_is_read_only_where_the_timer_is_concerned() {
    let mut a = x2apic(0);
    let never = || -> Now { panic!("time was read") };
    a.post(0x40, false);
    a.take();
    a.wrmsr(0x80b, 0, never).unwrap();
    a.wrmsr(0x830, 0x2_0000_00fd, never).unwrap();
    a.wrmsr(0x808, 0, never).unwrap();
    a.rdmsr(0x802, never).unwrap();
}

// ---- save records

fn busy() -> Vlapic {
    let mut a = x2apic(6);
    a.wr(reg::DCR, 11).unwrap();
    a.wr(reg::LVT, 0x2_00ec).unwrap();
    a.wr(reg::LVT + 3, 0xa731).unwrap();
    a.wr(reg::TMICT, 100_000).unwrap();
    a.wr(reg::TPR, 0x21).unwrap();
    a.wr(reg::ICR, 0x4_0000_08fd).unwrap();
    a.post(0x93, true);
    a.take();
    a.post(0x51, false);
    a.post(0xa0, true);
    a.post(2, false);
    a
}

#[test]
fn state_survives_save_and_load() {
    let a = busy();
    let now = at(250_000);
    let (hidden, regs) = a.save(now);
    assert_eq!(hidden.apic_base_msr, 0xfee0_0c00);
    assert_eq!((hidden.disabled, hidden.timer_divisor), (0, 1));
    assert_eq!(hidden.pending_esr, 0x40);
    assert_eq!(regs[0x20], 6);
    assert_eq!(regs[0x80], 0x21);
    let hidden = HiddenState::from_bytes(&hidden.to_bytes()).unwrap();
    let mut b = Vlapic::new(config(6));
    b.load(&hidden, &regs, now).unwrap();
    assert_eq!(a, b);
    assert_eq!(b.eoi(), Some(0x93));
    assert_eq!(b.take(), Some(0xa0));
}

impl Vlapic {
    fn with_regs(&self, change: impl FnOnce(&mut [u8; REGS_LEN])) -> Result<Vlapic, BadRecord> {
        let (h, mut r) = self.save(T0);
        change(&mut r);
        let mut b = Vlapic::new(self.cfg);
        b.load(&h, &r, T0).map(|()| b)
    }
}

#[test]
fn level_in_service_broadcasts_its_eoi_after_load() {
    let mut a = x2apic(0);
    a.post(0x93, true);
    a.take();
    let mut b = a.with_regs(|_| {}).unwrap();
    assert_eq!(b.wr(reg::EOI, 0), Ok(Effect::Eoi(0x93)));
}

#[test]
fn short_record_of_older_interfaces_is_accepted() {
    let (h, regs) = busy().save(T0);
    let h = HiddenState::from_bytes(&h.to_bytes()[..24]).unwrap();
    assert_eq!(h.pending_esr, 0);
    assert!(Vlapic::new(config(6)).load(&h, &regs, T0).is_ok());
    assert!(HiddenState::from_bytes(&[0; 25]).is_err());
    assert!(HiddenState::from_bytes(&[]).is_err());
}

#[test]
fn logical_address_of_older_hypervisors_is_kept() {
    let mut a = x2apic(6)
        .with_regs(|r| r[0xd0..0xd4].copy_from_slice(&8u32.to_le_bytes()))
        .unwrap();
    assert_eq!(a.rd(reg::LDR), 8);
    assert!(a.address().matches(logical(8)));
    assert!(!a.address().matches(logical(0x40)));
    let again = a.with_regs(|_| {}).unwrap();
    assert_eq!(again.rd(reg::LDR), 8);
    a.wrmsr(MSR_APIC_BASE, MMIO_BASE, || T0).unwrap();
    a.wrmsr(MSR_APIC_BASE, MMIO_BASE | BASE_ENABLE, || T0)
        .unwrap();
    a.wrmsr(MSR_APIC_BASE, MMIO_BASE | BASE_ENABLE | BASE_EXTEND, || T0)
        .unwrap();
    assert_eq!(a.rd(reg::LDR), 0x40);
}

#[test]
fn impossible_records_are_refused_and_change_nothing() {
    let a = busy();
    let set = |off: usize, v: u8| a.with_regs(move |r| r[off] = v);
    for (off, v) in [
        (0x20, 7),
        (0xd0, 1),
        (0x81, 1),
        (0x101, 1),
        (0x201, 0x80),
        (0xf1, 0x10),
        (0x282, 1),
        (0x322, 8),
        (0x372, 2),
        (0x3e0, 4),
    ] {
        assert!(set(off, v).is_err(), "{off:#x}");
    }
    let (h, r) = a.save(T0);
    let tries: Vec<HiddenState> = std::vec![
        HiddenState {
            apic_base_msr: MMIO_BASE | BASE_EXTEND,
            ..h
        },
        HiddenState {
            apic_base_msr: 0xfed0_0800,
            ..h
        },
        HiddenState { disabled: 4, ..h },
        HiddenState {
            timer_divisor: 0,
            ..h
        },
        HiddenState {
            timer_divisor: 3,
            ..h
        },
        HiddenState {
            pending_esr: 1,
            ..h
        },
    ];
    let mut b = x2apic(6);
    let before = b.clone();
    for t in tries {
        assert!(b.load(&t, &r, T0).is_err(), "{t:?}");
    }
    assert!(b.load(&h, &r[..1000], T0).is_err());
    assert_eq!(b, before);
}

#[test]
fn running_timer_of_a_writer_that_keeps_no_count_starts_anew() {
    let b = busy().with_regs(|r| r[0x390..0x394].fill(0)).unwrap();
    assert_eq!(b.timer_deadline(), Some(Deadline::Ns(T0.ns + 1_000_000)));
}

#[test]
fn tsc_deadline_survives_save_and_load() {
    let mut a = x2apic(0);
    a.wr(reg::LVT, 0x4_00ec).unwrap();
    a.wrmsr(MSR_TSC_DEADLINE, 77_000_000, || T0).unwrap();
    let b = a.with_regs(|_| {}).unwrap();
    assert_eq!(b.timer_deadline(), Some(Deadline::GuestTsc(77_000_000)));
}

// ---- what a processor shows by itself

#[test]
fn registers_to_show_are_what_an_emulated_read_gives() {
    let mut a = xapic(6);
    for (r, v) in [
        (reg::SVR, 0x1ff),
        (reg::LDR, 0x0400_0000),
        (reg::DFR, 0x0fff_ffff),
        (reg::ICR2, 0x0300_0000),
        (reg::ICR, 0x000c_0041),
        (reg::LVT, 0x2_00ec),
        (reg::LVT_LAST, 0xfe),
        (reg::TMICT, 1000),
        (reg::DCR, 0xb),
        (reg::ESR, 0),
    ] {
        a.set_page(r, v);
    }
    let all = a.registers();
    for (offset, value) in all {
        assert_eq!(a.page(u32::from(offset) >> 4), value, "{offset:#x}");
    }
    // The rest of what the processor reads there is shown otherwise; all else must be emulated.
    let shown = |r: u32| all.iter().any(|(o, _)| u32::from(*o) == r << 4);
    for r in 0..0x40 {
        let otherwise = matches!(
            r,
            reg::TPR | reg::APR | reg::PPR | reg::ISR..=reg::IRR_LAST | reg::TMCCT
        );
        let exists = a.read(r, T0).is_some() || r == reg::EOI;
        assert_eq!(shown(r), exists && !otherwise, "{r:#x}");
    }
}

#[test]
fn what_a_processor_has_let_the_guest_write_is_taken_over() {
    let mut a = xapic(0);
    a.set_page(reg::SVR, 0x1ff);
    a.post(0x41, false);
    a.set_shown(0x4f, 0xff00_0000_000c_1841);
    assert_eq!((a.tpr(), a.page(reg::TPR), a.cr8()), (0x4f, 0x4f, 4));
    assert_eq!(a.highest_pending(), None, "the priority counts");
    assert_eq!(
        (a.page(reg::ICR), a.page(reg::ICR2)),
        (0xc_0841, 0xff00_0000)
    );
    a.set_shown(0, 0xff_ffff << 32);
    assert_eq!((a.page(reg::ICR2), a.highest_pending()), (0, Some(0x41)));
    assert_eq!(a.level_triggered(), [0; 4]);
    a.post(0xc3, true);
    assert_eq!(a.level_triggered(), [0, 0, 0, 8]);
}

#[test]
fn few_are_one_of_each_kind_whose_end_matters_to_nobody() {
    let mut a = x2apic(0);
    assert_eq!(a.few(), Some((0, 0)));
    assert!(a.post(0x41, false));
    assert_eq!(a.few(), Some((0x41, 0)));
    a.accept(0x41);
    assert_eq!(a.few(), Some((0, 0x41)));
    assert!(a.post(0x91, false));
    assert_eq!(a.few(), Some((0x91, 0x41)));
    // The same bit of another word.
    assert!(a.post(0xd1, false));
    assert_eq!(a.few(), None);
    a.accept(0xd1);
    assert_eq!(a.few(), None);
    a.eoi();
    assert_eq!(a.few(), Some((0x91, 0x41)));
    a.accept(0x91);
    a.eoi();
    a.eoi();
    assert!(a.post(0x41, true));
    assert_eq!(a.few(), None, "level-triggered");
}
