//! The hostile micro-guest: it asks for what it must not get and says what it got.
//!
//! As an `xl` guest (`type="pvh"`) it has no privilege. Without arguments it does everything that a
//! guest must survive: each group ends with `ABUSE name ok`, a surprise is `ABUSE-FAIL name: what`, and
//! the last line is `ABUSE-END failures`. `only=NAME` runs one group, or one of [`FATAL`], after which
//! there is no guest: its end is for the hypervisor to report.
#![no_std]
#![no_main]

use galvan_dom0_proto::domctl::XEN_DOMCTL_GETDOMAININFO;
use galvan_dom0_proto::event_channel as ec;
use galvan_dom0_proto::grant_table as gt;
use galvan_dom0_proto::hvm::HvmStartInfo;
use galvan_dom0_proto::memory as mem;
use galvan_dom0_proto::sched::{SCHEDOP_BLOCK, SCHEDOP_YIELD};
use galvan_dom0_proto::sysctl::{XEN_SYSCTL_INTERFACE_VERSION, XEN_SYSCTL_PHYSINFO};
use galvan_dom0_proto::vcpu::VCPUOP_SET_SINGLESHOT_TIMER;
use galvan_dom0_proto::xen as nr;
use galvan_dom0_proto::{DomId, GntStatus, GuestHandle};
use galvan_guests::hypercall::{call, call_raw, op};
use galvan_guests::{Page, cpu, entry, events, guarded, println};

#[path = "abuse/xapic.rs"]
mod xapic;

/// Error numbers of the ABI, negated.
const EPERM: i64 = -1;
const EEXIST: i64 = -17;
const ENOSPC: i64 = -28;
const ENOSYS: i64 = -38;

const GP: u64 = 13;

/// The version of domctl that Debian 13's tools speak.
const DOMCTL_VERSION: u64 = 0x17;

/// What survives, by name.
const GROUPS: &[(&str, fn(&mut Verdict))] = &[
    ("numbers", numbers),
    ("pointers", pointers),
    ("privilege", privilege),
    ("memory", memory),
    ("grants", grants),
    ("channels", channels),
    ("storm", storm),
    ("timers", timers),
    ("msrs", msrs),
    ("instructions", instructions),
    ("ports", ports),
    ("mmio", mmio),
];

/// What survives and is done only when asked for by name. The first: QEMU, and with it the machine, does not
/// survive it everywhere (`docs/emulators.md`). The second: no group before it may have been at the local APIC.
const ALONE: &[(&str, fn(&mut Verdict))] = &[("priority", priority), ("xapic", xapic::xapic)];

/// What ends the guest, or makes it hang where only `xl destroy` helps.
const FATAL: &[(&str, fn())] = &[
    ("reserved", reserved_bits),
    ("triple", triple_fault),
    ("runaway", runaway),
    ("asleep", asleep),
    ("tables", tables_nowhere),
    ("nowhere", code_nowhere),
];

static TABLE: Page = Page::new();
static GRANTED: Page = Page::new();
static SCRATCH: Page = Page::new();

/// What a group found.
struct Verdict {
    name: &'static str,
    failures: u64,
}

impl Verdict {
    fn check(&mut self, good: bool, what: &str, got: i64) {
        if !good {
            self.failures += 1;
            println!("ABUSE-FAIL {}: {what}: {got:#x}", self.name);
        }
    }

    fn is(&mut self, got: i64, expected: i64, what: &str) {
        self.check(got == expected, what, got);
    }

    fn refused(&mut self, got: i64, what: &str) {
        self.check((-4095..0).contains(&got), what, got);
    }
}

/// The value of `only=` on the command line.
fn only(start: &HvmStartInfo) -> &'static [u8] {
    if start.cmdline_paddr == 0 {
        return &[];
    }
    // SAFETY: the PVH ABI passes a string that ends with a zero, and nobody changes it.
    let line =
        unsafe { core::ffi::CStr::from_ptr(start.cmdline_paddr as *const core::ffi::c_char) };
    line.to_bytes()
        .split(|&b| b == b' ')
        .find_map(|word| word.strip_prefix(b"only="))
        .unwrap_or_default()
}

#[unsafe(no_mangle)]
fn guest_main(start: &'static HvmStartInfo) {
    let only = only(start);
    println!("ABUSE-BEGIN");
    for (name, end) in FATAL {
        if only == name.as_bytes() {
            println!("ABUSE {name}");
            end();
            println!("ABUSE-FAIL {name}: it goes on");
            return;
        }
    }
    let mut failures = 0;
    let usual = GROUPS.iter().filter(|_| only.is_empty());
    let named = GROUPS
        .iter()
        .chain(ALONE)
        .filter(|(name, _)| only == name.as_bytes());
    for (name, run) in usual.chain(named) {
        let mut verdict = Verdict { name, failures: 0 };
        run(&mut verdict);
        if verdict.failures == 0 {
            println!("ABUSE {name} ok");
        }
        failures += verdict.failures;
    }
    println!("ABUSE-END {failures}");
}

/// Instructions that may trap or not.
macro_rules! attempt {
    ($($t:tt)*) => { let _ = guarded!($($t)*); };
}

