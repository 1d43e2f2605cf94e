//! The bits of an entry in each format.
//!
//! - NPT: AMD APM volume 2, "Nested Paging" and "Page-Translation-Table Entry Fields". A nested
//!   walk is a user access, so every entry has U/S set. Memory types go through the host's PAT.
//! - EPT: Intel SDM volume 3, "The Extended Page Table Mechanism".
//! - AMD-Vi: AMD I/O Virtualization Technology Specification, "I/O Page Tables for Host
//!   Translations".
//! - VT-d: Intel VT for Directed I/O, "Second-Stage Paging Entries".
//!
//! In all four, hardware ignores the rest of an entry that is not present, and the frame number
//! sits in bits 12..=51.

use galvan_base::hw::Stage2Format;
use galvan_base::{Mfn, PageOrder};

/// The format of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// AMD nested page tables.
    Npt,
    /// Intel extended page tables.
    Ept,
    /// AMD I/O page tables for host translations.
    AmdVi,
    /// Intel VT-d second-stage tables.
    VtdSl,
}

impl From<Stage2Format> for Format {
    fn from(f: Stage2Format) -> Self {
        match f {
            Stage2Format::Npt => Format::Npt,
            Stage2Format::Ept => Format::Ept,
        }
    }
}

/// The memory type of a mapping. I/O page tables have none and take any for write-back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemType {
    /// Write-back, unless the guest's own tables ask for less.
    Wb,
    /// Write-back whatever the guest's own tables ask for, where the format can say so (EPT);
    /// otherwise [`MemType::Wb`].
    WbForced,
    /// Uncached, unless the guest's own tables ask for write-combining.
    Uc,
}

/// What a mapping allows and carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attrs {
    /// Reads allowed. A mapping without this is not present, and allows nothing else.
    pub read: bool,
    /// Writes allowed.
    pub write: bool,
    /// Instruction fetches allowed; I/O page tables do not tell them from reads.
    pub exec: bool,
    /// Memory type; [`MemType::Wb`] in entries that are not present.
    pub memtype: MemType,
    /// Software type, [`Format::SW_BITS`] bits, kept also in entries that are not present.
    pub sw: u8,
}

impl Attrs {
    /// Nothing: not present and without a software type.
    pub const NONE: Attrs = Attrs {
        read: false,
        write: false,
        exec: false,
        memtype: MemType::Wb,
        sw: 0,
    };
    /// Read, write and execute, write-back, without a software type.
    pub const RWX: Attrs = Attrs {
        read: true,
        write: true,
        exec: true,
        memtype: MemType::Wb,
        sw: 0,
    };

    /// The same with another software type.
    pub const fn with_sw(self, sw: u8) -> Attrs {
        Attrs { sw, ..self }
    }

    /// Whether every access that `other` allows is allowed here too, in the same memory type.
    pub(crate) fn covers(self, other: Attrs) -> bool {
        (self.read || !other.read)
            && (self.write || !other.write)
            && (self.exec || !other.exec)
            && self.memtype == other.memtype
    }
}

/// What a table says about a guest frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The machine frame of the guest frame asked about. In entries that are not present: what was
    /// put there along with a software type, else 0.
    pub mfn: Mfn,
    /// The size of the page the guest frame lies in, or of the hole (at most 1 GiB of it).
    pub order: PageOrder,
    /// What is allowed.
    pub attrs: Attrs,
    /// The processor has used the mapping, if the format or the set-up of it tells.
    pub accessed: bool,
    /// The processor has written through the mapping, if the format or the set-up of it tells.
    pub dirty: bool,
}

impl Entry {
    /// Whether the guest can reach the frame.
    pub fn is_present(&self) -> bool {
        self.attrs.read
    }
}

/// A decoded entry of a table page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Points to a table of the next level.
    Table(Mfn),
    /// Maps a page, or is not present; `mfn` is the first frame.
    Leaf(Entry),
}

const ADDR: u64 = 0x000f_ffff_ffff_f000;

const NPT_P: u64 = 1;
const NPT_RW: u64 = 1 << 1;
const NPT_US: u64 = 1 << 2;
/// Cache disable alone selects PAT entry 2, UC- in the host's PAT as at reset: uncached unless the
/// guest asks for write-combining.
const NPT_PCD: u64 = 1 << 4;
const NPT_A: u64 = 1 << 5;
const NPT_D: u64 = 1 << 6;
const NPT_NX: u64 = 1 << 63;

