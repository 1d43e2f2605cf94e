//! The VMCS: numbers of its fields, and a guest's VMCS with a cache of what is in it.
//!
//! VMREAD and VMWRITE work on the VMCS that is current on a CPU. [`GuestVmcs`] therefore keeps the
//! value of each guest field it has read or is to write: a field is read at most once between two
//! entries, and written only if it changes. [`crate::vcpu`] says when the VMCS is current. (Intel
//! SDM volume 3 "Virtual Machine Control Structures", appendix "Field Encoding in VMCS".)

use core::cell::Cell;

use galvan_base::Mpa;
use galvan_base::hw::Exhausted;
use galvan_base::page::{PageSource, Pages, Words};
use galvan_base::state::Seg;

use crate::insn::Cpu;

/// Encodings of fields that are not cached.
pub mod field {
    /// Tag of the guest's translations.
    pub const VPID: u32 = 0x0000;
    /// The vector that tells of posted interrupts.
    pub const POSTED_VECTOR: u32 = 0x0002;
    /// Highest interrupt that waits, and above it the highest in service.
    pub const INTERRUPT_STATUS: u32 = 0x0810;
    /// First I/O bitmap; the second follows.
    pub const IO_BITMAP_A: u32 = 0x2000;
    /// Second I/O bitmap.
    pub const IO_BITMAP_B: u32 = 0x2002;
    /// MSR bitmap.
    pub const MSR_BITMAP: u32 = 0x2004;
    /// Virtual-APIC page.
    pub const VIRTUAL_APIC: u32 = 0x2012;
    /// APIC-access address.
    pub const APIC_ACCESS: u32 = 0x2014;
    /// Where interrupts are posted.
    pub const POSTED_DESCRIPTOR: u32 = 0x2016;
    /// Root and kind of the extended page tables.
    pub const EPTP: u32 = 0x201a;
    /// Vectors whose EOI exits: the first 64; three more follow, two apart.
    pub const EOI_EXITS: u32 = 0x201c;
    /// Which ENCLS functions exit.
    pub const ENCLS_BITMAP: u32 = 0x202e;
    /// Guest physical address of an EPT violation.
    pub const GPA: u32 = 0x2400;
    /// Shadow VMCS: none.
    pub const LINK: u32 = 0x2800;
    /// IA32_DEBUGCTL.
    pub const DEBUGCTL: u32 = 0x2802;
    /// Host PAT.
    pub const HOST_PAT: u32 = 0x2c00;
    /// Host EFER.
    pub const HOST_EFER: u32 = 0x2c02;
    /// Pin-based controls.
    pub const PIN: u32 = 0x4000;
    /// Exceptions that exit.
    pub const EXCEPTIONS: u32 = 0x4004;
    /// Page faults that exit: mask of the error code.
    pub const PF_MASK: u32 = 0x4006;
    /// Page faults that exit: error code.
    pub const PF_MATCH: u32 = 0x4008;
    /// Number of CR3 targets.
    pub const CR3_TARGETS: u32 = 0x400a;
    /// Exit controls.
    pub const EXIT: u32 = 0x400c;
    /// MSRs stored at exits.
    pub const EXIT_STORES: u32 = 0x400e;
    /// MSRs loaded at exits.
    pub const EXIT_LOADS: u32 = 0x4010;
    /// MSRs loaded at entries.
    pub const ENTRY_LOADS: u32 = 0x4014;
    /// The event that entry injects.
    pub const INJECT: u32 = 0x4016;
    /// Its error code.
    pub const INJECT_ERROR: u32 = 0x4018;
    /// The length of the instruction it stands for.
    pub const INJECT_LENGTH: u32 = 0x401a;
    /// TPR below which the guest exits.
    pub const TPR_THRESHOLD: u32 = 0x401c;
    /// Secondary controls.
    pub const SECONDARY: u32 = 0x401e;
    /// Ticks between PAUSEs of one loop.
    pub const PAUSE_GAP: u32 = 0x4020;
    /// Ticks of a loop before it exits.
    pub const PAUSE_WINDOW: u32 = 0x4022;
    /// Why VMLAUNCH or VMRESUME failed.
    pub const ERROR: u32 = 0x4400;
    /// Exit reason.
    pub const REASON: u32 = 0x4402;
    /// The event that exited.
    pub const EVENT: u32 = 0x4404;
    /// Its error code.
    pub const EVENT_ERROR: u32 = 0x4406;
    /// The event whose delivery the exit interrupted.
    pub const VECTORING: u32 = 0x4408;
    /// Its error code.
    pub const VECTORING_ERROR: u32 = 0x440a;
    /// Length of the instruction that exited.
    pub const LENGTH: u32 = 0x440c;
    /// Activity: 0 is active.
    pub const ACTIVITY: u32 = 0x4826;
    /// SMBASE.
    pub const SMBASE: u32 = 0x4828;
    /// Host SYSENTER_CS.
    pub const HOST_SYSENTER_CS: u32 = 0x4c00;
    /// Bits of CR0 that are not the guest's.
    pub const CR0_MASK: u32 = 0x6000;
    /// Bits of CR4 that are not the guest's.
    pub const CR4_MASK: u32 = 0x6002;
    /// What else there is to say about an exit.
    pub const QUALIFICATION: u32 = 0x6400;
    /// Host CR0; CR3 and CR4 follow.
    pub const HOST_CR0: u32 = 0x6c00;
    /// Host CR3.
    pub const HOST_CR3: u32 = 0x6c02;
    /// Host CR4.
    pub const HOST_CR4: u32 = 0x6c04;
    /// Host FS base.
    pub const HOST_FS_BASE: u32 = 0x6c06;
    /// Host GS base.
    pub const HOST_GS_BASE: u32 = 0x6c08;
    /// Host TR base.
    pub const HOST_TR_BASE: u32 = 0x6c0a;
    /// Host GDTR base.
    pub const HOST_GDTR_BASE: u32 = 0x6c0c;
    /// Host IDTR base.
    pub const HOST_IDTR_BASE: u32 = 0x6c0e;
    /// Host SYSENTER_ESP.
    pub const HOST_SYSENTER_ESP: u32 = 0x6c10;
    /// Host SYSENTER_EIP.
    pub const HOST_SYSENTER_EIP: u32 = 0x6c12;
    /// Host RSP.
    pub const HOST_RSP: u32 = 0x6c14;
    /// Host RIP.
    pub const HOST_RIP: u32 = 0x6c16;
    /// Host selectors: ES, CS, SS, DS, FS, GS, TR, two apart.
    pub const HOST_ES: u32 = 0x0c00;
}

