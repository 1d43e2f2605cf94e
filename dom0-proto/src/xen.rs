//! What every guest shares with the hypervisor: hypercall numbers, domain ids, `shared_info`,
//! `vcpu_info`, virtual interrupts, multicalls, console and vm_assist commands.
//!
//! C: `xen.h`, `arch-x86/xen.h`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::GuestHandle;

abi_newtype! {
    /// A domain id as guests write it: real ones are below [`DomId::FIRST_RESERVED`].
    pub struct DomId(u16) {
        /// The caller itself. Also the first reserved id (`DOMID_FIRST_RESERVED`).
        SELF = 0x7ff0, "DOMID_SELF";
        /// Owner of machine frames that are no RAM: MMIO.
        IO = 0x7ff1, "DOMID_IO";
        /// Owner of the hypervisor's own frames.
        XEN = 0x7ff2, "DOMID_XEN";
        /// Owner of shared copy-on-write frames.
        COW = 0x7ff3, "DOMID_COW";
        /// No domain; also a probe value of tools.
        INVALID = 0x7ff4, "DOMID_INVALID";
        /// The idle domain.
        IDLE = 0x7fff, "DOMID_IDLE";
    }
}

impl DomId {
    /// Ids from here on are no ordinary domains.
    pub const FIRST_RESERVED: Self = Self::SELF;
    /// The control domain.
    pub const DOM0: Self = Self(0);

    /// Whether the id can belong to an ordinary domain.
    #[must_use]
    pub const fn is_ordinary(self) -> bool {
        self.0 < Self::FIRST_RESERVED.0
    }
}

impl core::fmt::Display for DomId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "d{}", self.0),
        }
    }
}

