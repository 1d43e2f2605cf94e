//! What HVM and PVH guests and their builders use: parameters, `hvm_op`, and the PVH start info.
//!
//! C: `hvm/params.h`, `hvm/hvm_op.h`, `hvm/hvm_info_table.h`, `arch-x86/hvm/start_info.h`. Save
//! records are in [`crate::hvm_save`], device-model calls in [`crate::dm_op`].

use crate::DomId;

abi_consts! {
    u32 {
        /// [`XenHvmParam`].
        HVMOP_SET_PARAM = 0,
        /// [`XenHvmParam`].
        HVMOP_GET_PARAM = 1,
        /// Flush the TLBs of all vCPUs; null argument.
        HVMOP_FLUSH_TLBS = 5,
        /// [`XenHvmPagetableDying`].
        HVMOP_PAGETABLE_DYING = 9,
        /// [`XenHvmGetTime`].
        HVMOP_GET_TIME = 10,
        /// A trace record.
        HVMOP_XENTRACE = 11,
        /// [`XenHvmGetMemType`].
        HVMOP_GET_MEM_TYPE = 15,
        /// [`XenHvmEvtchnUpcallVector`].
        HVMOP_SET_EVTCHN_UPCALL_VECTOR = 23,
        /// Ask the monitor for an event; no argument.
        HVMOP_GUEST_REQUEST_VM_EVENT = 24,
        /// Alternate p2m tables.
        HVMOP_ALTP2M = 25,

        /// How events reach the guest: see `HVM_PARAM_CALLBACK_TYPE_*`.
        HVM_PARAM_CALLBACK_IRQ = 0,
        /// gfn of the xenstore ring.
        HVM_PARAM_STORE_PFN = 1,
        /// Port of the xenstore ring.
        HVM_PARAM_STORE_EVTCHN = 2,
        /// Historic; reads of it are refused or zero.
        HVM_PARAM_PAE_ENABLED = 4,
        /// gfn of the default ioreq page.
        HVM_PARAM_IOREQ_PFN = 5,
        /// gfn of the default buffered ioreq page.
        HVM_PARAM_BUFIOREQ_PFN = 6,
        /// Hyper-V enlightenments: `HVMPV_*`.
        HVM_PARAM_VIRIDIAN = 9,
        /// Treatment of missed timer ticks: `HVMPTM_*`.
        HVM_PARAM_TIMER_MODE = 10,
        /// Whether there is an HPET.
        HVM_PARAM_HPET_ENABLED = 11,
        /// Guest-physical address of the identity page table (VT-x without unrestricted guest).
        HVM_PARAM_IDENT_PT = 12,
        /// Domain of the device model, historic.
        HVM_PARAM_DM_DOMAIN = 13,
        /// ACPI sleep state: 0 or 3.
        HVM_PARAM_ACPI_S_STATE = 14,
        /// Guest-physical address of a TSS for real mode.
        HVM_PARAM_VM86_TSS = 15,
        /// Align the periods of virtual timers.
        HVM_PARAM_VPT_ALIGN = 16,
        /// gfn of the console ring.
        HVM_PARAM_CONSOLE_PFN = 17,
        /// Port of the console ring.
        HVM_PARAM_CONSOLE_EVTCHN = 18,
        /// Where ACPI's ports are: 0 old, 1 new place.
        HVM_PARAM_ACPI_IOPORTS_LOCATION = 19,
        /// Historic.
        HVM_PARAM_MEMORY_EVENT_CR0 = 20,
        /// Historic.
        HVM_PARAM_MEMORY_EVENT_CR3 = 21,
        /// Historic.
        HVM_PARAM_MEMORY_EVENT_CR4 = 22,
        /// Historic.
        HVM_PARAM_MEMORY_EVENT_INT3 = 23,
        /// Historic.
        HVM_PARAM_NESTEDHVM = 24,
        /// Historic.
        HVM_PARAM_MEMORY_EVENT_SINGLE_STEP = 25,
        /// Port of the default buffered ioreq page.
        HVM_PARAM_BUFIOREQ_EVTCHN = 26,
        /// gfn of the paging ring.
        HVM_PARAM_PAGING_RING_PFN = 27,
        /// gfn of the monitor ring.
        HVM_PARAM_MONITOR_RING_PFN = 28,
        /// gfn of the sharing ring.
        HVM_PARAM_SHARING_RING_PFN = 29,
        /// Historic.
        HVM_PARAM_MEMORY_EVENT_MSR = 30,
        /// Shutdown reason of a triple fault.
        HVM_PARAM_TRIPLE_FAULT_REASON = 31,
        /// First gfn for the pages of ioreq servers.
        HVM_PARAM_IOREQ_SERVER_PFN = 32,
        /// How many of them.
        HVM_PARAM_NR_IOREQ_SERVER_PAGES = 33,
        /// Guest-physical address of the VM generation id.
        HVM_PARAM_VM_GENERATION_ID_ADDR = 34,
        /// Alternate p2m mode: `XEN_ALTP2M_*`.
        HVM_PARAM_ALTP2M = 35,
        /// Bytes of the x87 instruction pointer that are saved.
        HVM_PARAM_X87_FIP_WIDTH = 36,
        /// As [`HVM_PARAM_VM86_TSS`] with the size in the high 32 bits.
        HVM_PARAM_VM86_TSS_SIZED = 37,
        /// Machine-check capabilities: `XEN_HVM_MCA_CAP_*`.
        HVM_PARAM_MCA_CAP = 38,
        /// The number of parameters.
        HVM_NR_PARAMS = 39,

        /// Callback type (bits 63:56 of the value): a GSI; 0 is none, 1 a dummy for vector users.
        HVM_PARAM_CALLBACK_TYPE_GSI = 0,
        /// Callback type: a PCI INTx line: segment 47:32, bus 31:16, devfn 15:8, pin 1:0.
        HVM_PARAM_CALLBACK_TYPE_PCI_INTX = 1,
        /// Callback type: a vector (7:0) on whichever vCPU has the event.
        HVM_PARAM_CALLBACK_TYPE_VECTOR = 2,

        /// Timer mode: deliver late ticks late.
        HVMPTM_DELAY_FOR_MISSED_TICKS = 0,
        /// Timer mode: deliver missed ticks without changing the period.
        HVMPTM_NO_DELAY_FOR_MISSED_TICKS = 1,
        /// Timer mode: drop missed ticks.
        HVMPTM_NO_MISSED_TICKS_PENDING = 2,
        /// Timer mode: collapse missed ticks into one.
        HVMPTM_ONE_MISSED_TICK_PENDING = 3,

        /// Viridian: the base set, needed by all others.
        HVMPV_BASE_FREQ = 1 << 0,
        /// Viridian: without the frequency MSRs.
        HVMPV_NO_FREQ = 1 << 1,
        /// Viridian: reference counter.
        HVMPV_TIME_REF_COUNT = 1 << 2,
        /// Viridian: reference TSC page.
        HVMPV_REFERENCE_TSC = 1 << 3,
        /// Viridian: TLB flush hypercalls.
        HVMPV_HCALL_REMOTE_TLB_FLUSH = 1 << 4,
        /// Viridian: APIC assist page.
        HVMPV_APIC_ASSIST = 1 << 5,
        /// Viridian: crash MSRs.
        HVMPV_CRASH_CTL = 1 << 6,
        /// Viridian: synthetic interrupt controller.
        HVMPV_SYNIC = 1 << 7,
        /// Viridian: synthetic timers.
        HVMPV_STIMER = 1 << 8,
        /// Viridian: IPI hypercalls.
        HVMPV_HCALL_IPI = 1 << 9,
        /// Viridian: processor masks of more than 64.
        HVMPV_EX_PROCESSOR_MASKS = 1 << 10,
        /// Viridian: more than 64 processors.
        HVMPV_NO_VP_LIMIT = 1 << 11,
        /// Viridian: processors may be added.
        HVMPV_CPU_HOTPLUG = 1 << 12,

        /// Alternate p2m: off.
        XEN_ALTP2M_DISABLED = 0,
        /// Alternate p2m: guest and outside.
        XEN_ALTP2M_MIXED = 1,
        /// Alternate p2m: outside only.
        XEN_ALTP2M_EXTERNAL = 2,
        /// Alternate p2m: limited to the guest.
        XEN_ALTP2M_LIMITED = 3,

        /// Memory type: RAM.
        HVMMEM_RAM_RW = 0,
        /// Memory type: RAM whose writes are dropped.
        HVMMEM_RAM_RO = 1,
        /// Memory type: reads and writes go to the device model.
        HVMMEM_MMIO_DM = 2,
        /// Memory type: not used.
        HVMMEM_UNUSED = 3,
        /// Memory type: writes go to an ioreq server.
        HVMMEM_IOREQ_SERVER = 4,

        /// ioreq server: no buffered page.
        HVM_IOREQSRV_BUFIOREQ_OFF = 0,
        /// ioreq server: buffered page with pointers read one by one.
        HVM_IOREQSRV_BUFIOREQ_LEGACY = 1,
        /// ioreq server: buffered page with pointers read atomically.
        HVM_IOREQSRV_BUFIOREQ_ATOMIC = 2,

        /// [`HvmStartInfo::magic`].
        XEN_HVM_START_MAGIC_VALUE = 0x336e_c578,
        /// Type in the start info's memory map; as in E820.
        XEN_HVM_MEMMAP_TYPE_RAM = 1,
        /// Type in the start info's memory map.
        XEN_HVM_MEMMAP_TYPE_RESERVED = 2,
        /// Type in the start info's memory map.
        XEN_HVM_MEMMAP_TYPE_ACPI = 3,
        /// Type in the start info's memory map.
        XEN_HVM_MEMMAP_TYPE_NVS = 4,
        /// Type in the start info's memory map.
        XEN_HVM_MEMMAP_TYPE_UNUSABLE = 5,
        /// Type in the start info's memory map.
        XEN_HVM_MEMMAP_TYPE_DISABLED = 6,
        /// Type in the start info's memory map.
        XEN_HVM_MEMMAP_TYPE_PMEM = 7,

        /// gfn of the table that the toolstack leaves for hvmloader.
        HVM_INFO_PFN = 0x09f,
        /// Its offset in the page.
        HVM_INFO_OFFSET = 0x800,
        /// vCPUs it can describe.
        HVM_MAX_VCPUS = 128,

        /// ACPI blocks of [`HVM_PARAM_ACPI_IOPORTS_LOCATION`] 0: PM1a events.
        ACPI_PM1A_EVT_BLK_ADDRESS_V0 = 0x1f40,
        /// Old place: PM1a control.
        ACPI_PM1A_CNT_BLK_ADDRESS_V0 = 0x1f44,
        /// Old place: PM timer.
        ACPI_PM_TMR_BLK_ADDRESS_V0 = 0x1f48,
        /// Old place: GPE 0.
        ACPI_GPE0_BLK_ADDRESS_V0 = 0x1f68,
        /// Old place: length of GPE 0.
        ACPI_GPE0_BLK_LEN_V0 = 8,
        /// ACPI blocks of [`HVM_PARAM_ACPI_IOPORTS_LOCATION`] 1: PM1a events.
        ACPI_PM1A_EVT_BLK_ADDRESS_V1 = 0xb000,
        /// New place: PM1a control.
        ACPI_PM1A_CNT_BLK_ADDRESS_V1 = 0xb004,
        /// New place: PM timer.
        ACPI_PM_TMR_BLK_ADDRESS_V1 = 0xb008,
        /// New place: GPE 0.
        ACPI_GPE0_BLK_ADDRESS_V1 = 0xafe0,
        /// New place: length of GPE 0.
        ACPI_GPE0_BLK_LEN_V1 = 4,
    }
    u64 {
        /// The type field of [`HVM_PARAM_CALLBACK_IRQ`]'s value.
        HVM_PARAM_CALLBACK_IRQ_TYPE_MASK = 0xff00_0000_0000_0000,
        /// Machine checks: local delivery.
        XEN_HVM_MCA_CAP_LMCE = 1 << 0,
    }
}

