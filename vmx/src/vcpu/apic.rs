//! The guest's local APIC in the virtual-APIC page, and what the processor does with it.
//!
//! - In x2APIC mode it ends interrupts, and perhaps delivers them: the virtual-APIC page has ISR and IRR.
//! - In xAPIC mode it answers accesses to the APIC's page, which the second-stage tables lead to the
//!   APIC-access page, from the virtual-APIC page: that has all registers. Of those that can be read, only APR,
//!   PPR and the timer's current count exit. Writes are made to the page, and exit after that, but for TPR,
//!   the upper half of ICR and, where the processor ends interrupts, EOI. What it is to do with interrupts can be
//!   switched, while the accesses stay its own: as long as the APIC-access page may be mapped, not doing so
//!   would give the guest that as memory.
//!
//! Beside the page the processor keeps the highest of IRR and of ISR, RVI and SVI. In xAPIC mode with
//! `no=virtualintr`, IRR can be read by the guest, but RVI stays 0. An interrupt that the guest sends to itself
//! is delivered by the processor in any case where that ends interrupts, and the others in IRR after it, as they
//! would be: what is read from the page afterwards is true. (Intel SDM "APIC Virtualization and Virtual
//! Interrupts".)

use core::sync::atomic::Ordering::Relaxed;

use galvan_base::hw::{HwVcpu, Lent, Shown, VirtualApic};

use super::{Stale, TPR_WORD, Vcpu};
use crate::caps::pin;
use crate::insn::Cpu;
use crate::vmcs::field;

/// ISR in the virtual-APIC page: eight registers of 32 bits each, 16 bytes apart.
pub(super) const ISR_WORD: usize = 0x100 / 8;
/// TMR, likewise.
const TMR_WORD: usize = 0x180 / 8;
/// IRR, likewise.
pub(super) const IRR_WORD: usize = 0x200 / 8;
/// ICR, in two registers.
const ICR_WORD: usize = 0x300 / 8;
const ICR2_WORD: usize = 0x310 / 8;

/// What the processor does for the guest's local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Apic {
    /// CR8.
    Plain,
    /// It has interrupts of an APIC in x2APIC mode.
    X2,
    /// It answers accesses to the page of one in xAPIC mode.
    Page {
        /// It has interrupts, too.
        interrupts: bool,
    },
}

impl Apic {
    const fn has_interrupts(self) -> bool {
        matches!(self, Apic::X2 | Apic::Page { interrupts: true })
    }

    const fn is_page(self) -> bool {
        matches!(self, Apic::Page { .. })
    }
}

impl<C: Cpu> Vcpu<C> {
    /// Has the processor do something else from the next entry on. The VMCS is current.
    #[cold]
    pub(super) fn switch_apic(&mut self, to: Apic) {
        // Afterwards it is said of another state.
        self.lent_interrupts();
        let c = self.vmx.cpu;
        let caps = &self.vmx.caps;
        let (more, msrs) = match (to, &self.vmx.eoi_msrs) {
            (Apic::X2, Some(msrs)) => (caps.virtual_eoi(), msrs),
            (Apic::Page { interrupts }, _) => (caps.apic_page(interrupts), &self.vmx.msrs),
            _ => (0, &self.vmx.msrs),
        };
        c.vmwrite(field::SECONDARY, u64::from(self.secondary() | more));
        if self.posted.is_some() {
            let posted = if to.has_interrupts() { pin::POSTED } else { 0 };
            c.vmwrite(field::PIN, u64::from(caps.controls.pin | posted));
        }
        c.vmwrite(field::MSR_BITMAP, msrs.mpa().get());
        if to.has_interrupts() {
            self.write_eoi_exits([0; 4]);
        }
        if to.is_page() != self.mode.is_page() {
            // Translations know which lead to the APIC-access page, and what that meant.
            self.forget_translations(Stale::Tables);
        }
        self.mode = to;
    }

    /// [`HwVcpu::show_apic`].
    pub(super) fn write_apic(&mut self, s: &Shown<'_>) {
        if self.on.is_none() || self.vmx.apic_access.is_none() || s.does > self.virtual_apic() {
            debug_assert!(
                false,
                "a local APIC shown to a processor that has no use for it"
            );
            return;
        }
        let interrupts = s.does != VirtualApic::None;
        let mode = Apic::Page { interrupts };
        if mode != self.mode {
            self.switch_apic(mode);
        }
        if let Some(w) = self.apic.get(TPR_WORD)
            && w.load(Relaxed) != u64::from(s.tpr)
        {
            w.store(s.tpr.into(), Relaxed);
            self.settle_threshold();
        }
        for (offset, value) in s.registers {
            if let Some(w) = self.apic.get(usize::from(offset / 8)) {
                w.store((*value).into(), Relaxed);
            }
        }
        if differ(&s.level, &self.level) {
            self.write_vectors(TMR_WORD, self.level, s.level);
            self.level = s.level;
        }
        if interrupts && differ(&s.interrupts.exits, &self.eoi_exits) {
            self.write_eoi_exits(s.interrupts.exits);
        }
        self.write_interrupts(&s.interrupts, s.does == VirtualApic::Delivers);
    }