/// Addresses that are none of the guest's: unmapped, an MMIO page, past all memory, not canonical, wrapping.
const BAD: &[u64] = &[
    0x1_2345_6000,
    0xfee0_0ff8,
    0xf000_0000,
    entry::HOLE + 0xffc,
    1 << 47,
    0xffff_8000_0000_0000,
    u64::MAX - 7,
    u64::MAX,
];

/// Hypercalls that are none, in every part of RAX.
fn numbers(v: &mut Verdict) {
    for number in [
        43,
        44,
        47,
        56,
        63,
        64,
        127,
        255,
        0x8000_0000,
        u64::from(u32::MAX),
    ] {
        let r = call_raw(number, [0; 5]);
        v.is(r as i32 as i64, ENOSYS, "a hypercall that is none");
    }
    // Calls of paravirtual kernels.
    for number in [
        nr::HYPERVISOR_SET_TRAP_TABLE,
        nr::HYPERVISOR_MMU_UPDATE,
        nr::HYPERVISOR_SET_GDT,
        nr::HYPERVISOR_STACK_SWITCH,
        nr::HYPERVISOR_UPDATE_VA_MAPPING,
        nr::HYPERVISOR_SET_SEGMENT_BASE,
    ] {
        v.refused(call(number, [1, 2, 3, 4, 5]), "a paravirtual kernel's call");
    }
    // Commands that are none.
    for number in [
        nr::HYPERVISOR_MEMORY_OP,
        nr::HYPERVISOR_XEN_VERSION,
        nr::HYPERVISOR_GRANT_TABLE_OP,
        nr::HYPERVISOR_SCHED_OP,
        nr::HYPERVISOR_EVENT_CHANNEL_OP,
        nr::HYPERVISOR_HVM_OP,
        nr::HYPERVISOR_PHYSDEV_OP,
    ] {
        for cmd in [60, 63, 0x7fff_ffff, 0xffff_ffff] {
            v.refused(
                call(number, [cmd, SCRATCH.addr(), 1, 0, 0]),
                "a command that is none",
            );
        }
        v.refused(
            call(nr::HYPERVISOR_VCPU_OP, [60, 0, SCRATCH.addr(), 0, 0]),
            "a command that is none",
        );
        v.refused(
            call(nr::HYPERVISOR_VCPU_OP, [0, 7777, 0, 0, 0]),
            "a vCPU that is not there",
        );
    }
}

/// Every command of every hypercall with structures that are not there.
fn pointers(v: &mut Verdict) {
    let calls = [
        nr::HYPERVISOR_MEMORY_OP,
        nr::HYPERVISOR_XEN_VERSION,
        nr::HYPERVISOR_CONSOLE_IO,
        nr::HYPERVISOR_GRANT_TABLE_OP,
        nr::HYPERVISOR_VM_ASSIST,
        nr::HYPERVISOR_VCPU_OP,
        nr::HYPERVISOR_MMUEXT_OP,
        nr::HYPERVISOR_XSM_OP,
        nr::HYPERVISOR_NMI_OP,
        nr::HYPERVISOR_SCHED_OP,
        nr::HYPERVISOR_CALLBACK_OP,
        nr::HYPERVISOR_EVENT_CHANNEL_OP,
        nr::HYPERVISOR_PHYSDEV_OP,
        nr::HYPERVISOR_HVM_OP,
        nr::HYPERVISOR_SYSCTL,
        nr::HYPERVISOR_DOMCTL,
        nr::HYPERVISOR_KEXEC_OP,
        nr::HYPERVISOR_ARGO_OP,
        nr::HYPERVISOR_XENPMU_OP,
        nr::HYPERVISOR_DM_OP,
        nr::HYPERVISOR_HYPFS_OP,
        nr::HYPERVISOR_PLATFORM_OP,
        nr::HYPERVISOR_ARCH_0,
        nr::HYPERVISOR_MULTICALL,
    ];
    let mut made = 0u64;
    for number in calls {
        for cmd in 0..64u64 {
            // These two wait, which is what they are for.
            if number == nr::HYPERVISOR_SCHED_OP && cmd == u64::from(SCHEDOP_BLOCK) {
                continue;
            }
            for &at in BAD {
                // Where the structure is the second argument, and where it is the third.
                let args = match number {
                    nr::HYPERVISOR_MULTICALL => [at, cmd, at, at, at],
                    nr::HYPERVISOR_VCPU_OP => [cmd, 1, at, at, at],
                    _ => [cmd, at, at, at, at],
                };
                let r = call(number, args);
                v.check((-4095..1 << 32).contains(&r), "no errno", r);
                // Calls that take counts: few, many, more than fit.
                for n in [1, 3, 0x7fff_ffff, u64::MAX >> 1] {
                    let args = match number {
                        nr::HYPERVISOR_MULTICALL => [at, n, 0, 0, 0],
                        nr::HYPERVISOR_CONSOLE_IO => [cmd, n, at, 0, 0],
                        nr::HYPERVISOR_VCPU_OP => [cmd, 1, at, n, 0],
                        _ => [cmd, at, n, at, at],
                    };
                    let r = call(number, args);
                    v.check((-4095..1 << 32).contains(&r), "no errno", r);
                    made += 1;
                }
                made += 1;
            }
        }
    }
    println!("ABUSE {} calls with pointers to nowhere", made);
    // A structure that begins in memory and ends in none.
    let last = 0x1_0000_0000 - 4;
    v.refused(
        call(
            nr::HYPERVISOR_MEMORY_OP,
            [mem::XENMEM_ADD_TO_PHYSMAP.into(), last, 0, 0, 0],
        ),
        "half a structure",
    );
}

