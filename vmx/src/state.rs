//! Guest state between its neutral form and the VMCS's: the checks of VM entry, by name, and the
//! form of segment registers. Pure. (Intel SDM "Checks on the Guest State Area", "Guest Register
//! State".)

use galvan_base::state::{
    ArchState, CR0_CD, CR0_NW, CR0_PE, CR0_PG, CR0_VALID, CR4_PAE, EFER_LMA, EFER_LME, RFLAGS_VM,
    SEGS, Seg, Segment, is_canonical, linear_bits, pat_is_valid, rflags, rip_fits,
};

use crate::caps::Caps;

/// Segment attribute bits in the packed form.
mod attr {
    pub(super) const ACCESSED: u16 = 1 << 0;
    /// Of code segments; of data segments: writable.
    pub(super) const READABLE: u16 = 1 << 1;
    pub(super) const BUSY: u16 = 1 << 1;
    pub(super) const CODE: u16 = 1 << 3;
    pub(super) const TYPE: u16 = 0xf;
    pub(super) const CODE_OR_DATA: u16 = 1 << 4;
    pub(super) const DPL_SHIFT: u32 = 5;
    pub(super) const DPL: u16 = 3 << DPL_SHIFT;
    pub(super) const PRESENT: u16 = 1 << 7;
    pub(super) const LONG: u16 = 1 << 9;
    pub(super) const BIG: u16 = 1 << 10;
    pub(super) const GRANULARITY: u16 = 1 << 11;
}

/// Access rights: the segment cannot be used.
const UNUSABLE: u64 = 1 << 16;
const SELECTOR_TI: u16 = 1 << 2;
/// CR4.PCIDE
pub const CR4_PCIDE: u64 = 1 << 17;

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

/// A segment as entry wants it where processors differ in what they keep: code and data accessed,
/// TR busy, granularity as the limit needs it.
pub fn complete(which: Seg, mut s: Segment) -> Segment {
    if matches!(which, Seg::Gdtr | Seg::Idtr) || s.attr & attr::PRESENT == 0 {
        return s;
    }
    if which == Seg::Tr {
        s.attr |= attr::BUSY;
    } else if s.attr & attr::CODE_OR_DATA != 0 {
        s.attr |= attr::ACCESSED;
    }
    if s.limit & 0xfff != 0xfff {
        s.attr &= !attr::GRANULARITY;
    } else if s.limit > 0xf_ffff {
        s.attr |= attr::GRANULARITY;
    }
    s
}

/// Access rights of a segment.
pub fn rights(s: Segment) -> u64 {
    let a = u64::from(s.attr);
    let unusable = if s.attr & attr::PRESENT == 0 {
        UNUSABLE
    } else {
        0
    };
    a & 0xff | (a & 0xf00) << 4 | unusable
}

/// The attributes that access rights stand for. What the processor keeps of an unusable segment is
/// undefined but for the privilege level in SS.
pub fn attributes(which: Seg, rights: u64) -> u16 {
    if matches!(which, Seg::Gdtr | Seg::Idtr) {
        0
    } else if rights & UNUSABLE == 0 {
        (rights & 0xff | rights >> 4 & 0xf00) as u16
    } else if which == Seg::Ss {
        rights as u16 & attr::DPL
    } else {
        0
    }
}

/// The privilege level in the access rights of SS.
pub fn dpl(rights: u64) -> u8 {
    ((rights as u16 & attr::DPL) >> attr::DPL_SHIFT) as u8
}

/// Whether the guest's page-directory-pointer table is in registers.
pub fn pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0
}

