//! The local APIC at work: what its registers ask of the rest of the machine, its timer, and the
//! address under which others find it.
//!
//! [`Vlapic`] keeps the registers. Here are the accesses by MSR and by page, with their effects
//! applied. CR8 and TPR are one register: it is taken over from the processor before an access that
//! may depend on it, and given back after one that may have changed it.

use core::sync::atomic::Ordering;

use galvan_base::hw::{Platform, VirtualApic};
use galvan_devices::interrupt::DeliveryMode;
use galvan_devices::vlapic::{
    self, ApicAddress, Deadline, Effect, Gp, Ipi, MMIO_BASE, MSR_X2APIC, Mode, Now, Shorthand,
};

use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::vcpu::{VcpuState, request};

const EOI: u32 = MSR_X2APIC + 0x0b;
const ICR: u32 = MSR_X2APIC + 0x30;
/// EOI in the page. What is shown of it is always 0.
const EOI_OFFSET: u32 = 0xb0;
const _: () = assert!(MMIO_BASE == galvan_base::hw::APIC_PAGE);

/// The guest's clocks.
fn now(hw: &dyn Platform, tsc_offset: u64) -> Now {
    Now {
        ns: hw.now_ns(),
        guest_tsc: hw.tsc().wrapping_add(tsc_offset),
    }
}

/// RDMSR of the APIC's registers.
pub fn rdmsr(cx: &mut Cx<'_>, index: u32) -> Result<u64, Gp> {
    let st = &mut *cx.st;
    crate::upcall::take_back(st);
    st.lapic.set_cr8(st.hw.tpr());
    let (hw, offset) = (cx.hv.hw, st.tsc_offset);
    st.lapic.rdmsr(index, || now(hw, offset))
}

/// The most frequent WRMSR: the end of an interrupt behind which none waits, after which what decides about the
/// next entry is as it was. False, having done nothing, if it is not that.
#[inline(always)]
pub fn eoi_quietly(cx: &mut Cx<'_>, index: u32, value: u64) -> bool {
    let st = &mut *cx.st;
    index == EOI
        && value == 0
        && st.lent == VirtualApic::None
        && st.lapic.mode() == Mode::X2Apic
        && st.lapic.eoi_quietly()
}

/// WRMSR of the APIC's registers.
#[inline]
pub fn wrmsr(cx: &mut Cx<'_>, index: u32, value: u64) -> Result<(), Gp> {
    crate::upcall::take_back(cx.st);
    let (hw, offset) = (cx.hv.hw, cx.st.tsc_offset);
    // The two that matter leave the TPR alone.
    let priority = !matches!(index, EOI | ICR);
    if priority {
        cx.st.lapic.set_cr8(cx.st.hw.tpr());
    }
    let effect = cx.st.lapic.wrmsr(index, value, || now(hw, offset))?;
    if priority {
        cx.st.hw.set_tpr(cx.st.lapic.cr8());
    }
    apply_lapic_effect(cx, effect);
    Ok(())
}

/// Whether accesses to this guest physical page go to the APIC.
#[inline]
pub fn claims(st: &VcpuState, page: u64) -> bool {
    page == MMIO_BASE && st.lapic.mode() == Mode::XApic
}

/// Reads the APIC's page.
pub fn mmio_read(cx: &mut Cx<'_>, offset: u32, size: u8) -> u64 {
    let st = &mut *cx.st;
    crate::upcall::take_back(st);
    st.lapic.set_cr8(st.hw.tpr());
    let (hw, tsc_offset) = (cx.hv.hw, st.tsc_offset);
    st.lapic.mmio_read(offset, size, || now(hw, tsc_offset))
}

/// Writes the APIC's page.
pub fn mmio_write(cx: &mut Cx<'_>, offset: u32, size: u8, value: u64) {
    let st = &mut *cx.st;
    crate::upcall::take_back(st);
    st.shown_stale |= offset != EOI_OFFSET;
    st.lapic.set_cr8(st.hw.tpr());
    let (hw, tsc_offset) = (cx.hv.hw, st.tsc_offset);
    let effect = st
        .lapic
        .mmio_write(offset, size, value, || now(hw, tsc_offset));
    st.hw.set_tpr(st.lapic.cr8());
    apply_lapic_effect(cx, effect);
}