/// A cached field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field(u8);

macro_rules! cached {
    ($($name:ident $n:literal $encoding:literal;)*) => {
        impl Field {
            $( #[doc = concat!("`", stringify!($name), "`")] pub const $name: Field = Field($n); )*
        }
        const SINGLE: [u16; SINGLES] = {
            let mut t = [0; SINGLES];
            $( t[$n] = $encoding; )*
            t
        };
    };
}

const SINGLES: usize = 23;

cached! {
    RIP 0 0x681e;
    RSP 1 0x681c;
    RFLAGS 2 0x6820;
    CR0 3 0x6800;
    CR3 4 0x6802;
    CR4 5 0x6804;
    DR7 6 0x681a;
    EFER 7 0x2806;
    INTERRUPTIBILITY 8 0x4824;
    PENDING_DEBUG 9 0x6822;
    SYSENTER_CS 10 0x482a;
    SYSENTER_ESP 11 0x6824;
    SYSENTER_EIP 12 0x6826;
    PDPTE0 13 0x280a;
    PDPTE1 14 0x280c;
    PDPTE2 15 0x280e;
    PDPTE3 16 0x2810;
    ENTRY 17 0x4012;
    PAT 18 0x2804;
    PRIMARY 19 0x4002;
    CR0_SHADOW 20 0x6004;
    CR4_SHADOW 21 0x6006;
    TSC_OFFSET 22 0x2010;
}

/// Parts of a segment register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    /// Base.
    Base,
    /// Limit.
    Limit,
    /// Selector; not of GDTR and IDTR.
    Selector,
    /// Access rights; not of GDTR and IDTR.
    Rights,
}

/// Segment registers in the order of the VMCS, GDTR and IDTR last.
const SEGMENTS: usize = 10;
const PARTS: usize = 4;
const FIELDS: usize = SINGLES + SEGMENTS * PARTS;
/// What only this program changes.
const OURS: u64 = 1 << Field::PAT.0
    | 1 << Field::PRIMARY.0
    | 1 << Field::CR0_SHADOW.0
    | 1 << Field::CR4_SHADOW.0
    | 1 << Field::TSC_OFFSET.0;
