//! Getting a guest's attention: the event-channel upcall, and the choice of what is injected at the
//! next entry.

use alloc::sync::Arc;
use core::mem::offset_of;
use core::sync::atomic::Ordering;

use galvan_base::hw::{Lent, Shown, VirtualApic, Window};
use galvan_base::state::{Event, RFLAGS_IF};
use galvan_devices::vlapic::{Mode, Vlapic};
use galvan_dom0_proto::xen::VcpuInfo;

use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::vcpu::{Vcpu, VcpuState};

const PENDING: usize = offset_of!(VcpuInfo, evtchn_upcall_pending);
// Its word is looked at.
const _: () = assert!(PENDING == 0);

/// An event of this vCPU has become pending: sets `evtchn_upcall_pending` and, if it was clear,
/// raises the upcall.
pub fn mark_pending(hv: Hv, v: &Arc<Vcpu>) {
    if set_pending(hv, v) {
        raise(hv, v);
    }
}

/// Sets `evtchn_upcall_pending`; true if it was clear, and the upcall is to be raised.
#[inline]
pub fn set_pending(hv: Hv, v: &Vcpu) -> bool {
    v.info()
        .is_some_and(|info| info.swap_u8(hv.hw, PENDING, 1) == Ok(0))
}

/// [`raise`] for the vCPU that runs here: nothing need be posted, nor anybody be told. The next entry must look
/// at its local APIC.
pub fn raise_own(cx: &mut Cx<'_>) {
    let vector = cx.vcpu.upcall_vector.load(Ordering::Relaxed) as u8;
    if vector >= 16 {
        take_back(cx.st);
        cx.st.lapic.post(vector, false);
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
    if let Some(info) = v.info()
        && info.word(PENDING).load(hv.hw).is_ok_and(|w| w & 0xff != 0)
    {
        raise(hv, v);
    }
}

/// Decides what is injected at the next entry. False if the vCPU is halted and nothing can end
/// that: it must not be entered.
///
/// A processor that can end interrupts by itself is lent those in service while the local APIC is in
/// x2APIC mode; one that can deliver them, those that wait, too. In xAPIC mode that goes along with the other
/// registers, where it can show those.
pub fn prepare_entry(cx: &mut Cx<'_>) -> bool {
    let st = &mut *cx.st;
    let mode = st.lapic.mode();
    let shows = st.shows_apic && mode == Mode::XApic;
    let delivers = st.virtual_apic == VirtualApic::Delivers
        && (mode == Mode::X2Apic || shows)
        && st.lapic.software_enabled();
    let enter = choose_event(st, delivers);
    if !enter {
        return false;
    }
    if shows {
        show(st, delivers);
    } else if st.shows_apic {
        // To this vCPU it would be memory.
        cx.dom.apic_page.unmap(cx.hv, cx.dom);
        lend(st, delivers);
    } else if st.virtual_apic != VirtualApic::None {
        lend(st, delivers);
    }
    true
}

/// `delivers`: interrupts are not injected, but lent to a processor that delivers them.
fn choose_event(st: &mut VcpuState, delivers: bool) -> bool {
    if st.nmi_pending && !st.nmi_blocked && !st.hw.event_pending() && !st.hw.shadow() {
        st.nmi_pending = false;
        st.halted = false;
        st.hw.inject(Event::Nmi);
        return true;
    }
    st.lapic.set_cr8(st.hw.tpr());
    match st.lapic.highest_pending() {
        Some(_) if delivers => st.halted &= !st.hw.can_take_interrupt(),
        Some(vector) if st.hw.can_take_interrupt() => {
            st.lapic.accept(vector);
            st.hw.inject(Event::Interrupt(vector));
            st.halted = false;
            // If another waits behind it, the window shows when it can follow.
            let next = window(&st.lapic);
            st.hw.set_interrupt_window(next);
        }
        Some(_) if !st.halted => st.hw.set_interrupt_window(Window::Open),
        None if !delivers && st.lapic.held_by_priority().is_some() => {
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

/// Lends interrupts to the processor. With those in service it has the task priority, and does not exit for
/// it (Intel SDM "TPR Virtualization"): not while that holds back one that is to be injected.
fn lend(st: &mut VcpuState, delivers: bool) {
    if let Some((waiting, in_service)) = st.lapic.few()
        && (delivers
            || waiting == 0
                && st.virtual_apic != VirtualApic::None
                && st.lapic.mode() == Mode::X2Apic)
    {
        st.lent = VirtualApic::Ends;
        if delivers {
            // With it the processor would deliver none.
            st.hw.set_interrupt_window(Window::Closed);
            st.lent = VirtualApic::Delivers;
        }
        st.hw.lend_few(waiting, in_service);
        return;
    }
    let (in_service, ends) = st.lapic.in_service();
    let lent = if delivers {
        let (waiting, exits) = st.lapic.waiting();
        st.hw.set_interrupt_window(Window::Closed);
        Some(Lent {
            waiting,
            in_service,
            exits,
        })
    } else if st.virtual_apic != VirtualApic::None
        && st.lapic.mode() == Mode::X2Apic
        && st.lapic.held_by_priority().is_none()
    {
        Some(Lent {
            waiting: [0; 4],
            in_service,
            exits: ends,
        })
    } else {
        None
    };
    st.lent = match lent {
        None => VirtualApic::None,
        Some(_) if delivers => VirtualApic::Delivers,
        Some(_) => VirtualApic::Ends,
    };
    st.hw.lend_interrupts(lent.as_ref());
}

/// Shows the processor the local APIC, which is in xAPIC mode, with its interrupts.
fn show(st: &mut VcpuState, delivers: bool) {
    let does = if delivers {
        st.hw.set_interrupt_window(Window::Closed);
        VirtualApic::Delivers
    } else if st.lapic.software_enabled() && st.lapic.held_by_priority().is_none() {
        // Not `Delivers`: that is for processors that do no more.
        st.virtual_apic.min(VirtualApic::Ends)
    } else {
        VirtualApic::None
    };
    // As mostly: nothing was written since, no interrupt was there then or has come since.
    let idle = st.lapic.is_idle().then_some(does);
    if idle.is_some()
        && idle == st.shown_idle
        && !st.shown_stale
        && (does == VirtualApic::None || st.hw.lent_is_empty())
    {
        (st.lent, st.shown) = (does, true);
        return;
    }
    show_all(st, does);
    st.shown_idle = idle;
}

#[inline(never)]
fn show_all(st: &mut VcpuState, does: VirtualApic) {
    let (in_service, ends) = st.lapic.in_service();
    let (waiting, mut exits) = st.lapic.waiting();
    if does != VirtualApic::Delivers {
        exits.iter_mut().zip(ends).for_each(|(e, end)| *e |= end);
    }
    let registers = st.shown_stale.then(|| st.lapic.registers());
    st.hw.show_apic(&Shown {
        tpr: st.lapic.tpr(),
        level: st.lapic.level_triggered(),
        interrupts: Lent {
            waiting,
            in_service,
            exits,
        },
        does,
        registers: registers.as_ref().map_or(&[], |r| r),
    });
    (st.lent, st.shown, st.shown_stale) = (does, true, false);
}

/// Takes interrupts back from the processor, if it has them, and what else it has let the guest change. Before
/// every use of the local APIC: they are lent anew before the next entry.
#[inline(always)]
pub fn take_back(st: &mut VcpuState) {
    if st.shown || st.lent != VirtualApic::None {
        take_lent(st);
    }
}

fn take_lent(st: &mut VcpuState) {
    if st.shown {
        let (tpr, icr) = st.hw.shown_apic();
        st.lapic.set_shown(tpr, icr);
    }
    if st.lent != VirtualApic::None {
        let with_waiting = st.lent == VirtualApic::Delivers || st.shown;
        if !st.hw.lent_is_empty() {
            let (waiting, in_service) = st.hw.lent_interrupts();
            if with_waiting {
                st.lapic.set_waiting(waiting, in_service);
            }
            st.lapic.set_in_service(in_service);
        } else if !st.lapic.is_idle() {
            if with_waiting {
                st.lapic.set_waiting([0; 4], [0; 4]);
            }
            st.lapic.set_in_service([0; 4]);
        }
    }
    (st.lent, st.shown, st.apic_left) = (VirtualApic::None, false, false);
}

/// Whether a halted vCPU can still be woken by an ordinary interrupt.
pub fn interruptible(cx: &Cx<'_>) -> bool {
    cx.st.hw.rflags() & RFLAGS_IF != 0
}
