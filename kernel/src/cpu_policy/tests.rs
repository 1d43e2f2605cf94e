use super::policy::{A, B, C, D};
use super::*;
use galvan_dom0_proto::errno::Errno;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::vec::Vec;

/// A processor, by its answers.
#[derive(Clone, Default)]
struct Cpu(BTreeMap<(u32, u32), Regs>);

impl Cpu {
    fn set(mut self, leaf: u32, subleaf: u32, regs: Regs) -> Self {
        self.0.insert((leaf, subleaf), regs);
        self
    }

    fn policy(&self, virt: Virt) -> HostPolicy {
        let msrs = HostMsrs {
            arch_caps: u64::MAX,
            microcode: 0x123,
        };
        let setup = Setup {
            virt,
            version: 4 << 16 | 20,
            hidden: FeatureSet::EMPTY,
        };
        let mut cpuid = |leaf, subleaf| self.0.get(&(leaf, subleaf)).copied().unwrap_or_default();
        HostPolicy::new(&mut cpuid, msrs, &setup)
    }
}

/// Every feature flag there is, on a processor of AMD's or Intel's.
fn everything(amd: bool) -> Cpu {
    let name = if amd {
        [0x6874_7541, 0x444d_4163, 0x6974_6e65]
    } else {
        [0x756e_6547, 0x6c65_746e, 0x4965_6e69]
    };
    let [b, c, d] = name;
    let ones = [u32::MAX; 4];
    let mut cpu = Cpu::default()
        .set(0, 0, [0x20, b, c, d])
        .set(1, 0, [0x00a2_0f12, 0x0510_0800, u32::MAX, u32::MAX])
        .set(2, 0, [0x00fe_ff01, 0xf0, 0, 0])
        .set(4, 0, [0x0400_0121, 0x01c0_003f, 63, 0])
        .set(4, 1, [0x0400_0122, 0x01c0_003f, 63, 0])
        .set(4, 2, [0x0400_0143, 0x00c0_003f, 1023, 0])
        .set(4, 3, [0x1c03_c163, 0x02c0_003f, 0x9fff, 4])
        .set(7, 0, [2, u32::MAX, u32::MAX, u32::MAX])
        .set(7, 1, ones)
        .set(7, 2, ones)
        .set(0xb, 0, [1, 2, 0x100, 5])
        .set(0xb, 1, [4, 16, 0x201, 5])
        // x87, SSE, AVX, MPX (2), AVX-512 (3), PKRU, AMX (2).
        .set(0xd, 0, [0x602ff, 832, 11008, 0])
        .set(0xd, 1, [0x1f, 2696, 0x1900, 0])
        .set(0xd, 2, [256, 576, 0, 0])
        .set(0xd, 3, [64, 960, 0, 0])
        .set(0xd, 4, [64, 1024, 0, 0])
        .set(0xd, 5, [64, 1088, 0, 0])
        .set(0xd, 6, [512, 1152, 0, 0])
        .set(0xd, 7, [1024, 1664, 0, 0])
        .set(0xd, 9, [8, 2688, 0, 0])
        .set(0xd, 17, [64, 2752, 2, 0])
        .set(0xd, 18, [8192, 2816, 6, 0])
        .set(
            0x8000_0000,
            0,
            [if amd { 0x8000_0028 } else { 0x8000_0008 }, b, c, d],
        )
        .set(
            0x8000_0001,
            0,
            [0x00a2_0f12, 0x4000_0000, u32::MAX, u32::MAX],
        )
        .set(0x8000_0005, 0, ones)
        .set(0x8000_0006, 0, ones)
        .set(0x8000_0007, 0, ones)
        .set(0x8000_0008, 0, [0x0030_3934, u32::MAX, 0x700f, u32::MAX]);
    for leaf in [3, 5, 6, 8, 9, 0xa, 0xc, 0xe, 0x10, 0x14] {
        cpu = cpu.set(leaf, 0, ones);
    }
    if amd {
        for leaf in 0x8000_000a..=0x8000_0028u32 {
            cpu = cpu.set(leaf, 0, ones);
        }
    }
    cpu
}

