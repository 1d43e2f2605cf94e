//! Guest state between its neutral form and the VMCB's: what VMRUN would refuse, and what
//! processors leave imprecise in segment registers. Pure. (AMD APM "Canonicalization and
//! Consistency Checks", "Segment State in the VMCB".)

use galvan_base::state::{
    ArchState, CR0_CD, CR0_NW, CR0_PE, CR0_PG, CR0_VALID, CR4_PAE, EFER_LMA, EFER_LME, SEGS, Seg,
    Segment, rip_fits,
};

pub use galvan_base::state::{
    CR4_LA57, RFLAGS_VM, efer, flushes, is_canonical, linear_bits, pat_is_valid, rflags,
};

use crate::caps::Caps;

/// Segment attribute bits.
mod attr {
    pub(super) const ACCESSED: u16 = 1 << 0;
    pub(super) const BUSY: u16 = 1 << 1;
    pub(super) const CODE_OR_DATA: u16 = 1 << 4;
    pub(super) const DPL_SHIFT: u32 = 5;
    pub(super) const DPL: u16 = 3 << DPL_SHIFT;
    pub(super) const PRESENT: u16 = 1 << 7;
    pub(super) const LONG: u16 = 1 << 9;
    pub(super) const BIG: u16 = 1 << 10;
    pub(super) const GRANULARITY: u16 = 1 << 11;
}

/// CR4.PCIDE
const CR4_PCIDE: u64 = 1 << 17;

/// Whether VMRUN takes this state, or why not; and whether a processor can have got into it as far as
/// modes go, which VMRUN does not check. It takes any attributes of segments but those of CS that
/// contradict each other.
pub fn validate(s: &ArchState, caps: &Caps) -> Result<(), &'static str> {
    let check = |ok: bool, why: &'static str| if ok { Ok(()) } else { Err(why) };
    let paging = s.cr0 & CR0_PG != 0;
    let long = s.efer & EFER_LME != 0 && paging;

    check(s.cr0 >> 32 == 0, "CR0 above bit 31")?;
    check(s.cr0 & !CR0_VALID == 0, "CR0 reserved bits")?;
    check(
        s.cr0 & CR0_CD != 0 || s.cr0 & CR0_NW == 0,
        "CR0.NW without CR0.CD",
    )?;
    check(!paging || s.cr0 & CR0_PE != 0, "CR0.PG without CR0.PE")?;
    check(s.cr3 >> caps.phys_bits.min(63) == 0, "CR3 reserved bits")?;
    check(s.cr4 & !caps.cr4_valid == 0, "CR4 reserved bits")?;
    check(s.efer & !caps.efer_valid == 0, "EFER reserved bits")?;
    check(
        (s.efer & EFER_LMA != 0) == long,
        "EFER.LMA against EFER.LME and CR0.PG",
    )?;
    check(
        !long || s.cr4 & CR4_PAE != 0,
        "long mode without physical address extension",
    )?;
    check(
        long || s.cr4 & CR4_PCIDE == 0,
        "CR4.PCIDE outside long mode",
    )?;
    check(s.rflags == rflags(s.rflags), "RFLAGS reserved bits")?;
    check(
        s.rflags & RFLAGS_VM == 0 || s.cr0 & CR0_PE != 0 && !long,
        "RFLAGS.VM outside protected mode",
    )?;
    let cs = s.seg[Seg::Cs as usize].attr;
    check(
        !(long && cs & attr::LONG != 0 && cs & attr::BIG != 0),
        "CS.L and CS.D",
    )?;
    check(s.dr6 >> 32 == 0, "DR6 above bit 31")?;
    check(s.dr7 >> 32 == 0, "DR7 above bit 31")?;
    check(pat_is_valid(s.pat), "PAT memory type")?;
    let bits = linear_bits(s.cr4);
    check(
        s.seg.iter().all(|g| is_canonical(g.base, bits))
            && is_canonical(s.sysenter[1], bits)
            && is_canonical(s.sysenter[2], bits)
            && is_canonical(s.syscall[1], bits)
            && is_canonical(s.syscall[2], bits)
            && is_canonical(s.kernel_gs_base, bits),
        "address not canonical",
    )?;
    for which in [Seg::Gdtr, Seg::Idtr] {
        check(
            s.seg[which as usize].limit >> 16 == 0,
            "limit of a descriptor table",
        )?;
    }
    let code_64 = long && cs & attr::LONG != 0;
    check(rip_fits(s.rip, code_64, linear_bits(caps.cr4_valid)), "RIP")
}

