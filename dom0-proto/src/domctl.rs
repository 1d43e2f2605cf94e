//! `domctl`: what the toolstack does to one domain.
//!
//! Every call carries an interface version, and layouts differ between versions. Stock Xen serves one
//! version; here the version of *each call* decides ([`DomctlVersion`]), and every versioned layout is
//! converted to one internal form ([`CreateDomain`]). Between 0x15 and 0x17 only `createdomain`
//! differs on x86 (0x17 inserts `altp2m_opts`); 0x16 changed Arm's part only. New operations do not
//! need a new version.
//!
//! A handler copies in the header, checks version and operation, then copies in the rest
//! ([`XenDomctl`]), takes the payload it needs by [`XenDomctl::payload`], and puts it back by
//! [`XenDomctl::set_payload`] if it has results.
//!
//! C: `domctl.h`, `arch-x86/xen.h`.

use crate::arch_x86::VcpuGuestContext;
use crate::memory::XenVmemrange;
use crate::xen::{DomainHandle, XenCpuidLeaf, XenMsrEntry, XenctlBitmap};
use crate::{DomId, GuestHandle};

abi_newtype! {
    /// An interface version of domctl.
    pub struct DomctlVersion(u32) {
        /// Xen 4.17.
        V15 = 0x15, "";
        /// Xen 4.18.
        V16 = 0x16, "";
        /// Xen 4.19 to 4.21.
        V17 = 0x17, "";
    }
}

impl DomctlVersion {
    /// Whether calls of this version can be served; others get `EACCES`.
    #[must_use]
    pub const fn is_known(self) -> bool {
        self.name().is_some()
    }
}