/// Whether entry takes this state, or the check that fails.
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
    check(s.dr6 >> 32 == 0, "DR6 above bit 31")?;
    check(s.dr7 >> 32 == 0, "DR7 above bit 31")?;
    check(pat_is_valid(s.pat), "PAT memory type")?;
    let bits = linear_bits(s.cr4);
    check(
        is_canonical(s.sysenter[1], bits)
            && is_canonical(s.sysenter[2], bits)
            && is_canonical(s.syscall[1], bits)
            && is_canonical(s.syscall[2], bits)
            && is_canonical(s.kernel_gs_base, bits),
        "address not canonical",
    )?;
    check(s.sysenter[0] >> 32 == 0, "SYSENTER_CS above bit 31")?;
    // Not a check of entry: the MSR itself would refuse it before.
    check(s.syscall[3] >> 32 == 0, "SFMASK above bit 31")?;

    check(s.rflags == rflags(s.rflags), "RFLAGS reserved bits")?;
    let virtual_8086 = s.rflags & RFLAGS_VM != 0;
    check(
        !virtual_8086 || s.cr0 & CR0_PE != 0 && !long,
        "RFLAGS.VM outside protected mode",
    )?;
    if virtual_8086 {
        for which in [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
            let g = s.seg[which as usize];
            check(
                g.base == u64::from(g.sel) << 4 && g.limit == 0xffff && g.attr == 0xf3,
                "segment in virtual-8086 mode",
            )?;
        }
    } else {
        code_and_data(s, long)?;
    }
    system(s, long)?;
    check(
        s.seg.iter().all(|g| is_canonical(g.base, bits)),
        "address not canonical",
    )?;

    let code_64 = long && s.seg[Seg::Cs as usize].attr & attr::LONG != 0;
    check(rip_fits(s.rip, code_64, linear_bits(caps.cr4_valid)), "RIP")
}

fn code_and_data(s: &ArchState, long: bool) -> Result<(), &'static str> {
    let check = |ok: bool, why: &'static str| if ok { Ok(()) } else { Err(why) };
    let seg = |which: Seg| complete(which, s.seg[which as usize]);
    let (cs, ss) = (seg(Seg::Cs), seg(Seg::Ss));
    let kind = |g: Segment| g.attr & attr::TYPE;
    let level = |g: Segment| g.attr & attr::DPL;

    check(cs.attr & attr::PRESENT != 0, "CS not present")?;
    check(
        cs.attr & attr::CODE_OR_DATA != 0 && matches!(kind(cs), 3 | 9 | 11 | 13 | 15),
        "CS type",
    )?;
    check(
        match kind(cs) {
            3 => level(cs) == 0,
            9 | 11 => level(cs) == level(ss),
            _ => level(cs) <= level(ss),
        },
        "CS privilege level",
    )?;
    check(
        !(long && cs.attr & attr::LONG != 0 && cs.attr & attr::BIG != 0),
        "CS.L and CS.D",
    )?;
    check(
        level(ss) == 0 || s.cr0 & CR0_PE != 0 && kind(cs) != 3,
        "SS privilege level",
    )?;
    if ss.attr & attr::PRESENT != 0 {
        check(
            ss.attr & attr::CODE_OR_DATA != 0 && matches!(kind(ss), 3 | 7),
            "SS type",
        )?;
    }
    for which in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
        let g = seg(which);
        check(
            g.attr & attr::PRESENT == 0
                || g.attr & attr::CODE_OR_DATA != 0
                    && (g.attr & attr::CODE == 0 || g.attr & attr::READABLE != 0),
            "data segment type",
        )?;
    }
    for which in [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
        let g = seg(which);
        if g.attr & attr::PRESENT == 0 {
            continue;
        }
        check(limit_fits(g), "segment limit")?;
        check(
            g.base >> 32 == 0 || matches!(which, Seg::Fs | Seg::Gs),
            "segment base above bit 31",
        )?;
    }
    Ok(())
}

fn system(s: &ArchState, long: bool) -> Result<(), &'static str> {
    let check = |ok: bool, why: &'static str| if ok { Ok(()) } else { Err(why) };
    let kind = |g: Segment| g.attr & (attr::TYPE | attr::CODE_OR_DATA);
    let tr = complete(Seg::Tr, s.seg[Seg::Tr as usize]);
    check(tr.attr & attr::PRESENT != 0, "TR not present")?;
    check(kind(tr) == 11 || kind(tr) == 3 && !long, "TR type")?;
    check(limit_fits(tr), "TR limit")?;
    check(tr.sel & SELECTOR_TI == 0, "TR selector")?;
    let ldtr = complete(Seg::Ldtr, s.seg[Seg::Ldtr as usize]);
    if ldtr.attr & attr::PRESENT != 0 {
        check(kind(ldtr) == 2, "LDTR type")?;
        check(limit_fits(ldtr), "LDTR limit")?;
        check(ldtr.sel & SELECTOR_TI == 0, "LDTR selector")?;
    }
    for which in [Seg::Gdtr, Seg::Idtr] {
        check(
            s.seg[which as usize].limit >> 16 == 0,
            "limit of a descriptor table",
        )?;
    }
    Ok(())
}

