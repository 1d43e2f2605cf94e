//! Which parts of the VMCB the processor may keep cached from the last run.
//!
//! [`GuestVmcb`] is a VMCB whose cacheable fields can be changed only by setters that note what
//! they dirtied; [`GuestVmcb::publish`] turns the notes into clean bits before a run. This is the
//! one place that knows which field belongs to which bit. (AMD APM "VMCB Clean Bits".)

use core::ops::Deref;

use galvan_base::Mpa;
use galvan_base::hw::Exhausted;
use galvan_base::state::{Seg, Segment};

use crate::page::{PageSource, Pages};
use crate::vmcb::Vmcb;

bitflags::bitflags! {
    /// The groups of cacheable fields.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Group: u32 {
        /// Intercepts, TSC offset, pause filter.
        const INTERCEPTS = 1 << 0;
        /// Addresses of the permission maps.
        const MAPS = 1 << 1;
        /// ASID.
        const ASID = 1 << 2;
        /// Virtual interrupt control.
        const TPR = 1 << 3;
        /// Nested paging: root, PAT.
        const NP = 1 << 4;
        /// CR0, CR3, CR4, EFER.
        const CRX = 1 << 5;
        /// DR6, DR7.
        const DRX = 1 << 6;
        /// GDTR, IDTR.
        const DT = 1 << 7;
        /// CS, DS, SS, ES, CPL.
        const SEG = 1 << 8;
        /// CR2.
        const CR2 = 1 << 9;
    }
}

impl Group {
    /// No group: the clean bits were set for changes that are past.
    const OUTDATED: Group = Group::from_bits_retain(1 << 31);
}

/// A guest's VMCB with a note of what changed since its last run.
#[derive(Debug)]
pub struct GuestVmcb {
    page: Pages<Vmcb>,
    dirty: Group,
}

impl Deref for GuestVmcb {
    type Target = Vmcb;
    #[inline]
    fn deref(&self) -> &Vmcb {
        &self.page
    }
}

macro_rules! setters {
    ($($group:ident: $($set:ident $field:ident $ty:ty),* ;)*) => {
        impl GuestVmcb {
            $($(
                #[doc = concat!("Changes `", stringify!($field), "`.")]
                #[inline]
                pub fn $set(&mut self, v: $ty) {
                    self.page.$field.set(v);
                    self.dirty.insert(Group::$group);
                }
            )*)*
        }
    };
}

setters! {
    INTERCEPTS:
        set_intercept_cr intercept_cr u32,
        set_intercept_dr intercept_dr u32,
        set_intercept_exceptions intercept_exceptions u32,
        set_intercept1 intercept1 u32,
        set_intercept2 intercept2 u32,
        set_intercept3 intercept3 u32,
        set_pause_threshold pause_threshold u16,
        set_pause_count pause_count u16,
        set_tsc_offset tsc_offset u64;
    ASID: set_asid asid u32;
    TPR: set_int_ctl int_ctl u32, set_int_vector int_vector u32;
    NP: set_nested_ctl nested_ctl u64, set_g_pat g_pat u64;
    CRX: set_cr0 cr0 u64, set_cr3 cr3 u64, set_cr4 cr4 u64, set_efer efer u64;
    DRX: set_dr6 dr6 u64, set_dr7 dr7 u64;
    SEG: set_cpl cpl u8;
    CR2: set_cr2 cr2 u64;
}

impl GuestVmcb {
    /// A zeroed VMCB, everything dirty.
    pub fn new(source: &'static dyn PageSource) -> Result<Self, Exhausted> {
        Ok(GuestVmcb {
            page: Pages::new(source)?,
            dirty: Group::all(),
        })
    }

    /// Its physical address.
    #[inline]
    pub fn mpa(&self) -> Mpa {
        self.page.mpa()
    }

    /// Sets the addresses of the permission maps.
    pub fn set_maps(&mut self, io: Mpa, msr: Mpa) {
        self.page.iopm_base.set(io.get());
        self.page.msrpm_base.set(msr.get());
        self.dirty.insert(Group::MAPS);
    }