abi_consts! {
    u32 {
        /// [`CreateDomain`]; the new id is returned in the header.
        XEN_DOMCTL_CREATEDOMAIN = 1,
        /// No payload.
        XEN_DOMCTL_DESTROYDOMAIN = 2,
        /// No payload.
        XEN_DOMCTL_PAUSEDOMAIN = 3,
        /// No payload.
        XEN_DOMCTL_UNPAUSEDOMAIN = 4,
        /// [`XenDomctlGetdomaininfo`] of the first domain at or above the id given.
        XEN_DOMCTL_GETDOMAININFO = 5,
        /// [`XenDomctlVcpuaffinity`].
        XEN_DOMCTL_SETVCPUAFFINITY = 9,
        /// [`XenDomctlShadowOp`].
        XEN_DOMCTL_SHADOW_OP = 10,
        /// [`XenDomctlMaxMem`].
        XEN_DOMCTL_MAX_MEM = 11,
        /// [`XenDomctlVcpucontext`].
        XEN_DOMCTL_SETVCPUCONTEXT = 12,
        /// [`XenDomctlVcpucontext`].
        XEN_DOMCTL_GETVCPUCONTEXT = 13,
        /// [`XenDomctlGetvcpuinfo`].
        XEN_DOMCTL_GETVCPUINFO = 14,
        /// [`XenDomctlMaxVcpus`].
        XEN_DOMCTL_MAX_VCPUS = 15,
        /// [`XenDomctlSchedulerOp`].
        XEN_DOMCTL_SCHEDULER_OP = 16,
        /// [`XenDomctlSetdomainhandle`].
        XEN_DOMCTL_SETDOMAINHANDLE = 17,
        /// [`XenDomctlSetdebugging`].
        XEN_DOMCTL_SETDEBUGGING = 18,
        /// [`XenDomctlIrqPermission`].
        XEN_DOMCTL_IRQ_PERMISSION = 19,
        /// [`XenDomctlIomemPermission`].
        XEN_DOMCTL_IOMEM_PERMISSION = 20,
        /// [`XenDomctlIoportPermission`].
        XEN_DOMCTL_IOPORT_PERMISSION = 21,
        /// [`XenDomctlHypercallInit`].
        XEN_DOMCTL_HYPERCALL_INIT = 22,
        /// [`XenDomctlSettimeoffset`].
        XEN_DOMCTL_SETTIMEOFFSET = 24,
        /// [`XenDomctlVcpuaffinity`].
        XEN_DOMCTL_GETVCPUAFFINITY = 25,
        /// No payload.
        XEN_DOMCTL_RESUMEDOMAIN = 27,
        /// [`XenDomctlSendtrigger`].
        XEN_DOMCTL_SENDTRIGGER = 28,
        /// [`XenDomctlSubscribe`].
        XEN_DOMCTL_SUBSCRIBE = 29,
        /// [`XenDomctlHvmcontext`].
        XEN_DOMCTL_GETHVMCONTEXT = 33,
        /// [`XenDomctlHvmcontext`].
        XEN_DOMCTL_SETHVMCONTEXT = 34,
        /// [`XenDomctlAddressSize`].
        XEN_DOMCTL_SET_ADDRESS_SIZE = 35,
        /// [`XenDomctlAddressSize`].
        XEN_DOMCTL_GET_ADDRESS_SIZE = 36,
        /// [`XenDomctlAssignDevice`].
        XEN_DOMCTL_ASSIGN_DEVICE = 37,
        /// [`XenDomctlBindPtIrq`].
        XEN_DOMCTL_BIND_PT_IRQ = 38,
        /// [`XenDomctlMemoryMapping`].
        XEN_DOMCTL_MEMORY_MAPPING = 39,
        /// [`XenDomctlIoportMapping`].
        XEN_DOMCTL_IOPORT_MAPPING = 40,
        /// PV only.
        XEN_DOMCTL_SET_EXT_VCPUCONTEXT = 42,
        /// PV only.
        XEN_DOMCTL_GET_EXT_VCPUCONTEXT = 43,
        /// [`XenDomctlAssignDevice`].
        XEN_DOMCTL_TEST_ASSIGN_DEVICE = 45,
        /// [`XenDomctlSetTarget`].
        XEN_DOMCTL_SET_TARGET = 46,
        /// [`XenDomctlAssignDevice`].
        XEN_DOMCTL_DEASSIGN_DEVICE = 47,
        /// [`XenDomctlBindPtIrq`].
        XEN_DOMCTL_UNBIND_PT_IRQ = 48,
        /// [`XenDomctlGetDeviceGroup`].
        XEN_DOMCTL_GET_DEVICE_GROUP = 50,
        /// [`XenDomctlDebugOp`].
        XEN_DOMCTL_DEBUG_OP = 54,
        /// [`XenDomctlHvmcontextPartial`].
        XEN_DOMCTL_GETHVMCONTEXT_PARTIAL = 55,
        /// [`XenDomctlVmEventOp`].
        XEN_DOMCTL_VM_EVENT_OP = 56,
        /// Page sharing.
        XEN_DOMCTL_MEM_SHARING_OP = 57,
        /// [`XenDomctlTscInfo`].
        XEN_DOMCTL_GETTSCINFO = 59,
        /// [`XenDomctlTscInfo`].
        XEN_DOMCTL_SETTSCINFO = 60,
        /// [`XenDomctlGetpageframeinfo3`].
        XEN_DOMCTL_GETPAGEFRAMEINFO3 = 61,
        /// [`XenDomctlVcpuextstate`].
        XEN_DOMCTL_SETVCPUEXTSTATE = 62,
        /// [`XenDomctlVcpuextstate`].
        XEN_DOMCTL_GETVCPUEXTSTATE = 63,
        /// Introspection.
        XEN_DOMCTL_SET_ACCESS_REQUIRED = 64,
        /// PV only.
        XEN_DOMCTL_AUDIT_P2M = 65,
        /// [`XenDomctlSetVirqHandler`].
        XEN_DOMCTL_SET_VIRQ_HANDLER = 66,
        /// One gfn to be marked broken.
        XEN_DOMCTL_SET_BROKEN_PAGE_P2M = 67,
        /// [`XenDomctlNodeaffinity`].
        XEN_DOMCTL_SETNODEAFFINITY = 68,
        /// [`XenDomctlNodeaffinity`].
        XEN_DOMCTL_GETNODEAFFINITY = 69,
        /// [`XenDomctlCacheflush`].
        XEN_DOMCTL_CACHEFLUSH = 71,
        /// [`XenDomctlVcpuMsrs`].
        XEN_DOMCTL_GET_VCPU_MSRS = 72,
        /// [`XenDomctlVcpuMsrs`].
        XEN_DOMCTL_SET_VCPU_MSRS = 73,
        /// [`XenDomctlVnuma`].
        XEN_DOMCTL_SETVNUMAINFO = 74,
        /// Cache monitoring.
        XEN_DOMCTL_PSR_CMT_OP = 75,
        /// Introspection.
        XEN_DOMCTL_MONITOR_OP = 77,
        /// Cache allocation.
        XEN_DOMCTL_PSR_ALLOC = 78,
        /// No payload.
        XEN_DOMCTL_SOFT_RESET = 79,
        /// Arm only.
        XEN_DOMCTL_VUART_OP = 81,
        /// [`XenDomctlCpuPolicy`].
        XEN_DOMCTL_GET_CPU_POLICY = 82,
        /// [`XenDomctlCpuPolicy`].
        XEN_DOMCTL_SET_CPU_POLICY = 83,
        /// Processor trace.
        XEN_DOMCTL_VMTRACE_OP = 84,
        /// [`XenDomctlPagingMempool`].
        XEN_DOMCTL_GET_PAGING_MEMPOOL_SIZE = 85,
        /// [`XenDomctlPagingMempool`].
        XEN_DOMCTL_SET_PAGING_MEMPOOL_SIZE = 86,
        /// Arm only (4.19).
        XEN_DOMCTL_DT_OVERLAY = 87,
        /// [`XenDomctlGsiPermission`] (4.20).
        XEN_DOMCTL_GSI_PERMISSION = 88,
        /// [`XenDomctlSetLlcColors`] (4.20).
        XEN_DOMCTL_SET_LLC_COLORS = 89,
        /// Debugger.
        XEN_DOMCTL_GDBSX_GUESTMEMIO = 1000,
        /// Debugger.
        XEN_DOMCTL_GDBSX_PAUSEVCPU = 1001,
        /// Debugger.
        XEN_DOMCTL_GDBSX_UNPAUSEVCPU = 1002,
        /// Debugger.
        XEN_DOMCTL_GDBSX_DOMSTATUS = 1003,

        /// Creation flag: HVM or PVH, not PV.
        XEN_DOMCTL_CDF_HVM = 1 << 0,
        /// Creation flag: nested paging.
        XEN_DOMCTL_CDF_HAP = 1 << 1,
        /// Creation flag: integrity over sleep (tboot).
        XEN_DOMCTL_CDF_S3_INTEGRITY = 1 << 2,
        /// Creation flag: shadow paging detail.
        XEN_DOMCTL_CDF_OOS_OFF = 1 << 3,
        /// Creation flag: the domain serves xenstore.
        XEN_DOMCTL_CDF_XS_DOMAIN = 1 << 4,
        /// Creation flag: may be given devices.
        XEN_DOMCTL_CDF_IOMMU = 1 << 5,
        /// Creation flag: may run a hypervisor.
        XEN_DOMCTL_CDF_NESTED_VIRT = 1 << 6,
        /// Creation flag: performance counters.
        XEN_DOMCTL_CDF_VPMU = 1 << 7,
        /// The highest creation flag.
        XEN_DOMCTL_CDF_MAX = 1 << 7,
        /// IOMMU option: do not share second-stage tables with the CPU.
        XEN_DOMCTL_IOMMU_NO_SHAREPT = 1 << 0,
        /// The highest IOMMU option.
        XEN_DOMCTL_IOMMU_MAX = 1 << 0,
        /// The highest grant-table version, in `grant_opts`.
        XEN_DOMCTL_GRANT_VERSION_MASK = 0xf,
        /// Alternate p2m: guest and outside.
        XEN_DOMCTL_ALTP2M_MIXED = 1,
        /// Alternate p2m: outside.
        XEN_DOMCTL_ALTP2M_EXTERNAL = 2,
        /// Alternate p2m: limited.
        XEN_DOMCTL_ALTP2M_LIMITED = 3,
        /// Alternate p2m mode, in `altp2m_opts`.
        XEN_DOMCTL_ALTP2M_MODE_MASK = 3,

        /// Emulate: local APIC.
        XEN_X86_EMU_LAPIC = 1 << 0,
        /// Emulate: HPET.
        XEN_X86_EMU_HPET = 1 << 1,
        /// Emulate: ACPI power management.
        XEN_X86_EMU_PM = 1 << 2,
        /// Emulate: real-time clock.
        XEN_X86_EMU_RTC = 1 << 3,
        /// Emulate: I/O APIC.
        XEN_X86_EMU_IOAPIC = 1 << 4,
        /// Emulate: 8259 interrupt controllers.
        XEN_X86_EMU_PIC = 1 << 5,
        /// Emulate: VGA memory.
        XEN_X86_EMU_VGA = 1 << 6,
        /// Emulate: IOMMU.
        XEN_X86_EMU_IOMMU = 1 << 7,
        /// Emulate: 8254 timer.
        XEN_X86_EMU_PIT = 1 << 8,
        /// Route emulated interrupts as pirqs.
        XEN_X86_EMU_USE_PIRQ = 1 << 9,
        /// Emulate: PCI configuration space of passed-through devices.
        XEN_X86_EMU_VPCI = 1 << 10,
        /// All of them.
        XEN_X86_EMU_ALL = 0x7ff,
        /// Misc flag: unknown MSRs read zero.
        XEN_X86_MSR_RELAXED = 1 << 0,
        /// The highest misc flag.
        XEN_X86_MISC_FLAGS_MAX = 1 << 0,

        /// State flag: being destroyed.
        XEN_DOMINF_DYING = 1 << 0,
        /// State flag: HVM or PVH.
        XEN_DOMINF_HVM_GUEST = 1 << 1,
        /// State flag: has shut down; the reason is in bits 16-23.
        XEN_DOMINF_SHUTDOWN = 1 << 2,
        /// State flag: paused by the toolstack.
        XEN_DOMINF_PAUSED = 1 << 3,
        /// State flag: all its vCPUs wait.
        XEN_DOMINF_BLOCKED = 1 << 4,
        /// State flag: one of its vCPUs runs.
        XEN_DOMINF_RUNNING = 1 << 5,
        /// State flag: stopped by a debugger.
        XEN_DOMINF_DEBUGGED = 1 << 6,
        /// State flag: serves xenstore.
        XEN_DOMINF_XS_DOMAIN = 1 << 7,
        /// State flag: nested paging.
        XEN_DOMINF_HAP = 1 << 8,
        /// Mask of the shutdown reason once shifted down.
        XEN_DOMINF_SHUTDOWNMASK = 255,
        /// Shift of the shutdown reason.
        XEN_DOMINF_SHUTDOWNSHIFT = 16,
        /// `max_vcpu_id` of a domain without vCPUs.
        XEN_INVALID_MAX_VCPU_ID = u32::MAX,

        /// Page type: ordinary.
        XEN_DOMCTL_PFINFO_NOTAB = 0,
        /// Page type: not present.
        XEN_DOMCTL_PFINFO_XTAB = 0xf << 28,
        /// Page type: to be allocated, without contents.
        XEN_DOMCTL_PFINFO_XALLOC = 0xe << 28,
        /// Page type: broken.
        XEN_DOMCTL_PFINFO_BROKEN = 0xd << 28,
        /// Mask of the page type.
        XEN_DOMCTL_PFINFO_LTAB_MASK = 0xf << 28,

        /// Shadow operation: log-dirty and shadow mode off.
        XEN_DOMCTL_SHADOW_OP_OFF = 0,
        /// Shadow operation: legacy.
        XEN_DOMCTL_SHADOW_OP_ENABLE_TEST = 1,
        /// Shadow operation: start to log dirty pages.
        XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY = 2,
        /// Shadow operation: read the bitmap and clear it.
        XEN_DOMCTL_SHADOW_OP_CLEAN = 11,
        /// Shadow operation: read the bitmap.
        XEN_DOMCTL_SHADOW_OP_PEEK = 12,
        /// Shadow operation: size of the paging pool in MiB.
        XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION = 30,
        /// Shadow operation: size of the paging pool in MiB.
        XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION = 31,
        /// Shadow operation: with the modes below.
        XEN_DOMCTL_SHADOW_OP_ENABLE = 32,
        /// Shadow mode.
        XEN_DOMCTL_SHADOW_ENABLE_REFCOUNT = 1 << 1,
        /// Shadow mode: log dirty pages.
        XEN_DOMCTL_SHADOW_ENABLE_LOG_DIRTY = 1 << 2,
        /// Shadow mode.
        XEN_DOMCTL_SHADOW_ENABLE_TRANSLATE = 1 << 3,
        /// Shadow mode.
        XEN_DOMCTL_SHADOW_ENABLE_EXTERNAL = 1 << 4,
        /// Clean or peek: the last round.
        XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL = 1 << 0,

        /// Affinity flag: the hard one.
        XEN_VCPUAFFINITY_HARD = 1 << 0,
        /// Affinity flag: the soft one.
        XEN_VCPUAFFINITY_SOFT = 1 << 1,
        /// Affinity flag: end a pin override.
        XEN_VCPUAFFINITY_FORCE = 1 << 2,

        /// Scheduler.
        XEN_SCHEDULER_CREDIT = 5,
        /// Scheduler.
        XEN_SCHEDULER_CREDIT2 = 6,
        /// Scheduler.
        XEN_SCHEDULER_ARINC653 = 7,
        /// Scheduler.
        XEN_SCHEDULER_RTDS = 8,
        /// Scheduler.
        XEN_SCHEDULER_NULL = 9,
        /// Scheduler operation: set for the domain.
        XEN_DOMCTL_SCHEDOP_PUTINFO = 0,
        /// Scheduler operation: get for the domain.
        XEN_DOMCTL_SCHEDOP_GETINFO = 1,
        /// Scheduler operation: set for vCPUs.
        XEN_DOMCTL_SCHEDOP_PUTVCPUINFO = 2,
        /// Scheduler operation: get for vCPUs.
        XEN_DOMCTL_SCHEDOP_GETVCPUINFO = 3,

        /// GSI permission: take away.
        XEN_DOMCTL_GSI_REVOKE = 0,
        /// GSI permission: give.
        XEN_DOMCTL_GSI_GRANT = 1,
        /// GSI permission: the action in the flags.
        XEN_DOMCTL_GSI_ACTION_MASK = 1,

        /// Trigger: NMI.
        XEN_DOMCTL_SENDTRIGGER_NMI = 0,
        /// Trigger: reset button.
        XEN_DOMCTL_SENDTRIGGER_RESET = 1,
        /// Trigger: INIT.
        XEN_DOMCTL_SENDTRIGGER_INIT = 2,
        /// Trigger: power button.
        XEN_DOMCTL_SENDTRIGGER_POWER = 3,
        /// Trigger: sleep button.
        XEN_DOMCTL_SENDTRIGGER_SLEEP = 4,

        /// Device kind: PCI.
        XEN_DOMCTL_DEV_PCI = 0,
        /// Device kind: device tree.
        XEN_DOMCTL_DEV_DT = 1,
        /// Assignment flag: conflicts with reserved memory are tolerated.
        XEN_DOMCTL_DEV_RDM_RELAXED = 1,

        /// Interrupt kind: PCI line.
        PT_IRQ_TYPE_PCI = 0,
        /// Interrupt kind: ISA line.
        PT_IRQ_TYPE_ISA = 1,
        /// Interrupt kind: MSI to MSI.
        PT_IRQ_TYPE_MSI = 2,
        /// Interrupt kind: MSI to line.
        PT_IRQ_TYPE_MSI_TRANSLATE = 3,
        /// Interrupt kind: Arm.
        PT_IRQ_TYPE_SPI = 4,
        /// MSI flags: destination.
        XEN_DOMCTL_VMSI_X86_DEST_ID_MASK = 0x0000ff,
        /// MSI flags: redirection hint.
        XEN_DOMCTL_VMSI_X86_RH_MASK = 0x000100,
        /// MSI flags: destination mode.
        XEN_DOMCTL_VMSI_X86_DM_MASK = 0x000200,
        /// MSI flags: delivery mode.
        XEN_DOMCTL_VMSI_X86_DELIV_MASK = 0x007000,
        /// MSI flags: trigger mode.
        XEN_DOMCTL_VMSI_X86_TRIG_MASK = 0x008000,
        /// MSI flags: not masked.
        XEN_DOMCTL_VMSI_X86_UNMASKED = 0x010000,
        /// Mapping: add.
        DPCI_ADD_MAPPING = 1,
        /// Mapping: remove.
        DPCI_REMOVE_MAPPING = 0,

        /// vm_event: start.
        XEN_VM_EVENT_ENABLE = 0,
        /// vm_event: stop.
        XEN_VM_EVENT_DISABLE = 1,
        /// vm_event: responses are ready.
        XEN_VM_EVENT_RESUME = 2,
        /// vm_event: interface version.
        XEN_VM_EVENT_GET_VERSION = 3,
        /// vm_event ring: paging.
        XEN_DOMCTL_VM_EVENT_OP_PAGING = 1,
        /// vm_event ring: monitor.
        XEN_DOMCTL_VM_EVENT_OP_MONITOR = 2,
        /// vm_event ring: sharing.
        XEN_DOMCTL_VM_EVENT_OP_SHARING = 3,
        /// Debugger: stop single stepping.
        XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_OFF = 0,
        /// Debugger: start single stepping.
        XEN_DOMCTL_DEBUG_OP_SINGLE_STEP_ON = 1,
    }
    usize {
        /// Length of the payload union.
        DOMCTL_PAYLOAD_LEN = 128,
        /// Offset of the payload union.
        DOMCTL_PAYLOAD_OFFSET = 16,
    }
}