/// Whether granularity can express the limit, as [`complete`] has left it.
fn limit_fits(g: Segment) -> bool {
    g.limit <= 0xf_ffff || g.limit & 0xfff == 0xfff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caps::{Features, settle, tests::skylake};

    fn caps() -> Caps {
        settle(&skylake(), Features::empty()).unwrap()
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
        // What the toolstack sets for a PVH guest: CS, DS, SS and TR alone.
        let mut s = ArchState::at_pvh_entry(0x100_0000);
        for which in [Seg::Es, Seg::Fs, Seg::Gs, Seg::Ldtr] {
            s.seg[which as usize] = Segment::default();
        }
        assert_eq!(validate(&s, &c), Ok(()));
        // 64-bit user code with null segments.
        let mut s = long_mode();
        for which in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
            s.seg[which as usize] = Segment::default();
        }
        s.seg[Seg::Cs as usize].attr = 0xafb;
        s.seg[Seg::Ss as usize].attr = 0x60;
        s.rip = 0x8000_0000_0000;
        assert_eq!(validate(&s, &c), Ok(()), "just after the lower half");
    }

    #[test]
    fn each_check_of_entry_is_named() {
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
        assert_eq!(why(|s| s.cr4 |= 1 << 23), "CR4 reserved bits");
        assert_eq!(why(|s| s.efer |= 1 << 12), "EFER reserved bits");
        assert_eq!(
            why(|s| s.efer &= !EFER_LMA),
            "EFER.LMA against EFER.LME and CR0.PG"
        );
        assert_eq!(
            why(|s| s.cr4 &= !CR4_PAE),
            "long mode without physical address extension"
        );
        assert_eq!(
            why(|s| {
                s.efer = 0;
                s.cr4 |= CR4_PCIDE;
            }),
            "CR4.PCIDE outside long mode"
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
        assert_eq!(why(|s| s.sysenter[0] = 1 << 32), "SYSENTER_CS above bit 31");
        assert_eq!(why(|s| s.syscall[3] = 1 << 32), "SFMASK above bit 31");
        assert_eq!(why(|s| s.rflags |= 1 << 3), "RFLAGS reserved bits");
        assert_eq!(why(|s| s.rflags |= 1 << 22), "RFLAGS reserved bits");
        assert_eq!(why(|s| s.rflags = 0), "RFLAGS reserved bits");
        assert_eq!(
            why(|s| s.rflags |= RFLAGS_VM),
            "RFLAGS.VM outside protected mode"
        );
        assert_eq!(why(|s| s.rip = 1 << 48), "RIP");
    }

    #[test]
    fn each_segment_check_of_entry_is_named() {
        let c = caps();
        let why = |which: Seg, f: fn(&mut Segment)| {
            let mut s = long_mode();
            f(&mut s.seg[which as usize]);
            validate(&s, &c).unwrap_err()
        };
        assert_eq!(why(Seg::Cs, |g| g.attr |= attr::BIG), "CS.L and CS.D");
        assert_eq!(why(Seg::Cs, |g| g.attr = 0), "CS not present");
        assert_eq!(why(Seg::Cs, |g| g.attr = 0xa97), "CS type");
        assert_eq!(why(Seg::Cs, |g| g.attr |= attr::DPL), "CS privilege level");
        assert_eq!(why(Seg::Ss, |g| g.attr |= attr::DPL), "CS privilege level");
        assert_eq!(why(Seg::Ss, |g| g.attr = 0xc9b), "SS type");
        assert_eq!(why(Seg::Ds, |g| g.attr = 0xc99), "data segment type");
        assert_eq!(why(Seg::Gs, |g| g.attr = 0x82), "data segment type");
        assert_eq!(why(Seg::Es, |g| g.limit = 0x12_3456), "segment limit");
        assert_eq!(
            why(Seg::Ds, |g| g.base = 1 << 32),
            "segment base above bit 31"
        );
        for which in [Seg::Fs, Seg::Gs, Seg::Tr, Seg::Ldtr, Seg::Gdtr, Seg::Idtr] {
            assert_eq!(why(which, |g| g.base = 1 << 47), "address not canonical");
        }
        assert_eq!(why(Seg::Tr, |g| g.limit = 0x12_3456), "TR limit");
        assert_eq!(why(Seg::Ldtr, |g| g.limit = 0x12_3456), "LDTR limit");
        assert_eq!(
            why(Seg::Cs, |g| g.base = 1 << 32),
            "segment base above bit 31"
        );
        assert_eq!(why(Seg::Tr, |g| g.attr = 0), "TR not present");
        assert_eq!(why(Seg::Tr, |g| g.attr = 0x82), "TR type");
        assert_eq!(why(Seg::Tr, |g| g.sel = 4), "TR selector");
        assert_eq!(why(Seg::Ldtr, |g| g.attr = 0x83), "LDTR type");
        assert_eq!(why(Seg::Ldtr, |g| g.sel = 4), "LDTR selector");
        assert_eq!(
            why(Seg::Gdtr, |g| g.limit = 0x1_0000),
            "limit of a descriptor table"
        );
        let mut s = ArchState::at_sipi(1);
        s.seg[Seg::Ss as usize].attr = 0xf3;
        s.seg[Seg::Cs as usize].attr = 0xfb;
        assert_eq!(validate(&s, &c), Err("SS privilege level"));
        let mut s = long_mode();
        s.efer = 0;
        s.rip = 1 << 32;
        s.seg[Seg::Cs as usize].attr = 0xc9b;
        assert_eq!(validate(&s, &c), Err("RIP"));
        let mut s = ArchState::at_pvh_entry(0);
        s.rflags |= RFLAGS_VM;
        assert_eq!(validate(&s, &c), Err("segment in virtual-8086 mode"));
        for g in &mut s.seg[..6] {
            *g = Segment {
                sel: 0x1234,
                base: 0x12340,
                limit: 0xffff,
                attr: 0xf3,
            };
        }
        assert_eq!(validate(&s, &c), Ok(()));
    }

    #[test]
    fn what_other_processors_leave_out_is_filled_in() {
        let g = |attr, limit| Segment {
            sel: 0,
            attr,
            limit,
            base: 0,
        };
        assert_eq!(complete(Seg::Cs, g(0x29a, !0)).attr, 0xa9b);
        assert_eq!(complete(Seg::Tr, g(0x89, 0x67)).attr, 0x8b);
        assert_eq!(complete(Seg::Ds, g(0xc93, 0x1234)).attr, 0x493);
        assert_eq!(complete(Seg::Ds, g(0xc93, 0xffff)).attr, 0xc93);
        assert_eq!(complete(Seg::Ldtr, g(0x82, 0xffff)).attr, 0x82);
        assert_eq!(complete(Seg::Ds, g(0, 5)).attr, 0);
    }

    #[test]
    fn access_rights_survive_the_round_trip() {
        for a in [0xa9bu16, 0xc93, 0x8b, 0x82, 0xf3, 0x193] {
            let s = Segment {
                attr: a,
                ..Segment::default()
            };
            assert_eq!(rights(s) & UNUSABLE, 0);
            assert_eq!(attributes(Seg::Ds, rights(s)), a);
        }
        let null = Segment {
            attr: 0x60,
            ..Segment::default()
        };
        assert_eq!(rights(null), UNUSABLE | 0x60);
        assert_eq!(dpl(rights(null)), 3);
        assert_eq!(attributes(Seg::Ss, rights(null) | 0xc000), 0x60);
        assert_eq!(attributes(Seg::Ds, rights(null)), 0);
    }
}