/// What QEMU 7.2's `qemu64,+svm,+npt` answers.
fn qemu64() -> Cpu {
    Cpu::default()
        .set(0, 0, [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65])
        .set(1, 0, [0x000f_0f61, 0x0002_0800, 0x8000_2001, 0x178b_fbfd])
        .set(0xd, 0, [0; 4])
        .set(
            0x8000_0000,
            0,
            [0x8000_000a, 0x6874_7541, 0x444d_4163, 0x6974_6e65],
        )
        .set(0x8000_0001, 0, [0x000f_0f61, 0, 0x65, 0x2191_abfd])
        .set(0x8000_0008, 0, [0x3028, 0, 0, 0])
        .set(0x8000_000a, 0, [1, 0x10, 0, 0x1_0001])
}

const TSC: TscInfo = TscInfo {
    emulated: false,
    mode: 0,
    khz: 2_400_000,
    host_khz: 2_500_000,
    incarnation: 3,
    offset: 0x1234_5678_9abc_def0,
    mul: 0x8000_0000,
    shift: -1,
};

fn caller() -> CpuidCaller<'static> {
    CpuidCaller {
        domid: 7,
        vcpu: 3,
        cr4: 0,
        xcr0: 1,
        apic_enabled: true,
        long_mode: true,
        tsc: &TSC,
    }
}

fn dom0(cpu: &Cpu, virt: Virt, vcpus: u32) -> CpuPolicy {
    cpu.policy(virt).default_for(true, vcpus)
}

#[test]
fn a_processor_with_everything_gives_guests_only_what_is_listed() {
    for amd in [false, true] {
        let p = everything(amd).policy(Virt::all()).default_for(false, 1);
        let given = p.features();
        let listed = FeatureSet::allowed(Virt::all(), false);
        let mut beyond = given.without(&listed);
        beyond.remove(Feature::HTT);
        assert!(beyond.is_empty(), "{beyond:?}");
        assert!(given.has(Feature::AVX512F) && given.has(Feature::SMAP));
        // Nothing of power, MONITOR, counters, SVM, IBS, SEV, QoS.
        for leaf in [
            3,
            5,
            6,
            8,
            9,
            0xa,
            0xc,
            0xe,
            0x10,
            0x14,
            0x20,
            0x1000_0000,
            0x2000_0000,
        ]
        .into_iter()
        .chain(0x8000_0009..=0x8000_0018)
        .chain(0x8000_001b..=0x8000_0020)
        .chain(0x8000_0022..=0x8000_0030)
        {
            assert_eq!(p.cpuid(leaf, 0, &caller()), [0; 4], "{leaf:#x}");
        }
        assert_eq!(p.cpuid(7, 3, &caller()), [0; 4]);
        assert_eq!(p.cpuid(0x8000_0007, 0, &caller()), [0; 4]);
    }
}

#[test]
fn the_labs_processor_gives_a_usable_guest() {
    let p = dom0(&qemu64(), Virt::TSC_AUX | Virt::PAGE_1G, 2);
    let f = p.features();
    for has in [
        Feature::LM,
        Feature::NX,
        Feature::SYSCALL,
        Feature::APIC,
        Feature::X2APIC,
        Feature::HYPERVISOR,
        Feature::MTRR,
        Feature::PAT,
        Feature::SSE3,
        Feature::CX16,
        Feature::SSE4A,
    ] {
        assert!(f.has(has), "{has:?}");
    }
    for hasnt in [
        Feature::SVM,
        Feature::XSAVE,
        Feature::TSC_DEADLINE,
        Feature::VME,
    ] {
        assert!(!f.has(hasnt), "{hasnt:?}");
    }
    assert_eq!(
        p.cpuid(0, 0, &caller()),
        [0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65]
    );
    // AMD repeats the features of leaf 1 here.
    let d = p.cpuid(0x8000_0001, 0, &caller())[D];
    assert_eq!(d & 0x0183_f3ff, p.cpuid(1, 0, &caller())[D] & 0x0183_f3ff);
    assert_eq!(p.cpuid(0x8000_0000, 0, &caller())[A], 0x8000_000a);
    assert_eq!(p.cpuid(0x8000_000a, 0, &caller()), [0; 4]);
    assert_eq!(p.phys_bits(), 40);
    assert_eq!(p.xcr0_mask(), 0);
    assert_eq!(p.cpuid(0xd, 0, &caller()), [0; 4]);
    assert_eq!(p.cpuid(0xd, 1, &caller()), [0; 4]);
}