abi_structs! {
    /// The part before the payload.
    pub struct XenDomctlHeader("", 16) {
        cmd: u32 = 0,
        interface_version: DomctlVersion = 4,
        /// The domain concerned; out for `createdomain` and `getdomaininfo`.
        domain: DomId = 8,
        _pad: [u16; 3],
    }

    /// A whole call.
    pub struct XenDomctl("struct xen_domctl", 144) {
        cmd: u32 = 0,
        interface_version: DomctlVersion = 4,
        /// The domain concerned; out for `createdomain` and `getdomaininfo`.
        domain: DomId = 8,
        _pad: [u16; 3],
        /// One of the payloads below.
        u: [u8; 128] = 16,
    }

    /// What a domain is made of on x86.
    pub struct XenArchDomainconfig("struct xen_arch_domainconfig", 8) {
        /// `XEN_X86_EMU_*`.
        emulation_flags: u32 = 0,
        /// [`XEN_X86_MSR_RELAXED`].
        misc_flags: u32 = 4,
    }

    /// `createdomain` of versions 0x15 and 0x16.
    pub struct XenDomctlCreatedomainV15("struct xen_domctl_createdomain", 64, 0x15..=0x16) {
        ssidref: u32 = 0,
        handle: DomainHandle = 4,
        flags: u32 = 20,
        iommu_opts: u32 = 24,
        max_vcpus: u32 = 28,
        max_evtchn_port: u32 = 32,
        max_grant_frames: i32 = 36,
        max_maptrack_frames: i32 = 40,
        grant_opts: u32 = 44,
        vmtrace_size: u32 = 48,
        cpupool_id: u32 = 52,
        arch: XenArchDomainconfig = 56,
    }

    /// `createdomain` of version 0x17.
    pub struct XenDomctlCreatedomainV17("struct xen_domctl_createdomain", 68, 0x17..=0x17) {
        ssidref: u32 = 0,
        handle: DomainHandle = 4,
        flags: u32 = 20,
        iommu_opts: u32 = 24,
        max_vcpus: u32 = 28,
        max_evtchn_port: u32 = 32,
        max_grant_frames: i32 = 36,
        max_maptrack_frames: i32 = 40,
        grant_opts: u32 = 44,
        altp2m_opts: u32 = 48,
        vmtrace_size: u32 = 52,
        cpupool_id: u32 = 56,
        arch: XenArchDomainconfig = 60,
    }

    /// What the toolstack sees of a domain; also the element of `getdomaininfolist`.
    pub struct XenDomctlGetdomaininfo("struct xen_domctl_getdomaininfo", 112) {
        domain: DomId = 0,
        _pad1: u16,
        /// `XEN_DOMINF_*`, shutdown reason in bits 16-23 (0xff while not shut down).
        flags: u32 = 4,
        tot_pages: u64 = 8,
        max_pages: u64 = 16,
        /// Claimed, not yet allocated.
        outstanding_pages: u64 = 24,
        shr_pages: u64 = 32,
        paged_pages: u64 = 40,
        /// gfn of `shared_info`, or all ones.
        shared_info_frame: u64 = 48,
        /// Nanoseconds.
        cpu_time: u64 = 56,
        nr_online_vcpus: u32 = 64,
        /// [`XEN_INVALID_MAX_VCPU_ID`] if there is none.
        max_vcpu_id: u32 = 68,
        ssidref: u32 = 72,
        handle: DomainHandle = 76,
        cpupool: u32 = 92,
        /// Width of guest-physical addresses.
        gpaddr_bits: u8 = 96,
        _pad2: [u8; 7],
        arch_config: XenArchDomainconfig = 104,
    }

    /// Types of a list of pages.
    pub struct XenDomctlGetpageframeinfo3("struct xen_domctl_getpageframeinfo3", 16) {
        num: u64 = 0,
        /// In: gfns. Out: `XEN_DOMCTL_PFINFO_*`.
        array: GuestHandle<u64> = 8,
    }

    /// Counters of the dirty log.
    pub struct XenDomctlShadowOpStats("struct xen_domctl_shadow_op_stats", 8) {
        fault_count: u32 = 0,
        dirty_count: u32 = 4,
    }

    /// Dirty logging and the paging pool.
    pub struct XenDomctlShadowOp("struct xen_domctl_shadow_op", 40) {
        /// `XEN_DOMCTL_SHADOW_OP_*`.
        op: u32 = 0,
        mode: u32 = 4,
        /// Pool size in MiB.
        mb: u32 = 8,
        _pad: u32,
        dirty_bitmap: GuestHandle<u8> = 16,
        /// In: bits of room. Out: bits stored.
        pages: u64 = 24,
        stats: XenDomctlShadowOpStats = 32,
    }

    /// The memory limit.
    pub struct XenDomctlMaxMem("struct xen_domctl_max_mem", 8) {
        max_memkb: u64 = 0,
    }

    /// The registers of a vCPU in PV form.
    pub struct XenDomctlVcpucontext("struct xen_domctl_vcpucontext", 16) {
        vcpu: u32 = 0,
        _pad: u32,
        ctxt: GuestHandle<VcpuGuestContext> = 8,
    }

    /// The state of a vCPU.
    pub struct XenDomctlGetvcpuinfo("struct xen_domctl_getvcpuinfo", 24) {
        /// In.
        vcpu: u32 = 0,
        online: u8 = 4,
        blocked: u8 = 5,
        running: u8 = 6,
        _pad0: u8,
        /// Nanoseconds.
        cpu_time: u64 = 8,
        /// The CPU it is on.
        cpu: u32 = 16,
        _pad1: u32,
    }

    /// NUMA affinity.
    pub struct XenDomctlNodeaffinity("struct xen_domctl_nodeaffinity", 16) {
        nodemap: XenctlBitmap = 0,
    }

    /// CPU affinity; after a change both maps hold what is in effect.
    pub struct XenDomctlVcpuaffinity("struct xen_domctl_vcpuaffinity", 40) {
        vcpu: u32 = 0,
        /// `XEN_VCPUAFFINITY_*`.
        flags: u32 = 4,
        cpumap_hard: XenctlBitmap = 8,
        cpumap_soft: XenctlBitmap = 24,
    }

    /// How many vCPUs to make; must equal that of `createdomain`.
    pub struct XenDomctlMaxVcpus("struct xen_domctl_max_vcpus", 4) {
        max: u32 = 0,
    }

    /// Parameters of the credit schedulers.
    pub struct XenDomctlSchedCredit("struct xen_domctl_sched_credit2", 4) {
        weight: u16 = 0,
        /// Percent of one CPU; 0 is none.
        cap: u16 = 2,
    }

    /// Parameters of a domain or of its vCPUs.
    pub struct XenDomctlSchedulerOp("struct xen_domctl_scheduler_op", 24) {
        /// `XEN_SCHEDULER_*`.
        sched_id: u32 = 0,
        /// `XEN_DOMCTL_SCHEDOP_*`.
        cmd: u32 = 4,
        /// [`XenDomctlSchedCredit`] for the credit schedulers.
        credit ["u.credit2"]: XenDomctlSchedCredit = 8,
        _pad: [u32; 3],
    }

    /// The UUID.
    pub struct XenDomctlSetdomainhandle("struct xen_domctl_setdomainhandle", 16) {
        handle: DomainHandle = 0,
    }

    /// Whether a debugger is attached.
    pub struct XenDomctlSetdebugging("struct xen_domctl_setdebugging", 1) {
        enable: u8 = 0,
    }

    /// Use of a pirq.
    pub struct XenDomctlIrqPermission("struct xen_domctl_irq_permission", 8) {
        pirq: u32 = 0,
        allow_access: u8 = 4,
        _pad: [u8; 3],
    }

    /// Use of a GSI.
    pub struct XenDomctlGsiPermission("struct xen_domctl_gsi_permission", 8, 0x17..=0x17) {
        gsi: u32 = 0,
        /// `XEN_DOMCTL_GSI_*`.
        flags: u32 = 4,
    }

    /// Use of machine memory that is no RAM.
    pub struct XenDomctlIomemPermission("struct xen_domctl_iomem_permission", 24) {
        first_mfn: u64 = 0,
        nr_mfns: u64 = 8,
        allow_access: u8 = 16,
        _pad: [u8; 7],
    }

    /// Use of ports.
    pub struct XenDomctlIoportPermission("struct xen_domctl_ioport_permission", 12) {
        first_port: u32 = 0,
        nr_ports: u32 = 4,
        allow_access: u8 = 8,
        _pad: [u8; 3],
    }

    /// Fill a hypercall page.
    pub struct XenDomctlHypercallInit("struct xen_domctl_hypercall_init", 8) {
        gmfn: u64 = 0,
    }

    /// Wall-clock offset.
    pub struct XenDomctlSettimeoffset("struct xen_domctl_settimeoffset", 8) {
        time_offset_seconds: i64 = 0,
    }

    /// All HVM save records of a domain.
    pub struct XenDomctlHvmcontext("struct xen_domctl_hvmcontext", 16) {
        /// In: room. Out: bytes. With a null buffer: the size needed.
        size: u32 = 0,
        _pad: u32,
        buffer: GuestHandle<u8> = 8,
    }

    /// One HVM save record.
    pub struct XenDomctlHvmcontextPartial("struct xen_domctl_hvmcontext_partial", 24) {
        /// Type code.
        kind ["type"]: u32 = 0,
        instance: u32 = 4,
        bufsz: u64 = 8,
        buffer: GuestHandle<u8> = 16,
    }

    /// Bits of a PV guest's addresses.
    pub struct XenDomctlAddressSize("struct xen_domctl_address_size", 4) {
        size: u32 = 0,
    }

    /// A button or an interrupt.
    pub struct XenDomctlSendtrigger("struct xen_domctl_sendtrigger", 8) {
        /// `XEN_DOMCTL_SENDTRIGGER_*`.
        trigger: u32 = 0,
        vcpu: u32 = 4,
    }

    /// A device to give or take.
    pub struct XenDomctlAssignDevice("struct xen_domctl_assign_device", 24) {
        /// `XEN_DOMCTL_DEV_*`.
        dev: u32 = 0,
        flags: u32 = 4,
        /// PCI: segment 31:16, bus 15:8, devfn 7:0.
        machine_sbdf ["u.pci.machine_sbdf"]: u32 = 8,
        _pad: [u32; 3],
    }

    /// Devices that cannot be separated from one.
    pub struct XenDomctlGetDeviceGroup("struct xen_domctl_get_device_group", 24) {
        machine_sbdf: u32 = 0,
        max_sdevs: u32 = 4,
        num_sdevs: u32 = 8,
        _pad: u32,
        sdev_array: GuestHandle<u32> = 16,
    }

    /// A passed-through interrupt.
    pub struct XenDomctlBindPtIrq("struct xen_domctl_bind_pt_irq", 24) {
        machine_irq: u32 = 0,
        /// `PT_IRQ_TYPE_*`.
        irq_type: u32 = 4,
        /// PCI: bus, device, pin. ISA: the line in the first byte. MSI: the vector in the first byte.
        line ["u.pci"]: [u8; 3] = 8,
        _pad: u8,
        /// MSI: `XEN_DOMCTL_VMSI_X86_*`.
        msi_gflags ["u.msi.gflags"]: u32 = 12,
        /// MSI-X: guest-physical address of the table.
        msi_gtable ["u.msi.gtable"]: u64 = 16,
    }

    /// Machine memory in a domain's address space.
    pub struct XenDomctlMemoryMapping("struct xen_domctl_memory_mapping", 32) {
        first_gfn: u64 = 0,
        first_mfn: u64 = 8,
        nr_mfns: u64 = 16,
        /// `DPCI_*_MAPPING`.
        add_mapping: u32 = 24,
        _pad ["padding"]: u32,
    }

    /// Machine ports in a domain's port space.
    pub struct XenDomctlIoportMapping("struct xen_domctl_ioport_mapping", 16) {
        first_gport: u32 = 0,
        first_mport: u32 = 4,
        nr_ports: u32 = 8,
        add_mapping: u32 = 12,
    }

    /// The domain that this one may act upon.
    pub struct XenDomctlSetTarget("struct xen_domctl_set_target", 2) {
        target: DomId = 0,
    }

    /// A CPUID and MSR policy.
    pub struct XenDomctlCpuPolicy("struct xen_domctl_cpu_policy", 40) {
        nr_leaves: u32 = 0,
        nr_msrs: u32 = 4,
        leaves: GuestHandle<XenCpuidLeaf> = 8,
        msrs: GuestHandle<XenMsrEntry> = 16,
        /// Out, all ones if none: what was refused.
        err_leaf: u32 = 24,
        err_subleaf: u32 = 28,
        err_msr: u32 = 32,
        _pad: u32,
    }

    /// Port to be notified of suspension.
    pub struct XenDomctlSubscribe("struct xen_domctl_subscribe", 4) {
        port: u32 = 0,
    }

    /// Single stepping.
    pub struct XenDomctlDebugOp("struct xen_domctl_debug_op", 8) {
        op: u32 = 0,
        vcpu: u32 = 4,
    }

    /// The TSC of a domain.
    pub struct XenDomctlTscInfo("struct xen_domctl_tsc_info", 24) {
        /// `XEN_CPUID_TSC_MODE_*`.
        tsc_mode: u32 = 0,
        gtsc_khz: u32 = 4,
        incarnation: u32 = 8,
        _pad: u32,
        elapsed_nsec: u64 = 16,
    }

    /// Introspection rings.
    pub struct XenDomctlVmEventOp("struct xen_domctl_vm_event_op", 12) {
        /// `XEN_VM_EVENT_*`.
        op: u32 = 0,
        /// `XEN_DOMCTL_VM_EVENT_OP_*`.
        mode: u32 = 4,
        /// Port or version.
        u ["u.version"]: u32 = 8,
    }

    /// Global virtual interrupt handed to another domain.
    pub struct XenDomctlSetVirqHandler("struct xen_domctl_set_virq_handler", 4) {
        virq: u32 = 0,
    }

    /// XSAVE state of a PV vCPU.
    pub struct XenDomctlVcpuextstate("struct xen_domctl_vcpuextstate", 32) {
        vcpu: u32 = 0,
        _pad: u32,
        xfeature_mask: u64 = 8,
        size: u64 = 16,
        buffer: GuestHandle<u64> = 24,
    }

    /// A range to be written back.
    pub struct XenDomctlCacheflush("struct xen_domctl_cacheflush", 16) {
        start_pfn: u64 = 0,
        nr_pfns: u64 = 8,
    }

    /// Memory for second-stage tables.
    pub struct XenDomctlPagingMempool("struct xen_domctl_paging_mempool", 8) {
        /// Bytes.
        size: u64 = 0,
    }

    /// One MSR.
    pub struct XenDomctlVcpuMsr("struct xen_domctl_vcpu_msr", 16) {
        index: u32 = 0,
        _pad ["reserved"]: u32,
        value: u64 = 8,
    }

    /// MSRs of a PV vCPU.
    pub struct XenDomctlVcpuMsrs("struct xen_domctl_vcpu_msrs", 16) {
        vcpu: u32 = 0,
        msr_count: u32 = 4,
        msrs: GuestHandle<XenDomctlVcpuMsr> = 8,
    }

    /// Virtual NUMA.
    pub struct XenDomctlVnuma("struct xen_domctl_vnuma", 48) {
        nr_vnodes: u32 = 0,
        nr_vmemranges: u32 = 4,
        nr_vcpus: u32 = 8,
        _pad: u32,
        vdistance: GuestHandle<u32> = 16,
        vcpu_to_vnode: GuestHandle<u32> = 24,
        vnode_to_pnode: GuestHandle<u32> = 32,
        vmemrange: GuestHandle<XenVmemrange> = 40,
    }

    /// Cache colours.
    pub struct XenDomctlSetLlcColors("struct xen_domctl_set_llc_colors", 16, 0x17..=0x17) {
        num_llc_colors: u32 = 0,
        _pad: u32,
        llc_colors: GuestHandle<u32> = 8,
    }
}