abi_structs! {
    /// Arguments of [`HVMOP_SET_PARAM`] and [`HVMOP_GET_PARAM`].
    pub struct XenHvmParam("struct xen_hvm_param", 16) {
        domid: DomId = 0,
        _pad: u16,
        /// `HVM_PARAM_*`.
        index: u32 = 4,
        /// In or out.
        value: u64 = 8,
    }

    /// Arguments of [`HVMOP_PAGETABLE_DYING`].
    pub struct XenHvmPagetableDying("struct xen_hvm_pagetable_dying", 16) {
        domid: DomId = 0,
        _pad: [u16; 3],
        /// Of the top-level table.
        gpa: u64 = 8,
    }

    /// Result of [`HVMOP_GET_TIME`].
    pub struct XenHvmGetTime("struct xen_hvm_get_time", 8) {
        /// System time in ns.
        now: u64 = 0,
    }

    /// Arguments of [`HVMOP_GET_MEM_TYPE`].
    pub struct XenHvmGetMemType("struct xen_hvm_get_mem_type", 16) {
        domid: DomId = 0,
        /// Out: `HVMMEM_*`.
        mem_type: u16 = 2,
        _pad: [u16; 2],
        pfn: u64 = 8,
    }

    /// Arguments of [`HVMOP_SET_EVTCHN_UPCALL_VECTOR`].
    pub struct XenHvmEvtchnUpcallVector("struct xen_hvm_evtchn_upcall_vector", 8) {
        vcpu: u32 = 0,
        /// Local APIC vector, 16 or more.
        vector: u8 = 4,
        _pad: [u8; 3],
    }

    /// Head of the alternate p2m operations; their arguments follow at 16, in a union of 64 bytes.
    pub struct XenHvmAltp2mOp("struct xen_hvm_altp2m_op", 80) {
        version: u32 = 0,
        cmd: u32 = 4,
        domain: DomId = 8,
        _pad1: u16,
        _pad2: u32,
        u: [u8; 64] = 16,
    }

    /// What a PVH guest finds by its `ebx`.
    pub struct HvmStartInfo("struct hvm_start_info", 56) {
        /// [`XEN_HVM_START_MAGIC_VALUE`].
        magic: u32 = 0,
        /// 0, or 1 if the memory map fields are valid.
        version: u32 = 4,
        /// `SIF_*`.
        flags: u32 = 8,
        nr_modules: u32 = 12,
        /// Of an array of [`HvmModlistEntry`].
        modlist_paddr: u64 = 16,
        /// Of a NUL-terminated string.
        cmdline_paddr: u64 = 24,
        /// Of the ACPI RSDP.
        rsdp_paddr: u64 = 32,
        /// Version 1: of an array of [`HvmMemmapTableEntry`].
        memmap_paddr: u64 = 40,
        /// Version 1.
        memmap_entries: u32 = 48,
        _pad ["reserved"]: u32,
    }

    /// One module of the start info.
    pub struct HvmModlistEntry("struct hvm_modlist_entry", 32) {
        paddr: u64 = 0,
        size: u64 = 8,
        /// Of a NUL-terminated string, or zero.
        cmdline_paddr: u64 = 16,
        _pad ["reserved"]: u64,
    }

    /// One range of the start info's memory map.
    pub struct HvmMemmapTableEntry("struct hvm_memmap_table_entry", 24) {
        addr: u64 = 0,
        size: u64 = 8,
        /// `XEN_HVM_MEMMAP_TYPE_*`.
        kind ["type"]: u32 = 16,
        _pad ["reserved"]: u32,
    }

    /// What the toolstack tells hvmloader, at [`HVM_INFO_PFN`] and [`HVM_INFO_OFFSET`].
    pub struct HvmInfoTable("struct hvm_info_table", 48) {
        signature: [u8; 8] = 0,
        length: u32 = 8,
        checksum: u8 = 12,
        apic_mode: u8 = 13,
        _pad: u16,
        nr_vcpus: u32 = 16,
        low_mem_pgend: u32 = 20,
        reserved_mem_pgstart: u32 = 24,
        high_mem_pgend: u32 = 28,
        vcpu_online: [u8; 16] = 32,
    }
}

