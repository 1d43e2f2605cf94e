//! `platform_op`: the machine as only the control domain may use it.
//!
//! A handler copies in [`XenPlatformOp`], checks version and operation, takes the payload by
//! [`XenPlatformOp::payload`] and puts results back by [`XenPlatformOp::set_payload`].
//!
//! C: `platform.h`.

use crate::GuestHandle;

abi_consts! {
    u32 {
        /// The one interface version; others get `EACCES`.
        XENPF_INTERFACE_VERSION = 0x0300_0001,

        /// [`XenpfSettime32`].
        XENPF_SETTIME32 = 17,
        /// PV only.
        XENPF_ADD_MEMTYPE = 31,
        /// PV only.
        XENPF_DEL_MEMTYPE = 32,
        /// PV only.
        XENPF_READ_MEMTYPE = 33,
        /// [`XenpfMicrocodeUpdate`].
        XENPF_MICROCODE_UPDATE = 35,
        /// A quirk's number.
        XENPF_PLATFORM_QUIRK = 39,
        /// [`XenpfPcpuVersion`].
        XENPF_GET_CPU_VERSION = 48,
        /// [`XenpfEfiRuntimeCall`].
        XENPF_EFI_RUNTIME_CALL = 49,
        /// [`XenpfFirmwareInfo`].
        XENPF_FIRMWARE_INFO = 50,
        /// [`XenpfEnterAcpiSleep`].
        XENPF_ENTER_ACPI_SLEEP = 51,
        /// Historic.
        XENPF_CHANGE_FREQ = 52,
        /// Historic.
        XENPF_GETIDLETIME = 53,
        /// [`XenpfSetProcessorPminfo`].
        XENPF_SET_PROCESSOR_PMINFO = 54,
        /// [`XenpfPcpuinfo`].
        XENPF_GET_CPUINFO = 55,
        /// [`XenpfCpuOl`].
        XENPF_CPU_ONLINE = 56,
        /// [`XenpfCpuOl`].
        XENPF_CPU_OFFLINE = 57,
        /// A CPU was plugged in.
        XENPF_CPU_HOTADD = 58,
        /// Memory was plugged in.
        XENPF_MEM_HOTADD = 59,
        /// [`XenpfCoreParking`].
        XENPF_CORE_PARKING = 60,
        /// [`XenpfResourceOp`].
        XENPF_RESOURCE_OP = 61,
        /// [`XenpfSettime64`].
        XENPF_SETTIME64 = 62,
        /// [`XenpfSymdata`].
        XENPF_GET_SYMBOL = 63,
        /// [`crate::xen::Dom0VgaConsoleInfo`]; returns its length (4.18).
        XENPF_GET_DOM0_CONSOLE = 64,
        /// [`XenpfUcodeRevision`] (4.18).
        XENPF_GET_UCODE_REVISION = 65,
        /// [`XenpfMicrocodeUpdate2`] (4.20).
        XENPF_MICROCODE_UPDATE2 = 66,

        /// EFI runtime service.
        XEN_EFI_GET_TIME = 1,
        /// EFI runtime service.
        XEN_EFI_SET_TIME = 2,
        /// EFI runtime service.
        XEN_EFI_GET_WAKEUP_TIME = 3,
        /// EFI runtime service.
        XEN_EFI_SET_WAKEUP_TIME = 4,
        /// EFI runtime service; the count is returned in `misc`.
        XEN_EFI_GET_NEXT_HIGH_MONOTONIC_COUNT = 5,
        /// EFI runtime service.
        XEN_EFI_GET_VARIABLE = 6,
        /// EFI runtime service.
        XEN_EFI_SET_VARIABLE = 7,
        /// EFI runtime service.
        XEN_EFI_GET_NEXT_VARIABLE_NAME = 8,
        /// EFI runtime service.
        XEN_EFI_QUERY_VARIABLE_INFO = 9,
        /// EFI runtime service.
        XEN_EFI_QUERY_CAPSULE_CAPABILITIES = 10,
        /// EFI runtime service.
        XEN_EFI_UPDATE_CAPSULE = 11,
        /// In `misc` of a query: as found at boot.
        XEN_EFI_VARINFO_BOOT_SNAPSHOT = 1,

        /// Firmware: BIOS disks.
        XEN_FW_DISK_INFO = 1,
        /// Firmware: signatures of boot records.
        XEN_FW_DISK_MBR_SIGNATURE = 2,
        /// Firmware: monitor.
        XEN_FW_VBEDDC_INFO = 3,
        /// Firmware: EFI.
        XEN_FW_EFI_INFO = 4,
        /// Firmware: keyboard.
        XEN_FW_KBD_SHIFT_FLAGS = 5,
        /// EFI index: version of the system table.
        XEN_FW_EFI_VERSION = 0,
        /// EFI index: [`XenpfEfiInfoCfg`].
        XEN_FW_EFI_CONFIG_TABLE = 1,
        /// EFI index: [`XenpfEfiInfoVendor`].
        XEN_FW_EFI_VENDOR = 2,
        /// EFI index: [`XenpfEfiInfoMem`].
        XEN_FW_EFI_MEM_INFO = 3,
        /// EFI index: version of the runtime services.
        XEN_FW_EFI_RT_VERSION = 4,
        /// EFI index: a PCI option ROM.
        XEN_FW_EFI_PCI_ROM = 5,
        /// EFI index: Apple properties.
        XEN_FW_EFI_APPLE_PROPERTIES = 6,

        /// Sleep: by the extended registers.
        XENPF_ACPI_SLEEP_EXTENDED = 1,

        /// Processor data: C states.
        XEN_PM_CX = 0,
        /// Processor data: P states.
        XEN_PM_PX = 1,
        /// Processor data: T states.
        XEN_PM_TX = 2,
        /// Processor data: capabilities.
        XEN_PM_PDC = 3,

        /// The CPU is online.
        XEN_PCPU_FLAGS_ONLINE = 1,
        /// There is no such CPU.
        XEN_PCPU_FLAGS_INVALID = 2,

        /// Parking: set.
        XEN_CORE_PARKING_SET = 1,
        /// Parking: get.
        XEN_CORE_PARKING_GET = 2,

        /// Resource: read an MSR.
        XEN_RESOURCE_OP_MSR_READ = 0,
        /// Resource: write an MSR.
        XEN_RESOURCE_OP_MSR_WRITE = 1,
        /// Microcode: even if older.
        XENPF_UCODE_FORCE = 1,
    }
    usize {
        /// Length of the payload union.
        PLATFORM_PAYLOAD_LEN = 128,
        /// Offset of the payload union.
        PLATFORM_PAYLOAD_OFFSET = 8,
    }
}