/// What only a control domain may do.
fn privilege(v: &mut Verdict) {
    SCRATCH.set(
        0,
        DOMCTL_VERSION << 32 | u64::from(XEN_DOMCTL_GETDOMAININFO),
    );
    SCRATCH.set(1, 0);
    v.is(
        call(nr::HYPERVISOR_DOMCTL, [SCRATCH.addr(), 0, 0, 0, 0]),
        EPERM,
        "domctl on dom0",
    );
    SCRATCH.set(
        0,
        u64::from(XEN_SYSCTL_INTERFACE_VERSION) << 32 | u64::from(XEN_SYSCTL_PHYSINFO),
    );
    v.is(
        call(nr::HYPERVISOR_SYSCTL, [SCRATCH.addr(), 0, 0, 0, 0]),
        EPERM,
        "sysctl",
    );
    v.refused(
        call(nr::HYPERVISOR_PLATFORM_OP, [SCRATCH.addr(), 0, 0, 0, 0]),
        "platform_op",
    );

    // dom0's pages, by number.
    for owner in [0, 1, 0x7ff1, 0x7ff2] {
        let (mut idx, mut gpfn, mut err) = (256u64, SCRATCH.gfn(), 0i32);
        let mut map = mem::XenAddToPhysmapBatch {
            domid: DomId::SELF,
            space: mem::XENMAPSPACE_GMFN_FOREIGN as u16,
            size: 1,
            foreign_domid: DomId(owner),
            idxs: GuestHandle::new(&raw mut idx as u64),
            gpfns: GuestHandle::new(&raw mut gpfn as u64),
            errs: GuestHandle::new(&raw mut err as u64),
        };
        let r = op(
            nr::HYPERVISOR_MEMORY_OP,
            mem::XENMEM_ADD_TO_PHYSMAP_BATCH,
            &mut map,
        );
        v.check(r < 0 || err < 0, "a foreign page mapped", r);
    }
    for domid in [0, 999, 0x7ff1] {
        let mut map = mem::XenAddToPhysmap {
            domid: DomId(domid),
            size: 0,
            space: mem::XENMAPSPACE_SHARED_INFO,
            idx: 0,
            gpfn: SCRATCH.gfn(),
        };
        v.refused(
            op(
                nr::HYPERVISOR_MEMORY_OP,
                mem::XENMEM_ADD_TO_PHYSMAP,
                &mut map,
            ),
            "another's physmap",
        );
        let mut gone = mem::XenRemoveFromPhysmap {
            domid: DomId(domid),
            _pad: [0; 6],
            gpfn: 256,
        };
        v.refused(
            op(
                nr::HYPERVISOR_MEMORY_OP,
                mem::XENMEM_REMOVE_FROM_PHYSMAP,
                &mut gone,
            ),
            "another's page removed",
        );
    }
}

/// Reservations that make no sense.
fn memory(v: &mut Verdict) {
    let mut at = [0x100_0000_0000u64; 4];
    for (nr_extents, order) in [
        (1, 0),
        (4, 9),
        (1, 63),
        (1, 64),
        (u64::MAX, 0),
        (u64::MAX >> 6, 18),
    ] {
        for cmd in [
            mem::XENMEM_INCREASE_RESERVATION,
            mem::XENMEM_DECREASE_RESERVATION,
            mem::XENMEM_POPULATE_PHYSMAP,
        ] {
            for domid in [DomId::SELF, DomId(0), DomId(0x7ff2)] {
                let mut r = mem::XenMemoryReservation {
                    extent_start: GuestHandle::new(at.as_mut_ptr() as u64),
                    nr_extents,
                    extent_order: order,
                    mem_flags: 0,
                    domid,
                    _pad: [0; 6],
                };
                let done = op(nr::HYPERVISOR_MEMORY_OP, cmd, &mut r);
                v.check(done <= 0, "pages that cannot be", done);
            }
        }
    }
    for gpfn in [u64::MAX, u64::MAX >> 12, 1 << 40, 0xfee00] {
        for space in [
            mem::XENMAPSPACE_SHARED_INFO,
            mem::XENMAPSPACE_GRANT_TABLE,
            mem::XENMAPSPACE_GMFN,
            mem::XENMAPSPACE_GMFN_FOREIGN,
            99,
        ] {
            for idx in [u64::MAX, 1 << 33, 1 << 63] {
                let mut map = mem::XenAddToPhysmap {
                    domid: DomId::SELF,
                    size: 0,
                    space,
                    idx,
                    gpfn,
                };
                let r = op(
                    nr::HYPERVISOR_MEMORY_OP,
                    mem::XENMEM_ADD_TO_PHYSMAP,
                    &mut map,
                );
                // Shared info has no index, and may lie where the APIC is.
                let apic = space == mem::XENMAPSPACE_SHARED_INFO && gpfn == 0xfee00;
                v.check(r < 0 || apic, "mapped nowhere", gpfn as i64);
            }
        }
        let mut gone = mem::XenRemoveFromPhysmap {
            domid: DomId::SELF,
            _pad: [0; 6],
            gpfn,
        };
        let r = op(
            nr::HYPERVISOR_MEMORY_OP,
            mem::XENMEM_REMOVE_FROM_PHYSMAP,
            &mut gone,
        );
        v.check(
            r < 0 || gpfn == 0xfee00,
            "removed from nowhere",
            gpfn as i64,
        );
    }
}