/// The privilege level of a state: SS's in protected mode.
pub fn cpl(s: &ArchState) -> u8 {
    if s.cr0 & CR0_PE == 0 {
        0
    } else if s.rflags & RFLAGS_VM != 0 {
        3
    } else {
        ((s.seg[Seg::Ss as usize].attr & attr::DPL) >> attr::DPL_SHIFT) as u8
    }
}

/// What a segment register of the VMCB says in the form every processor agrees on.
///
/// AMD processors do not keep the granularity bit of CS, need not show TR busy or a loaded data
/// segment accessed, and keep the privilege level apart from SS, whose attributes are then stale.
pub fn normalize(which: Seg, mut s: Segment, cpl: u8) -> Segment {
    let present = s.attr & attr::PRESENT != 0;
    match which {
        Seg::Gdtr | Seg::Idtr => {
            s.sel = 0;
            s.attr = 0;
        }
        Seg::Tr => s.attr |= attr::BUSY,
        Seg::Ldtr => {}
        Seg::Es | Seg::Cs | Seg::Ss | Seg::Ds | Seg::Fs | Seg::Gs => {
            if present && s.attr & attr::CODE_OR_DATA != 0 {
                s.attr |= attr::ACCESSED;
            }
            if which == Seg::Ss {
                s.attr = s.attr & !attr::DPL | u16::from(cpl & 3) << attr::DPL_SHIFT;
                if !present {
                    s.attr &= !attr::BIG;
                }
            }
        }
    }
    if present && s.limit > 0xf_ffff {
        s.attr |= attr::GRANULARITY;
    }
    s
}