abi_structs! {
    /// The part before the payload.
    pub struct XenPlatformOpHeader("", 8) {
        cmd: u32 = 0,
        interface_version: u32 = 4,
    }

    /// A whole call.
    pub struct XenPlatformOp("struct xen_platform_op", 136) {
        cmd: u32 = 0,
        interface_version: u32 = 4,
        /// One of the payloads below.
        u: [u8; 128] = 8,
    }

    /// Wall clock, 32-bit seconds.
    pub struct XenpfSettime32("struct xenpf_settime32", 16) {
        secs: u32 = 0,
        nsecs: u32 = 4,
        /// System time at which it is that time.
        system_time: u64 = 8,
    }

    /// Wall clock.
    pub struct XenpfSettime64("struct xenpf_settime64", 24) {
        secs: u64 = 0,
        nsecs: u32 = 8,
        /// Must be zero.
        mbz: u32 = 12,
        /// System time at which it is that time.
        system_time: u64 = 16,
    }

    /// Microcode.
    pub struct XenpfMicrocodeUpdate("struct xenpf_microcode_update", 16) {
        data: GuestHandle<u8> = 0,
        length: u32 = 8,
        _pad: u32,
    }

    /// Microcode, with flags.
    pub struct XenpfMicrocodeUpdate2("struct xenpf_microcode_update2", 16, 0x17..=0xff) {
        /// [`XENPF_UCODE_FORCE`].
        flags: u32 = 0,
        length: u32 = 4,
        data: GuestHandle<u8> = 8,
    }

    /// Revision of a CPU's microcode.
    pub struct XenpfUcodeRevision("struct xenpf_ucode_revision", 16, 0x16..=0xff) {
        cpu: u32 = 0,
        /// Out.
        signature: u32 = 4,
        /// Out: platform flags (Intel).
        pf: u32 = 8,
        /// Out.
        revision: u32 = 12,
    }

    /// A time as EFI has it.
    pub struct XenpfEfiTime("struct xenpf_efi_time", 16) {
        year: u16 = 0,
        month: u8 = 2,
        day: u8 = 3,
        hour: u8 = 4,
        min: u8 = 5,
        sec: u8 = 6,
        _pad0: u8,
        ns: u32 = 8,
        /// Minutes from UTC, or 2047.
        tz: i16 = 12,
        daylight: u8 = 14,
        _pad1: u8,
    }

    /// A GUID.
    pub struct XenpfEfiGuid("struct xenpf_efi_guid", 16) {
        data1: u32 = 0,
        data2: u16 = 4,
        data3: u16 = 6,
        data4: [u8; 8] = 8,
    }

    /// A call of an EFI runtime service; its arguments lie in `u`.
    pub struct XenpfEfiRuntimeCall("struct xenpf_efi_runtime_call", 56) {
        /// `XEN_EFI_*`.
        function: u32 = 0,
        /// In and out: depends on the function (attributes, enabled and pending flags).
        misc: u32 = 4,
        /// Out: the EFI status.
        status: u64 = 8,
        u: [u8; 40] = 16,
    }

    /// Arguments of get_time: only results.
    pub struct XenpfEfiGetTime("__typeof__(((struct xenpf_efi_runtime_call *)0)->u.get_time)", 24) {
        time: XenpfEfiTime = 0,
        resolution: u32 = 16,
        accuracy: u32 = 20,
    }

    /// Arguments of get_variable and set_variable.
    pub struct XenpfEfiVariable("__typeof__(((struct xenpf_efi_runtime_call *)0)->u.get_variable)", 40) {
        /// UCS-2, NUL-terminated.
        name: GuestHandle<u16> = 0,
        /// Bytes of data.
        size: u64 = 8,
        data: GuestHandle<u8> = 16,
        vendor_guid: XenpfEfiGuid = 24,
    }

    /// Arguments of get_next_variable_name.
    pub struct XenpfEfiNextVariableName("__typeof__(((struct xenpf_efi_runtime_call *)0)->u.get_next_variable_name)", 32) {
        /// Bytes of room for the name.
        size: u64 = 0,
        name: GuestHandle<u16> = 8,
        vendor_guid: XenpfEfiGuid = 16,
    }

    /// Arguments of query_variable_info.
    pub struct XenpfEfiQueryVariableInfo("__typeof__(((struct xenpf_efi_runtime_call *)0)->u.query_variable_info)", 32) {
        attr: u32 = 0,
        _pad: u32,
        /// Out.
        max_store_size: u64 = 8,
        /// Out.
        remain_store_size: u64 = 16,
        /// Out.
        max_size: u64 = 24,
    }

    /// What firmware said at boot.
    pub struct XenpfFirmwareInfo("struct xenpf_firmware_info", 40) {
        /// `XEN_FW_*`.
        kind ["type"]: u32 = 0,
        /// Which: for EFI, `XEN_FW_EFI_*`.
        index: u32 = 4,
        /// One of the forms below; for the EFI versions and the keyboard, a number.
        u: [u8; 32] = 8,
    }

    /// EFI configuration table.
    pub struct XenpfEfiInfoCfg("__typeof__(((struct xenpf_firmware_info *)0)->u.efi_info.cfg)", 16) {
        /// Machine address.
        addr: u64 = 0,
        nent: u32 = 8,
        _pad: u32,
    }

    /// EFI vendor.
    pub struct XenpfEfiInfoVendor("__typeof__(((struct xenpf_firmware_info *)0)->u.efi_info.vendor)", 16) {
        revision: u32 = 0,
        /// Bytes of room.
        bufsz: u32 = 4,
        name: GuestHandle<u16> = 8,
    }

    /// EFI memory descriptor at an address.
    pub struct XenpfEfiInfoMem("__typeof__(((struct xenpf_firmware_info *)0)->u.efi_info.mem)", 32) {
        addr: u64 = 0,
        size: u64 = 8,
        attr: u64 = 16,
        kind ["type"]: u32 = 24,
        _pad: u32,
    }

    /// BIOS disk.
    pub struct XenpfFwDiskInfo("__typeof__(((struct xenpf_firmware_info *)0)->u.disk_info)", 16) {
        device: u8 = 0,
        version: u8 = 1,
        interface_support: u16 = 2,
        legacy_max_cylinder: u16 = 4,
        legacy_max_head: u8 = 6,
        legacy_sectors_per_track: u8 = 7,
        edd_params: GuestHandle<u8> = 8,
    }

    /// Enter a sleep state.
    pub struct XenpfEnterAcpiSleep("struct xenpf_enter_acpi_sleep", 12) {
        /// PM1a control, or the extended control register.
        val_a: u16 = 0,
        /// PM1b control.
        val_b: u16 = 2,
        /// 1 to 5.
        sleep_state: u32 = 4,
        /// [`XENPF_ACPI_SLEEP_EXTENDED`].
        flags: u32 = 8,
    }

    /// A register as ACPI describes it.
    pub struct XenPowerRegister("struct xen_power_register", 24) {
        space_id: u32 = 0,
        bit_width: u32 = 4,
        bit_offset: u32 = 8,
        access_size: u32 = 12,
        address: u64 = 16,
    }

    /// A dependency between C states.
    pub struct XenProcessorCsd("struct xen_processor_csd", 12) {
        domain: u32 = 0,
        coord_type: u32 = 4,
        num: u32 = 8,
    }

    /// A C state.
    pub struct XenProcessorCx("struct xen_processor_cx", 48) {
        reg: XenPowerRegister = 0,
        kind ["type"]: u8 = 24,
        _pad0: [u8; 3],
        /// Microseconds.
        latency: u32 = 28,
        power: u32 = 32,
        dpcnt: u32 = 36,
        dp: GuestHandle<XenProcessorCsd> = 40,
    }

    /// C states of a CPU.
    pub struct XenProcessorPower("struct xen_processor_power", 16) {
        count: u32 = 0,
        /// Bit 0 bus-master control, 1 check, 2 has _CST, 3 set up, 4 bus-master reload.
        flags: u32 = 4,
        states: GuestHandle<XenProcessorCx> = 8,
    }

    /// A performance control register.
    pub struct XenPctRegister("struct xen_pct_register", 16) {
        descriptor: u8 = 0,
        _pad0: u8,
        length: u16 = 2,
        space_id: u8 = 4,
        bit_width: u8 = 5,
        bit_offset: u8 = 6,
        _pad1 ["reserved"]: u8,
        address: u64 = 8,
    }

    /// A P state.
    pub struct XenProcessorPx("struct xen_processor_px", 48) {
        /// MHz.
        core_frequency: u64 = 0,
        /// Milliwatts.
        power: u64 = 8,
        /// Microseconds.
        transition_latency: u64 = 16,
        /// Microseconds.
        bus_master_latency: u64 = 24,
        control: u64 = 32,
        status: u64 = 40,
    }

    /// A dependency between P states.
    pub struct XenPsdPackage("struct xen_psd_package", 40) {
        num_entries: u64 = 0,
        revision: u64 = 8,
        domain: u64 = 16,
        coord_type: u64 = 24,
        num_processors: u64 = 32,
    }

    /// P states of a CPU.
    pub struct XenProcessorPerformance("struct xen_processor_performance", 104) {
        /// What is valid: 1 PCT, 2 PSS, 4 PPC, 8 PSD.
        flags: u32 = 0,
        platform_limit: u32 = 4,
        control_register: XenPctRegister = 8,
        status_register: XenPctRegister = 24,
        state_count: u32 = 40,
        _pad0: u32,
        states: GuestHandle<XenProcessorPx> = 48,
        domain_info: XenPsdPackage = 56,
        shared_type: u32 = 96,
        _pad1: u32,
    }

    /// Power states that dom0 found in ACPI. Arguments by type in `u`: [`XenProcessorPower`],
    /// [`XenProcessorPerformance`], or a handle of `u32`s.
    pub struct XenpfSetProcessorPminfo("struct xenpf_set_processor_pminfo", 112) {
        /// ACPI id.
        id: u32 = 0,
        /// `XEN_PM_*`.
        kind ["type"]: u32 = 4,
        u: [u8; 104] = 8,
    }

    /// A CPU.
    pub struct XenpfPcpuinfo("struct xenpf_pcpuinfo", 20) {
        /// In.
        xen_cpuid: u32 = 0,
        /// Out: the highest number.
        max_present: u32 = 4,
        /// Out: `XEN_PCPU_FLAGS_*`.
        flags: u32 = 8,
        /// Out.
        apic_id: u32 = 12,
        /// Out.
        acpi_id: u32 = 16,
    }

    /// The model of a CPU.
    pub struct XenpfPcpuVersion("struct xenpf_pcpu_version", 32) {
        /// In.
        xen_cpuid: u32 = 0,
        /// Out: the highest number.
        max_present: u32 = 4,
        vendor_id: [u8; 12] = 8,
        family: u32 = 20,
        model: u32 = 24,
        stepping: u32 = 28,
    }

    /// A CPU to bring up or down.
    pub struct XenpfCpuOl("struct xenpf_cpu_ol", 4) {
        cpuid: u32 = 0,
    }

    /// CPUs to be idle.
    pub struct XenpfCoreParking("struct xenpf_core_parking", 8) {
        /// `XEN_CORE_PARKING_*`.
        kind ["type"]: u32 = 0,
        idle_nums: u32 = 4,
    }

    /// One access to a resource.
    pub struct XenpfResourceEntry("struct xenpf_resource_entry", 24) {
        /// In: `XEN_RESOURCE_OP_*`. Out: zero or a negative error number.
        cmd ["u.cmd"]: u32 = 0,
        _pad ["rsvd"]: u32,
        idx: u64 = 8,
        val: u64 = 16,
    }

    /// Accesses on one CPU.
    pub struct XenpfResourceOp("struct xenpf_resource_op", 16) {
        nr_entries: u32 = 0,
        cpu: u32 = 4,
        entries: GuestHandle<XenpfResourceEntry> = 8,
    }

    /// A symbol of the hypervisor.
    pub struct XenpfSymdata("struct xenpf_symdata", 32) {
        /// In: room. Out: length.
        namelen: u32 = 0,
        /// In: which. Out: the next.
        symnum: u32 = 4,
        name: GuestHandle<u8> = 8,
        address: u64 = 16,
        kind ["type"]: u8 = 24,
        _pad: [u8; 7],
    }
}

payload_methods!(XenPlatformOp, PLATFORM_PAYLOAD_LEN);
payload_methods!(XenpfFirmwareInfo, 32);
payload_methods!(XenpfEfiRuntimeCall, 40);
payload_methods!(XenpfSetProcessorPminfo, 104);
