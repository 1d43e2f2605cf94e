//! The APIC's state as the public save records hold it: LAPIC (what the guest cannot see) and
//! LAPIC_REGS (the first KiB of the register page). (Public `arch-x86/hvm/save.h`.)
//!
//! Posted interrupts must have been taken over before saving. Loading changes nothing unless all
//! of both records is valid.

use super::bitmap::Bitmap;
use super::spec::*;
use super::timer::{self, Timer};
use super::{Lvt, Mode, Now, Vlapic, base_mode};

/// Length in bytes of the LAPIC_REGS record.
pub const REGS_LEN: usize = 1024;

/// A save record that no APIC can have written, or that does not fit this one; says what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadRecord(pub &'static str);

/// The LAPIC record: `struct hvm_hw_lapic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HiddenState {
    /// IA32_APIC_BASE.
    pub apic_base_msr: u64,
    /// Bit 0: globally disabled; bit 1: disabled by software. Both follow from the registers.
    pub disabled: u32,
    /// The timer's divisor, 1 to 128. Follows from the registers.
    pub timer_divisor: u32,
    /// IA32_TSC_DEADLINE, in the guest's TSC.
    pub tdt_msr: u64,
    /// Errors not yet latched into ESR.
    pub pending_esr: u32,
}

impl HiddenState {
    /// Length in bytes of the record up to interface 4.19, without `pending_esr`.
    pub const LEN_SHORT: usize = 24;
    /// Length in bytes of the record since interface 4.20.
    pub const LEN: usize = 32;

    /// The record's bytes. An older reader gets the first [`Self::LEN_SHORT`].
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        let fields: [&[u8]; 5] = [
            &self.apic_base_msr.to_le_bytes(),
            &self.disabled.to_le_bytes(),
            &self.timer_divisor.to_le_bytes(),
            &self.tdt_msr.to_le_bytes(),
            &self.pending_esr.to_le_bytes(),
        ];
        for (to, from) in b.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        b
    }

    /// From a record of either length.
    pub fn from_bytes(b: &[u8]) -> Result<Self, BadRecord> {
        if b.len() != Self::LEN_SHORT && b.len() != Self::LEN {
            return Err(BadRecord("LAPIC: length"));
        }
        Ok(Self {
            apic_base_msr: u64::from(le32(b, 0)) | u64::from(le32(b, 4)) << 32,
            disabled: le32(b, 8),
            timer_divisor: le32(b, 12),
            tdt_msr: u64::from(le32(b, 16)) | u64::from(le32(b, 20)) << 32,
            pending_esr: le32(b, 24),
        })
    }
}

impl Vlapic {
    /// The state as of `now`, as the two records.
    pub fn save(&self, now: Now) -> (HiddenState, [u8; REGS_LEN]) {
        let hidden = HiddenState {
            apic_base_msr: self.apic_base(),
            disabled: u32::from(self.mode == Mode::Disabled)
                | u32::from(!self.software_enabled()) << 1,
            timer_divisor: self.timer.divisor(),
            tdt_msr: self.timer.tsc_deadline(now),
            pending_esr: self.esr_pending,
        };
        let mut regs = [0; REGS_LEN];
        for (n, to) in regs.chunks_exact_mut(16).enumerate() {
            if let Some(v) = self.read(n as u32, now)
                && let Some(to) = to.first_chunk_mut()
            {
                *to = v.to_le_bytes();
            }
        }
        (hidden, regs)
    }

