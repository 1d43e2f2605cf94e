//! `physdev_op`: PCI devices, physical interrupts, configuration space.
//!
//! C: `physdev.h`.

use crate::{DomId, GuestHandle};

abi_consts! {
    u32 {
        /// [`PhysdevIrqStatusQuery`].
        PHYSDEVOP_IRQ_STATUS_QUERY = 5,
        /// [`PhysdevSetIopl`]; PV only.
        PHYSDEVOP_SET_IOPL = 6,
        /// [`PhysdevSetIobitmap`]; PV only.
        PHYSDEVOP_SET_IOBITMAP = 7,
        /// PV only.
        PHYSDEVOP_APIC_READ = 8,
        /// PV only.
        PHYSDEVOP_APIC_WRITE = 9,
        /// PV only.
        PHYSDEVOP_ALLOC_IRQ_VECTOR = 10,
        /// PV only.
        PHYSDEVOP_FREE_IRQ_VECTOR = 11,
        /// [`PhysdevEoi`].
        PHYSDEVOP_EOI = 12,
        /// [`PhysdevMapPirq`].
        PHYSDEVOP_MAP_PIRQ = 13,
        /// [`PhysdevUnmapPirq`].
        PHYSDEVOP_UNMAP_PIRQ = 14,
        /// [`PhysdevManagePci`], historic.
        PHYSDEVOP_MANAGE_PCI_ADD = 15,
        /// [`PhysdevManagePci`], historic.
        PHYSDEVOP_MANAGE_PCI_REMOVE = 16,
        /// PV only.
        PHYSDEVOP_PIRQ_EOI_GMFN_V1 = 17,
        /// [`PhysdevManagePci`], historic.
        PHYSDEVOP_RESTORE_MSI = 19,
        /// Historic.
        PHYSDEVOP_MANAGE_PCI_ADD_EXT = 20,
        /// [`PhysdevSetupGsi`].
        PHYSDEVOP_SETUP_GSI = 21,
        /// [`PhysdevGetFreePirq`].
        PHYSDEVOP_GET_FREE_PIRQ = 23,
        /// [`PhysdevPciMmcfgReserved`].
        PHYSDEVOP_PCI_MMCFG_RESERVED = 24,
        /// [`PhysdevPciDeviceAdd`].
        PHYSDEVOP_PCI_DEVICE_ADD = 25,
        /// [`PhysdevPciDevice`].
        PHYSDEVOP_PCI_DEVICE_REMOVE = 26,
        /// [`PhysdevPciDevice`].
        PHYSDEVOP_RESTORE_MSI_EXT = 27,
        /// PV only.
        PHYSDEVOP_PIRQ_EOI_GMFN_V2 = 28,
        /// [`PhysdevDbgpOp`].
        PHYSDEVOP_DBGP_OP = 29,
        /// [`PhysdevPciDevice`].
        PHYSDEVOP_PREPARE_MSIX = 30,
        /// [`PhysdevPciDevice`].
        PHYSDEVOP_RELEASE_MSIX = 31,
        /// [`PciDeviceReset`] (4.20).
        PHYSDEVOP_PCI_DEVICE_RESET = 32,

        /// Status: an EOI is needed.
        XENIRQSTAT_NEEDS_EOI = 1 << 0,
        /// Status: may be shared.
        XENIRQSTAT_SHARED = 1 << 1,

        /// The range is reserved in the memory map.
        XEN_PCI_MMCFG_RESERVED = 1,
        /// The device is an extended function.
        XEN_PCI_DEV_EXTFN = 1,
        /// The device is a virtual function.
        XEN_PCI_DEV_VIRTFN = 2,
        /// A proximity domain follows.
        XEN_PCI_DEV_PXM = 4,

        /// Reset: cold.
        PCI_DEVICE_RESET_COLD = 0,
        /// Reset: warm.
        PCI_DEVICE_RESET_WARM = 1,
        /// Reset: hot.
        PCI_DEVICE_RESET_HOT = 2,
        /// Reset: function level.
        PCI_DEVICE_RESET_FLR = 3,
        /// Reset: mask of the kind.
        PCI_DEVICE_RESET_MASK = 3,

        /// Debug port: about to be reset.
        PHYSDEVOP_DBGP_RESET_PREPARE = 1,
        /// Debug port: was reset.
        PHYSDEVOP_DBGP_RESET_DONE = 2,
        /// Debug port: any bus.
        PHYSDEVOP_DBGP_BUS_UNKNOWN = 0,
        /// Debug port: a PCI device.
        PHYSDEVOP_DBGP_BUS_PCI = 1,
    }
    i32 {
        /// What to map: an MSI on segment 0.
        MAP_PIRQ_TYPE_MSI = 0,
        /// What to map: a GSI.
        MAP_PIRQ_TYPE_GSI = 1,
        /// What to map: unknown.
        MAP_PIRQ_TYPE_UNKNOWN = 2,
        /// What to map: an MSI, segment in the high half of `bus`.
        MAP_PIRQ_TYPE_MSI_SEG = 3,
        /// What to map: several MSIs.
        MAP_PIRQ_TYPE_MULTI_MSI = 4,
    }
}

