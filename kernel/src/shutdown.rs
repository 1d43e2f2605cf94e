//! Ends: of a vCPU that halts for good, of a domain whose vCPUs all have, and of the machine.

use core::sync::atomic::{AtomicBool, Ordering};

use galvan_dom0_proto::sched::{
    SHUTDOWN_CRASH, SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_WATCHDOG,
};

use crate::guest_access::Cx;
use crate::hv::Hv;
use crate::vcpu::block;

/// `noreboot`: stay after dom0 has crashed.
pub static NOREBOOT: AtomicBool = AtomicBool::new(false);

/// A vCPU has executed HLT with interrupts disabled and nothing can wake it: it is down. The last
/// one that goes down shuts the domain off: that is how a kernel without a power button ends.
/// Gives false if it is an ordinary halt.
pub fn halted_for_good(cx: &mut Cx<'_>) -> bool {
    if crate::upcall::interruptible(cx) || cx.st.nmi_pending {
        return false;
    }
    cx.vcpu.blocked.fetch_or(block::DOWN, Ordering::SeqCst);
    let any_up = cx.dom.vcpus().iter().any(|v| v.is_up());
    if !any_up {
        cx.dom.shutdown(cx.hv, SHUTDOWN_POWEROFF as u8);
    }
    true
}

/// dom0 has ended: so does the machine.
pub fn machine(hv: Hv, reason: u8) -> ! {
    match u32::from(reason) {
        SHUTDOWN_POWEROFF => {
            log::info!("dom0 has shut down: powering off");
            hv.hw.power_off()
        }
        SHUTDOWN_REBOOT => {
            log::info!("dom0 has shut down: rebooting");
            hv.hw.reset()
        }
        SHUTDOWN_WATCHDOG => {
            log::error!("dom0's watchdog has expired: rebooting");
            hv.hw.reset()
        }
        SHUTDOWN_CRASH => {
            log::error!("dom0 has crashed");
            if NOREBOOT.load(Ordering::Relaxed) {
                log::error!("stopped (noreboot)");
                hv.hw.power_off()
            }
            hv.hw.reset()
        }
        other => {
            log::info!("dom0 has shut down for reason {other}: rebooting");
            hv.hw.reset()
        }
    }
}