/// All segment registers, in the order of [`Seg`].
pub const ALL_SEGMENTS: [Seg; SEGS] = [
    Seg::Es,
    Seg::Cs,
    Seg::Ss,
    Seg::Ds,
    Seg::Fs,
    Seg::Gs,
    Seg::Gdtr,
    Seg::Ldtr,
    Seg::Idtr,
    Seg::Tr,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::{Features, settle, tests::zen3};

    fn caps() -> Caps {
        settle(&zen3(), Features::empty()).unwrap()
    }

    fn long_mode() -> ArchState {
        let mut s = ArchState::at_pvh_entry(0x100_0000);
        s.cr0 |= CR0_PG;
        s.cr3 = 0x1000;
        s.cr4 = CR4_PAE;
        s.efer = EFER_LME | EFER_LMA;
        s.seg[Seg::Cs as usize].attr = 0xa9b;
        s
    }

    #[test]
    fn states_that_guests_start_in_pass() {
        let c = caps();
        assert_eq!(validate(&ArchState::at_reset(), &c), Ok(()));
        assert_eq!(validate(&ArchState::at_sipi(0x9f), &c), Ok(()));
        assert_eq!(validate(&ArchState::at_pvh_entry(0x100_0000), &c), Ok(()));
        assert_eq!(validate(&long_mode(), &c), Ok(()));
    }

    #[test]
    fn each_illegal_combination_is_named() {
        let c = caps();
        let why = |f: fn(&mut ArchState)| {
            let mut s = long_mode();
            f(&mut s);
            validate(&s, &c).unwrap_err()
        };
        assert_eq!(why(|s| s.cr0 |= 1 << 32), "CR0 above bit 31");
        assert_eq!(why(|s| s.cr0 |= 1 << 28), "CR0 reserved bits");
        assert_eq!(why(|s| s.cr0 |= CR0_NW), "CR0.NW without CR0.CD");
        assert_eq!(why(|s| s.cr0 &= !CR0_PE), "CR0.PG without CR0.PE");
        assert_eq!(why(|s| s.cr3 = 1 << 48), "CR3 reserved bits");
        assert_eq!(why(|s| s.cr4 |= 1 << 13), "CR4 reserved bits");
        assert_eq!(why(|s| s.cr4 |= 1 << 40), "CR4 reserved bits");
        assert_eq!(why(|s| s.efer |= 1 << 12), "EFER reserved bits");
        assert_eq!(
            why(|s| s.efer &= !EFER_LMA),
            "EFER.LMA against EFER.LME and CR0.PG"
        );
        assert_eq!(
            why(|s| s.efer &= !EFER_LME),
            "EFER.LMA against EFER.LME and CR0.PG"
        );
        assert_eq!(
            why(|s| s.cr4 &= !CR4_PAE),
            "long mode without physical address extension"
        );
        assert_eq!(
            why(|s| s.seg[Seg::Cs as usize].attr |= attr::BIG),
            "CS.L and CS.D"
        );
        assert_eq!(why(|s| s.dr6 |= 1 << 32), "DR6 above bit 31");
        assert_eq!(why(|s| s.dr7 |= 1 << 63), "DR7 above bit 31");
        assert_eq!(why(|s| s.pat = 2), "PAT memory type");
        for change in [
            (|s| s.syscall[1] = 1 << 63) as fn(&mut ArchState),
            |s| s.syscall[2] = 1 << 47,
            |s| s.sysenter[1] = 1 << 47,
            |s| s.sysenter[2] = 1 << 47,
            |s| s.kernel_gs_base = 1 << 47,
        ] {
            assert_eq!(why(change), "address not canonical");
        }
        for which in ALL_SEGMENTS {
            let mut s = long_mode();
            s.seg[which as usize].base = 1 << 47;
            assert_eq!(validate(&s, &c), Err("address not canonical"), "{which:?}");
        }
        assert_eq!(
            why(|s| {
                s.efer = 0;
                s.cr4 |= CR4_PCIDE;
            }),
            "CR4.PCIDE outside long mode"
        );
        assert_eq!(why(|s| s.rflags |= 1 << 15), "RFLAGS reserved bits");
        assert_eq!(why(|s| s.rflags = 0), "RFLAGS reserved bits");
        assert_eq!(
            why(|s| s.rflags |= RFLAGS_VM),
            "RFLAGS.VM outside protected mode"
        );
        assert_eq!(
            why(|s| s.seg[Seg::Idtr as usize].limit = 0x1_0000),
            "limit of a descriptor table"
        );
        assert_eq!(why(|s| s.rip = 1 << 48), "RIP");
        assert_eq!(
            why(|s| {
                s.seg[Seg::Cs as usize].attr = 0xc9b;
                s.rip = 1 << 32;
            }),
            "RIP"
        );
    }

    #[test]
    fn canonical_addresses_depend_on_the_paging_depth() {
        assert!(is_canonical(0x7fff_ffff_ffff, 48));
        assert!(!is_canonical(0x8000_0000_0000, 48));
        assert!(is_canonical(0xffff_8000_0000_0000, 48));
        assert!(is_canonical(0x8000_0000_0000, 57));
        assert!(!is_canonical(0x100_0000_0000_0000, 57));
    }

    #[test]
    fn privilege_level_follows_mode_and_stack_segment() {
        let mut s = long_mode();
        assert_eq!(cpl(&s), 0);
        s.seg[Seg::Ss as usize].attr = 0xcf3;
        assert_eq!(cpl(&s), 3);
        s.seg[Seg::Ss as usize].attr = 0x60;
        assert_eq!(cpl(&s), 3, "of an unusable SS, too");
        s.cr0 = 0;
        assert_eq!(cpl(&s), 0);
        let mut s = ArchState::at_pvh_entry(0);
        s.rflags |= RFLAGS_VM;
        assert_eq!(cpl(&s), 3);
    }

    #[test]
    fn segments_read_back_complete() {
        let seg = |attr, limit| Segment {
            sel: 8,
            attr,
            limit,
            base: 0,
        };
        assert_eq!(normalize(Seg::Cs, seg(0x29a, !0), 0).attr, 0xa9b);
        assert_eq!(normalize(Seg::Tr, seg(0x89, 0x67), 0).attr, 0x8b);
        assert_eq!(normalize(Seg::Ss, seg(0, 0), 3).attr, 0x60);
        assert_eq!(normalize(Seg::Ss, seg(0x400, 0), 0).attr, 0);
        assert_eq!(normalize(Seg::Ss, seg(0xcf3, !0), 0).attr, 0xc93);
        assert_eq!(normalize(Seg::Ds, seg(0, 0), 3).attr, 0);
        let g = normalize(Seg::Gdtr, seg(0x93, 0x7f), 0);
        assert_eq!((g.sel, g.attr, g.limit), (0, 0, 0x7f));
    }

    #[test]
    fn long_mode_activity_is_derived() {
        assert_eq!(efer(EFER_LME, CR0_PG), EFER_LME | EFER_LMA);
        assert_eq!(efer(EFER_LME | EFER_LMA, 0), EFER_LME);
        assert_eq!(efer(EFER_LMA, CR0_PG), 0);
    }

    #[test]
    fn translations_go_stale_when_their_rules_change() {
        assert!(flushes(3, 1, 1));
        assert!(flushes(0, 0, CR0_PG));
        assert!(!flushes(0, 0, 8), "TS");
        assert!(flushes(4, 0, 1 << 7));
        assert!(!flushes(4, 0, 1 << 18), "OSXSAVE");
        assert!(!flushes(2, 0, 1));
    }

    #[test]
    fn reserved_flags_are_dropped() {
        assert_eq!(rflags(0), 2);
        assert_eq!(rflags(u64::MAX), 0x3f_7fd7);
    }
}