/// Finishes a write to the APIC's page that the processor has begun. Of writes to a part of a register it does
/// not say so: what it shows then is the whole, which counts.
pub fn written(cx: &mut Cx<'_>, offset: u16) {
    let value = cx.st.hw.take_written(offset);
    mmio_write(cx, offset.into(), 4, value.into());
}

/// Carries out what a register write asks for.
#[inline]
pub fn apply_lapic_effect(cx: &mut Cx<'_>, e: Effect) {
    match e {
        // The run loop asks for the deadline before every entry.
        Effect::None | Effect::TimerChanged => {}
        Effect::Ipi(ipi) => send(cx, &ipi),
        Effect::Eoi(vector) => {
            if let Some(h) = &cx.dom.hardware {
                h.eoi(cx.hv, cx.dom, vector);
            }
        }
        Effect::Reconfigured => publish(cx),
    }
}

/// Lets others know by what destinations this APIC is reached. After every change of its mode, and
/// after its state was loaded.
pub fn publish(cx: &mut Cx<'_>) {
    let address = cx.st.lapic.address();
    cx.st.shown_stale = true;
    cx.vcpu.apic_view.store(address.bits(), Ordering::SeqCst);
    if address.accepts_vectors() {
        crate::upcall::recheck(cx.hv, cx.vcpu);
    }
}

/// The APIC's part of an INIT.
pub fn init(cx: &mut Cx<'_>) {
    cx.st.lapic.init();
    cx.st.hw.set_tpr(cx.st.lapic.cr8());
    publish(cx);
}

fn send(cx: &mut Cx<'_>, ipi: &Ipi) {
    let (hv, me) = (cx.hv, cx.vcpu.id);
    let vectored = ipi.mode.is_vectored();
    // Of equals the one after the sender, so that not all senders choose the same.
    let mut lowest = None;
    for v in cx.dom.vcpus() {
        let address = ApicAddress::from_bits(v.apic_view.load(Ordering::Acquire));
        let named = match ipi.shorthand {
            Shorthand::None => address.matches(ipi.dest),
            Shorthand::AllIncludingSelf => true,
            Shorthand::AllExcludingSelf => v.id != me,
        };
        if !named || vectored && !address.accepts_vectors() {
            continue;
        }
        match ipi.mode {
            DeliveryMode::Fixed if v.id == me => {
                cx.st.lapic.post(ipi.vector, false);
            }
            DeliveryMode::Fixed => v.post_vector(hv, ipi.vector, false),
            DeliveryMode::LowestPriority => {
                let candidate = (v.id, 0);
                let best = vlapic::lowest_priority(lowest.into_iter().chain([candidate]), me);
                lowest = best.map(|id| (id, 0));
            }
            DeliveryMode::Nmi => v.request(hv, request::NMI),
            DeliveryMode::Init => v.request(hv, request::INIT),
            DeliveryMode::Startup => v.start_at(hv, ipi.vector),
            // There is no system management mode here, and ExtINT is not sent by an ICR.
            DeliveryMode::Smi | DeliveryMode::ExtInt => {}
        }
    }
    if let Some((id, _)) = lowest
        && let Some(v) = cx.dom.vcpu(id)
    {
        v.post_vector(hv, ipi.vector, false);
    }
}

/// Lets the timer go off if it is due.
pub fn tick(cx: &mut Cx<'_>, now_ns: u64) {
    let guest_tsc = cx.hv.hw.tsc().wrapping_add(cx.st.tsc_offset);
    cx.st.lapic.tick(Now {
        ns: now_ns,
        guest_tsc,
    });
}

/// The system time in ns at which [`tick`] is to be called next.
#[inline]
pub fn deadline(st: &VcpuState, hv: Hv) -> Option<u64> {
    match st.lapic.timer_deadline()? {
        Deadline::Ns(at) => Some(at),
        Deadline::GuestTsc(at) => {
            let ticks = at
                .wrapping_sub(st.tsc_offset)
                .saturating_sub(hv.hw.tsc_base());
            // One tick is lost in the conversion; a deadline that comes early would come again at
            // once.
            Some(hv.hw.tsc_scale().ticks_to_ns(ticks).saturating_add(1))
        }
    }
}