    /// Replaces the state by that of the two records. The caller publishes [`Self::address`], asks
    /// for the timer's deadline and sets CR8.
    pub fn load(&mut self, hidden: &HiddenState, regs: &[u8], now: Now) -> Result<(), BadRecord> {
        if regs.len() != REGS_LEN {
            return Err(BadRecord("LAPIC_REGS: length"));
        }
        let r = |n: u32| le32(regs, n as usize * 16);
        let check = |ok: bool, what| if ok { Ok(()) } else { Err(BadRecord(what)) };
        let mut a = Self::new(self.cfg);

        a.mode = base_mode(hidden.apic_base_msr, self.cfg.x2apic)
            .map_err(|_| BadRecord("LAPIC: APIC_BASE"))?;
        check(hidden.disabled <= 3, "LAPIC: disabled")?;
        check(
            hidden.timer_divisor.is_power_of_two() && hidden.timer_divisor <= 128,
            "LAPIC: timer divisor",
        )?;
        check(hidden.pending_esr & !ESR_BITS == 0, "LAPIC: pending ESR")?;
        if a.mode == Mode::Disabled {
            // Disabling resets the registers, and nothing can have changed them since.
            *self = a;
            return Ok(());
        }
        a.esr_pending = hidden.pending_esr;

        a.load_addresses(r(reg::ID), r(reg::LDR), r(reg::DFR))?;

        for n in 0..8 {
            a.irr.set_word(n, r(reg::IRR + u32::from(n)));
            a.isr.set_word(n, r(reg::ISR + u32::from(n)));
            a.tmr.set_word(n, r(reg::TMR + u32::from(n)));
        }
        let legal = |b: &Bitmap| b.0[0] & ((1 << FIRST_VECTOR) - 1) == 0;
        check(legal(&a.irr), "LAPIC_REGS: IRR")?;
        check(legal(&a.isr), "LAPIC_REGS: ISR")?;
        a.irrv = a.irr.highest();
        a.isrv = a.isr.highest();
        a.tpr = u8::try_from(r(reg::TPR)).map_err(|_| BadRecord("LAPIC_REGS: TPR"))?;
        a.update_ppr();

        a.svr = r(reg::SVR);
        check(a.svr & !SVR_WRITABLE == 0, "LAPIC_REGS: SVR")?;
        a.esr = r(reg::ESR);
        check(a.esr & !ESR_BITS == 0, "LAPIC_REGS: ESR")?;

        let icr = r(reg::ICR);
        a.icr = u64::from(icr & ICR_STORED) | u64::from(r(reg::ICR2)) << 32;

        for n in 0..LVTS as u32 {
            let v = r(reg::LVT + n);
            let known = a.lvt_writable(n) | LVT_STATUS | LVT_REMOTE_IRR;
            check(v & !known == 0, "LAPIC_REGS: LVT")?;
            // Masks it where the APIC is disabled by software.
            a.write_lvt(n, v);
        }

        let dcr = r(reg::DCR);
        check(dcr & !0b1011 == 0, "LAPIC_REGS: TDCR")?;
        a.load_timer(dcr, r(reg::TMICT), r(reg::TMCCT), hidden.tdt_msr, now);

        *self = a;
        Ok(())
    }

    /// In xAPIC mode the ID is ours whatever the record says (a guest of stock Xen can change the
    /// register); in x2APIC mode it is what the guest knows itself by, and must be the same.
    ///
    /// Up to 4.18 stock Xen derived the x2APIC logical address from the vCPU number, half the ID. A
    /// guest that started there must keep the address that it has read.
    fn load_addresses(&mut self, id: u32, ldr: u32, dfr: u32) -> Result<(), BadRecord> {
        match self.mode {
            Mode::X2Apic => {
                if id != self.cfg.id {
                    return Err(BadRecord("LAPIC_REGS: ID"));
                }
                if ldr != self.address().x2apic_ldr() {
                    self.compact_ldr = true;
                    if ldr != self.address().x2apic_ldr() {
                        return Err(BadRecord("LAPIC_REGS: LDR"));
                    }
                }
            }
            _ => {
                self.ldr = (ldr >> 24) as u8;
                self.dfr = dfr | 0x0fff_ffff;
            }
        }
        Ok(())
    }

    /// A count that stands at 0 starts anew: the record does not say whether a one-shot timer has
    /// gone off or its writer does not keep the count, and one interrupt too many does less harm
    /// than one too few.
    fn load_timer(&mut self, dcr: u32, initial: u32, current: u32, tdt: u64, now: Now) {
        self.timer = Timer::at_reset();
        self.timer.dcr = dcr;
        self.timer.initial = initial;
        self.timer
            .set_mode(timer::Mode::from_lvt(*self.lvt_entry(Lvt::Timer)));
        match timer::Mode::from_lvt(*self.lvt_entry(Lvt::Timer)) {
            timer::Mode::TscDeadline => self.timer.set_tsc_deadline(tdt),
            _ if current == 0 => self.timer.start(initial, now),
            _ => self.timer.start(current.min(initial), now),
        }
    }
}

/// The little-endian u32 at `off`; 0 beyond the end.
fn le32(b: &[u8], off: usize) -> u32 {
    b.get(off..)
        .and_then(|b| b.first_chunk())
        .map_or(0, |b| u32::from_le_bytes(*b))
}