fn map_grant(dom: DomId, gref: u32, host_addr: u64, flags: u32) -> gt::GnttabMapGrantRef {
    let mut map = gt::GnttabMapGrantRef {
        host_addr,
        flags,
        gref,
        dom,
        status: GntStatus(0),
        handle: 0,
        dev_bus_addr: 0,
    };
    let r = call(
        nr::HYPERVISOR_GRANT_TABLE_OP,
        [
            gt::GNTTABOP_MAP_GRANT_REF.into(),
            &raw mut map as u64,
            1,
            0,
            0,
        ],
    );
    if r != 0 {
        map.status = GntStatus(-1);
    }
    map
}

fn unmap_grant(host_addr: u64, handle: u32) -> i64 {
    let mut unmap = gt::GnttabUnmapGrantRef {
        host_addr,
        dev_bus_addr: 0,
        handle,
        status: GntStatus(0),
        _pad: 0,
    };
    let r = call(
        nr::HYPERVISOR_GRANT_TABLE_OP,
        [
            gt::GNTTABOP_UNMAP_GRANT_REF.into(),
            &raw mut unmap as u64,
            1,
            0,
            0,
        ],
    );
    if r != 0 { r } else { unmap.status.0.into() }
}

fn copy(source: gt::GnttabCopyPtr, dest: gt::GnttabCopyPtr, len: u16, flags: u16) -> i64 {
    let mut copy = gt::GnttabCopy {
        source,
        dest,
        len,
        flags,
        status: GntStatus(0),
        _pad: 0,
    };
    let r = call(
        nr::HYPERVISOR_GRANT_TABLE_OP,
        [gt::GNTTABOP_COPY.into(), &raw mut copy as u64, 1, 0, 0],
    );
    if r != 0 { r } else { copy.status.0.into() }
}