#[test]
fn galvan_adds_the_apic_and_itself_where_the_processor_has_neither() {
    let bare = qemu64().set(1, 0, [0xf61, 0, 0, 0x178b_f9fd]);
    let p = dom0(&bare, Virt::TSC_DEADLINE, 1);
    let [_, _, c, d] = p.cpuid(1, 0, &caller());
    assert_eq!(c, 1 << 31 | 1 << 24 | 1 << 21);
    assert_ne!(d & 1 << 9, 0);
}

#[test]
fn the_guests_own_state_shows() {
    let p = dom0(&everything(false), Virt::all(), 4);
    let me = caller();
    let with = |cr4, apic_enabled, long_mode| CpuidCaller {
        cr4,
        apic_enabled,
        long_mode,
        ..me
    };
    let plain = p.cpuid(1, 0, &me);
    assert_eq!(plain[B] >> 24, 6);
    assert_eq!(plain[C] & 1 << 27, 0);
    assert_ne!(p.cpuid(1, 0, &with(1 << 18, true, true))[C] & 1 << 27, 0);
    assert_ne!(plain[D] & 1 << 9, 0);
    assert_eq!(p.cpuid(1, 0, &with(0, false, true))[D] & 1 << 9, 0);
    assert_eq!(p.cpuid(7, 0, &me)[C] & 1 << 4, 0);
    assert_ne!(p.cpuid(7, 0, &with(1 << 22, true, true))[C] & 1 << 4, 0);
    assert_ne!(p.cpuid(0x8000_0001, 0, &me)[D] & 1 << 11, 0);
    assert_eq!(
        p.cpuid(0x8000_0001, 0, &with(0, true, false))[D] & 1 << 11,
        0
    );
    // AMD has SYSCALL in 32-bit mode, too.
    let amd = dom0(&everything(true), Virt::all(), 4);
    let d = |c: &CpuidCaller<'_>| amd.cpuid(0x8000_0001, 0, c)[D];
    assert_ne!(d(&with(0, true, false)) & 1 << 11, 0);
    assert_eq!(d(&with(0, false, true)) & 1 << 9, 0);
}

#[test]
fn answers_depend_on_nothing_but_what_is_said() {
    for p in [
        dom0(&everything(false), Virt::all(), 4),
        dom0(&everything(true), Virt::all(), 4),
    ] {
        let ranges = [0..0x40, 0x8000_0000..0x8000_0040, 0x2000_0000..0x2000_0002];
        for leaf in ranges.into_iter().flatten() {
            let me = caller();
            for sub in 0..70 {
                let plain = p.cpuid(leaf, sub, &me);
                if !has_subleaves(leaf) {
                    assert_eq!(plain, p.cpuid(leaf, 0, &me), "{leaf:#x}");
                }
                let other = |c: CpuidCaller<'_>| p.cpuid(leaf, sub, &c) != plain;
                let cr4 = other(CpuidCaller { cr4: !0, ..me });
                let shown = other(CpuidCaller {
                    cr4: CR4_SHOWN,
                    ..me
                });
                let apic = other(CpuidCaller {
                    apic_enabled: false,
                    ..me
                });
                let xcr0 = other(CpuidCaller { xcr0: 7, ..me });
                let long = other(CpuidCaller {
                    long_mode: false,
                    ..me
                });
                let tsc = other(CpuidCaller {
                    tsc: &TscInfo { khz: 1, ..TSC },
                    ..me
                });
                let n = needs(leaf);
                assert!(n == Needs::Cr4 || !cr4, "{leaf:#x}");
                assert_eq!(cr4, shown, "{leaf:#x}");
                assert!(
                    matches!(n, Needs::Cr4 | Needs::LongMode) || !apic,
                    "{leaf:#x}"
                );
                assert!(n == Needs::Xcr0 || !xcr0, "{leaf:#x}");
                assert!(n == Needs::LongMode || !long, "{leaf:#x}");
                assert!(n == Needs::Tsc || !tsc, "{leaf:#x}");
            }
        }
    }
}

