//! The page by which local APICs in xAPIC mode are reached, where processors answer accesses to it themselves
//! (Intel SDM "Virtualizing Memory-Mapped APIC Accesses").
//!
//! For that, [`APIC_PAGE`] must lead to one certain frame of the machine in the domain's second-stage tables.
//! Which vCPUs have such accesses answered is told each processor by itself, but the tables are the domain's: a
//! vCPU whose local APIC is in x2APIC mode, or off, would find the frame there as memory, and could pass
//! something on by it. So the frame is mapped only while the local APICs of all vCPUs are in xAPIC mode, which
//! is when every entry has their accesses answered. It is mapped at the first access that the tables do not
//! allow, so that guests that go on to x2APIC mode at once never have it, and taken away before a vCPU in
//! another mode is entered. While it is not there, accesses are emulated.
//!
//! In the p2m it is [`crate::p2m::P2mType::ApicPage`], which nobody else sees.

use galvan_base::hw::APIC_PAGE;
use galvan_base::sync::atomic::{AtomicBool, Ordering};
use galvan_base::sync::{RankedLock, rank};
use galvan_base::{Gfn, Gpa};
use galvan_devices::vlapic::ApicAddress;

use crate::domain::Domain;
use crate::hv::Hv;

/// Whether it is mapped in a domain.
#[derive(Debug)]
pub struct ApicPage {
    /// It may be: set before the modes are looked at, as a mode is published before this is.
    mapped: AtomicBool,
    /// It cannot be: there is something else, or no memory for tables.
    refused: AtomicBool,
    changing: RankedLock<(), { rank::CONFIG }>,
}

impl Default for ApicPage {
    fn default() -> Self {
        ApicPage {
            mapped: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            changing: RankedLock::new(()),
        }
    }
}

fn gfn() -> Gfn {
    Gpa::new_truncate(APIC_PAGE).frame()
}

/// Whether the local APICs of all vCPUs are in xAPIC mode.
fn all_xapic(d: &Domain) -> bool {
    d.vcpus()
        .iter()
        .all(|v| ApicAddress::from_bits(v.apic_view.load(Ordering::SeqCst)).is_xapic())
}

impl ApicPage {
    /// Maps it, if the modes allow that. True if it is there now: the access can be made again. Called for a
    /// vCPU whose processor answers it then.
    #[cold]
    pub fn map(&self, hv: Hv, d: &Domain) -> bool {
        let Some(mfn) = hv.hw.apic_access_page() else {
            return false;
        };
        if self.refused.load(Ordering::Relaxed) || !all_xapic(d) {
            return false;
        }
        let _changing = self.changing.lock();
        let before = self.mapped.swap(true, Ordering::SeqCst);
        if !all_xapic(d) {
            // Whoever has changed its mode takes it away before it goes on, if it is there.
            self.mapped.store(before, Ordering::SeqCst);
            return false;
        }
        let mut changes = d.p2m.changes();
        let r = changes.map_apic_page(gfn(), mfn);
        d.finish(hv, changes);
        if let Err(e) = r {
            log::debug!("{d:?}: accesses to local APICs are emulated: {e:?}");
            self.refused.store(true, Ordering::Relaxed);
            self.mapped.store(before, Ordering::SeqCst);
        }
        r.is_ok()
    }

    /// Takes it away, for the sake of a vCPU that is to be entered and has published that its local APIC is not
    /// in xAPIC mode.
    #[inline]
    pub fn unmap(&self, hv: Hv, d: &Domain) {
        if self.mapped.load(Ordering::SeqCst) {
            self.unmap_now(hv, d);
        }
    }

    #[cold]
    fn unmap_now(&self, hv: Hv, d: &Domain) {
        let _changing = self.changing.lock();
        let mut changes = d.p2m.changes();
        let r = changes.unmap_apic_page(gfn());
        d.finish(hv, changes);
        // An entry of a single page is there, and taking it away needs no memory.
        debug_assert!(r.is_ok(), "{r:?}");
        self.mapped.store(r.is_err(), Ordering::SeqCst);
    }

    /// Whether it may be mapped.
    pub fn is_mapped(&self) -> bool {
        self.mapped.load(Ordering::SeqCst)
    }
}