/// Grants of others that were never given, handles of others, copies over the edges of pages.
fn grants(v: &mut Verdict) {
    for dom in [
        DomId(0),
        DomId(1),
        DomId(0x7ff1),
        DomId(0x7ff2),
        DomId(0x7ff4),
    ] {
        for gref in [0, 1, 8, 9, 511, 512, 70_000, u32::MAX] {
            let m = map_grant(dom, gref, SCRATCH.addr(), gt::GNTMAP_HOST_MAP);
            v.check(
                m.status.0 < 0,
                "another's page by a forged reference",
                i64::from(gref),
            );
            let theirs = gt::GnttabCopyPtr {
                gmfn: gref.into(),
                domid: dom,
                offset: 0,
                _pad: 0,
            };
            let mine = gt::GnttabCopyPtr {
                gmfn: SCRATCH.gfn(),
                domid: DomId::SELF,
                offset: 0,
                _pad: 0,
            };
            let r = copy(theirs, mine, 64, gt::GNTCOPY_SOURCE_GREF as u16);
            v.check(r < 0, "copied by a forged reference", r);
            let r = copy(mine, theirs, 64, gt::GNTCOPY_DEST_GREF as u16);
            v.check(r < 0, "overwritten by a forged reference", r);
            // Without a grant at all.
            let r = copy(theirs, mine, 64, 0);
            v.check(r < 0, "copied without a grant", r);
        }
    }
    for handle in [0, 1, 7, 4096, u32::MAX] {
        let r = unmap_grant(SCRATCH.addr(), handle);
        v.check(r < 0, "a handle that was not given", r);
    }
    // A grant to itself.
    let mut map = mem::XenAddToPhysmap {
        domid: DomId::SELF,
        size: 0,
        space: mem::XENMAPSPACE_GRANT_TABLE,
        idx: 0,
        gpfn: TABLE.gfn(),
    };
    v.is(
        op(
            nr::HYPERVISOR_MEMORY_OP,
            mem::XENMEM_ADD_TO_PHYSMAP,
            &mut map,
        ),
        0,
        "its own table",
    );
    // Domain 0x7ff0 is the caller; the entry names its own id, which it learns by trying.
    let me = (1..0x400u16).find(|&id| {
        TABLE.set(
            9,
            u64::from(gt::GTF_PERMIT_ACCESS as u16) | u64::from(id) << 16 | GRANTED.gfn() << 32,
        );
        let from = gt::GnttabCopyPtr {
            gmfn: 9,
            domid: DomId::SELF,
            offset: 0,
            _pad: 0,
        };
        let to = gt::GnttabCopyPtr {
            gmfn: SCRATCH.gfn(),
            domid: DomId::SELF,
            offset: 0,
            _pad: 0,
        };
        copy(from, to, 64, gt::GNTCOPY_SOURCE_GREF as u16) == 0
    });
    let Some(me) = me.map(DomId) else {
        v.check(false, "no grant to itself works", 0);
        return;
    };
    let from = gt::GnttabCopyPtr {
        gmfn: 9,
        domid: DomId::SELF,
        offset: 4000,
        _pad: 0,
    };
    let to = gt::GnttabCopyPtr {
        gmfn: SCRATCH.gfn(),
        domid: DomId::SELF,
        offset: 0,
        _pad: 0,
    };
    for (offset, len) in [
        (4000, 97),
        (4095, 2),
        (4096, 1),
        (65535, 1),
        (0, 4097),
        (0, 65535),
        (1, 4096),
    ] {
        let r = copy(
            gt::GnttabCopyPtr { offset, ..from },
            to,
            len,
            gt::GNTCOPY_SOURCE_GREF as u16,
        );
        v.check(r < 0, "a copy over the edge of its source", offset.into());
        let r = copy(
            gt::GnttabCopyPtr { offset: 0, ..from },
            gt::GnttabCopyPtr { offset, ..to },
            len,
            gt::GNTCOPY_SOURCE_GREF as u16,
        );
        v.check(
            r < 0,
            "a copy over the edge of its destination",
            offset.into(),
        );
    }
    // Mapped where no page can be.
    for at in [u64::MAX & !0xfff, 1 << 60, 0xfee0_0000] {
        let m = map_grant(me, 9, at, gt::GNTMAP_HOST_MAP);
        if m.status.0 == 0 {
            v.check(at == 0xfee0_0000, "mapped where nothing can be", at as i64);
            let r = unmap_grant(at, m.handle);
            v.is(r, 0, "and not unmapped");
        }
    }
    // Used and revoked while in use; unmapped twice.
    let m = map_grant(me, 9, SCRATCH.addr(), gt::GNTMAP_HOST_MAP);
    v.is(m.status.0.into(), 0, "a grant to itself");
    TABLE.set(9, 0);
    v.check(
        map_grant(me, 9, SCRATCH.addr(), gt::GNTMAP_HOST_MAP)
            .status
            .0
            < 0,
        "a revoked grant",
        0,
    );
    v.is(
        unmap_grant(SCRATCH.addr(), m.handle),
        0,
        "unmapped after it was revoked",
    );
    let r = unmap_grant(SCRATCH.addr(), m.handle);
    v.check(r < 0, "unmapped twice", r);
    // A grant of what is nobody's.
    for frame in [0xffff_ffffu64, 0xfee00, 0x8000_0000] {
        TABLE.set(
            10,
            u64::from(gt::GTF_PERMIT_ACCESS as u16) | 0x7ff0 << 16 | frame << 32,
        );
        let m = map_grant(me, 10, SCRATCH.addr(), gt::GNTMAP_HOST_MAP);
        v.check(m.status.0 < 0, "a grant of no page", frame as i64);
    }
}

/// All the channels there are, and none too many.
fn channels(v: &mut Verdict) {
    for port in [0, 1023, 4095, 4096, 131_071, 131_072, u32::MAX] {
        let mut p = ec::EvtchnPort { port };
        for cmd in [ec::EVTCHNOP_SEND, ec::EVTCHNOP_CLOSE, ec::EVTCHNOP_UNMASK] {
            let r = op(nr::HYPERVISOR_EVENT_CHANNEL_OP, cmd, &mut p);
            v.check(
                r < 0 || cmd == ec::EVTCHNOP_UNMASK,
                "a channel that is not there",
                port.into(),
            );
        }
        v.check(
            events::bind_interdomain(DomId(0), port).is_err(),
            "dom0's channel",
            port.into(),
        );
    }
    let mut wild = ec::EvtchnBindVirq {
        virq: 0,
        vcpu: 4711,
        port: 0,
    };
    v.refused(
        op(
            nr::HYPERVISOR_EVENT_CHANNEL_OP,
            ec::EVTCHNOP_BIND_VIRQ,
            &mut wild,
        ),
        "a vCPU that is not there",
    );
    for virq in [2, 3, 24, u32::MAX] {
        // The console's, a domain's end, one that is none: dom0's alone.
        let r = events::bind_virq(virq);
        v.check(r.is_err(), "a global virtual interrupt", virq.into());
    }
    let timer = events::bind_virq(nr::VIRQ_TIMER);
    v.check(timer.is_ok(), "its timer", 0);
    v.check(
        events::bind_virq(nr::VIRQ_TIMER) == Err(EEXIST),
        "its timer twice",
        0,
    );
    // Until none is left; each is different.
    let (mut first, mut last, mut n) = (0, 0, 0u64);
    let full = loop {
        match events::alloc_unbound(DomId(0)) {
            Ok(port) => {
                v.check(port > last, "a channel given twice", port.into());
                first = if first == 0 { port } else { first };
                last = port;
                n += 1;
            }
            Err(r) => break r,
        }
        if n > 1 << 18 {
            break 0;
        }
    };
    println!("ABUSE {n} channels");
    v.is(full, ENOSPC, "more channels than there are");
    for port in first..=last {
        let mut p = ec::EvtchnPort { port };
        v.is(
            op(nr::HYPERVISOR_EVENT_CHANNEL_OP, ec::EVTCHNOP_CLOSE, &mut p),
            0,
            "closed",
        );
    }
    if let Ok(port) = timer {
        let mut p = ec::EvtchnPort { port };
        v.is(
            op(nr::HYPERVISOR_EVENT_CHANNEL_OP, ec::EVTCHNOP_CLOSE, &mut p),
            0,
            "the timer closed",
        );
    }
    // Control blocks that are no memory of its own, or leave their page.
    for (gfn, offset) in [
        (u64::MAX, 0),
        (1 << 36, 0),
        (0xfee00, 0),
        (SCRATCH.gfn(), 4092),
        (SCRATCH.gfn(), 3),
        (SCRATCH.gfn(), u32::MAX),
    ] {
        let mut init = ec::EvtchnInitControl {
            control_gfn: gfn,
            offset,
            vcpu: 0,
            link_bits: 0,
            _pad: [0; 7],
        };
        v.refused(
            op(
                nr::HYPERVISOR_EVENT_CHANNEL_OP,
                ec::EVTCHNOP_INIT_CONTROL,
                &mut init,
            ),
            "a control block nowhere",
        );
    }
}

