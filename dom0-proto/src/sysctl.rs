//! `sysctl`: what the toolstack asks about, and does to, the whole machine.
//!
//! Every call carries an interface version; 0x15 has served since 4.17. Layouts that grew within it
//! did so compatibly. C: `sysctl.h`.
//!
//! A handler copies in [`XenSysctl`], checks version and operation, takes the payload by
//! [`XenSysctl::payload`] and puts results back by [`XenSysctl::set_payload`].

use crate::domctl::XenDomctlGetdomaininfo;
use crate::physdev::PhysdevPciDevice;
use crate::xen::{XenCpuidLeaf, XenMsrEntry, XenctlBitmap};
use crate::{DomId, GuestHandle};

abi_consts! {
    u32 {
        /// The version of 4.17 to 4.20.
        XEN_SYSCTL_INTERFACE_VERSION = 0x15,

        /// [`XenSysctlReadconsole`].
        XEN_SYSCTL_READCONSOLE = 1,
        /// [`XenSysctlTbufOp`].
        XEN_SYSCTL_TBUF_OP = 2,
        /// [`XenSysctlPhysinfo`].
        XEN_SYSCTL_PHYSINFO = 3,
        /// [`XenSysctlSchedId`].
        XEN_SYSCTL_SCHED_ID = 4,
        /// [`XenSysctlPerfcOp`].
        XEN_SYSCTL_PERFC_OP = 5,
        /// [`XenSysctlGetdomaininfolist`].
        XEN_SYSCTL_GETDOMAININFOLIST = 6,
        /// [`XenSysctlDebugKeys`].
        XEN_SYSCTL_DEBUG_KEYS = 7,
        /// [`XenSysctlGetcpuinfo`].
        XEN_SYSCTL_GETCPUINFO = 8,
        /// [`XenSysctlAvailheap`].
        XEN_SYSCTL_AVAILHEAP = 9,
        /// [`XenSysctlGetPmstat`].
        XEN_SYSCTL_GET_PMSTAT = 10,
        /// [`XenSysctlCpuHotplug`].
        XEN_SYSCTL_CPU_HOTPLUG = 11,
        /// [`XenSysctlPmOp`].
        XEN_SYSCTL_PM_OP = 12,
        /// [`XenSysctlPageOfflineOp`].
        XEN_SYSCTL_PAGE_OFFLINE_OP = 14,
        /// Lock profiling.
        XEN_SYSCTL_LOCKPROF_OP = 15,
        /// [`XenSysctlCputopoinfo`].
        XEN_SYSCTL_CPUTOPOINFO = 16,
        /// [`XenSysctlNumainfo`].
        XEN_SYSCTL_NUMAINFO = 17,
        /// [`XenSysctlCpupoolOp`].
        XEN_SYSCTL_CPUPOOL_OP = 18,
        /// [`XenSysctlSchedulerOp`].
        XEN_SYSCTL_SCHEDULER_OP = 19,
        /// Code coverage.
        XEN_SYSCTL_COVERAGE_OP = 20,
        /// [`XenSysctlPsrCmtOp`].
        XEN_SYSCTL_PSR_CMT_OP = 21,
        /// [`XenSysctlPcitopoinfo`].
        XEN_SYSCTL_PCITOPOINFO = 22,
        /// [`XenSysctlPsrAlloc`].
        XEN_SYSCTL_PSR_ALLOC = 23,
        /// [`XenSysctlCpuLevellingCaps`].
        XEN_SYSCTL_GET_CPU_LEVELLING_CAPS = 25,
        /// [`XenSysctlCpuFeatureset`].
        XEN_SYSCTL_GET_CPU_FEATURESET = 26,
        /// Live patching.
        XEN_SYSCTL_LIVEPATCH_OP = 27,
        /// [`XenSysctlCpuPolicy`].
        XEN_SYSCTL_GET_CPU_POLICY = 29,
        /// Arm only (4.18).
        XEN_SYSCTL_DT_OVERLAY = 30,

        /// Machine capability: HVM.
        XEN_SYSCTL_PHYSCAP_HVM = 1 << 0,
        /// Machine capability: PV.
        XEN_SYSCTL_PHYSCAP_PV = 1 << 1,
        /// Machine capability: an IOMMU.
        XEN_SYSCTL_PHYSCAP_DIRECTIO = 1 << 2,
        /// Machine capability: nested paging.
        XEN_SYSCTL_PHYSCAP_HAP = 1 << 3,
        /// Machine capability: shadow paging.
        XEN_SYSCTL_PHYSCAP_SHADOW = 1 << 4,
        /// Machine capability: IOMMU and CPU share second-stage tables.
        XEN_SYSCTL_PHYSCAP_IOMMU_HAP_PT_SHARE = 1 << 5,
        /// Machine capability: processor trace.
        XEN_SYSCTL_PHYSCAP_VMTRACE = 1 << 6,
        /// Machine capability: performance counters.
        XEN_SYSCTL_PHYSCAP_VPMU = 1 << 7,
        /// Machine capability: grant table version 1.
        XEN_SYSCTL_PHYSCAP_GNTTAB_V1 = 1 << 8,
        /// Machine capability: grant table version 2.
        XEN_SYSCTL_PHYSCAP_GNTTAB_V2 = 1 << 9,

        /// Trace buffers: size and place.
        XEN_SYSCTL_TBUFOP_GET_INFO = 0,
        /// Trace buffers: which CPUs.
        XEN_SYSCTL_TBUFOP_SET_CPU_MASK = 1,
        /// Trace buffers: which events.
        XEN_SYSCTL_TBUFOP_SET_EVT_MASK = 2,
        /// Trace buffers: pages.
        XEN_SYSCTL_TBUFOP_SET_SIZE = 3,
        /// Trace buffers: start.
        XEN_SYSCTL_TBUFOP_ENABLE = 4,
        /// Trace buffers: stop.
        XEN_SYSCTL_TBUFOP_DISABLE = 5,
        /// Counters: set to zero.
        XEN_SYSCTL_PERFCOP_RESET = 1,
        /// Counters: read.
        XEN_SYSCTL_PERFCOP_QUERY = 2,

        /// CPU: bring up.
        XEN_SYSCTL_CPU_HOTPLUG_ONLINE = 0,
        /// CPU: take down.
        XEN_SYSCTL_CPU_HOTPLUG_OFFLINE = 1,
        /// All siblings: bring up.
        XEN_SYSCTL_CPU_HOTPLUG_SMT_ENABLE = 2,
        /// All siblings: take down.
        XEN_SYSCTL_CPU_HOTPLUG_SMT_DISABLE = 3,

        /// Power statistics: number of P states.
        PMSTAT_GET_MAX_PX = 0x11,
        /// Power statistics: P states.
        PMSTAT_GET_PXSTAT = 0x12,
        /// Power statistics: set to zero.
        PMSTAT_RESET_PXSTAT = 0x13,
        /// Power statistics: number of C states.
        PMSTAT_GET_MAX_CX = 0x21,
        /// Power statistics: C states.
        PMSTAT_GET_CXSTAT = 0x22,
        /// Power statistics: set to zero.
        PMSTAT_RESET_CXSTAT = 0x23,
        /// Power management: frequency parameters.
        GET_CPUFREQ_PARA = 0x11,
        /// Power management: governor.
        SET_CPUFREQ_GOV = 0x12,
        /// Power management: frequency parameters.
        SET_CPUFREQ_PARA = 0x13,
        /// Power management: average frequency.
        GET_CPUFREQ_AVGFREQ = 0x14,
        /// Power management: hardware-controlled performance (4.18).
        SET_CPUFREQ_CPPC = 0x15,

        /// `core` of a CPU that is not there.
        XEN_INVALID_CORE_ID = u32::MAX,
        /// `socket` of a CPU that is not there.
        XEN_INVALID_SOCKET_ID = u32::MAX,
        /// `node` of a CPU or device that is not there.
        XEN_INVALID_NODE_ID = u32::MAX,
        /// Node of a device that does not exist.
        XEN_INVALID_DEV = u32::MAX - 1,
        /// Distance that is not known.
        XEN_INVALID_NODE_DIST = u32::MAX,

        /// Pool: make one.
        XEN_SYSCTL_CPUPOOL_OP_CREATE = 1,
        /// Pool: destroy.
        XEN_SYSCTL_CPUPOOL_OP_DESTROY = 2,
        /// Pool: describe the first at or above the id.
        XEN_SYSCTL_CPUPOOL_OP_INFO = 3,
        /// Pool: add a CPU.
        XEN_SYSCTL_CPUPOOL_OP_ADDCPU = 4,
        /// Pool: remove a CPU.
        XEN_SYSCTL_CPUPOOL_OP_RMCPU = 5,
        /// Pool: move a domain into it.
        XEN_SYSCTL_CPUPOOL_OP_MOVEDOMAIN = 6,
        /// Pool: CPUs in none.
        XEN_SYSCTL_CPUPOOL_OP_FREEINFO = 7,
        /// Pool: any id, or any CPU.
        XEN_SYSCTL_CPUPOOL_PAR_ANY = u32::MAX,

        /// Scheduler: set.
        XEN_SYSCTL_SCHEDOP_PUTINFO = 0,
        /// Scheduler: get.
        XEN_SYSCTL_SCHEDOP_GETINFO = 1,
        /// Longest rate limit in microseconds; 0 is none.
        XEN_SYSCTL_SCHED_RATELIMIT_MAX = 500_000,
        /// Shortest rate limit in microseconds.
        XEN_SYSCTL_SCHED_RATELIMIT_MIN = 100,

        /// Feature set: the hardware.
        XEN_SYSCTL_CPU_FEATURESET_RAW = 0,
        /// Feature set: the hypervisor's own.
        XEN_SYSCTL_CPU_FEATURESET_HOST = 1,
        /// Feature set: PV default.
        XEN_SYSCTL_CPU_FEATURESET_PV = 2,
        /// Feature set: HVM default.
        XEN_SYSCTL_CPU_FEATURESET_HVM = 3,
        /// Feature set: PV maximum.
        XEN_SYSCTL_CPU_FEATURESET_PV_MAX = 4,
        /// Feature set: HVM maximum.
        XEN_SYSCTL_CPU_FEATURESET_HVM_MAX = 5,
        /// Policy: the hardware.
        XEN_SYSCTL_CPU_POLICY_RAW = 0,
        /// Policy: the hypervisor's own.
        XEN_SYSCTL_CPU_POLICY_HOST = 1,
        /// Policy: PV maximum.
        XEN_SYSCTL_CPU_POLICY_PV_MAX = 2,
        /// Policy: HVM maximum.
        XEN_SYSCTL_CPU_POLICY_HVM_MAX = 3,
        /// Policy: PV default.
        XEN_SYSCTL_CPU_POLICY_PV_DEFAULT = 4,
        /// Policy: HVM default.
        XEN_SYSCTL_CPU_POLICY_HVM_DEFAULT = 5,
    }
    u64 {
        /// Memory size that is not known.
        XEN_INVALID_MEM_SZ = u32::MAX as u64,
    }
    usize {
        /// Length of the payload union.
        SYSCTL_PAYLOAD_LEN = 128,
        /// Offset of the payload union.
        SYSCTL_PAYLOAD_OFFSET = 8,
    }
}