payload_methods!(XenDomctl, DOMCTL_PAYLOAD_LEN);

bitflags::bitflags! {
    /// What kind of domain to create (`flags` of [`CreateDomain`]).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct CreateFlags: u32 {
        /// HVM or PVH.
        const HVM = XEN_DOMCTL_CDF_HVM;
        /// Nested paging.
        const HAP = XEN_DOMCTL_CDF_HAP;
        /// Integrity over sleep.
        const S3_INTEGRITY = XEN_DOMCTL_CDF_S3_INTEGRITY;
        /// Shadow paging detail.
        const OOS_OFF = XEN_DOMCTL_CDF_OOS_OFF;
        /// Serves xenstore.
        const XS_DOMAIN = XEN_DOMCTL_CDF_XS_DOMAIN;
        /// May be given devices.
        const IOMMU = XEN_DOMCTL_CDF_IOMMU;
        /// May run a hypervisor.
        const NESTED_VIRT = XEN_DOMCTL_CDF_NESTED_VIRT;
        /// Performance counters.
        const VPMU = XEN_DOMCTL_CDF_VPMU;
    }
}

bitflags::bitflags! {
    /// The devices that the hypervisor emulates for a domain (`arch.emulation_flags`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EmulationFlags: u32 {
        /// Local APIC.
        const LAPIC = XEN_X86_EMU_LAPIC;
        /// HPET.
        const HPET = XEN_X86_EMU_HPET;
        /// ACPI power management.
        const PM = XEN_X86_EMU_PM;
        /// Real-time clock.
        const RTC = XEN_X86_EMU_RTC;
        /// I/O APIC.
        const IOAPIC = XEN_X86_EMU_IOAPIC;
        /// 8259.
        const PIC = XEN_X86_EMU_PIC;
        /// VGA memory.
        const VGA = XEN_X86_EMU_VGA;
        /// IOMMU.
        const IOMMU = XEN_X86_EMU_IOMMU;
        /// 8254.
        const PIT = XEN_X86_EMU_PIT;
        /// Emulated interrupts as pirqs.
        const USE_PIRQ = XEN_X86_EMU_USE_PIRQ;
        /// PCI configuration space.
        const VPCI = XEN_X86_EMU_VPCI;
    }
}