    /// Sets the root of the nested page tables.
    pub fn set_nested_root(&mut self, root: Mpa) {
        self.page.nested_cr3.set(root.get());
        self.dirty.insert(Group::NP);
    }

    /// Changes a segment register. What VMLOAD loads is not cached and belongs to no group.
    pub fn set_segment(&mut self, which: Seg, s: &Segment) {
        let (cell, group) = match which {
            Seg::Es => (&self.page.es, Group::SEG),
            Seg::Cs => (&self.page.cs, Group::SEG),
            Seg::Ss => (&self.page.ss, Group::SEG),
            Seg::Ds => (&self.page.ds, Group::SEG),
            Seg::Fs => (&self.page.fs, Group::empty()),
            Seg::Gs => (&self.page.gs, Group::empty()),
            Seg::Gdtr => (&self.page.gdtr, Group::DT),
            Seg::Ldtr => (&self.page.ldtr, Group::empty()),
            Seg::Idtr => (&self.page.idtr, Group::DT),
            Seg::Tr => (&self.page.tr, Group::empty()),
        };
        cell.set(s);
        self.dirty.insert(group);
    }

    /// Forgets what any processor may have cached: after a move to another one.
    pub fn dirty_all(&mut self) {
        self.dirty = Group::all();
    }

    /// Tells the processor what has not changed since the last run; called just before each.
    #[inline]
    pub fn publish(&mut self, supported: bool) {
        if !self.dirty.is_empty() {
            self.publish_changes(supported);
        }
    }

    fn publish_changes(&mut self, supported: bool) {
        // Bits of groups that are never changed (LBR, AVIC, CET) stay 0: not cached.
        let clean = if supported {
            Group::all().difference(self.dirty)
        } else {
            Group::empty()
        };
        self.page.clean.set(clean.bits());
        // What was not clean for this run will be for the next.
        self.dirty = if supported && clean != Group::all() {
            Group::OUTDATED
        } else {
            Group::empty()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn clean_after(change: impl Fn(&mut GuestVmcb)) -> Group {
        let mut v = GuestVmcb::new(testing::source()).unwrap();
        v.publish(true);
        assert_eq!(v.clean.get(), 0, "nothing is cached at the first run");
        v.publish(true);
        assert_eq!(v.clean.get(), Group::all().bits());
        change(&mut v);
        v.publish(true);
        Group::all().difference(Group::from_bits_retain(v.clean.get()))
    }

    #[test]
    fn a_change_dirties_its_own_group_only() {
        let s = Segment::default();
        assert_eq!(clean_after(|v| v.set_cr3(1)), Group::CRX);
        assert_eq!(clean_after(|v| v.set_efer(1)), Group::CRX);
        assert_eq!(clean_after(|v| v.set_cr2(1)), Group::CR2);
        assert_eq!(clean_after(|v| v.set_tsc_offset(1)), Group::INTERCEPTS);
        assert_eq!(clean_after(|v| v.set_intercept1(1)), Group::INTERCEPTS);
        assert_eq!(clean_after(|v| v.set_int_ctl(1)), Group::TPR);
        assert_eq!(clean_after(|v| v.set_g_pat(1)), Group::NP);
        assert_eq!(clean_after(|v| v.set_dr7(1)), Group::DRX);
        assert_eq!(clean_after(|v| v.set_asid(1)), Group::ASID);
        assert_eq!(clean_after(|v| v.set_segment(Seg::Cs, &s)), Group::SEG);
        assert_eq!(clean_after(|v| v.set_segment(Seg::Idtr, &s)), Group::DT);
        assert_eq!(clean_after(|v| v.set_segment(Seg::Tr, &s)), Group::empty());
        assert_eq!(clean_after(|v| v.rip.set(1)), Group::empty());
        assert_eq!(clean_after(GuestVmcb::dirty_all), Group::all());
    }

    #[test]
    fn without_the_feature_nothing_is_ever_clean() {
        let mut v = GuestVmcb::new(testing::source()).unwrap();
        v.publish(false);
        v.publish(false);
        assert_eq!(v.clean.get(), 0);
    }
}