/// GDTR and IDTR have no selector and rights.
const ABSENT: u64 = 0b11 << (SINGLES + 8 * PARTS + 2) | 0b11 << (SINGLES + 9 * PARTS + 2);
const ALL: u64 = ((1 << FIELDS) - 1) & !ABSENT;

/// Not a field: the virtual-APIC page has neither interrupts that wait nor some in service.
const NOTE: u64 = 1 << 63;
const _: () = assert!(ALL & NOTE == 0);

/// The size of tables by field: as many as a word has bits.
const SLOTS: usize = 64;

const _: () = assert!(FIELDS < SLOTS);

const ENCODINGS: [u16; SLOTS] = {
    let mut t = [0; SLOTS];
    let mut n = 0;
    while n < FIELDS {
        t[n] = if n < SINGLES {
            SINGLE[n]
        } else {
            let (s, part) = ((n - SINGLES) / PARTS, (n - SINGLES) % PARTS);
            2 * s as u16
                + match part {
                    0 => 0x6806,
                    1 => 0x4800,
                    2 => 0x0800,
                    _ => 0x4814,
                }
        };
        n += 1;
    }
    t
};

impl Field {
    /// A part of a segment register.
    #[inline]
    pub const fn segment(s: Seg, part: Part) -> Field {
        let n = match s {
            Seg::Es => 0,
            Seg::Cs => 1,
            Seg::Ss => 2,
            Seg::Ds => 3,
            Seg::Fs => 4,
            Seg::Gs => 5,
            Seg::Ldtr => 6,
            Seg::Tr => 7,
            Seg::Gdtr => 8,
            Seg::Idtr => 9,
        };
        Field((SINGLES + n * PARTS + part as usize) as u8)
    }

    /// Its number for VMREAD and VMWRITE.
    #[inline]
    pub const fn encoding(self) -> u32 {
        ENCODINGS[self.index()] as u32
    }

    /// Its place in a table of [`SLOTS`], which needs no check of bounds.
    #[inline]
    const fn index(self) -> usize {
        self.0 as usize % SLOTS
    }

    /// Its place in a set of fields.
    #[inline]
    pub const fn bit(self) -> u64 {
        1 << self.0
    }
}

/// A guest's VMCS.
#[derive(Debug)]
pub struct GuestVmcs {
    page: Pages<Words<512>>,
    values: [Cell<u64>; SLOTS],
    /// Fields whose value is in `values`.
    known: Cell<u64>,
    /// Fields whose value is not in the VMCS yet.
    dirty: u64,
}

impl GuestVmcs {
    /// A VMCS of this revision, which the processor has not seen yet.
    pub fn new(source: &'static dyn PageSource, revision: u32) -> Result<Self, Exhausted> {
        let page: Pages<Words<512>> = Pages::new(source)?;
        if let Some(first) = page.first() {
            first.store(u64::from(revision), core::sync::atomic::Ordering::Relaxed);
        }
        Ok(GuestVmcs {
            page,
            values: [const { Cell::new(0) }; SLOTS],
            known: Cell::new(0),
            dirty: 0,
        })
    }

    /// Its physical address.
    #[inline]
    pub fn mpa(&self) -> Mpa {
        self.page.mpa()
    }

    /// The value of a field, if it is known.
    #[inline]
    pub fn cached(&self, f: Field) -> Option<u64> {
        (self.known.get() & f.bit() != 0).then(|| self.value(f).get())
    }

    /// The value of a field that only this program changes and has set once.
    #[inline]
    pub fn own(&self, f: Field) -> u64 {
        debug_assert!(OURS & self.known.get() & f.bit() != 0);
        self.value(f).get()
    }

    /// Reads a field; the VMCS is current.
    #[inline]
    pub fn read<C: Cpu>(&self, cpu: C, f: Field) -> u64 {
        let v = cpu.vmread(f.encoding());
        self.value(f).set(v);
        self.known.set(self.known.get() | f.bit());
        v
    }

    /// Reads a field that is not known, of which the caller then notes that it is ([`GuestVmcs::know`]); the
    /// VMCS is current.
    #[inline]
    pub fn fetch<C: Cpu>(&self, cpu: C, f: Field) -> u64 {
        let v = cpu.vmread(f.encoding());
        self.value(f).set(v);
        v
    }