/// A channel to itself with an upcall for each event, where there is an x2APIC.
fn ipi_channel(v: &mut Verdict) -> Option<u32> {
    if !events::enable_x2apic() {
        println!("ABUSE {}: no x2APIC", v.name);
        return None;
    }
    v.is(events::set_up(), 0, "upcalls");
    let port = events::bind_ipi();
    v.check(port.is_ok(), "no IPI channel", 0);
    events::set_masked(port.ok()?, false);
    port.ok()
}

fn close(v: &mut Verdict, port: u32) {
    let mut p = ec::EvtchnPort { port };
    v.is(
        op(nr::HYPERVISOR_EVENT_CHANNEL_OP, ec::EVTCHNOP_CLOSE, &mut p),
        0,
        "closed",
    );
}

/// Events to itself, faster than anybody can want.
fn storm(v: &mut Verdict) {
    let Some(port) = ipi_channel(v) else { return };
    cpu::interrupts_on();
    let before = events::UPCALLS.load(core::sync::atomic::Ordering::Relaxed);
    for _ in 0..20_000 {
        events::send(port);
    }
    cpu::interrupts_off();
    let taken = events::UPCALLS.load(core::sync::atomic::Ordering::Relaxed) - before;
    println!("ABUSE {taken} upcalls of 20000 events");
    v.check(taken > 0, "no upcall", taken as i64);
    close(v, port);
}

/// An interrupt that the task priority holds back comes when the guest lowers that. Says whether it came
/// at once, or only when there was another reason to leave the guest.
fn priority(v: &mut Verdict) {
    let Some(port) = ipi_channel(v) else { return };
    let taken = || events::UPCALLS.load(core::sync::atomic::Ordering::Relaxed);
    // Far less than a turn of the scheduler, or than the time between two ticks of anything.
    let wait = || {
        for n in 0..1000 {
            core::hint::black_box(n);
        }
    };
    let mut at_once = true;
    for enabled in [true, false] {
        let before = taken();
        cpu::interrupts_on();
        attempt!("mov cr8, {x}"; x = in(reg) u64::from(events::VECTOR >> 4));
        events::send(port);
        wait();
        v.is(taken() as i64, before as i64, "an upcall in spite of CR8");
        if !enabled {
            cpu::interrupts_off();
        }
        attempt!("mov cr8, {x}"; x = in(reg) u64::from(events::VECTOR >> 4) - 1);
        wait();
        if !enabled {
            v.is(taken() as i64, before as i64, "an upcall in spite of IF");
            cpu::interrupts_on();
            wait();
        }
        at_once &= taken() == before + 1;
        call(nr::HYPERVISOR_SCHED_OP, [SCHEDOP_YIELD.into(), 0, 0, 0, 0]);
        v.is(
            taken() as i64,
            before as i64 + 1,
            "no upcall after CR8 was lowered",
        );
        cpu::interrupts_off();
    }
    println!(
        "ABUSE priority: {}",
        if at_once {
            "at once"
        } else {
            "with the next exit"
        }
    );
    attempt!("mov cr8, {x}"; x = in(reg) 0u64);
    close(v, port);
}