impl EmulationFlags {
    /// A PVH domU.
    pub const PVH: Self = Self::LAPIC;
    /// An HVM domU.
    pub const HVM: Self = Self::from_bits_retain(XEN_X86_EMU_ALL & !XEN_X86_EMU_VPCI);
    /// The PVH control domain.
    pub const DOM0: Self = Self::LAPIC.union(Self::IOAPIC).union(Self::VPCI);
}

/// `createdomain` in the internal form to which every version converts.
///
/// Plain values as the caller gave them: the handler validates them once for all versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateDomain {
    /// Security label.
    pub ssidref: u32,
    /// UUID.
    pub handle: DomainHandle,
    /// `XEN_DOMCTL_CDF_*`; see [`CreateFlags`].
    pub flags: u32,
    /// `XEN_DOMCTL_IOMMU_*`.
    pub iommu_opts: u32,
    /// vCPUs it may have.
    pub max_vcpus: u32,
    /// Highest event-channel port.
    pub max_evtchn_port: u32,
    /// Grant-table frames; negative is the hypervisor's default.
    pub max_grant_frames: i32,
    /// Maptrack frames; negative is the hypervisor's default.
    pub max_maptrack_frames: i32,
    /// Highest grant-table version in the low 4 bits.
    pub grant_opts: u32,
    /// `XEN_DOMCTL_ALTP2M_*`; zero from callers older than 0x17.
    pub altp2m_opts: u32,
    /// Bytes of processor-trace buffer per vCPU.
    pub vmtrace_size: u32,
    /// CPU pool.
    pub cpupool_id: u32,
    /// x86's part.
    pub arch: XenArchDomainconfig,
}

