//! The machine's IOMMUs: found, taken over from firmware, and put to use before dom0 gets a
//! device.
//!
//! From [`init`] on, no device reaches any memory until it is given to a domain
//! ([`galvan_base::hw::Iommu::attach`]), and then only that domain's. Called by [`crate::start`]; what
//! is policy, and can be tested on the host, is in [`galvan_kernel::iommu`].

mod amd;

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::Mpa;
use galvan_base::hw::{Iommu, Sbdf};
use galvan_kernel::iommu::amd::AmdVi;
use spin::Once;

use crate::start::{acpi, options};

static AMD: Once<AmdVi<amd::Units>> = Once::new();
/// When the event logs are looked at next, in ns.
static NEXT_LOOK: AtomicU64 = AtomicU64::new(0);
/// How often they are looked at.
const LOOK_NS: u64 = 1_000_000_000;

/// Finds the IOMMUs and blocks all DMA. Boot memory must still be there to be had.
///
/// # Panics
/// If the administrator requires an IOMMU and there is none that works.
pub fn init() {
    let ivrs = acpi().and_then(|a| a.table(b"IVRS"));
    let why = if !options().iommu.enable {
        if let Some(table) = ivrs {
            amd::leave_off(table);
        }
        "it is switched off on the command line"
    } else {
        match ivrs {
            Some(table) => match amd::start(table) {
                Ok(units) => {
                    AMD.call_once(|| units);
                    return;
                }
                Err(e) => e,
            },
            None if acpi().is_some_and(|a| a.table(b"DMAR").is_some()) => {
                "the machine has one of a kind that Galvan does not drive (VT-d)"
            }
            None => "firmware describes none",
        }
    };
    assert!(!options().iommu.required, "iommu=required, but {why}");
    log::error!("*******************************************************************");
    log::error!("NO IOMMU: {why}.");
    log::error!("Devices reach all memory, that of Galvan and of all domains included.");
    log::error!("A device that is handed a page of another domain works on the WRONG");
    log::error!("MEMORY: no disks of guests on raw devices (phy:), no pages of guests");
    log::error!("given to network adapters. Disks in files are safe.");
    log::error!("*******************************************************************");
}

/// The IOMMU, if there is one in use.
pub fn get() -> Option<&'static dyn Iommu> {
    AMD.get().map(|a| a as &dyn Iommu)
}

/// The PCI functions of the IOMMUs and the windows of their registers.
pub fn private() -> (Vec<Sbdf>, Vec<(Mpa, u64)>) {
    AMD.get()
        .map_or_else(Default::default, |a| a.hw().private())
}

/// Reports what the IOMMUs have logged, such as accesses they have blocked; once per second, however
/// often it is called.
#[inline]
pub fn poll() {
    if let Some(a) = AMD.get() {
        let now = crate::clock::now_ns();
        let due = NEXT_LOOK.load(Ordering::Relaxed);
        if now >= due
            && NEXT_LOOK
                .compare_exchange(due, now + LOOK_NS, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            a.hw().report_events();
        }
    }
}