/// How a domain wants to be told of events, from the value of [`HVM_PARAM_CALLBACK_IRQ`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallbackVia {
    /// Not by an interrupt (value 0).
    None,
    /// A GSI.
    Gsi(u32),
    /// A PCI line of the virtual bus.
    PciIntx {
        /// Device number.
        device: u8,
        /// Pin, 0 to 3.
        intx: u8,
    },
    /// A vector, without an EOI.
    Vector(u8),
    /// A type this ABI does not have.
    Unknown(u64),
}

impl CallbackVia {
    /// Decodes the parameter's value.
    #[must_use]
    pub const fn decode(value: u64) -> Self {
        if value == 0 {
            return Self::None;
        }
        match (value >> 56) as u32 {
            HVM_PARAM_CALLBACK_TYPE_GSI => Self::Gsi(value as u32),
            HVM_PARAM_CALLBACK_TYPE_PCI_INTX => Self::PciIntx {
                device: (value >> 11 & 0x1f) as u8,
                intx: (value & 3) as u8,
            },
            HVM_PARAM_CALLBACK_TYPE_VECTOR => Self::Vector(value as u8),
            _ => Self::Unknown(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callback_values_decode_by_their_top_byte() {
        assert_eq!(CallbackVia::decode(0), CallbackVia::None);
        assert_eq!(CallbackVia::decode(1), CallbackVia::Gsi(1));
        assert_eq!(
            CallbackVia::decode(1 << 56 | 0x03 << 11 | 2),
            CallbackVia::PciIntx { device: 3, intx: 2 }
        );
        assert_eq!(
            CallbackVia::decode(2 << 56 | 0xf3),
            CallbackVia::Vector(0xf3)
        );
        assert_eq!(CallbackVia::decode(9 << 56), CallbackVia::Unknown(9 << 56));
    }
}