abi_consts! {
    u32 {
        /// Hypercall: PV only.
        HYPERVISOR_SET_TRAP_TABLE = 0,
        /// Hypercall: PV only.
        HYPERVISOR_MMU_UPDATE = 1,
        /// Hypercall: PV only.
        HYPERVISOR_SET_GDT = 2,
        /// Hypercall: PV only.
        HYPERVISOR_STACK_SWITCH = 3,
        /// Hypercall: PV only.
        HYPERVISOR_SET_CALLBACKS = 4,
        /// Hypercall: PV only.
        HYPERVISOR_FPU_TASKSWITCH = 5,
        /// Hypercall: the scheduler call before interface 0x00030101.
        HYPERVISOR_SCHED_OP_COMPAT = 6,
        /// Hypercall: the machine as dom0 sees it ([`crate::platform`]).
        HYPERVISOR_PLATFORM_OP = 7,
        /// Hypercall: PV only.
        HYPERVISOR_SET_DEBUGREG = 8,
        /// Hypercall: PV only.
        HYPERVISOR_GET_DEBUGREG = 9,
        /// Hypercall: PV only.
        HYPERVISOR_UPDATE_DESCRIPTOR = 10,
        /// Hypercall: [`crate::memory`].
        HYPERVISOR_MEMORY_OP = 12,
        /// Hypercall: a list of [`MulticallEntry`].
        HYPERVISOR_MULTICALL = 13,
        /// Hypercall: PV only.
        HYPERVISOR_UPDATE_VA_MAPPING = 14,
        /// Hypercall: one-shot timer of the calling vCPU, absolute system time in ns.
        HYPERVISOR_SET_TIMER_OP = 15,
        /// Hypercall: the event-channel call before interface 0x00030202.
        HYPERVISOR_EVENT_CHANNEL_OP_COMPAT = 16,
        /// Hypercall: [`crate::version`].
        HYPERVISOR_XEN_VERSION = 17,
        /// Hypercall: the hypervisor's console.
        HYPERVISOR_CONSOLE_IO = 18,
        /// Hypercall: the physdev call before interface 0x00030202.
        HYPERVISOR_PHYSDEV_OP_COMPAT = 19,
        /// Hypercall: [`crate::grant_table`].
        HYPERVISOR_GRANT_TABLE_OP = 20,
        /// Hypercall: switches per-domain conveniences on and off.
        HYPERVISOR_VM_ASSIST = 21,
        /// Hypercall: PV only.
        HYPERVISOR_UPDATE_VA_MAPPING_OTHERDOMAIN = 22,
        /// Hypercall: PV only.
        HYPERVISOR_IRET = 23,
        /// Hypercall: [`crate::vcpu`].
        HYPERVISOR_VCPU_OP = 24,
        /// Hypercall: PV only.
        HYPERVISOR_SET_SEGMENT_BASE = 25,
        /// Hypercall: PV page tables.
        HYPERVISOR_MMUEXT_OP = 26,
        /// Hypercall: security module (Flask).
        HYPERVISOR_XSM_OP = 27,
        /// Hypercall: NMI callbacks of PV guests.
        HYPERVISOR_NMI_OP = 28,
        /// Hypercall: [`crate::sched`].
        HYPERVISOR_SCHED_OP = 29,
        /// Hypercall: PV only.
        HYPERVISOR_CALLBACK_OP = 30,
        /// Hypercall: profiling, historic.
        HYPERVISOR_XENOPROF_OP = 31,
        /// Hypercall: [`crate::event_channel`].
        HYPERVISOR_EVENT_CHANNEL_OP = 32,
        /// Hypercall: [`crate::physdev`].
        HYPERVISOR_PHYSDEV_OP = 33,
        /// Hypercall: [`crate::hvm`].
        HYPERVISOR_HVM_OP = 34,
        /// Hypercall: [`crate::sysctl`].
        HYPERVISOR_SYSCTL = 35,
        /// Hypercall: [`crate::domctl`].
        HYPERVISOR_DOMCTL = 36,
        /// Hypercall: loads a crash kernel.
        HYPERVISOR_KEXEC_OP = 37,
        /// Hypercall: transcendent memory, historic.
        HYPERVISOR_TMEM_OP = 38,
        /// Hypercall: inter-domain messages.
        HYPERVISOR_ARGO_OP = 39,
        /// Hypercall: performance counters.
        HYPERVISOR_XENPMU_OP = 40,
        /// Hypercall: device models ([`crate::dm_op`]).
        HYPERVISOR_DM_OP = 41,
        /// Hypercall: the hypervisor's parameter file system.
        HYPERVISOR_HYPFS_OP = 42,
        /// Hypercall: machine checks (x86's first architecture call, `__HYPERVISOR_mca`).
        HYPERVISOR_ARCH_0 = 48,
        /// Hypercall: reserved for the architecture.
        HYPERVISOR_ARCH_1 = 49,

        /// Per-vCPU timer.
        VIRQ_TIMER = 0,
        /// Per-vCPU: dump your state.
        VIRQ_DEBUG = 1,
        /// Global: input on the hypervisor's console.
        VIRQ_CONSOLE = 2,
        /// Global: a domain shut down or died.
        VIRQ_DOM_EXC = 3,
        /// Global: the trace buffer has data.
        VIRQ_TBUF = 4,
        /// Global: a domain wants a debugger.
        VIRQ_DEBUGGER = 6,
        /// Per-vCPU: profiling.
        VIRQ_XENOPROF = 7,
        /// Global: the console ring has data.
        VIRQ_CON_RING = 8,
        /// Global: a physical CPU came or went.
        VIRQ_PCPU_STATE = 9,
        /// Global: memory event.
        VIRQ_MEM_EVENT = 10,
        /// Global: Argo message.
        VIRQ_ARGO = 11,
        /// Global: memory is low.
        VIRQ_ENOMEM = 12,
        /// Per-vCPU: performance counters.
        VIRQ_XENPMU = 13,
        /// Reserved for the architecture; x86 uses it for machine checks.
        VIRQ_ARCH_0 = 16,
        /// The number of virtual interrupts.
        NR_VIRQS = 24,

        /// console_io: write a buffer.
        CONSOLEIO_WRITE = 0,
        /// console_io: read pending input.
        CONSOLEIO_READ = 1,

        /// vm_assist: switch on.
        VMASST_CMD_ENABLE = 0,
        /// vm_assist: switch off.
        VMASST_CMD_DISABLE = 1,
        /// vm_assist type: PV only.
        VMASST_TYPE_4GB_SEGMENTS = 0,
        /// vm_assist type: PV only.
        VMASST_TYPE_4GB_SEGMENTS_NOTIFY = 1,
        /// vm_assist type: PV only.
        VMASST_TYPE_WRITABLE_PAGETABLES = 2,
        /// vm_assist type: PV only.
        VMASST_TYPE_PAE_EXTENDED_CR3 = 3,
        /// vm_assist type: PV only.
        VMASST_TYPE_ARCHITECTURAL_IOPL = 4,
        /// vm_assist type: mark run-state areas while they are being updated.
        VMASST_TYPE_RUNSTATE_UPDATE_FLAG = 5,
        /// vm_assist type: PV only.
        VMASST_TYPE_M2P_STRICT = 32,

        /// start_info flag: the domain is privileged.
        SIF_PRIVILEGED = 1 << 0,
        /// start_info flag: the domain is the first one.
        SIF_INITDOMAIN = 1 << 1,
        /// start_info flag: the module is a multiboot module list (PV).
        SIF_MULTIBOOT_MOD = 1 << 2,
        /// start_info flag: `mod_start` is a frame number (PV).
        SIF_MOD_START_PFN = 1 << 3,

        /// vCPUs whose `vcpu_info` lies in `shared_info`.
        XEN_LEGACY_MAX_VCPUS = 32,
        /// Port to which HVM guests write debug text, a byte at a time.
        XEN_HVM_DEBUGCONS_IOPORT = 0xe9,

        /// dom0_vga_console_info: text mode.
        XEN_VGATYPE_TEXT_MODE_3 = 0x03,
        /// dom0_vga_console_info: VESA frame buffer.
        XEN_VGATYPE_VESA_LFB = 0x23,
        /// dom0_vga_console_info: EFI frame buffer.
        XEN_VGATYPE_EFI_LFB = 0x70,

        /// A CPUID leaf without subleaves.
        XEN_CPUID_NO_SUBLEAF = 0xffff_ffff,
    }
    u8 {
        /// [`VcpuTimeInfo::flags`]: readings are monotonic over all vCPUs.
        XEN_PVCLOCK_TSC_STABLE_BIT = 1 << 0,
        /// [`VcpuTimeInfo::flags`]: the guest was stopped by its host.
        XEN_PVCLOCK_GUEST_STOPPED = 1 << 1,
    }
}