#[test]
fn a_change_begins_another_version() {
    let p = DomainPolicy::new(dom0(&qemu64(), Virt::all(), 4));
    let first = p.version();
    assert_ne!(first, 0, "0 is what a place without an answer has");
    let _ = p.read();
    assert_eq!(p.version(), first);
    let _ = p.write();
    assert_ne!(p.version(), first);
}

#[test]
fn without_the_feature_its_state_cannot_show() {
    let p = dom0(&qemu64(), Virt::all(), 4);
    let all = CpuidCaller {
        cr4: u64::MAX,
        xcr0: u64::MAX,
        ..caller()
    };
    assert_eq!(p.cpuid(1, 0, &all)[C] & 1 << 27, 0);
    assert_eq!(p.cpuid(7, 0, &all)[C], 0);
}

#[test]
fn xsave_sizes_follow_the_components() {
    let p = dom0(&everything(false), Virt::all(), 1);
    assert_eq!(p.xcr0_mask(), 0x2e7);
    let with = |xcr0| CpuidCaller { xcr0, ..caller() };
    for (xcr0, standard, compacted) in [
        (1, 576, 576),
        (3, 576, 576),
        (7, 832, 832),
        (0xe7, 2688, 832 + 64 + 512 + 1024),
        (0x2e7, 2696, 832 + 64 + 512 + 1024 + 8),
        (0x203, 2696, 584),
        // What the guest has not, is not counted.
        (u64::MAX, 2696, 2440),
    ] {
        assert_eq!(
            p.cpuid(0xd, 0, &with(xcr0)),
            [0x2e7, standard, 2696, 0],
            "{xcr0:#x}"
        );
        assert_eq!(p.cpuid(0xd, 1, &with(xcr0))[B], compacted, "{xcr0:#x}");
    }
    assert_eq!(p.cpuid(0xd, 1, &with(7))[A], 7);
    assert_eq!(p.cpuid(0xd, 2, &with(7)), [256, 576, 0, 0]);
    // MPX and AMX.
    for hidden in [3, 4, 8, 17, 18, 62, 63, u32::MAX] {
        assert_eq!(p.cpuid(0xd, hidden, &with(7)), [0; 4], "{hidden}");
    }
}

#[test]
fn aligned_components_are_aligned_in_the_compacted_format() {
    let cpu = everything(false).set(0xd, 9, [8, 2688, 2, 0]);
    let p = dom0(&cpu, Virt::all(), 1);
    let odd = everything(false)
        .set(0xd, 5, [60, 1088, 0, 0])
        .set(0xd, 6, [512, 1152, 2, 0]);
    let q = dom0(&odd, Virt::all(), 1);
    let with = |xcr0| CpuidCaller { xcr0, ..caller() };
    assert_eq!(p.cpuid(0xd, 1, &with(0x207))[B], 832 + 8);
    assert_eq!(q.cpuid(0xd, 1, &with(0xe7))[B], 832 + 64 + 512 + 1024);
}

#[test]
fn a_processor_without_a_components_state_loses_its_features() {
    let cpu = everything(false).set(0xd, 0, [7, 832, 832, 0]);
    let f = dom0(&cpu, Virt::all(), 1).features();
    assert!(f.has(Feature::AVX2));
    assert!(!f.has(Feature::AVX512F) && !f.has(Feature::AVX512BW) && !f.has(Feature::PKU));
}

#[test]
fn xcr0_cr4_and_efer_accept_what_the_features_allow() {
    let p = dom0(&everything(true), Virt::all(), 1);
    for (xcr0, valid) in [
        (1, true),
        (3, true),
        (7, true),
        (0xe7, true),
        (0x2e7, true),
        (0, false),
        (2, false),
        (5, false),
        (0x27, false),
        (0xe3, false),
        (0x1b, false),
        (1 << 62 | 1, false),
    ] {
        assert_eq!(p.xcr0_is_valid(xcr0), valid, "{xcr0:#x}");
    }
    let cr4 = p.cr4_mask();
    assert_eq!(cr4 & (1 << 13 | 1 << 14 | 1 << 12 | 1 << 23 | 1 << 24), 0);
    assert_ne!(cr4 & 1 << 18, 0);
    assert_eq!(p.efer_mask(), 0x4d01);
    let q = dom0(&qemu64(), Virt::empty(), 1);
    assert_eq!(q.cr4_mask() & (1 << 18 | 1 << 17 | 1 << 20), 0);
    assert!(!q.xcr0_is_valid(1));
}