/// Large page, in all formats but AMD-Vi's.
const PS: u64 = 1 << 7;

const EPT_R: u64 = 1;
const EPT_W: u64 = 1 << 1;
const EPT_X: u64 = 1 << 2;
const EPT_TYPE: u64 = 7 << 3;
const EPT_WB: u64 = 6 << 3;
const EPT_IPAT: u64 = 1 << 6;
/// Accessed and dirty of EPT and of VT-d's second stage.
const EPT_A: u64 = 1 << 8;
const EPT_D: u64 = 1 << 9;

const VI_PR: u64 = 1;
const VI_A: u64 = 1 << 5;
const VI_D: u64 = 1 << 6;
const VI_NEXT_SHIFT: u32 = 9;
const VI_NEXT: u64 = 7 << VI_NEXT_SHIFT;
/// Coherent whatever the device asks for.
const VI_FC: u64 = 1 << 60;
const VI_IR: u64 = 1 << 61;
const VI_IW: u64 = 1 << 62;

impl Format {
    /// How many bits of software type every format keeps at least in entries that are present;
    /// AMD-Vi keeps 4.
    pub const SW_BITS: u32 = 5;

    /// `a` as this format can express it.
    #[inline]
    pub fn normalize(self, mut a: Attrs) -> Attrs {
        a.sw &= if self == Format::AmdVi { 0xf } else { 0x1f };
        if !a.read {
            return Attrs::NONE.with_sw(a.sw);
        }
        match self {
            Format::Ept => {}
            Format::Npt => {
                if a.memtype == MemType::WbForced {
                    a.memtype = MemType::Wb;
                }
            }
            Format::AmdVi | Format::VtdSl => {
                a.exec = true;
                a.memtype = MemType::Wb;
            }
        }
        a
    }

    #[inline]
    fn encode_sw(self, sw: u8) -> u64 {
        let sw = u64::from(sw);
        match self {
            // 9..=11, then 52 and 53.
            Format::Npt => (sw & 7) << 9 | (sw >> 3 & 3) << 52,
            Format::Ept | Format::VtdSl => (sw & 0x1f) << 52,
            Format::AmdVi => (sw & 0xf) << 1,
        }
    }

    /// The frame in an entry that does not point to a table.
    #[inline]
    pub(crate) fn frame(self, raw: u64) -> Mfn {
        Mfn::new_truncate((raw & ADDR) >> 12)
    }

    #[inline]
    pub(crate) fn decode_sw(self, raw: u64) -> u8 {
        let sw = match self {
            Format::Npt => (raw >> 9 & 7) | (raw >> 52 & 3) << 3,
            Format::Ept | Format::VtdSl => raw >> 52 & 0x1f,
            Format::AmdVi => raw >> 1 & 0xf,
        };
        sw as u8
    }

    /// An entry that points to a table of the next level and leaves the decision to it.
    pub(crate) fn table(self, next: Mfn, level: u8) -> u64 {
        next.addr().get()
            | match self {
                Format::Npt => NPT_P | NPT_RW | NPT_US,
                Format::Ept => EPT_R | EPT_W | EPT_X,
                Format::AmdVi => VI_PR | u64::from(level) << VI_NEXT_SHIFT | VI_IR | VI_IW,
                Format::VtdSl => EPT_R | EPT_W,
            }
    }

    /// An entry of a table of `level` that maps a page, or is not present. `mfn` must be aligned to
    /// the level.
    #[inline]
    pub(crate) fn leaf(self, mfn: Mfn, level: u8, a: Attrs) -> u64 {
        let a = self.normalize(a);
        if a == Attrs::NONE {
            // A hole without a software type is the same wherever it comes from: an empty entry.
            return 0;
        }
        let raw = mfn.addr().get() | self.encode_sw(a.sw);
        if !a.read {
            return raw;
        }
        let set = |on: bool, bit: u64| if on { bit } else { 0 };
        let ps = set(level > 0, PS);
        raw | match self {
            Format::Npt => {
                NPT_P
                    | NPT_US
                    | ps
                    | set(a.write, NPT_RW)
                    | set(!a.exec, NPT_NX)
                    | set(a.memtype == MemType::Uc, NPT_PCD)
            }
            Format::Ept => {
                let memtype = match a.memtype {
                    MemType::Wb => EPT_WB,
                    MemType::WbForced => EPT_WB | EPT_IPAT,
                    MemType::Uc => 0,
                };
                EPT_R | ps | memtype | set(a.write, EPT_W) | set(a.exec, EPT_X)
            }
            Format::AmdVi => VI_PR | VI_FC | VI_IR | set(a.write, VI_IW),
            Format::VtdSl => EPT_R | ps | set(a.write, EPT_W),
        }
    }