    /// [`HwVcpu::shown_apic`].
    pub(super) fn tpr_and_icr(&self) -> (u8, u64) {
        let get = |at: usize| {
            self.apic
                .get(at)
                .map_or(0, |w| w.load(Relaxed) & 0xffff_ffff)
        };
        (get(TPR_WORD) as u8, get(ICR2_WORD) << 32 | get(ICR_WORD))
    }

    /// [`HwVcpu::take_written`].
    pub(super) fn take_register(&mut self, offset: u16) -> u32 {
        let word = self.apic.get(usize::from(offset & 0xff0) / 8);
        word.map_or(0, |w| w.swap(0, Relaxed) as u32)
    }

    /// Writes IRR and ISR, where they are others than the page has, and RVI and SVI; RVI only if the
    /// processor is to deliver what waits.
    pub(super) fn write_interrupts(&mut self, lent: &Lent, deliver: bool) {
        let all = lent.waiting.into_iter().chain(lent.in_service);
        let none = all.fold(0, |all, word| all | word) == 0;
        if none && self.lent_is_empty() {
            return;
        }
        let (waiting, in_service) = self.lent_interrupts();
        if differ(&waiting, &lent.waiting) || differ(&in_service, &lent.in_service) {
            self.write_vectors(IRR_WORD, waiting, lent.waiting);
            self.write_vectors(ISR_WORD, in_service, lent.in_service);
            self.page.set((lent.waiting, lent.in_service));
            self.page_empty.set(none);
        }
        let rvi = if deliver { highest(lent.waiting) } else { 0 };
        self.withheld = rvi == 0 && differ(&lent.waiting, &[0; 4]);
        let status = u16::from(highest(lent.in_service)) << 8 | u16::from(rvi);
        if self.vmx.caps.virtual_eoi() != 0 && self.status.get() != Some(status) {
            self.vmx.cpu.vmwrite(field::INTERRUPT_STATUS, status.into());
            self.status.set(Some(status));
        }
    }

    /// Writes a bitmap of vectors to the virtual-APIC page, where it is this one now.
    pub(super) fn write_vectors(&self, at: usize, now: [u64; 4], vectors: [u64; 4]) {
        for (n, (now, word)) in now.into_iter().zip(vectors).enumerate() {
            if now == word {
                continue;
            }
            for (half, bits) in [(0, word & 0xffff_ffff), (1, word >> 32)] {
                if let Some(w) = self.apic.get(at + (2 * n + half) * 2) {
                    w.store(bits, Relaxed);
                }
            }
        }
    }

    /// Finds out what the page has. Beside it the processor keeps the highest of both kinds, 0 for none, so
    /// that it mostly need not be read.
    pub(super) fn read_page(&self) {
        self.vmcs.note();
        if !self.mode.has_interrupts() {
            // As it was written last.
            return;
        }
        let read = |_| self.vmx.cpu.vmread(field::INTERRUPT_STATUS) as u16;
        let status = self.on.map(read);
        self.status.set(status);
        let withheld = if self.withheld { 0xff } else { 0 };
        let status = status.map_or(!0, |s| s | withheld);
        self.page_empty.set(status == 0);
        if status == 0 {
            return;
        }
        let read = |highest: u16, at| match highest & 0xff {
            0 => [0; 4],
            _ => self.read_vectors(at),
        };
        self.page
            .set((read(status, IRR_WORD), read(status >> 8, ISR_WORD)));
    }

    /// Reads one.
    fn read_vectors(&self, at: usize) -> [u64; 4] {
        let half = |n: usize| {
            let word = self.apic.get(at + n * 2);
            word.map_or(0, |w| w.load(Relaxed) & 0xffff_ffff)
        };
        core::array::from_fn(|n| half(2 * n) | half(2 * n + 1) << 32)
    }
}

/// Whether two bitmaps are not the same.
#[inline(always)]
pub(super) fn differ(a: &[u64; 4], b: &[u64; 4]) -> bool {
    // A comparison of arrays is a call.
    let words = a.iter().zip(b);
    words.fold(0, |all, (a, b)| all | (a ^ b)) != 0
}

/// The highest of a bitmap of vectors, 0 for none.
fn highest(vectors: [u64; 4]) -> u8 {
    let word = (0..).zip(vectors).filter(|(_, w)| *w != 0).last();
    word.map_or(0, |(n, w)| n * 64 + 63 - w.leading_zeros() as u8)
}