impl CreateDomain {
    /// Decodes the payload of a call, or `None` if its version is unknown.
    #[must_use]
    pub fn decode(call: &XenDomctl) -> Option<Self> {
        match call.interface_version {
            DomctlVersion::V15 | DomctlVersion::V16 => {
                Some(call.payload::<XenDomctlCreatedomainV15>().into())
            }
            DomctlVersion::V17 => Some(call.payload::<XenDomctlCreatedomainV17>().into()),
            _ => None,
        }
    }

    /// The devices to emulate; unknown bits are kept.
    #[must_use]
    pub const fn emulation(&self) -> EmulationFlags {
        EmulationFlags::from_bits_retain(self.arch.emulation_flags)
    }

    /// The kind of domain; unknown bits are kept.
    #[must_use]
    pub const fn create_flags(&self) -> CreateFlags {
        CreateFlags::from_bits_retain(self.flags)
    }
}

impl From<XenDomctlCreatedomainV15> for CreateDomain {
    fn from(c: XenDomctlCreatedomainV15) -> Self {
        Self {
            ssidref: c.ssidref,
            handle: c.handle,
            flags: c.flags,
            iommu_opts: c.iommu_opts,
            max_vcpus: c.max_vcpus,
            max_evtchn_port: c.max_evtchn_port,
            max_grant_frames: c.max_grant_frames,
            max_maptrack_frames: c.max_maptrack_frames,
            grant_opts: c.grant_opts,
            altp2m_opts: 0,
            vmtrace_size: c.vmtrace_size,
            cpupool_id: c.cpupool_id,
            arch: c.arch,
        }
    }
}