    /// The accessed and dirty bits of an entry that maps a page.
    pub(crate) fn used_bits(self) -> u64 {
        match self {
            Format::Npt => NPT_A | NPT_D,
            Format::Ept | Format::VtdSl => EPT_A | EPT_D,
            Format::AmdVi => VI_A | VI_D,
        }
    }

    #[inline]
    pub(crate) fn is_present(self, raw: u64) -> bool {
        match self {
            Format::Npt => raw & NPT_P != 0,
            Format::Ept => raw & (EPT_R | EPT_W | EPT_X) != 0,
            Format::VtdSl => raw & (EPT_R | EPT_W) != 0,
            Format::AmdVi => raw & VI_PR != 0,
        }
    }

    /// The table that an entry of a table of `level` points to, if it does: what a walk asks most.
    #[inline(always)]
    pub(crate) fn next(self, raw: u64, level: u8) -> Option<Mfn> {
        let table = match self {
            Format::AmdVi => raw & VI_NEXT != 0,
            _ => raw & PS == 0,
        };
        (level > 0 && table && self.is_present(raw)).then(|| Mfn::new_truncate((raw & ADDR) >> 12))
    }

    /// What an entry of a table of `level` says.
    #[inline]
    pub(crate) fn decode(self, raw: u64, level: u8) -> Slot {
        match self.next(raw, level) {
            Some(next) => Slot::Table(next),
            None => Slot::Leaf(self.entry(raw, level)),
        }
    }

    /// What an entry that does not point to a table says.
    pub(crate) fn entry(self, raw: u64, level: u8) -> Entry {
        let addr = Mfn::new_truncate((raw & ADDR) >> 12);
        let present = self.is_present(raw);
        let sw = self.decode_sw(raw);
        let (attrs, a, d) = if !present {
            (Attrs::NONE.with_sw(sw), false, false)
        } else {
            let (write, exec, memtype, a, d) = match self {
                Format::Npt => (
                    raw & NPT_RW != 0,
                    raw & NPT_NX == 0,
                    if raw & NPT_PCD != 0 {
                        MemType::Uc
                    } else {
                        MemType::Wb
                    },
                    raw & NPT_A != 0,
                    raw & NPT_D != 0,
                ),
                Format::Ept => (
                    raw & EPT_W != 0,
                    raw & EPT_X != 0,
                    if raw & EPT_TYPE != EPT_WB {
                        MemType::Uc
                    } else if raw & EPT_IPAT != 0 {
                        MemType::WbForced
                    } else {
                        MemType::Wb
                    },
                    raw & EPT_A != 0,
                    raw & EPT_D != 0,
                ),
                Format::AmdVi => (
                    raw & VI_IW != 0,
                    true,
                    MemType::Wb,
                    raw & VI_A != 0,
                    raw & VI_D != 0,
                ),
                Format::VtdSl => (
                    raw & EPT_W != 0,
                    true,
                    MemType::Wb,
                    raw & EPT_A != 0,
                    raw & EPT_D != 0,
                ),
            };
            let attrs = Attrs {
                read: true,
                write,
                exec,
                memtype,
                sw,
            };
            (attrs, a, d)
        };
        Entry {
            mfn: addr,
            order: order_of(level),
            attrs,
            accessed: a,
            dirty: d,
        }
    }
}

/// The size of the page that an entry of a table of `level` maps, or of 1 GiB above that.
pub(crate) const fn order_of(level: u8) -> PageOrder {
    match level {
        0 => PageOrder::P4K,
        1 => PageOrder::P2M,
        _ => PageOrder::P1G,
    }
}
