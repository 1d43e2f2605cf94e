//! Settled capabilities of real processors, of a hypervisor's virtual one and of an emulator's.

use super::*;

/// What all of them share: long mode, NX, PAT, and VT-x switched on.
fn any() -> Raw {
    Raw {
        leaf1: [0, 0x800, 0x029e_e3ff, 0xbfeb_fbff],
        ext1: [0, 0, 1, 0x2c10_0800],
        ext8: [0x3028, 0, 0, 0],
        feature_control: 5,
        pin: 0x0000_007f_0000_0016,
        primary: 0xfff9_fffe_0400_6172,
        exit: 0x007f_ffff_0003_6dfb,
        entry: 0x0000_ffff_0000_11fb,
        misc: 0x3004_81e5,
        cr0_fixed0: 0x8000_0021,
        cr4_fixed0: 0x2000,
        ept_vpid: 0x0000_0f01_0611_4141,
        ..Raw::default()
    }
}

/// The first generation with unrestricted guest.
pub(crate) fn westmere() -> Raw {
    Raw {
        basic: 0x00da_0400_0000_000f,
        secondary: 0x0000_00ff_0000_0000,
        cr4_fixed1: 0x0002_67ff,
        misc: 0x0004_01e7,
        ..any()
    }
}

/// The generation before: EPT, but real mode has to be emulated.
fn nehalem() -> Raw {
    Raw {
        basic: 0x00da_0400_0000_000e,
        secondary: 0x0000_006f_0000_0000,
        cr4_fixed1: 0x0000_27ff,
        misc: 0x0004_01e5,
        ..any()
    }
}

fn sandy_bridge() -> Raw {
    Raw {
        basic: 0x00da_0400_0000_0010,
        secondary: 0x0000_04ff_0000_0000,
        cr4_fixed1: 0x0006_27ff,
        leaf1: [0x206a7, 0x800, 0x1fba_e3ff, 0xbfeb_fbff],
        xsave: Some(XsaveLayout { mask: 7, size: 832 }),
        ..any()
    }
}

fn haswell() -> Raw {
    Raw {
        basic: 0x00da_0400_0000_0012,
        secondary: 0x0000_7cff_0000_0000,
        cr4_fixed1: 0x0017_67ff,
        leaf1: [0x306c3, 0x800, 0x7ffa_fbff, 0xbfeb_fbff],
        leaf7: [0, 0x0000_27ab, 0, 0x0c00_0000],
        ext1: [0, 0, 0x21, 0x2c10_0800],
        ept_vpid: 0x0000_0f01_0613_4141,
        ..sandy_bridge()
    }
}

/// A Skylake client (Core i7-6700K).
pub(crate) fn skylake() -> Raw {
    Raw {
        basic: 0x00da_0400_0000_0004,
        secondary: 0x0005_7cff_0000_0000,
        exit: 0x01ff_ffff_0003_6dfb,
        entry: 0x0003_ffff_0000_11fb,
        misc: 0x7004_c1e7,
        cr4_fixed1: 0x0037_67ff,
        leaf1: [0x506e3, 0x800, 0x7ffa_fbff, 0xbfeb_fbff],
        leaf7: [0, 0x029c_67af, 0, 0x9c00_0604],
        ext8: [0x3027, 0, 0, 0],
        ept_vpid: 0x0000_0f01_0633_4141,
        ..haswell()
    }
}

/// A Sapphire Rapids server: tertiary controls, CET, five-level EPT and more that is left alone.
pub(crate) fn sapphire_rapids() -> Raw {
    Raw {
        basic: 0x03da_0500_0000_0013,
        pin: 0x0000_00ff_0000_0016,
        primary: 0xfffb_fffe_0400_6172,
        secondary: 0x1773_ffff_0000_0000,
        exit: 0x77ff_ffff_0003_6dfb,
        entry: 0x0076_ffff_0000_11fb,
        cr4_fixed1: 0x01ff_fff7 | 0xff,
        leaf7: [0, 0xf3bf_b7ef, 0x1b41_5f7e, 0xffdd_4432],
        ext8: [0x30_3934, 0, 0, 0],
        ept_vpid: 0x0000_0f01_06f3_41c1,
        ..skylake()
    }
}

/// A virtual machine on a Coffee Lake whose hypervisor offers nested VT-x without the preemption
/// timer, virtual APIC accesses and some of the newer controls.
fn nested() -> Raw {
    Raw {
        leaf1: [0x906ea, 0x800, 0xfffa_3223, 0x1fab_fbff],
        pin: 0x0000_003f_0000_0016,
        secondary: 0x0055_3cfe_0000_0000,
        basic: 0x00da_0400_0000_0001,
        misc: 0x2000_0065,
        exit: 0x003f_efff_0003_6dfb,
        entry: 0x0000_d3ff_0000_11fb,
        ..skylake()
    }
}