abi_structs! {
    /// An interrupt is done with.
    pub struct PhysdevEoi("struct physdev_eoi", 4) {
        irq: u32 = 0,
    }

    /// The state of a pirq.
    pub struct PhysdevIrqStatusQuery("struct physdev_irq_status_query", 8) {
        irq: u32 = 0,
        /// Out: `XENIRQSTAT_*`.
        flags: u32 = 4,
    }

    /// I/O privilege level.
    pub struct PhysdevSetIopl("struct physdev_set_iopl", 4) {
        iopl: u32 = 0,
    }

    /// Port permissions.
    pub struct PhysdevSetIobitmap("struct physdev_set_iobitmap", 16) {
        bitmap: GuestHandle<u8> = 0,
        nr_ports: u32 = 8,
        _pad: u32,
    }

    /// Give a physical or emulated interrupt a pirq.
    pub struct PhysdevMapPirq("struct physdev_map_pirq", 40) {
        domid: DomId = 0,
        _pad: u16,
        /// `MAP_PIRQ_TYPE_*`.
        kind ["type"]: i32 = 4,
        /// In: GSI, or -1. Out for MSIs.
        index: i32 = 8,
        /// In: wanted, or -1. Out: given.
        pirq: i32 = 12,
        /// Bus, segment in the high half.
        bus: i32 = 16,
        devfn: i32 = 20,
        /// MSI-X entry, or number of MSIs.
        entry_nr: i32 = 24,
        _pad1: u32,
        /// MSI-X table, or zero.
        table_base: u64 = 32,
    }

    /// Take the pirq away.
    pub struct PhysdevUnmapPirq("struct physdev_unmap_pirq", 8) {
        domid: DomId = 0,
        _pad: u16,
        pirq: i32 = 4,
    }

    /// A device of segment 0.
    pub struct PhysdevManagePci("struct physdev_manage_pci", 2) {
        bus: u8 = 0,
        devfn: u8 = 1,
    }

    /// Trigger and polarity of a GSI.
    pub struct PhysdevSetupGsi("struct physdev_setup_gsi", 8) {
        gsi: i32 = 0,
        /// 0 edge, 1 level.
        triggering: u8 = 4,
        /// 0 high, 1 low.
        polarity: u8 = 5,
        _pad: u16,
    }

    /// A pirq that is not in use.
    pub struct PhysdevGetFreePirq("struct physdev_get_free_pirq", 8) {
        /// `MAP_PIRQ_TYPE_*`.
        kind ["type"]: i32 = 0,
        /// Out.
        pirq: u32 = 4,
    }

    /// Where configuration space is in memory.
    pub struct PhysdevPciMmcfgReserved("struct physdev_pci_mmcfg_reserved", 16) {
        address: u64 = 0,
        segment: u16 = 8,
        start_bus: u8 = 10,
        end_bus: u8 = 11,
        /// [`XEN_PCI_MMCFG_RESERVED`].
        flags: u32 = 12,
    }

    /// A device was found. With [`XEN_PCI_DEV_PXM`] a `u32` proximity domain follows.
    pub struct PhysdevPciDeviceAdd("struct physdev_pci_device_add", 12) {
        seg: u16 = 0,
        bus: u8 = 2,
        devfn: u8 = 3,
        /// `XEN_PCI_DEV_*`.
        flags: u32 = 4,
        /// Of a virtual function.
        physfn_bus ["physfn.bus"]: u8 = 8,
        physfn_devfn ["physfn.devfn"]: u8 = 9,
        _pad: u16,
    }

    /// A PCI device.
    pub struct PhysdevPciDevice("struct physdev_pci_device", 4) {
        seg: u16 = 0,
        bus: u8 = 2,
        devfn: u8 = 3,
    }

    /// A device was reset.
    pub struct PciDeviceReset("struct pci_device_reset", 8, 0x17..=0xff) {
        dev: PhysdevPciDevice = 0,
        /// `PCI_DEVICE_RESET_*`.
        flags: u32 = 4,
    }

    /// The EHCI debug port.
    pub struct PhysdevDbgpOp("struct physdev_dbgp_op", 6) {
        op: u8 = 0,
        bus: u8 = 1,
        pci ["u.pci"]: PhysdevPciDevice = 2,
    }
}