#[test]
fn the_hypervisors_leaves_are_xens() {
    let p = dom0(
        &everything(true),
        Virt::IOMMU_MAPPINGS | Virt::TSC_RELIABLE | Virt::TSC_AUX,
        4,
    );
    let leaf = |n: u32, sub| p.cpuid(0x4000_0000 + n, sub, &caller());
    assert_eq!(
        leaf(0, 0),
        [0x4000_0005, 0x566e_6558, 0x6558_4d4d, 0x4d4d_566e]
    );
    assert_eq!(leaf(1, 0), [0x4_0014, 0, 0, 0]);
    assert_eq!(leaf(2, 0), [1, 0x4000_0000, 0, 0]);
    assert_eq!(leaf(3, 0), [6, 0, 2_400_000, 3]);
    assert_eq!(
        leaf(3, 1),
        [0x9abc_def0, 0x1234_5678, 0x8000_0000, u32::MAX]
    );
    assert_eq!(leaf(3, 2), [2_500_000, 0, 0, 0]);
    assert_eq!(leaf(4, 0), [0x5c, 3, 7, 0]);
    assert_eq!(leaf(5, 0), [0; 4]);
    // Linux looks for other blocks up to here and must find none.
    for n in [6, 0x100, 0x1_0000, 0x0fff_ffff] {
        assert_eq!(leaf(n, 0), [0; 4]);
    }
}

#[test]
fn vcpus_are_cores_with_one_thread_and_even_apic_ids() {
    for amd in [false, true] {
        for (vcpus, width) in [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (128, 8)] {
            let p = dom0(&everything(amd), Virt::all(), vcpus);
            let me = CpuidCaller {
                vcpu: vcpus - 1,
                ..caller()
            };
            let id = 2 * (vcpus - 1);
            assert!(id < 1 << width);
            let leaf1 = p.cpuid(1, 0, &me);
            assert_ne!(leaf1[D] & 1 << 28, 0);
            assert_eq!(leaf1[B] >> 16, id << 8 & 0xff00 | (1u32 << width).min(255));
            assert_eq!(p.cpuid(0xb, 0, &me), [0, 1, 0x100, id]);
            assert_eq!(p.cpuid(0xb, 1, &me), [width, vcpus, 0x201, id]);
            assert_eq!(p.cpuid(0xb, 2, &me), [0, 0, 2, id]);
            if amd {
                let leaf = p.cpuid(0x8000_0008, 0, &me);
                assert_eq!(leaf[C], width << 12 | (2 * vcpus - 1));
                assert_eq!(p.cpuid(0x8000_0001, 0, &me)[C] & 2, 0);
                assert_eq!(p.cpuid(4, 0, &me), [0; 4]);
                assert_eq!(p.cpuid(0x8000_001e, 0, &me), [0; 4]);
            } else {
                // Level 1 is a core's own, level 3 is everybody's.
                assert_eq!(p.cpuid(4, 0, &me)[A] >> 14 & 0xfff, 0);
                assert_eq!(p.cpuid(4, 3, &me)[A] >> 14 & 0xfff, (1 << width) - 1);
                assert_eq!(p.cpuid(4, 3, &me)[A] & 0x3fff, 0x163);
                assert_eq!(p.cpuid(4, 4, &me), [0; 4]);
            }
        }
    }
}

#[test]
fn dom0_may_know_that_the_tsc_is_invariant_and_others_when_asked() {
    let host = everything(true).policy(Virt::all());
    assert!(host.default_for(true, 1).has(Feature::ITSC));
    assert!(!host.default_for(false, 1).has(Feature::ITSC));
    assert!(host.max().has(Feature::ITSC));
}