#[test]
fn every_generation_with_unrestricted_guest_will_do() {
    for (name, raw, largest, invpcid) in [
        ("Westmere", westmere(), PageOrder::P2M, false),
        ("Sandy Bridge", sandy_bridge(), PageOrder::P2M, false),
        ("Haswell", haswell(), PageOrder::P1G, true),
        ("Skylake", skylake(), PageOrder::P1G, true),
        ("Sapphire Rapids", sapphire_rapids(), PageOrder::P1G, true),
        ("nested", nested(), PageOrder::P1G, true),
    ] {
        let c = settle(&raw, Features::empty()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((c.invpcid, c.largest_page), (invpcid, largest), "{name}");
        assert!(c.tsc_aux && c.invept_single, "{name}");
        assert_eq!((c.cr0_one, c.cr4_one), (0x20, 0x2000), "{name}");
        assert!(!c.unlocked, "{name}");
        // Everything that is 1 is allowed, everything that must be 1 is 1.
        let k = c.controls;
        for (msr, v) in [
            (raw.pin, k.pin),
            (raw.primary, k.primary),
            (raw.secondary, k.secondary),
            (raw.exit, k.exit),
            (raw.entry, k.entry),
        ] {
            assert_eq!(v & !((msr >> 32) as u32), 0, "{name} {msr:#x}");
            assert_eq!(!v & msr as u32, 0, "{name} {msr:#x}");
        }
        assert_eq!(
            k.primary & (primary::CR3_LOAD | primary::CR3_STORE | primary::INTERRUPT_WINDOW),
            0
        );
        // CET, PKS, LASS and user interrupts are not a guest's, VMX is not either.
        assert_eq!(c.cr4_valid >> 22, 0, "{name}");
        assert_eq!(c.cr4_valid & 0x6000, 0, "{name}");
    }
}

#[test]
fn the_controls_of_a_known_processor_are_these() {
    let c = settle(&skylake(), Features::empty()).unwrap();
    assert_eq!(
        c.controls,
        Controls {
            pin: 0x3f,
            primary: 0xb6a0_6dfa,
            secondary: 0x0000_14ea,
            exit: 0x003b_6fff,
            entry: 0xd1ff,
        }
    );
    assert_eq!(
        c.features,
        Features::VPID | Features::PAUSE_LOOP | Features::APIC_PAGE
    );
    assert_eq!(c.virtual_eoi(), 0, "servers alone had it then");
    assert_eq!((c.apic_page(false), c.apic_page(true)), (1, 1), "TPR alone");
    assert_eq!((c.revision, c.phys_bits), (4, 39));
    assert!(c.length_0 && c.ibpb);
    let old = settle(&westmere(), Features::empty()).unwrap();
    assert_eq!(old.controls.secondary, 0xea, "no PAUSE loops yet");
    assert!(!old.length_0 && !old.ibpb);
    assert_eq!(old.xsave, None);
}

#[test]
fn a_name_takes_a_feature_away() {
    let vpid = Features::by_name("vpid").unwrap();
    let c = settle(&skylake(), vpid).unwrap();
    assert_eq!(c.controls.secondary & secondary::VPID, 0);
    assert_eq!(c.features, Features::PAUSE_LOOP | Features::APIC_PAGE);
    let pause = Features::by_name("pausefilter").unwrap();
    let c = settle(&skylake(), pause).unwrap();
    assert_eq!(c.controls.secondary & secondary::PAUSE_LOOP, 0);
    assert_eq!(Features::by_name("nrips"), None);
}

#[test]
fn interrupts_are_ended_by_processors_that_can() {
    let c = settle(&sapphire_rapids(), Features::empty()).unwrap();
    assert_eq!(c.features, Features::all());
    assert_eq!(c.virtual_eoi(), 0x310);
    assert_eq!(c.controls.secondary & 0x310, 0, "not before x2APIC mode");
    let off = Features::by_name("apicv").unwrap();
    let c = settle(&sapphire_rapids(), off).unwrap();
    let rest = Features::VPID | Features::PAUSE_LOOP;
    assert_eq!((c.features, c.virtual_eoi()), (rest, 0));
    // What needs the other goes with it.
    for (name, gone) in [
        (
            "virtualintr",
            Features::VIRTUAL_INTERRUPTS | Features::POSTED,
        ),
        ("posted", Features::POSTED),
        ("apicpage", Features::APIC_PAGE),
    ] {
        let off = Features::by_name(name).unwrap();
        let c = settle(&sapphire_rapids(), off).unwrap();
        assert_eq!(c.features, Features::all() - gone, "{name}");
        let posted = c.features.contains(Features::POSTED);
        assert_eq!(c.controls.exit >> 15 & 1, posted.into(), "{name}");
    }
    let mut r = sapphire_rapids();
    r.secondary &= !(1 << 40);
    let c = settle(&r, Features::empty()).unwrap();
    assert_eq!(c.virtual_eoi(), 0x210, "registers are read by exits");
    assert_eq!((c.apic_page(false), c.apic_page(true)), (1, 0x201));
    // The APIC's page.
    let all = settle(&sapphire_rapids(), Features::empty()).unwrap();
    assert_eq!((all.apic_page(false), all.apic_page(true)), (0x101, 0x301));
    assert_eq!(all.controls.secondary & 1, 0, "not before a vCPU shows it");
    let mut r = sapphire_rapids();
    r.secondary &= !(1 << 32);
    let c = settle(&r, Features::empty()).unwrap();
    assert_eq!(
        (c.features, c.virtual_eoi()),
        (Features::all() - Features::APIC_PAGE, 0x310)
    );
    let mut r = sapphire_rapids();
    r.secondary &= !(1 << 41);
    let c = settle(&r, Features::empty()).unwrap();
    assert!(
        c.features
            .contains(Features::APIC_PAGE | Features::APIC_REGISTERS)
    );
    assert_eq!(
        (c.apic_page(true), c.virtual_eoi()),
        (0x101, 0),
        "without delivery"
    );
    // MSRs of the x2APIC have to be virtual.
    let mut r = sapphire_rapids();
    r.secondary &= !(1 << 36);
    assert_eq!(settle(&r, Features::empty()).unwrap().virtual_eoi(), 0);
}

#[test]
fn vpid_needs_a_way_to_flush_it() {
    let mut r = skylake();
    r.ept_vpid &= !(cap::INVVPID_SINGLE | cap::INVVPID_ALL);
    let c = settle(&r, Features::empty()).unwrap();
    assert!(!c.features.contains(Features::VPID));
}

#[test]
fn processors_that_will_not_do_say_why() {
    let no = |f: fn(&mut Raw)| {
        let mut r = skylake();
        f(&mut r);
        settle(&r, Features::empty()).unwrap_err()
    };
    assert_eq!(no(|r| r.leaf1[2] &= !LEAF1_ECX_VMX), Unsupported::NoVmx);
    assert_eq!(
        no(|r| r.feature_control = 1),
        Unsupported::DisabledByFirmware
    );
    assert_eq!(
        no(|r| r.feature_control = 3),
        Unsupported::DisabledByFirmware,
        "inside SMX only"
    );
    assert_eq!(
        no(|r| r.secondary &= !(u64::from(secondary::EPT) << 32)),
        Unsupported::NoEpt
    );
    assert_eq!(no(|r| r.primary &= !(1 << 63)), Unsupported::NoEpt);
    assert_eq!(
        settle(&nehalem(), Features::empty()),
        Err(Unsupported::NoUnrestrictedGuest)
    );
    assert_eq!(
        no(|r| r.ept_vpid &= !cap::INVEPT),
        Unsupported::Lacks("INVEPT")
    );
    assert_eq!(
        no(|r| r.primary |= u64::from(primary::CR3_LOAD)),
        Unsupported::Lacks("CR3 without exits")
    );
    assert_eq!(
        no(|r| r.basic &= !BASIC_TRUE),
        Unsupported::Lacks("true controls")
    );
    assert_eq!(
        no(|r| r.pin &= !(u64::from(pin::VIRTUAL_NMIS) << 32)),
        Unsupported::Lacks("virtual NMIs")
    );
}

#[test]
fn feature_control_that_nobody_has_set_is_ours_to_set() {
    let mut r = skylake();
    r.feature_control = 0;
    assert!(settle(&r, Features::empty()).unwrap().unlocked);
}

#[test]
fn capability_registers_are_read_only_where_they_exist() {
    let leaf1 = |ecx: u32| {
        move |leaf: u32, _: u32| match leaf {
            0 => [1, 0, 0, 0],
            1 => [0, 0, ecx, 0],
            0x8000_0000 => [0x8000_0001, 0, 0, 0],
            _ => [0; 4],
        }
    };
    let r = Raw::read(leaf1(0), |_| panic!("no such MSR"));
    assert_eq!(settle(&r, Features::empty()), Err(Unsupported::NoVmx));
    // The first processors with VMX: no secondary controls, no true ones.
    let r = Raw::read(leaf1(LEAF1_ECX_VMX), |index| match index {
        0x3a => 5,
        0x480 => 0x001a_0400_0000_0007,
        0x481 => 0x0000_001f_0000_0016,
        0x482 => 0x77b9_fffe_0401_e172,
        0x483 => 0x0003_efff_0003_6dff,
        0x484 => 0x0000_1fff_0000_11ff,
        0x485..=0x489 => 0,
        other => panic!("MSR {other:#x} does not exist"),
    });
    assert_eq!(settle(&r, Features::empty()), Err(Unsupported::NoEpt));
}

#[test]
fn what_is_lacking_is_named_and_nothing_is_named_twice() {
    let old = settle(&westmere(), Features::empty()).unwrap();
    assert_eq!(
        std::format!("{old}"),
        "EPT, unrestricted guest, VPID, virtual APIC accesses, RDTSCP, INVEPT of one table, INVVPID of one VPID; \
         without pause-loop exiting, virtual EOI, APIC-register virtualization, \
         virtual-interrupt delivery, posted interrupts, 1 GiB pages, XSAVE, INVPCID, IBPB, injection without length"
    );
    let new = settle(&sapphire_rapids(), Features::VPID).unwrap();
    assert!(std::format!("{new}").ends_with("; without VPID"), "{new}");
}