impl From<XenDomctlCreatedomainV17> for CreateDomain {
    fn from(c: XenDomctlCreatedomainV17) -> Self {
        Self {
            ssidref: c.ssidref,
            handle: c.handle,
            flags: c.flags,
            iommu_opts: c.iommu_opts,
            max_vcpus: c.max_vcpus,
            max_evtchn_port: c.max_evtchn_port,
            max_grant_frames: c.max_grant_frames,
            max_maptrack_frames: c.max_maptrack_frames,
            grant_opts: c.grant_opts,
            altp2m_opts: c.altp2m_opts,
            vmtrace_size: c.vmtrace_size,
            cpupool_id: c.cpupool_id,
            arch: c.arch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    /// The fields after `grant_opts` move between versions; give each its own value.
    fn call(version: DomctlVersion, words_after_grant_opts: &[u32]) -> XenDomctl {
        let mut call = XenDomctl::new_zeroed();
        call.interface_version = version;
        call.u[44] = 2;
        for (i, w) in words_after_grant_opts.iter().enumerate() {
            call.u[48 + i * 4..][..4].copy_from_slice(&w.to_le_bytes());
        }
        call
    }

    #[test]
    fn each_version_of_createdomain_finds_its_fields() {
        let old = CreateDomain::decode(&call(DomctlVersion::V15, &[10, 11, 12, 13])).unwrap();
        assert_eq!((old.grant_opts, old.altp2m_opts), (2, 0));
        assert_eq!((old.vmtrace_size, old.cpupool_id), (10, 11));
        assert_eq!((old.arch.emulation_flags, old.arch.misc_flags), (12, 13));
        assert_eq!(
            Some(old),
            CreateDomain::decode(&call(DomctlVersion::V16, &[10, 11, 12, 13]))
        );

        let new = CreateDomain::decode(&call(DomctlVersion::V17, &[3, 10, 11, 12, 13])).unwrap();
        assert_eq!(
            new,
            CreateDomain {
                altp2m_opts: 3,
                ..old
            }
        );
    }

    #[test]
    fn an_unknown_version_is_refused() {
        assert!(CreateDomain::decode(&call(DomctlVersion(0x14), &[])).is_none());
        assert!(!DomctlVersion(0x18).is_known());
        assert!(DomctlVersion::V17.is_known());
    }

    #[test]
    fn a_payload_written_back_leaves_the_rest_of_the_union() {
        let mut c = XenDomctl::new_zeroed();
        c.u = [0xaa; 128];
        c.set_payload(&XenDomctlMaxVcpus { max: 7 });
        assert_eq!(c.payload::<XenDomctlMaxVcpus>().max, 7);
        assert_eq!(&c.u[4..], [0xaa; 124]);
    }

    #[test]
    fn the_three_kinds_of_domain_have_their_known_device_sets() {
        assert_eq!(EmulationFlags::DOM0.bits(), 0x411);
        assert_eq!(EmulationFlags::HVM.bits(), 0x3ff);
        assert_eq!(EmulationFlags::PVH.bits(), 1);
    }
}