#[test]
fn features_can_be_withheld_from_all_guests() {
    let mut unknown = Vec::new();
    let hidden = hidden_by("no-smep,no-AVX,smap,no-warp", &mut |word| {
        unknown.push(word)
    });
    assert_eq!(unknown, ["smap", "no-warp"]);
    let cpu = everything(false);
    let setup = Setup {
        virt: Virt::all(),
        version: 0,
        hidden,
    };
    let mut cpuid = |l, s| cpu.0.get(&(l, s)).copied().unwrap_or_default();
    let host = HostPolicy::new(&mut cpuid, HostMsrs::default(), &setup);
    for p in [
        host.max(),
        &host.default_for(false, 1),
        &host.default_for(true, 1),
    ] {
        let f = p.features();
        assert!(!f.has(Feature::SMEP) && !f.has(Feature::AVX) && !f.has(Feature::AVX2));
        assert!(f.has(Feature::SMAP));
        assert_eq!(p.xcr0_mask(), 0x203);
    }
}

#[test]
fn policies_survive_the_toolstacks_arrays() {
    for cpu in [everything(false), everything(true), qemu64()] {
        let host = cpu.policy(Virt::all());
        let p = host.default_for(false, 2);
        let leaves = p.leaves();
        assert!(leaves.len() <= MAX_LEAVES as usize);
        assert!(leaves.is_sorted_by_key(|l| (l.leaf, l.subleaf)));
        assert_eq!(host.adopt(&p, &leaves, &p.msrs(), 2), Ok(p.clone()));
        assert_eq!(
            host.adopt(&host.default_for(false, 1), &leaves, &[], 2),
            Ok(p)
        );
        for index in [0, 1, 3, 5] {
            assert!(host.by_index(index).unwrap().leaves().len() <= MAX_LEAVES as usize);
        }
        assert!(host.by_index(2).is_none() && host.by_index(4).is_none());
    }
    assert_eq!(MAX_LEAVES, 0x78);
}

fn leaf(leaf: u32, subleaf: u32, [a, b, c, d]: Regs) -> XenCpuidLeaf {
    XenCpuidLeaf {
        leaf,
        subleaf,
        a,
        b,
        c,
        d,
    }
}