abi_structs! {
    /// One call of a multicall list.
    pub struct MulticallEntry("struct multicall_entry", 64) {
        /// Hypercall number.
        op: u64 = 0,
        /// Out: its result register.
        result: u64 = 8,
        /// Its arguments; x86 uses the first five, or six.
        args: [u64; 6] = 16,
    }

    /// The clock of one vCPU (pvclock). Even versions are stable, odd ones are being written.
    ///
    /// `ns = system_time + ((tsc - tsc_timestamp) << tsc_shift) * tsc_to_system_mul >> 32`.
    pub struct VcpuTimeInfo("struct vcpu_time_info", 32) {
        version: u32 = 0,
        _pad0: u32,
        /// TSC of the guest at the last update.
        tsc_timestamp: u64 = 8,
        /// Nanoseconds since boot at the last update.
        system_time: u64 = 16,
        /// 32.32 fixed-point factor, fraction only.
        tsc_to_system_mul: u32 = 24,
        /// Left shift of the TSC difference; negative is right.
        tsc_shift: i8 = 28,
        /// `XEN_PVCLOCK_*`.
        flags: u8 = 29,
        _pad1: [u8; 2],
    }

    /// The part of [`VcpuInfo`] that belongs to the architecture.
    pub struct ArchVcpuInfo("struct arch_vcpu_info", 16) {
        /// Faulting address, PV only.
        cr2: u64 = 0,
        _pad: u64,
    }

    /// Event state and clock of one vCPU.
    pub struct VcpuInfo("struct vcpu_info", 64) {
        /// Non-zero while an upcall is due.
        evtchn_upcall_pending: u8 = 0,
        /// Non-zero while upcalls are masked; PV only.
        evtchn_upcall_mask: u8 = 1,
        _pad: [u8; 6],
        /// One bit per word of `evtchn_pending` that may have work (2-level ABI).
        evtchn_pending_sel: u64 = 8,
        arch: ArchVcpuInfo = 16,
        time: VcpuTimeInfo = 32,
    }

    /// The part of [`SharedInfo`] that belongs to the architecture; only `nmi_reason` matters to HVM.
    pub struct ArchSharedInfo("struct arch_shared_info", 48) {
        max_pfn: u64,
        pfn_to_mfn_frame_list_list: u64,
        nmi_reason: u64 = 16,
        p2m_cr3: u64,
        p2m_vaddr: u64,
        p2m_generation: u64,
    }

    /// The page every domain shares with the hypervisor (its first 3136 bytes).
    pub struct SharedInfo("struct shared_info", 3136) {
        vcpu_info: [VcpuInfo; 32] = 0,
        /// Pending bits of the 2-level ABI.
        evtchn_pending: [u64; 64] = 2048,
        /// Mask bits of the 2-level ABI.
        evtchn_mask: [u64; 64] = 2560,
        /// Wall-clock version: even is stable.
        wc_version: u32 = 3072,
        /// Wall clock at system time zero: seconds, low half.
        wc_sec: u32 = 3076,
        wc_nsec: u32 = 3080,
        /// Seconds, high half.
        wc_sec_hi: u32 = 3084,
        arch: ArchSharedInfo = 3088,
    }

    /// A bitmap in guest memory.
    pub struct XenctlBitmap("struct xenctl_bitmap", 16) {
        bitmap: GuestHandle<u8> = 0,
        nr_bits: u32 = 8,
        _pad: u32,
    }

    /// One CPUID leaf of a policy.
    pub struct XenCpuidLeaf("struct xen_cpuid_leaf", 24) {
        leaf: u32 = 0,
        /// Subleaf, or [`XEN_CPUID_NO_SUBLEAF`].
        subleaf: u32 = 4,
        a: u32 = 8,
        b: u32 = 12,
        c: u32 = 16,
        d: u32 = 20,
    }

    /// One MSR of a policy.
    pub struct XenMsrEntry("struct xen_msr_entry", 16) {
        idx: u32 = 0,
        /// Must be zero.
        flags: u32 = 4,
        val: u64 = 8,
    }

    /// The text-mode form of [`Dom0VgaConsoleInfo`].
    pub struct VgaTextMode3("__typeof__(((struct dom0_vga_console_info *)0)->u.text_mode_3)", 10) {
        font_height: u16,
        cursor_x: u16,
        cursor_y: u16,
        rows: u16,
        columns: u16,
    }

    /// The linear frame buffer form of [`Dom0VgaConsoleInfo`], given to dom0 by
    /// `XENPF_get_dom0_console`.
    pub struct Dom0VgaConsoleInfo("struct dom0_vga_console_info", 40) {
        /// `XEN_VGATYPE_*`.
        video_type: u8 = 0,
        _pad0: [u8; 3],
        width ["u.vesa_lfb.width"]: u16 = 4,
        height ["u.vesa_lfb.height"]: u16 = 6,
        bytes_per_line ["u.vesa_lfb.bytes_per_line"]: u16 = 8,
        bits_per_pixel ["u.vesa_lfb.bits_per_pixel"]: u16 = 10,
        /// Physical base, low half.
        lfb_base ["u.vesa_lfb.lfb_base"]: u32 = 12,
        /// Size: in units of 64 KiB for VESA, in bytes for EFI.
        lfb_size ["u.vesa_lfb.lfb_size"]: u32 = 16,
        red_pos ["u.vesa_lfb.red_pos"]: u8 = 20,
        red_size ["u.vesa_lfb.red_size"]: u8,
        green_pos ["u.vesa_lfb.green_pos"]: u8,
        green_size ["u.vesa_lfb.green_size"]: u8,
        blue_pos ["u.vesa_lfb.blue_pos"]: u8,
        blue_size ["u.vesa_lfb.blue_size"]: u8,
        rsvd_pos ["u.vesa_lfb.rsvd_pos"]: u8,
        rsvd_size ["u.vesa_lfb.rsvd_size"]: u8,
        gbl_caps ["u.vesa_lfb.gbl_caps"]: u32 = 28,
        mode_attrs ["u.vesa_lfb.mode_attrs"]: u16 = 32,
        _pad1: u16,
        /// Physical base, high half.
        ext_lfb_base ["u.vesa_lfb.ext_lfb_base"]: u32 = 36,
    }
}

/// A domain's UUID as the toolstack gave it. C: `xen_domain_handle_t`.
#[repr(transparent)]
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct DomainHandle(pub [u8; 16]);

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn reserved_ids_are_no_ordinary_domains() {
        assert!(DomId(0).is_ordinary());
        assert!(DomId(0x7fef).is_ordinary());
        assert!(!DomId::SELF.is_ordinary());
        assert!(!DomId(0xffff).is_ordinary());
        assert_eq!(format!("{} {}", DomId(7), DomId::IO), "d7 IO");
    }
}