/// Timers in the past, in the far future, and out of all sense.
fn timers(v: &mut Verdict) {
    for at in [0, 1, 1 << 40, 1 << 62, i64::MAX as u64, 1 << 63, u64::MAX] {
        let r = call(nr::HYPERVISOR_SET_TIMER_OP, [at, 0, 0, 0, 0]);
        v.check(r <= 0, "set_timer_op", r);
        for flags in [0u64, 1, u64::from(u32::MAX)] {
            SCRATCH.set(0, at);
            SCRATCH.set(1, flags);
            let r = call(
                nr::HYPERVISOR_VCPU_OP,
                [VCPUOP_SET_SINGLESHOT_TIMER.into(), 0, SCRATCH.addr(), 0, 0],
            );
            v.check(r <= 0, "single-shot timer", r);
        }
        call(nr::HYPERVISOR_SCHED_OP, [SCHEDOP_YIELD.into(), 0, 0, 0, 0]);
    }
}

/// Registers by which a processor is run: what a guest gets of them is #GP or its own.
fn msrs(v: &mut Verdict) {
    let ranges = [
        0..0x1000u32,
        0x4000_0000..0x4000_0200,
        0xc000_0000..0xc000_0200,
        0xc001_0000..0xc001_0200,
        0xc001_1000..0xc001_1040,
        0xffff_fff0..0xffff_ffff,
    ];
    let (mut read, mut refused) = (0u64, 0u64);
    for range in ranges.clone() {
        // Where the readable ones before this one begin.
        let mut first = None;
        for msr in range.clone() {
            let caught = guarded!("rdmsr"; in("ecx") msr, out("eax") _, out("edx") _);
            match caught {
                None => read += 1,
                Some(GP) => refused += 1,
                Some(other) => v.check(false, "an exception other than #GP", other as i64),
            }
            match (caught, first) {
                (None, None) => first = Some(msr),
                (Some(_), Some(from)) => {
                    println!("ABUSE reads {from:#x} to {:#x}", msr - 1);
                    first = None;
                }
                _ => {}
            }
        }
        if let Some(from) = first {
            println!("ABUSE reads {from:#x} to {:#x}", range.end - 1);
        }
    }
    println!("ABUSE registers: {read} read, {refused} refused");
    for msr in ranges.into_iter().flatten() {
        // What this code itself runs on.
        if matches!(msr, 0x1b | 0x800..=0x8ff | 0xc000_0080 | 0xc000_0100..=0xc000_0102) {
            continue;
        }
        // The hypercall page may be put anywhere in memory, which would be the end of something here.
        if msr == 0x4000_0000 {
            continue;
        }
        let caught = guarded!("wrmsr"; in("ecx") msr, inout("eax") 0xffff_fff1u32 => _, inout("edx") 0xffff_ffffu32 => _);
        v.check(
            matches!(caught, None | Some(GP)),
            "an exception other than #GP",
            msr.into(),
        );
    }
    // The SVM and VMX registers are nobody's but the hypervisor's.
    for msr in [0xc001_0117u32, 0xc001_0114, 0x480, 0x48b] {
        let caught =
            guarded!("wrmsr"; in("ecx") msr, inout("eax") 0x1000u32 => _, inout("edx") 0u32 => _);
        v.check(caught == Some(GP), "a virtualisation register", msr.into());
    }
    let caught = guarded!("wrmsr"; in("ecx") 0xc000_0080u32, inout("eax") 0xffff_ffffu32 => _, inout("edx") 0xffff_ffffu32 => _);
    v.check(caught == Some(GP), "reserved bits of EFER", 0);
}

/// Instructions of a hypervisor's own, and such as a processor may trap on.
fn instructions(v: &mut Verdict) {
    for bytes in 0..6 {
        let caught = match bytes {
            0 => guarded!("vmrun"; in("rax") SCRATCH.addr()),
            1 => guarded!("vmload"; in("rax") SCRATCH.addr()),
            2 => guarded!("stgi";),
            3 => guarded!("clgi";),
            4 => guarded!("skinit"; in("eax") 0u32),
            _ => guarded!("invlpga"; in("rax") 0u64, in("ecx") 0u32),
        };
        v.check(caught.is_some(), "a hypervisor's instruction", bytes);
    }
    let caught = guarded!("xor ecx, ecx", "xsetbv"; inout("eax") !0u32 => _, inout("edx") !0u32 => _, out("ecx") _);
    v.check(caught.is_some(), "XCR0 of all bits", 0);
    attempt!("wbinvd";);
    attempt!("invd";);
    attempt!("pause";);
    attempt!("monitor"; in("rax") SCRATCH.addr(), in("ecx") 0u32, in("edx") 0u32);
    attempt!("int3";);
    attempt!("int 0x80";);
    attempt!("ud2";);
}

