//! Tries states of processors: as dom0 it makes a domain, loads contexts into it that no processor can
//! run, and sees that each is refused and changes nothing; then writes to its own registers what
//! they cannot hold.
//!
//! What is wrong is `CONTEXT-FAIL name: what`. `CONTEXT refused N` says how many contexts were, which the
//! hypervisor's log names one by one; the last line is `CONTEXT-END failures`.
#![no_std]
#![no_main]

use core::mem::size_of;

use galvan_dom0_proto::domctl::*;
use galvan_dom0_proto::hvm::HvmStartInfo;
use galvan_dom0_proto::hvm_save::*;
use galvan_dom0_proto::xen::HYPERVISOR_DOMCTL;
use galvan_dom0_proto::{DomId, GuestHandle};
use galvan_guests::hypercall::call;
use galvan_guests::{cpu, guarded, println};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

const EINVAL: i64 = -22;
const GP: u64 = 13;
/// Room for a context of one vCPU.
const ROOM: usize = 32 << 10;

/// Who refuses a state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Both,
    /// VMRUN does not mind.
    Intel,
}

type Case = (&'static str, By, fn(&mut HvmHwCpu));

use By::{Both, Intel};

/// Changes that make 64-bit kernel code impossible.
const IMPOSSIBLE: &[Case] = &[
    ("cr0-high", Both, |c| c.cr0 |= 1 << 32),
    ("cr0-reserved", Both, |c| c.cr0 |= 1 << 28),
    ("cr0-nw", Both, |c| c.cr0 |= 1 << 29),
    ("cr0-pg-without-pe", Both, |c| c.cr0 &= !1),
    ("cr3-high", Both, |c| c.cr3 |= 1 << 63),
    ("cr3-52", Both, |c| c.cr3 |= 1 << 52),
    ("cr4-vmxe", Both, |c| c.cr4 |= 1 << 13),
    ("cr4-15", Both, |c| c.cr4 |= 1 << 15),
    ("cr4-cet", Both, |c| c.cr4 |= 1 << 23),
    ("cr4-high", Both, |c| c.cr4 |= 1 << 32),
    ("cr4-pcide-outside", Both, |c| {
        c.cr4 |= 1 << 17;
        c.msr_efer = 0;
    }),
    ("long-without-pae", Both, |c| c.cr4 = 0),
    ("efer-reserved", Both, |c| c.msr_efer |= 1 << 1),
    ("efer-svme", Both, |c| c.msr_efer |= 1 << 12),
    ("efer-high", Both, |c| c.msr_efer |= 1 << 63),
    ("efer-no-lma", Both, |c| c.msr_efer &= !(1 << 10)),
    ("efer-no-lme", Both, |c| c.msr_efer &= !(1 << 8)),
    ("efer-lma-without-pg", Both, |c| c.cr0 &= !(1 << 31)),
    ("dr6-high", Both, |c| c.dr6 |= 1 << 32),
    ("dr7-high", Both, |c| c.dr7 |= 1 << 32),
    ("rip-middle", Both, |c| c.rip = 1 << 58),
    ("rip-32-bit", Both, |c| {
        c.cs_arbytes = 0xc9b;
        c.rip = 1 << 32;
    }),
    ("rflags-3", Both, |c| c.rflags |= 1 << 3),
    ("rflags-5", Both, |c| c.rflags |= 1 << 5),
    ("rflags-15", Both, |c| c.rflags |= 1 << 15),
    ("rflags-22", Both, |c| c.rflags |= 1 << 22),
    ("rflags-high", Both, |c| c.rflags |= 1 << 63),
    ("rflags-vm-in-long-mode", Both, |c| c.rflags |= 1 << 17),
    ("rflags-vm-in-real-mode", Both, |c| {
        real_mode(c);
        c.rflags |= 1 << 17;
    }),
    ("lstar", Both, |c| c.msr_lstar = 1 << 47),
    ("cstar", Both, |c| c.msr_cstar = 1 << 63),
    ("sysenter-esp", Both, |c| c.sysenter_esp = 1 << 47),
    ("sysenter-eip", Both, |c| c.sysenter_eip = 1 << 47),
    ("shadow-gs", Both, |c| c.shadow_gs = 1 << 47),
    ("fs-base", Both, |c| c.fs_base = 1 << 47),
    ("gs-base", Both, |c| c.gs_base = 1 << 63),
    ("tr-base", Both, |c| c.tr_base = 1 << 47),
    ("ldtr-base", Both, |c| c.ldtr_base = 1 << 47),
    ("gdtr-base", Both, |c| c.gdtr_base = 1 << 47),
    ("idtr-base", Both, |c| c.idtr_base = 1 << 47),
    ("gdtr-limit", Both, |c| c.gdtr_limit = 0x1_0000),
    ("idtr-limit", Both, |c| c.idtr_limit = !0),
    ("tsc-aux-high", Both, |c| c.msr_tsc_aux = 1 << 32),
    ("cs-l-and-d", Both, |c| c.cs_arbytes = 0xe9b),
    ("cs-word", Both, |c| c.cs_arbytes |= 1 << 12),
    ("ldtr-word", Both, |c| c.ldtr_arbytes |= 1 << 31),
    ("cs-selector-word", Both, |c| c.cs_sel = 0x1_0008),
    ("event-interrupt-disabled", Both, |c| {
        c.pending_event = 0x8000_0030
    }),
    ("event-vector-15", Both, |c| {
        c.rflags |= 1 << 9;
        c.pending_event = 0x8000_000f;
    }),
    ("event-nmi-as-exception", Both, |c| {
        c.pending_event = 0x8000_0302
    }),
    ("event-no-exception", Both, |c| {
        c.pending_event = 0x8000_030f
    }),
    ("event-exception-32", Both, |c| {
        c.pending_event = 0x8000_0320
    }),
    ("event-error-code", Both, |c| {
        (c.pending_event, c.error_code) = (0x8000_0b0d, !0)
    }),
    ("event-kind", Both, |c| c.pending_event = 0x8000_0700),
    ("sfmask-high", Intel, |c| c.msr_syscall_mask = 1 << 32),
    ("sysenter-cs-high", Intel, |c| c.sysenter_cs = 1 << 32),
    ("cs-null", Intel, |c| c.cs_arbytes = 0),
    ("cs-data", Intel, |c| c.cs_arbytes = 0xa95),
    ("cs-system", Intel, |c| c.cs_arbytes = 0xa8b),
    ("cs-dpl", Intel, |c| c.cs_arbytes |= 3 << 5),
    ("cs-conforming-dpl", Intel, |c| c.cs_arbytes = 0xaff),
    ("cs-limit", Intel, |c| c.cs_limit = 0x12_3456),
    ("cs-base", Intel, |c| c.cs_base = 1 << 32),
    ("ss-code", Intel, |c| c.ss_arbytes = 0xc9b),
    ("ss-read-only", Intel, |c| c.ss_arbytes = 0xc91),
    ("ss-dpl", Intel, |c| c.ss_arbytes |= 3 << 5),
    ("ss-limit", Intel, |c| c.ss_limit = 0x12_3456),
    ("ss-base", Intel, |c| c.ss_base = 1 << 32),
    ("ds-execute-only", Intel, |c| c.ds_arbytes = 0xc99),
    ("ds-system", Intel, |c| c.ds_arbytes = 0x82),
    ("ds-base", Intel, |c| c.ds_base = 1 << 32),
    ("es-execute-only", Intel, |c| c.es_arbytes = 0xc99),
    ("es-limit", Intel, |c| c.es_limit = 0x12_3456),
    ("fs-execute-only", Intel, |c| c.fs_arbytes = 0xc99),
    ("gs-system", Intel, |c| c.gs_arbytes = 0x8b),
    ("tr-null", Intel, |c| c.tr_arbytes = 0),
    ("tr-ldt", Intel, |c| c.tr_arbytes = 0x82),
    ("tr-16-bit-in-long-mode", Intel, |c| c.tr_arbytes = 0x83),
    ("tr-code", Intel, |c| c.tr_arbytes = 0x9b),
    ("tr-selector", Intel, |c| c.tr_sel = 0x44),
    ("tr-limit", Intel, |c| c.tr_limit = 0x12_3456),
    ("ldtr-tss", Intel, |c| c.ldtr_arbytes = 0x8b),
    ("ldtr-selector", Intel, |c| {
        (c.ldtr_arbytes, c.ldtr_sel) = (0x82, 0x4c)
    }),
    ("ldtr-limit", Intel, |c| {
        (c.ldtr_arbytes, c.ldtr_limit) = (0x82, 0x12_3456)
    }),
    ("ss-dpl-in-real-mode", Intel, |c| {
        real_mode(c);
        c.cs_arbytes = 0xfb;
        c.ss_arbytes = 0xf3;
    }),
    ("v86-limit", Intel, |c| {
        virtual_8086(c);
        c.ds_limit = !0;
    }),
    ("v86-base", Intel, |c| {
        virtual_8086(c);
        c.gs_base = 0;
    }),
    ("v86-rights", Intel, |c| {
        virtual_8086(c);
        c.ss_arbytes = 0x93;
    }),
];

/// Changes to the same that leave something a processor can run.
const POSSIBLE: &[(&str, fn(&mut HvmHwCpu))] = &[
    // As toolstacks set it.
    ("rflags-0", |c| c.rflags = 0),
    ("rip-after-lower-half", |c| c.rip = 1 << 47),
    ("rip-upper-half", |c| c.rip = 0xffff_8000_0000_0000),
    ("user", |c| {
        c.cs_arbytes = 0xafb;
        c.ss_arbytes = 0xcf3;
    }),
    ("user-without-stack-segment", |c| {
        c.cs_arbytes = 0xafb;
        c.ss_arbytes = 0x60;
        c.ds_arbytes = 0;
    }),
    ("compatibility", |c| c.cs_arbytes = 0xc9b),
    ("bases", |c| {
        c.fs_base = 0xffff_ffff_8000_0000;
        c.gs_base = 0x7fff_ffff_f000;
        c.shadow_gs = !0;
    }),
    ("ldt", |c| {
        (c.ldtr_arbytes, c.ldtr_sel, c.ldtr_limit) = (0x82, 0x48, 0xffff)
    }),
    ("real-mode", real_mode),
    ("virtual-8086", virtual_8086),
    ("32-bit", |c| {
        (c.cr0, c.cr4, c.msr_efer) = (0x11, 0, 0);
        c.cs_arbytes = 0xc9b;
    }),
    ("breakpoint", |c| c.dr7 = 0x401),
    ("interrupt", |c| {
        c.rflags |= 1 << 9;
        c.pending_event = 0x8000_0030;
    }),
    ("page-fault", |c| {
        (c.pending_event, c.error_code) = (0x8000_0b0e, 0x1f)
    }),
    ("nmi", |c| c.pending_event = 0x8000_0202),
    ("software-interrupt", |c| c.pending_event = 0x8000_0480),
];

/// 64-bit kernel code.
fn long_mode() -> HvmHwCpu {
    let mut c = HvmHwCpu::new_zeroed();
    (c.rip, c.rflags, c.rsp) = (0x10_0000, 2, 0x9000);
    (c.cr0, c.cr3, c.cr4) = (0x8001_0011, 0x1000, 0x20);
    c.msr_efer = 0x500;
    (c.cs_arbytes, c.ss_arbytes, c.tr_arbytes) = (0xa9b, 0xc93, 0x8b);
    (c.ds_arbytes, c.es_arbytes) = (0xc93, 0xc93);
    (c.cs_limit, c.ss_limit, c.ds_limit, c.es_limit) = (!0, !0, !0, !0);
    (c.cs_sel, c.ss_sel, c.ds_sel, c.tr_sel) = (8, 0x10, 0x10, 0x40);
    (c.tr_limit, c.gdtr_limit, c.idtr_limit) = (0x67, 0x7f, 0xfff);
    (c.dr6, c.dr7) = (0xffff_0ff0, 0x400);
    c
}

fn set_segments(c: &mut HvmHwCpu, rights: u32) {
    (c.cs_arbytes, c.ss_arbytes, c.ds_arbytes) = (rights, rights, rights);
    (c.es_arbytes, c.fs_arbytes, c.gs_arbytes) = (rights, rights, rights);
    (c.cs_limit, c.ss_limit, c.ds_limit) = (0xffff, 0xffff, 0xffff);
    (c.es_limit, c.fs_limit, c.gs_limit) = (0xffff, 0xffff, 0xffff);
    (c.cs_sel, c.ss_sel, c.ds_sel) = (0x1234, 0x1234, 0x1234);
    (c.es_sel, c.fs_sel, c.gs_sel) = (0x1234, 0x1234, 0x1234);
    (c.cs_base, c.ss_base, c.ds_base) = (0x1_2340, 0x1_2340, 0x1_2340);
    (c.es_base, c.fs_base, c.gs_base) = (0x1_2340, 0x1_2340, 0x1_2340);
    c.rip = 0x100;
    c.msr_efer = 0;
}

fn real_mode(c: &mut HvmHwCpu) {
    set_segments(c, 0x93);
    (c.cr0, c.cr4) = (0x10, 0);
    c.cs_arbytes = 0x9b;
}

fn virtual_8086(c: &mut HvmHwCpu) {
    set_segments(c, 0xf3);
    (c.cr0, c.cr4) = (0x11, 0);
    c.rflags |= 1 << 17;
}

struct Context {
    bytes: [u8; ROOM],
    len: usize,
}

static mut BEFORE: Context = Context {
    bytes: [0; ROOM],
    len: 0,
};
static mut AFTER: Context = Context {
    bytes: [0; ROOM],
    len: 0,
};

fn domctl<T: IntoBytes + Immutable>(cmd: u32, domain: u16, payload: &T) -> (i64, XenDomctl) {
    let mut c = XenDomctl::new_zeroed();
    (c.cmd, c.interface_version, c.domain) = (cmd, DomctlVersion::V17, DomId(domain));
    c.set_payload(payload);
    let r = call(HYPERVISOR_DOMCTL, [&raw mut c as u64, 0, 0, 0, 0]);
    (r, c)
}

fn create() -> Result<u16, i64> {
    let mut new = XenDomctlCreatedomainV17::new_zeroed();
    new.flags = XEN_DOMCTL_CDF_HVM | XEN_DOMCTL_CDF_HAP;
    (new.max_vcpus, new.max_evtchn_port) = (1, 1023);
    (new.max_grant_frames, new.max_maptrack_frames) = (-1, -1);
    new.grant_opts = 1;
    new.arch.emulation_flags = XEN_X86_EMU_LAPIC;
    let (r, made) = domctl(XEN_DOMCTL_CREATEDOMAIN, 0xffff, &new);
    if r != 0 {
        return Err(r);
    }
    match domctl(
        XEN_DOMCTL_MAX_VCPUS,
        made.domain.0,
        &XenDomctlMaxVcpus { max: 1 },
    )
    .0
    {
        0 => Ok(made.domain.0),
        r => Err(r),
    }
}

fn get(domain: u16, to: &mut Context) -> i64 {
    let h = XenDomctlHvmcontext {
        size: ROOM as u32,
        _pad: 0,
        buffer: GuestHandle::new(to.bytes.as_mut_ptr() as u64),
    };
    let (r, back) = domctl(XEN_DOMCTL_GETHVMCONTEXT, domain, &h);
    to.len = if r == 0 {
        back.payload::<XenDomctlHvmcontext>().size as usize
    } else {
        0
    };
    // Time goes on.
    if let Some(tsc) = record(to, SaveCode::CPU).and_then(|(at, _)| {
        let at = at + core::mem::offset_of!(HvmHwCpu, tsc);
        to.bytes.get_mut(at..at + 8)
    }) {
        tsc.fill(0);
    }
    r
}

/// Where the record of a type begins, and its length.
fn record(c: &Context, code: SaveCode) -> Option<(usize, usize)> {
    let mut at = 0;
    loop {
        let (head, _) = HvmSaveDescriptor::read_from_prefix(c.bytes.get(at..c.len)?).ok()?;
        at += size_of::<HvmSaveDescriptor>();
        if head.typecode == code {
            return Some((at, head.length as usize));
        }
        at += head.length as usize;
    }
}

/// Loads one record, after the header that the domain itself gave.
fn set<T: IntoBytes + Immutable>(
    domain: u16,
    header: &HvmSaveHeader,
    code: SaveCode,
    r: &T,
) -> i64 {
    let mut bytes = [0u8; 4096];
    let mut at = 0;
    let mut put = |b: &[u8]| {
        if let Some(to) = bytes.get_mut(at..at + b.len()) {
            to.copy_from_slice(b);
        }
        at += b.len();
    };
    for (typecode, contents) in [
        (SaveCode::HEADER, header.as_bytes()),
        (code, r.as_bytes()),
        (SaveCode::END, &[]),
    ] {
        put(HvmSaveDescriptor {
            typecode,
            instance: 0,
            length: contents.len() as u32,
        }
        .as_bytes());
        put(contents);
    }
    let h = XenDomctlHvmcontext {
        size: at as u32,
        _pad: 0,
        buffer: GuestHandle::new(bytes.as_ptr() as u64),
    };
    domctl(XEN_DOMCTL_SETHVMCONTEXT, domain, &h).0
}

struct Verdict {
    refused: u64,
    failures: u64,
}

impl Verdict {
    fn is(&mut self, got: i64, expected: i64, name: &str) {
        self.check(got == expected, name, got);
    }

    fn check(&mut self, good: bool, name: &str, got: i64) {
        if !good {
            self.failures += 1;
            println!("CONTEXT-FAIL {name}: {got:#x}");
        }
    }
}

#[unsafe(no_mangle)]
fn guest_main(_: &'static HvmStartInfo) {
    println!("CONTEXT-BEGIN");
    let mut v = Verdict {
        refused: 0,
        failures: 0,
    };
    let intel = cpu::cpuid(0, 0)[1] == u32::from_le_bytes(*b"Genu");
    match create() {
        Ok(domain) => {
            contexts(&mut v, domain, intel);
            v.is(
                domctl(XEN_DOMCTL_DESTROYDOMAIN, domain, &0u64).0,
                0,
                "destroy",
            );
        }
        Err(r) => v.check(false, "create", r),
    }
    println!("CONTEXT refused {}", v.refused);
    own_msrs(&mut v, intel);
    if intel {
        own_control_registers(&mut v);
    }
    println!("CONTEXT-END {}", v.failures);
}

fn contexts(v: &mut Verdict, domain: u16, intel: bool) {
    // SAFETY: there is one processor, and nobody else refers to them.
    let (before, after) = unsafe { (&mut *(&raw mut BEFORE), &mut *(&raw mut AFTER)) };
    let r = get(domain, before);
    v.is(r, 0, "get");
    let header = record(before, SaveCode::HEADER)
        .and_then(|(at, _)| HvmSaveHeader::read_from_prefix(before.bytes.get(at..)?).ok());
    let Some((header, _)) = header else {
        return v.check(false, "header", before.len as i64);
    };
    let good = long_mode();
    v.is(set(domain, &header, SaveCode::CPU, &good), 0, "good");
    get(domain, before);
    let mut same = |v: &mut Verdict, before: &Context, name: &str| {
        let r = get(domain, after);
        v.is(r, 0, name);
        let differs =
            (0..before.len.max(after.len)).find(|&i| before.bytes.get(i) != after.bytes.get(i));
        v.check(differs.is_none(), name, differs.map_or(0, |at| at as i64));
    };
    for (name, by, change) in IMPOSSIBLE {
        let mut c = good;
        change(&mut c);
        let r = set(domain, &header, SaveCode::CPU, &c);
        if intel || *by == Both {
            v.is(r, EINVAL, name);
            v.refused += 1;
            same(v, before, name);
        } else {
            v.is(r, 0, name);
            v.is(set(domain, &header, SaveCode::CPU, &good), 0, name);
        }
    }
    let mtrr = record(before, SaveCode::MTRR)
        .and_then(|(at, _)| HvmHwMtrr::read_from_prefix(before.bytes.get(at..)?).ok());
    match mtrr {
        Some((mtrr, _)) => {
            for (name, pat) in [("pat-2", 2), ("pat-3", 3 << 56), ("pat-8", 8 << 8)] {
                let mut m = mtrr;
                m.msr_pat_cr = pat;
                v.is(set(domain, &header, SaveCode::MTRR, &m), EINVAL, name);
                v.refused += 1;
                same(v, before, name);
            }
            v.is(set(domain, &header, SaveCode::MTRR, &mtrr), 0, "pat");
            // A context without registers leaves the processor down.
            v.is(set(domain, &header, SaveCode::CPU, &good), 0, "good");
        }
        None => v.check(false, "mtrr", 0),
    }
    same(v, before, "good again");
    for (name, change) in POSSIBLE {
        let mut c = good;
        change(&mut c);
        v.is(set(domain, &header, SaveCode::CPU, &c), 0, name);
        v.is(get(domain, before), 0, name);
        let got = record(before, SaveCode::CPU)
            .and_then(|(at, _)| HvmHwCpu::read_from_prefix(before.bytes.get(at..)?).ok());
        let fits = got.is_some_and(|(g, _)| {
            (g.rip, g.cr0, g.cr4, g.msr_efer) == (c.rip, c.cr0, c.cr4, c.msr_efer)
                && (g.fs_base, g.gs_base, g.shadow_gs) == (c.fs_base, c.gs_base, c.shadow_gs)
                && g.rflags == c.rflags | 2
        });
        v.check(fits, name, 0);
    }
    v.is(
        set(domain, &header, SaveCode::CPU, &good),
        0,
        "good at the end",
    );
}

/// What MSRs cannot hold is #GP, and not the next entry's to find.
fn own_msrs(v: &mut Verdict, intel: bool) {
    let mut refused = |name: &str, msr: u32, value: u64| {
        let trap = guarded!(
            "wrmsr";
            in("ecx") msr,
            in("eax") value as u32,
            in("edx") (value >> 32) as u32,
        );
        v.check(trap == Some(GP), name, trap.map_or(-1, |t| t as i64));
    };
    let efer = cpu::rdmsr(0xc000_0080);
    refused("own efer-reserved", 0xc000_0080, efer | 1 << 1);
    refused("own efer-svme", 0xc000_0080, efer | 1 << 12);
    refused("own efer-high", 0xc000_0080, efer | 1 << 63);
    refused("own efer-no-lme", 0xc000_0080, efer & !(1 << 8));
    refused("own pat", 0x277, 2);
    // The processor's own to refuse: QEMU's does not, and VMRUN does not mind.
    if intel {
        for (name, msr) in [
            ("own fs-base", 0xc000_0100),
            ("own gs-base", 0xc000_0101),
            ("own shadow-gs", 0xc000_0102),
            ("own lstar", 0xc000_0082),
            ("own cstar", 0xc000_0083),
            ("own sysenter-esp", 0x175),
            ("own sysenter-eip", 0x176),
        ] {
            refused(name, msr, 1 << 47);
        }
    }
    // LMA is not the guest's to change.
    cpu::wrmsr(0xc000_0080, efer & !(1 << 10));
    v.check(cpu::rdmsr(0xc000_0080) == efer, "own efer-lma", 0);
}

/// The same of control registers. (QEMU's processors take what they should refuse.)
fn own_control_registers(v: &mut Verdict) {
    macro_rules! refused {
        ($name:literal, $read:literal, $write:literal, $change:expr) => {{
            let old: u64;
            // SAFETY: reads a register.
            unsafe { core::arch::asm!($read, out(reg) old) };
            let change: fn(u64) -> u64 = $change;
            let trap = guarded!($write; new = in(reg) change(old));
            v.check(trap == Some(GP), $name, trap.map_or(-1, |t| t as i64));
        }};
    }
    refused!("own cr0-high", "mov {}, cr0", "mov cr0, {new}", |c| c | 1
        << 32);
    refused!("own cr0-nw", "mov {}, cr0", "mov cr0, {new}", |c| c & !(1
        << 30)
        | 1 << 29);
    refused!(
        "own cr0-pg-without-pe",
        "mov {}, cr0",
        "mov cr0, {new}",
        |c| c & !1
    );
    refused!(
        "own cr0-no-pg-in-long-mode",
        "mov {}, cr0",
        "mov cr0, {new}",
        |c| c & !(1 << 31)
    );
    refused!("own cr3-high", "mov {}, cr3", "mov cr3, {new}", |c| c | 1
        << 52);
    refused!("own cr4-vmxe", "mov {}, cr4", "mov cr4, {new}", |c| c | 1
        << 13);
    refused!("own cr4-15", "mov {}, cr4", "mov cr4, {new}", |c| c | 1
        << 15);
    refused!("own cr4-cet", "mov {}, cr4", "mov cr4, {new}", |c| c | 1
        << 23);
    refused!("own cr4-high", "mov {}, cr4", "mov cr4, {new}", |c| c | 1
        << 32);
    refused!("own cr4-no-pae", "mov {}, cr4", "mov cr4, {new}", |c| c
        & !(1 << 5));
    refused!("own dr7-high", "mov {}, dr7", "mov dr7, {new}", |c| c | 1
        << 32);
    refused!("own dr6-high", "mov {}, dr6", "mov dr6, {new}", |c| c | 1
        << 32);
}
