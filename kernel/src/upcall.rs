//! Getting a guest's attention: the event-channel upcall, and the choice of what is injected at the
//! next entry.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use galvan_base::direct;
use galvan_base::hw::{InService, Window};
use galvan_base::state::{Event, RFLAGS_IF};
use galvan_devices::vlapic::{Mode, Vlapic};

use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::vcpu::{Vcpu, VcpuState};

/// An event of this vCPU has become pending: sets `evtchn_upcall_pending` and, if it was clear,
/// raises the upcall.
pub fn mark_pending(hv: Hv, v: &Arc<Vcpu>) {
    let Some((m, off)) = v.info() else { return };
    // `evtchn_upcall_pending` is the first byte of `vcpu_info`.
    if direct::swap_u8(hv.hw, m, off, 1) == Ok(0) {
        raise(hv, v);
    }
}

/// Posts the upcall vector to the vCPU's local APIC. A guest that has set none polls, or uses a
/// callback by interrupt line.
pub fn raise(hv: Hv, v: &Arc<Vcpu>) {
    let vector = v.upcall_vector.load(Ordering::Relaxed) as u8;
    if vector >= 16 {
        v.post_vector(hv, vector, false);
    }
}

/// Raises the upcall if it is pending already: for moments at which the vCPU becomes able to take
/// it. A local APIC that is disabled by software drops the vector, while `evtchn_upcall_pending`
/// stays set, so that no later event would raise it again.
pub fn recheck(hv: Hv, v: &Arc<Vcpu>) {
    if let Some((m, off)) = v.info()
        && hv.hw.load_u32(m, off & !3).is_ok_and(|w| w & 0xff != 0)
    {
        raise(hv, v);
    }
}

/// Decides what is injected at the next entry. False if the vCPU is halted and nothing can end
/// that: it must not be entered.
///
/// A processor that can end interrupts by itself is lent those in service while the local APIC is in
/// x2APIC mode. Those that wait stay here: see `docs/emulators.md` on what Bochs does with them.
pub fn prepare_entry(cx: &mut Cx<'_>) -> bool {
    let st = &mut *cx.st;
    let enter = choose_event(st);
    if enter && st.ends_interrupts {
        lend(st);
    }
    enter
}

fn choose_event(st: &mut VcpuState) -> bool {
    if st.nmi_pending && !st.nmi_blocked && !st.hw.event_pending() && !st.hw.shadow() {
        st.nmi_pending = false;
        st.halted = false;
        st.hw.inject(Event::Nmi);
        return true;
    }
    st.lapic.set_cr8(st.hw.tpr());
    match st.lapic.highest_pending() {
        Some(vector) if st.hw.can_take_interrupt() => {
            st.lapic.accept(vector);
            st.hw.inject(Event::Interrupt(vector));
            st.halted = false;
            // If another waits behind it, the window shows when it can follow.
            let next = window(&st.lapic);
            st.hw.set_interrupt_window(next);
        }
        Some(_) if !st.halted => st.hw.set_interrupt_window(Window::Open),
        None if st.lapic.held_by_priority().is_some() => {
            let next = window(&st.lapic);
            st.hw.set_interrupt_window(next);
        }
        _ => {}
    }
    !st.halted
}

/// What the guest has to do before the next interrupt can be injected. One that an interrupt in service
/// holds back comes with the end of that, which exits.
fn window(lapic: &Vlapic) -> Window {
    if lapic.highest_pending().is_some() {
        return Window::Open;
    }
    lapic
        .held_by_priority()
        .map_or(Window::Closed, Window::Below)
}

/// Lends the interrupts in service to the processor. With them it has the task priority, and does not exit
/// for it (Intel SDM "TPR Virtualization"): not while that holds an interrupt back.
fn lend(st: &mut VcpuState) {
    st.lent = st.lapic.mode() == Mode::X2Apic && st.lapic.held_by_priority().is_none();
    let (vectors, exits) = st.lapic.in_service();
    let lent = InService { vectors, exits };
    st.hw.lend_interrupts(st.lent.then_some(&lent));
}

/// Takes the interrupts in service back from the processor, if it has them. Before every use of the local
/// APIC: they are lent anew before the next entry.
#[inline]
pub fn take_back(st: &mut VcpuState) {
    if st.lent {
        st.lent = false;
        let vectors = st.hw.in_service();
        st.lapic.set_in_service(vectors);
    }
}

/// Whether a halted vCPU can still be woken by an ordinary interrupt.
pub fn interruptible(cx: &Cx<'_>) -> bool {
    cx.st.hw.rflags() & RFLAGS_IF != 0
}