    /// These fields, by [`Field::bit`], are known now.
    #[inline]
    pub fn know(&self, fields: u64) {
        self.known.set(self.known.get() | fields);
    }

    /// Whether nothing is known that the guest can change: so it is after an exit.
    #[inline]
    pub fn knows_its_own_alone(&self) -> bool {
        self.known.get() == OURS
    }

    /// Whether any of these is.
    #[inline]
    pub fn knows_any(&self, fields: u64) -> bool {
        self.known.get() & fields != 0
    }

    /// The parts of a segment register, if all are known: base, limit, selector, access rights.
    #[inline]
    pub fn cached_segment(&self, s: Seg) -> Option<[u64; PARTS]> {
        let first = Field::segment(s, Part::Base);
        let all = 0b1111 << first.0;
        (self.known.get() & all == all)
            .then(|| core::array::from_fn(|n| self.value(Field(first.0 + n as u8)).get()))
    }

    /// Reads all fields that are not known; the VMCS is current.
    #[cold]
    pub fn read_all<C: Cpu>(&self, cpu: C) {
        let mut unknown = ALL & !self.known.get();
        while unknown != 0 {
            self.read(cpu, Field(unknown.trailing_zeros() as u8));
            unknown &= unknown - 1;
        }
    }

    /// Whether every field is known.
    pub fn complete(&self) -> bool {
        self.known.get() & ALL == ALL
    }

    /// Changes a field, from the next entry on.
    #[inline]
    pub fn set(&mut self, f: Field, v: u64) {
        if self.cached(f) != Some(v) {
            self.value(f).set(v);
            self.known.set(self.known.get() | f.bit());
            self.dirty |= f.bit();
        }
    }

    /// Whether something is to be written.
    #[inline]
    pub fn is_dirty(&self) -> bool {
        self.dirty != 0
    }

    /// Writes what was changed; the VMCS is current.
    #[inline]
    pub fn write_back<C: Cpu>(&mut self, cpu: C) {
        // What an instruction that was stepped over leaves.
        if self.dirty == Field::RIP.bit() {
            self.dirty = 0;
            cpu.vmwrite(Field::RIP.encoding(), self.value(Field::RIP).get());
        }
        while self.dirty != 0 {
            let f = Field(self.dirty.trailing_zeros() as u8);
            cpu.vmwrite(f.encoding(), self.value(f).get());
            self.dirty &= self.dirty - 1;
        }
    }

    /// Notes that the owner knows what the virtual-APIC page has, until the guest runs.
    pub fn note(&self) {
        self.known.set(self.known.get() | NOTE);
    }

    /// He knows no more.
    #[inline]
    pub fn forget_note(&self) {
        self.known.set(self.known.get() & !NOTE);
    }

    /// Whether that is noted.
    pub fn noted(&self) -> bool {
        self.known.get() & NOTE != 0
    }

    /// The guest has run: what it can change is unknown.
    #[inline]
    pub fn forget(&mut self) {
        self.known.set(self.known.get() & OURS);
    }

    #[inline]
    fn value(&self, f: Field) -> &Cell<u64> {
        &self.values[f.index()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_fields_have_the_numbers_of_the_manual() {
        let e = |s, p| Field::segment(s, p).encoding();
        assert_eq!(e(Seg::Es, Part::Selector), 0x800);
        assert_eq!(e(Seg::Tr, Part::Selector), 0x80e);
        assert_eq!(e(Seg::Ldtr, Part::Base), 0x6812);
        assert_eq!(e(Seg::Gdtr, Part::Base), 0x6816);
        assert_eq!(e(Seg::Idtr, Part::Base), 0x6818);
        assert_eq!(e(Seg::Idtr, Part::Limit), 0x4812);
        assert_eq!(e(Seg::Gs, Part::Limit), 0x480a);
        assert_eq!(e(Seg::Cs, Part::Rights), 0x4816);
        assert_eq!(e(Seg::Tr, Part::Rights), 0x4822);
        assert_eq!(Field::RIP.encoding(), 0x681e);
        assert_eq!(Field::TSC_OFFSET.encoding(), 0x2010);
    }

    #[test]
    fn no_two_fields_have_one_number() {
        let mut seen = std::collections::BTreeSet::new();
        for n in (0..FIELDS as u8).filter(|n| ALL >> n & 1 != 0) {
            assert!(seen.insert(Field(n).encoding()), "{n}");
        }
    }
}