abi_structs! {
    /// The part before the payload.
    pub struct XenSysctlHeader("", 8) {
        cmd: u32 = 0,
        interface_version: u32 = 4,
    }

    /// A whole call.
    pub struct XenSysctl("struct xen_sysctl", 136) {
        cmd: u32 = 0,
        interface_version: u32 = 4,
        /// One of the payloads below.
        u: [u8; 128] = 8,
    }

    /// The console ring.
    pub struct XenSysctlReadconsole("struct xen_sysctl_readconsole", 24) {
        /// Empty it afterwards.
        clear: u8 = 0,
        /// Start from `index`.
        incremental: u8 = 1,
        _pad0 ["pad0"]: u8,
        _pad1 ["pad1"]: u8,
        /// In: where to start. Out: where to go on.
        index: u32 = 4,
        buffer: GuestHandle<u8> = 8,
        /// In: room. Out: bytes.
        count: u32 = 16,
        _pad2: u32,
    }

    /// Trace buffers.
    pub struct XenSysctlTbufOp("struct xen_sysctl_tbuf_op", 48) {
        cmd: u32 = 0,
        _pad0: u32,
        cpu_mask: XenctlBitmap = 8,
        evt_mask: u32 = 24,
        _pad1: u32,
        buffer_mfn: u64 = 32,
        size: u32 = 40,
        _pad2: u32,
    }

    /// The machine.
    pub struct XenSysctlPhysinfo("struct xen_sysctl_physinfo", 112) {
        threads_per_core: u32 = 0,
        cores_per_socket: u32 = 4,
        /// Online.
        nr_cpus: u32 = 8,
        max_cpu_id: u32 = 12,
        /// Online.
        nr_nodes: u32 = 16,
        max_node_id: u32 = 20,
        cpu_khz: u32 = 24,
        /// `XEN_SYSCTL_PHYSCAP_*`.
        capabilities: u32 = 28,
        arch_capabilities: u32 = 32,
        _pad: u32,
        total_pages: u64 = 40,
        free_pages: u64 = 48,
        scrub_pages: u64 = 56,
        outstanding_pages: u64 = 64,
        max_mfn: u64 = 72,
        /// Words of the hypervisor's feature set.
        hw_cap: [u32; 8] = 80,
    }

    /// The scheduler.
    pub struct XenSysctlSchedId("struct xen_sysctl_sched_id", 4) {
        /// `XEN_SCHEDULER_*`.
        sched_id: u32 = 0,
    }

    /// The name of a counter.
    pub struct XenSysctlPerfcDesc("struct xen_sysctl_perfc_desc", 84) {
        name: [u8; 80] = 0,
        nr_vals: u32 = 80,
    }

    /// Counters.
    pub struct XenSysctlPerfcOp("struct xen_sysctl_perfc_op", 32) {
        /// `XEN_SYSCTL_PERFCOP_*`.
        cmd: u32 = 0,
        nr_counters: u32 = 4,
        nr_vals: u32 = 8,
        _pad: u32,
        desc: GuestHandle<XenSysctlPerfcDesc> = 16,
        val: GuestHandle<u32> = 24,
    }

    /// All domains from one on.
    pub struct XenSysctlGetdomaininfolist("struct xen_sysctl_getdomaininfolist", 24) {
        first_domain: DomId = 0,
        _pad0: u16,
        max_domains: u32 = 4,
        buffer: GuestHandle<XenDomctlGetdomaininfo> = 8,
        /// Out.
        num_domains: u32 = 16,
        _pad1: u32,
    }

    /// Debug keys to act upon.
    pub struct XenSysctlDebugKeys("struct xen_sysctl_debug_keys", 16) {
        keys: GuestHandle<u8> = 0,
        nr_keys: u32 = 8,
        _pad: u32,
    }

    /// Idle time of a CPU.
    pub struct XenSysctlCpuinfo("struct xen_sysctl_cpuinfo", 8) {
        /// Nanoseconds.
        idletime: u64 = 0,
    }

    /// Idle time of all CPUs.
    pub struct XenSysctlGetcpuinfo("struct xen_sysctl_getcpuinfo", 24) {
        max_cpus: u32 = 0,
        _pad0: u32,
        info: GuestHandle<XenSysctlCpuinfo> = 8,
        /// Out.
        nr_cpus: u32 = 16,
        _pad1: u32,
    }

    /// Free memory within limits.
    pub struct XenSysctlAvailheap("struct xen_sysctl_availheap", 24) {
        /// Lowest address width; 0 is any.
        min_bitwidth: u32 = 0,
        /// Highest address width; 0 is any.
        max_bitwidth: u32 = 4,
        /// -1 is all.
        node: i32 = 8,
        _pad: u32,
        /// Out.
        avail_bytes: u64 = 16,
    }

    /// Residency in C states.
    pub struct PmCxStat("struct pm_cx_stat", 56) {
        nr: u32 = 0,
        last: u32 = 4,
        idle_time: u64 = 8,
        triggers: GuestHandle<u64> = 16,
        residencies: GuestHandle<u64> = 24,
        nr_pc: u32 = 32,
        nr_cc: u32 = 36,
        pc: GuestHandle<u64> = 40,
        cc: GuestHandle<u64> = 48,
    }

    /// Power statistics of a CPU.
    pub struct XenSysctlGetPmstat("struct xen_sysctl_get_pmstat", 64) {
        /// `PMSTAT_*`.
        kind ["type"]: u32 = 0,
        cpuid: u32 = 4,
        /// C states; the other member of the union, P states, is shorter.
        getcx ["u.getcx"]: PmCxStat = 8,
    }

    /// A CPU to bring up or down.
    pub struct XenSysctlCpuHotplug("struct xen_sysctl_cpu_hotplug", 8) {
        cpu: u32 = 0,
        /// `XEN_SYSCTL_CPU_HOTPLUG_*`.
        op: u32 = 4,
    }

    /// Power management: its own arguments follow the two words.
    pub struct XenSysctlPmOp("", 8) {
        /// `GET_CPUFREQ_PARA` and the like.
        cmd: u32 = 0,
        cpuid: u32 = 4,
    }

    /// Frames to take out of use.
    pub struct XenSysctlPageOfflineOp("struct xen_sysctl_page_offline_op", 24) {
        cmd: u32 = 0,
        start: u32 = 4,
        end: u32 = 8,
        _pad: u32,
        status: GuestHandle<u32> = 16,
    }

    /// Where a CPU sits.
    pub struct XenSysctlCputopo("struct xen_sysctl_cputopo", 12) {
        core: u32 = 0,
        socket: u32 = 4,
        node: u32 = 8,
    }

    /// Where all CPUs sit; a null handle asks for the number.
    pub struct XenSysctlCputopoinfo("struct xen_sysctl_cputopoinfo", 16) {
        num_cpus: u32 = 0,
        _pad: u32,
        cputopo: GuestHandle<XenSysctlCputopo> = 8,
    }

    /// Memory of a node in bytes.
    pub struct XenSysctlMeminfo("struct xen_sysctl_meminfo", 16) {
        memsize: u64 = 0,
        memfree: u64 = 8,
    }

    /// All nodes; null handles ask for the number.
    pub struct XenSysctlNumainfo("struct xen_sysctl_numainfo", 24) {
        num_nodes: u32 = 0,
        _pad: u32,
        meminfo: GuestHandle<XenSysctlMeminfo> = 8,
        /// A square, row by row.
        distance: GuestHandle<u32> = 16,
    }

    /// CPU pools.
    pub struct XenSysctlCpupoolOp("struct xen_sysctl_cpupool_op", 40) {
        /// `XEN_SYSCTL_CPUPOOL_OP_*`.
        op: u32 = 0,
        cpupool_id: u32 = 4,
        sched_id: u32 = 8,
        domid: u32 = 12,
        cpu: u32 = 16,
        n_dom: u32 = 20,
        cpumap: XenctlBitmap = 24,
    }

    /// Parameters of a scheduler.
    pub struct XenSysctlSchedulerOp("struct xen_sysctl_scheduler_op", 32) {
        cpupool_id: u32 = 0,
        /// `XEN_SCHEDULER_*`.
        sched_id: u32 = 4,
        /// `XEN_SYSCTL_SCHEDOP_*`.
        cmd: u32 = 8,
        _pad0: u32,
        /// A union. Credit2: the rate limit in microseconds. Credit: the time slice in milliseconds,
        /// the rate limit and the migration delay in microseconds.
        params ["u.sched_credit"]: [u32; 3] = 16,
        _pad1: u32,
    }

    /// Cache monitoring.
    pub struct XenSysctlPsrCmtOp("struct xen_sysctl_psr_cmt_op", 16) {
        cmd: u32 = 0,
        flags: u32 = 4,
        data ["u.data"]: u64 = 8,
    }

    /// Cache allocation.
    pub struct XenSysctlPsrAlloc("struct xen_sysctl_psr_alloc", 20) {
        cmd: u32 = 0,
        target: u32 = 4,
        u ["u.cat_info"]: [u32; 3] = 8,
    }

    /// Nodes of PCI devices.
    pub struct XenSysctlPcitopoinfo("struct xen_sysctl_pcitopoinfo", 24) {
        num_devs: u32 = 0,
        _pad: u32,
        devs: GuestHandle<PhysdevPciDevice> = 8,
        nodes: GuestHandle<u32> = 16,
    }

    /// What can be levelled between machines; PV.
    pub struct XenSysctlCpuLevellingCaps("struct xen_sysctl_cpu_levelling_caps", 4) {
        caps: u32 = 0,
    }

    /// A feature set.
    pub struct XenSysctlCpuFeatureset("struct xen_sysctl_cpu_featureset", 16) {
        /// `XEN_SYSCTL_CPU_FEATURESET_*`.
        index: u32 = 0,
        /// In: room. Out: words.
        nr_features: u32 = 4,
        features: GuestHandle<u32> = 8,
    }

    /// A CPUID and MSR policy.
    pub struct XenSysctlCpuPolicy("struct xen_sysctl_cpu_policy", 32) {
        /// `XEN_SYSCTL_CPU_POLICY_*`.
        index: u32 = 0,
        nr_leaves: u32 = 4,
        nr_msrs: u32 = 8,
        _pad ["_rsvd"]: u32,
        leaves: GuestHandle<XenCpuidLeaf> = 16,
        msrs: GuestHandle<XenMsrEntry> = 24,
    }
}

payload_methods!(XenSysctl, SYSCTL_PAYLOAD_LEN);