#[test]
fn the_toolstack_may_take_away_but_not_add() {
    let host = everything(true).policy(Virt::all() - Virt::PCID);
    let p = host.default_for(false, 1);
    // Everything asked for.
    let ones = [u32::MAX; 4];
    let mut wanted = [
        leaf(1, u32::MAX, [0x123, u32::MAX, u32::MAX, u32::MAX]),
        leaf(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
        leaf(0xd, 0, ones),
        leaf(0xd, 1, ones),
        leaf(0xd, 17, ones),
        leaf(0x8000_0001, u32::MAX, ones),
        leaf(0x8000_0008, u32::MAX, ones),
        leaf(0x8000_000a, u32::MAX, ones),
    ];
    let q = host.adopt(&p, &wanted, &[], 3).unwrap();
    let mut more = q.features().without(&host.max().features());
    more.remove(Feature::HTT);
    assert!(more.is_empty(), "{more:?}");
    assert_eq!(q.xcr0_mask(), p.xcr0_mask());
    assert_eq!(q.phys_bits(), 48);
    assert_eq!(q.cpuid(0x8000_000a, 0, &caller()), [0; 4]);
    assert_eq!(q.cpuid(1, 0, &caller())[A], 0x123);
    // AVX taken away takes its state and AVX-512 with it.
    wanted[0].c = !Feature::AVX.bit();
    let q = host.adopt(&p, &wanted, &[], 3).unwrap();
    assert_eq!(q.xcr0_mask(), 0x203);
    assert!(!q.has(Feature::AVX512F) && !q.has(Feature::VAES));
    assert!(missing_features(host.max(), &q).is_empty());
}

#[test]
fn parts_that_no_policy_has_are_refused_by_name() {
    let host = everything(true).policy(Virt::all());
    let p = host.default_for(false, 1);
    let refused = |l: XenCpuidLeaf| {
        let bad = host.adopt(&p, &[l], &[], 1).unwrap_err();
        (bad.errno, bad.leaf, bad.subleaf, bad.msr)
    };
    let none = u32::MAX;
    for (n, sub) in [
        (0xe, none),
        (4, none),
        (4, 6),
        (7, 3),
        (0xb, 2),
        (0xd, 63),
        (1, 0),
        (0x4000_0001, none),
        (0x8000_0022, none),
        (0x9000_0000, none),
    ] {
        assert_eq!(refused(leaf(n, sub, [0; 4])), (Errno::ERANGE, n, sub, none));
    }
    let [b, c, d] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
    let einval = |l: XenCpuidLeaf| assert_eq!(refused(l), (Errno::EINVAL, l.leaf, l.subleaf, none));
    einval(leaf(0, none, [0xe, b, c, d]));
    einval(leaf(0, none, [0xd, 0x756e_6547, c, d]));
    einval(leaf(7, 0, [3, 0, 0, 0]));
    einval(leaf(0x8000_0000, none, [0x8000_0022, b, c, d]));
    for (idx, flags, val, errno) in [
        (0xce, 1, 0, Errno::EINVAL),
        (0xce, 0, 1 << 31, Errno::EINVAL),
        (0x1a0, 0, 0, Errno::ERANGE),
    ] {
        let bad = host
            .adopt(&p, &[], &[XenMsrEntry { idx, flags, val }], 1)
            .unwrap_err();
        assert_eq!((bad.errno, bad.leaf, bad.msr), (errno, none, idx));
    }
}

#[test]
fn the_toolstack_may_shorten_the_hypervisors_leaves() {
    let host = qemu64().policy(Virt::all());
    let limit = leaf(0x4000_0000, u32::MAX, [0x4000_0003, 0, 0, 0]);
    let p = host
        .adopt(&host.default_for(false, 1), &[limit], &[], 1)
        .unwrap();
    assert_eq!(p.cpuid(0x4000_0000, 0, &caller())[A], 0x4000_0003);
    assert_eq!(p.cpuid(0x4000_0004, 0, &caller()), [0; 4]);
    assert!(p.leaves().contains(&limit));
}

#[test]
fn a_guest_of_a_better_machine_is_incompatible_and_the_reason_is_named() {
    let strong = everything(true).policy(Virt::all());
    let weak = qemu64().policy(Virt::all());
    let guest = strong.default_for(false, 1);
    assert_eq!(is_compatible(strong.max(), &guest), Ok(()));
    assert_eq!(is_compatible(weak.max(), &guest).unwrap_err().leaf, 7);
    assert_eq!(
        is_compatible(strong.max(), &weak.default_for(false, 1)),
        Ok(())
    );
    let lesser = everything(true).set(7, 1, [0; 4]).policy(Virt::all());
    let bad = is_compatible(lesser.max(), &guest).unwrap_err();
    assert_eq!((bad.leaf, bad.subleaf), (7, 1));
    assert!(missing_features(lesser.max(), &guest).has(Feature::SHA512));
    // Another vendor's machine can run none of them.
    let intel = everything(false).policy(Virt::all());
    assert_eq!(
        is_compatible(intel.max(), &weak.default_for(false, 1))
            .unwrap_err()
            .leaf,
        0
    );
}

#[test]
fn msrs_answer_what_a_booting_kernel_asks() {
    let amd = dom0(&everything(true), Virt::all(), 1);
    for (msr, value) in [
        (0x8b, Some(0x123)),
        (0x179, Some(2)),
        (0x17a, Some(0)),
        (0x17b, None),
        (0x400, Some(0)),
        (0x407, Some(0)),
        (0x408, None),
        (0xc001_0010, Some(0)),
        (0xc001_0015, Some(1 << 24)),
        (0xc001_0000, Some(0)),
        (0xc001_0007, Some(0)),
        (0xc001_0055, Some(0)),
        (0xc001_1029, Some(2)),
        (0xc001_1020, None),
        (0xc001_0114, None),
        (0x1a0, None),
        (0x3a, None),
        (0xda0, None),
    ] {
        assert_eq!(amd.msr_read(msr), value, "{msr:#x}");
    }
    // Before family 10h there is no such bit; QEMU's model is family 0fh.
    assert_eq!(
        dom0(&qemu64(), Virt::all(), 1).msr_read(0xc001_0015),
        Some(0)
    );
    for (msr, value, ok) in [
        (0xc001_0015, 0x40, true),
        (0xc001_0004, 0xffff, true),
        (0x400, u64::MAX, true),
        (0x401, 0, true),
        (0x401, 1, false),
        (0x179, 0, false),
        (0x8b, 0, false),
        (0x1d9, 0x40, false),
        (0x10a, 0, false),
    ] {
        assert_eq!(amd.msr_write(msr, value), ok, "{msr:#x}");
    }
    let intel = dom0(&everything(false), Virt::all(), 1);
    assert_eq!(intel.msr_read(0x3a), Some(1));
    assert_eq!(intel.msr_read(0x1a0), Some(0x1801));
    assert_eq!(intel.msr_read(0xc001_0015), None);
    assert!(intel.msr_write(0x8b, 0) && intel.msr_write(0x1a0, 0x85_0089));
    assert!(!intel.msr_write(0x3a, 5));
}

#[test]
fn architectural_capabilities_are_an_allow_list_too() {
    let p = dom0(&everything(false), Virt::all(), 1);
    let caps = p.msr_read(0x10a).unwrap();
    assert_ne!(caps & 1, 0);
    // TSX_CTRL, MCU_CTRL, XAPIC_STATUS would be promises of MSRs.
    assert_eq!(caps & (1 << 7 | 1 << 9 | 1 << 21), 0);
    let without = dom0(&qemu64(), Virt::all(), 1);
    assert_eq!(without.msr_read(0x10a), None);
}

proptest! {
    #[test]
    fn no_processor_and_no_question_upsets_a_policy(
        answers in prop::collection::vec(any::<[u32; 4]>(), 16),
        max in any::<u32>(),
        questions in prop::collection::vec((any::<u32>(), any::<u32>()), 20),
        virt in any::<u32>(),
    ) {
        let mut cpuid = |leaf: u32, subleaf: u32| {
            let mut r = answers[(leaf.wrapping_mul(7).wrapping_add(subleaf) % 16) as usize];
            if leaf == 0 || leaf == 0x8000_0000 {
                r[0] = leaf | max & 0x3f;
            }
            r
        };
        let setup = Setup { virt: Virt::from_bits_truncate(virt), version: 1, hidden: FeatureSet::EMPTY };
        let host = HostPolicy::new(&mut cpuid, HostMsrs { arch_caps: u64::MAX, microcode: 0 }, &setup);
        let p = host.default_for(true, max);
        let mut more = p.features().without(&FeatureSet::allowed(setup.virt, true));
        more.remove(Feature::ITSC);
        more.remove(Feature::HTT);
        prop_assert!(more.is_empty(), "{:?}", more);
        let me = CpuidCaller { cr4: u64::MAX, xcr0: u64::MAX, ..caller() };
        for (leaf, subleaf) in questions {
            for leaf in [leaf, leaf & 0xf, 0x8000_0000 | leaf & 0x3f, 0x4000_0000 | leaf & 7] {
                let _ = p.cpuid(leaf, subleaf, &me);
                let _ = p.cpuid(leaf, subleaf & 0x3f, &me);
                let _ = (p.msr_read(leaf), p.msr_write(leaf, u64::from(subleaf)));
            }
        }
        prop_assert!(p.leaves().len() <= MAX_LEAVES as usize);
    }

    #[test]
    fn whatever_the_toolstack_writes_stays_within_the_maximum(
        leaves in prop::collection::vec((prop::sample::select(std::vec![0u32, 1, 2, 4, 7, 0xb, 0xd, 0x8000_0000,
            0x8000_0001, 0x8000_0007, 0x8000_0008, 0x8000_0021, 0x4000_0000]), 0u32..4, any::<[u32; 4]>()), 0..12),
        vcpus in 1u32..200,
    ) {
        let host = everything(true).policy(Virt::all());
        let leaves = leaves.into_iter().map(|(n, sub, regs)| {
            let has_sub = matches!(n, 4 | 7 | 0xb | 0xd);
            leaf(n, if has_sub { sub } else { u32::MAX }, regs)
        }).collect::<Vec<_>>();
        if let Ok(p) = host.adopt(&host.default_for(false, 1), &leaves, &[], vcpus) {
            let mut more = p.features().without(&host.max().features());
            more.remove(Feature::HTT);
            prop_assert!(more.is_empty(), "{:?}", more);
            prop_assert_eq!(p.xcr0_mask() & !host.max().xcr0_mask(), 0);
            prop_assert_eq!(host.adopt(&p, &p.leaves(), &p.msrs(), vcpus), Ok(p));
        }
    }
}