/// All ports, in all sizes, both ways.
fn ports(_: &mut Verdict) {
    for port in 0..=0xffffu16 {
        // The debug console would say it.
        if port & !3 == 0xe8 {
            continue;
        }
        attempt!("in al, dx"; in("dx") port, out("al") _);
        if port % 5 == 0 || port < 0x500 || (0xcf0..0xd00).contains(&port) {
            attempt!("in ax, dx"; in("dx") port, out("ax") _);
            attempt!("in eax, dx"; in("dx") port, out("eax") _);
            attempt!("out dx, al"; in("dx") port, in("al") 0xa5u8);
            attempt!("out dx, ax"; in("dx") port, in("ax") 0xa5a5u16);
            attempt!("out dx, eax"; in("dx") port, in("eax") 0x8000_a5a5u32);
        }
    }
    // Strings, over the edge of what is mapped too.
    for at in [SCRATCH.addr(), 0x1_2345_6000, 1 << 47] {
        attempt!("cld", "rep insb"; in("dx") 0x80u16, inout("rdi") at => _, inout("rcx") 64u64 => _);
        attempt!("cld", "rep outsb"; in("dx") 0x80u16, inout("rsi") at => _, inout("rcx") 64u64 => _);
        attempt!("std", "rep insd", "cld"; in("dx") 0x84u16, inout("rdi") at => _, inout("rcx") 4u64 => _);
        attempt!("cld"; );
    }
}

/// Reads and writes where there is no memory and no device, and the APIC's page at odd places and sizes.
fn mmio(v: &mut Verdict) {
    for at in [
        entry::HOLE,
        entry::HOLE + 1,
        0xfed0_0000,
        0xfec0_0000,
        0xfee0_0000,
        0xfee0_0020,
        0xfee0_0ffd,
        0xf000_0000,
    ] {
        attempt!("mov al, [{at}]"; at = in(reg) at, out("al") _);
        attempt!("mov ax, [{at}]"; at = in(reg) at, out("ax") _);
        attempt!("mov eax, [{at}]"; at = in(reg) at, out("eax") _);
        attempt!("mov rax, [{at}]"; at = in(reg) at, out("rax") _);
        attempt!("movzx eax, byte ptr [{at}]"; at = in(reg) at, out("eax") _);
        attempt!("movsx rax, word ptr [{at}]"; at = in(reg) at, out("rax") _);
        // The APIC's registers are not this test's to change.
        if at & !0xfff != 0xfee0_0000 {
            attempt!("mov [{at}], al"; at = in(reg) at, in("al") 1u8);
            attempt!("mov [{at}], ax"; at = in(reg) at, in("ax") 1u16);
            attempt!("mov [{at}], eax"; at = in(reg) at, in("eax") 1u32);
            attempt!("mov [{at}], rax"; at = in(reg) at, in("rax") 1u64);
            attempt!("mov dword ptr [{at}], 0x12345678"; at = in(reg) at);
            attempt!("or dword ptr [{at}], 1"; at = in(reg) at);
            attempt!("xchg [{at}], eax"; at = in(reg) at, inout("eax") 1u32 => _);
            attempt!("cld", "rep stosd"; inout("rdi") at => _, inout("rcx") 16u64 => _, in("eax") 0u32);
        }
        attempt!("cld", "movsd"; inout("rsi") at => _, inout("rdi") SCRATCH.addr() => _);
        attempt!("test dword ptr [{at}], 1"; at = in(reg) at);
        attempt!("cmp eax, [{at}]"; at = in(reg) at, in("eax") 1u32);
    }
    let caught = guarded!("mov eax, [{at}]"; at = in(reg) entry::HOLE, out("eax") _);
    v.check(caught.is_none(), "a read of nothing", 0);
}

/// A processor refuses these with #GP. QEMU's emulation of one does not, and takes the guest's state for
/// invalid at its next entry: CPUID makes it exit at once, before it runs on in a mode that cannot be.
fn reserved_bits() {
    // RBX is LLVM's own.
    let caught = [
        guarded!(
            "mov {x}, cr0", "or {x}, {bits}", "mov cr0, {x}", "mov {x}, rbx", "cpuid", "mov rbx, {x}";
            x = out(reg) _, bits = in(reg) 1u64 << 40, inout("eax") 0 => _, out("ecx") _, out("edx") _
        ),
        guarded!(
            "mov {x}, cr4", "or {x}, {bits}", "mov cr4, {x}", "mov {x}, rbx", "cpuid", "mov rbx, {x}";
            x = out(reg) _, bits = in(reg) 1u64 << 50, inout("eax") 0 => _, out("ecx") _, out("edx") _
        ),
        guarded!("mov cr8, {x}"; x = in(reg) 0x10u64),
    ];
    if caught == [Some(GP); 3] {
        println!("ABUSE reserved ok");
        galvan_guests::hypercall::shutdown(galvan_dom0_proto::sched::SHUTDOWN_CRASH);
    }
}

fn triple_fault() {
    #[repr(C, packed)]
    struct Pointer(u16, u64);
    // SAFETY: this is the end.
    unsafe { core::arch::asm!("lidt [{}]", "ud2", in(reg) &raw const *&Pointer(0, 0)) };
}

fn runaway() {
    cpu::interrupts_off();
    loop {
        core::hint::spin_loop();
    }
}

fn asleep() {
    cpu::interrupts_off();
    cpu::halt();
}

fn tables_nowhere() {
    // SAFETY: this is the end.
    unsafe { core::arch::asm!("mov cr3, {}", in(reg) 0x12_3456_7000u64) };
}

fn code_nowhere() {
    // SAFETY: this is the end.
    unsafe { core::arch::asm!("call {}", in(reg) entry::HOLE) };
}
