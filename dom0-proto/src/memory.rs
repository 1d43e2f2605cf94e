//! `memory_op`: reservations, the physical address space, memory maps, resources, claims.
//!
//! The low bits of the command register are the operation, the rest is the extent to start from when
//! a long operation is re-executed ([`MEMOP_EXTENT_SHIFT`]).
//!
//! C: `memory.h`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{DomId, GuestHandle};

/// Number of command bits that hold the operation; the start extent lies above.
pub const MEMOP_EXTENT_SHIFT: u32 = 6;
/// Mask of the operation in the command register.
pub const MEMOP_CMD_MASK: u64 = (1 << MEMOP_EXTENT_SHIFT) - 1;

abi_consts! {
    u32 {
        /// Allocate frames for a PV guest's pseudo-physical memory: [`XenMemoryReservation`].
        XENMEM_INCREASE_RESERVATION = 0,
        /// Give frames back (ballooning): [`XenMemoryReservation`].
        XENMEM_DECREASE_RESERVATION = 1,
        /// The highest machine frame number; no argument.
        XENMEM_MAXIMUM_RAM_PAGE = 2,
        /// Pages of a domain: [`XenMemoryDomain`].
        XENMEM_CURRENT_RESERVATION = 3,
        /// Limit of a domain: [`XenMemoryDomain`].
        XENMEM_MAXIMUM_RESERVATION = 4,
        /// PV only.
        XENMEM_MACHPHYS_MFN_LIST = 5,
        /// Allocate frames at given gfns: [`XenMemoryReservation`].
        XENMEM_POPULATE_PHYSMAP = 6,
        /// Map one page of a kind into the physical address space: [`XenAddToPhysmap`].
        XENMEM_ADD_TO_PHYSMAP = 7,
        /// The caller's memory map: [`XenMemoryMap`].
        XENMEM_MEMORY_MAP = 9,
        /// The machine's memory map: [`XenMemoryMap`]; PV dom0 only.
        XENMEM_MACHINE_MEMORY_MAP = 10,
        /// Swap frames: PV dom0 only.
        XENMEM_EXCHANGE = 11,
        /// PV only.
        XENMEM_MACHPHYS_MAPPING = 12,
        /// Set what a domain's [`XENMEM_MEMORY_MAP`] says: [`XenForeignMemoryMap`].
        XENMEM_SET_MEMORY_MAP = 13,
        /// Highest gfn in use: [`XenMemoryDomain`].
        XENMEM_MAXIMUM_GPFN = 14,
        /// Unmap one gfn: [`XenRemoveFromPhysmap`].
        XENMEM_REMOVE_FROM_PHYSMAP = 15,
        /// Populate-on-demand: [`XenPodTarget`].
        XENMEM_SET_POD_TARGET = 16,
        /// Populate-on-demand: [`XenPodTarget`].
        XENMEM_GET_POD_TARGET = 17,
        /// Pages saved by sharing; no argument.
        XENMEM_GET_SHARING_FREED_PAGES = 18,
        /// Pages shared; no argument.
        XENMEM_GET_SHARING_SHARED_PAGES = 19,
        /// Paging to a pager domain.
        XENMEM_PAGING_OP = 20,
        /// Per-page access rights for introspection.
        XENMEM_ACCESS_OP = 21,
        /// Page sharing.
        XENMEM_SHARING_OP = 22,
        /// As [`XENMEM_ADD_TO_PHYSMAP`] for many: [`XenAddToPhysmapBatch`].
        XENMEM_ADD_TO_PHYSMAP_BATCH = 23,
        /// Stake a claim on free memory: [`XenMemoryReservation`].
        XENMEM_CLAIM_PAGES = 24,
        /// PV only.
        XENMEM_MACHPHYS_COMPAT_MFN_LIST = 25,
        /// Virtual NUMA layout: [`XenVnumaTopologyInfo`].
        XENMEM_GET_VNUMAINFO = 26,
        /// Memory reserved for devices: [`XenReservedDeviceMemoryMap`].
        XENMEM_RESERVED_DEVICE_MEMORY_MAP = 27,
        /// Map hypervisor-owned pages of a domain: [`XenMemAcquireResource`].
        XENMEM_ACQUIRE_RESOURCE = 28,

        /// Reservation flag: populate on demand.
        XENMEMF_POPULATE_ON_DEMAND = 1 << 16,
        /// Reservation flag: this node or none.
        XENMEMF_EXACT_NODE_REQUEST = 1 << 17,
        /// Reservation flag: the node is one of the guest's virtual nodes.
        XENMEMF_VNODE = 1 << 18,

        /// The domain's `shared_info` page.
        XENMAPSPACE_SHARED_INFO = 0,
        /// A grant-table frame; bit [`XENMAPIDX_GRANT_TABLE_STATUS`] of the index means status.
        XENMAPSPACE_GRANT_TABLE = 1,
        /// Another gfn of the same domain (it moves).
        XENMAPSPACE_GMFN = 2,
        /// As gmfn for a range.
        XENMAPSPACE_GMFN_RANGE = 3,
        /// A gfn of another domain.
        XENMAPSPACE_GMFN_FOREIGN = 4,
        /// Device memory; Arm only.
        XENMAPSPACE_DEV_MMIO = 5,
        /// See [`XENMAPSPACE_GRANT_TABLE`].
        XENMAPIDX_GRANT_TABLE_STATUS = 0x8000_0000,

        /// acquire_resource type: the pages of an ioreq server; id = server.
        XENMEM_RESOURCE_IOREQ_SERVER = 0,
        /// acquire_resource type: grant-table frames.
        XENMEM_RESOURCE_GRANT_TABLE = 1,
        /// acquire_resource type: a vCPU's processor-trace buffer.
        XENMEM_RESOURCE_VMTRACE_BUF = 2,
        /// acquire_resource id: grant entries.
        XENMEM_RESOURCE_GRANT_TABLE_ID_SHARED = 0,
        /// acquire_resource id: status frames of version 2.
        XENMEM_RESOURCE_GRANT_TABLE_ID_STATUS = 1,
        /// acquire_resource frame: the buffered page; frame 1 + n is the n-th synchronous page.
        XENMEM_RESOURCE_IOREQ_SERVER_FRAME_BUFIOREQ = 0,

        /// reserved_device_memory_map flag: all devices, not only the one named.
        XENMEM_RDM_ALL = 1,

        /// E820 type: RAM.
        E820_RAM = 1,
        /// E820 type: reserved.
        E820_RESERVED = 2,
        /// E820 type: ACPI tables, reclaimable.
        E820_ACPI = 3,
        /// E820 type: ACPI NVS.
        E820_NVS = 4,
        /// E820 type: defective memory.
        E820_UNUSABLE = 5,
    }
}

/// The node requested by reservation flags, if any.
#[must_use]
pub const fn xenmemf_get_node(mem_flags: u32) -> Option<u8> {
    match (mem_flags >> 8) & 0xff {
        0 => None,
        n => Some((n - 1) as u8),
    }
}

/// The address width requested by reservation flags: 0 is any.
#[must_use]
pub const fn xenmemf_get_address_bits(mem_flags: u32) -> u8 {
    (mem_flags & 0xff) as u8
}

/// One entry of a memory map, 20 bytes, packed. The headers call its form that of the BIOS's
/// INT 15h function E820h (ACPI specification, "System Address Map Interfaces").
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct E820Entry {
    /// First byte.
    pub addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// `E820_*`.
    pub kind: u32,
}

const _: () = assert!(size_of::<E820Entry>() == 20);

abi_structs! {
    /// Arguments of [`XENMEM_INCREASE_RESERVATION`], [`XENMEM_DECREASE_RESERVATION`],
    /// [`XENMEM_POPULATE_PHYSMAP`] and [`XENMEM_CLAIM_PAGES`].
    pub struct XenMemoryReservation("struct xen_memory_reservation", 32) {
        /// First frame of each extent.
        extent_start: GuestHandle<u64> = 0,
        nr_extents: u64 = 8,
        /// Each extent is 2^order pages.
        extent_order: u32 = 16,
        /// `XENMEMF_*`.
        mem_flags: u32 = 20,
        domid: DomId = 24,
        _pad: [u8; 6],
    }

    /// Arguments of [`XENMEM_EXCHANGE`].
    pub struct XenMemoryExchange("struct xen_memory_exchange", 72) {
        input ["in"]: XenMemoryReservation = 0,
        output ["out"]: XenMemoryReservation = 32,
        nr_exchanged: u64 = 64,
    }

    /// Argument of the operations that only name a domain.
    pub struct XenMemoryDomain("struct xen_memory_domain", 2) {
        domid: DomId = 0,
    }

    /// Arguments of [`XENMEM_ADD_TO_PHYSMAP`].
    pub struct XenAddToPhysmap("struct xen_add_to_physmap", 24) {
        domid: DomId = 0,
        /// Number of pages, [`XENMAPSPACE_GMFN_RANGE`] only.
        size: u16 = 2,
        /// `XENMAPSPACE_*`.
        space: u32 = 4,
        /// Index in that space.
        idx: u64 = 8,
        /// Where to map it.
        gpfn: u64 = 16,
    }

    /// Arguments of [`XENMEM_ADD_TO_PHYSMAP_BATCH`].
    pub struct XenAddToPhysmapBatch("struct xen_add_to_physmap_batch", 32) {
        domid: DomId = 0,
        /// `XENMAPSPACE_*`.
        space: u16 = 2,
        /// Length of the arrays.
        size: u16 = 4,
        /// The owner for [`XENMAPSPACE_GMFN_FOREIGN`], else zero.
        foreign_domid ["u.foreign_domid"]: DomId = 6,
        idxs: GuestHandle<u64> = 8,
        gpfns: GuestHandle<u64> = 16,
        /// Out: per page, zero or a negative error number.
        errs: GuestHandle<i32> = 24,
    }

    /// Arguments of [`XENMEM_REMOVE_FROM_PHYSMAP`].
    pub struct XenRemoveFromPhysmap("struct xen_remove_from_physmap", 16) {
        domid: DomId = 0,
        _pad: [u8; 6],
        gpfn: u64 = 8,
    }

    /// Arguments of [`XENMEM_MEMORY_MAP`].
    pub struct XenMemoryMap("struct xen_memory_map", 16) {
        /// In: room in entries. Out: entries stored.
        nr_entries: u32 = 0,
        _pad: u32,
        buffer: GuestHandle<E820Entry> = 8,
    }

    /// Arguments of [`XENMEM_SET_MEMORY_MAP`].
    pub struct XenForeignMemoryMap("struct xen_foreign_memory_map", 24) {
        domid: DomId = 0,
        _pad: [u8; 6],
        map: XenMemoryMap = 8,
    }

    /// Arguments of [`XENMEM_SET_POD_TARGET`] and [`XENMEM_GET_POD_TARGET`].
    pub struct XenPodTarget("struct xen_pod_target", 40) {
        /// In.
        target_pages: u64 = 0,
        /// Out.
        tot_pages: u64 = 8,
        /// Out.
        pod_cache_pages: u64 = 16,
        /// Out.
        pod_entries: u64 = 24,
        /// In.
        domid: DomId = 32,
        _pad: [u8; 6],
    }

    /// Arguments of [`XENMEM_ACQUIRE_RESOURCE`].
    pub struct XenMemAcquireResource("struct xen_mem_acquire_resource", 32) {
        /// Whose resource.
        domid: DomId = 0,
        /// `XENMEM_RESOURCE_*`.
        kind ["type"]: u16 = 2,
        /// Depends on the type.
        id: u32 = 4,
        /// In: frames wanted. Out: with 0 and a null list, the frames there are.
        nr_frames: u32 = 8,
        _pad: u32,
        /// First frame of the resource.
        frame: u64 = 16,
        /// In: the gfns at which a translated caller wants them.
        frame_list: GuestHandle<u64> = 24,
    }

    /// A range of one virtual NUMA node.
    pub struct XenVmemrange("struct xen_vmemrange", 24) {
        /// First byte.
        start: u64 = 0,
        /// First byte behind.
        end: u64 = 8,
        flags: u32 = 16,
        nid: u32 = 20,
    }

    /// Arguments of [`XENMEM_GET_VNUMAINFO`].
    pub struct XenVnumaTopologyInfo("struct xen_vnuma_topology_info", 40) {
        domid: DomId = 0,
        _pad: u16,
        /// In: room. Out: number.
        nr_vnodes: u32 = 4,
        nr_vcpus: u32 = 8,
        nr_vmemranges: u32 = 12,
        vdistance: GuestHandle<u32> = 16,
        vcpu_to_vnode: GuestHandle<u32> = 24,
        vmemrange: GuestHandle<XenVmemrange> = 32,
    }

    /// A range of memory reserved for a device.
    pub struct XenReservedDeviceMemory("struct xen_reserved_device_memory", 16) {
        start_pfn: u64 = 0,
        nr_pages: u64 = 8,
    }

    /// Arguments of [`XENMEM_RESERVED_DEVICE_MEMORY_MAP`].
    pub struct XenReservedDeviceMemoryMap("struct xen_reserved_device_memory_map", 24) {
        /// [`XENMEM_RDM_ALL`] or zero.
        flags: u32 = 0,
        /// In: room. Out: number.
        nr_entries: u32 = 4,
        buffer: GuestHandle<XenReservedDeviceMemory> = 8,
        /// PCI segment.
        seg ["dev.pci.seg"]: u16 = 16,
        bus ["dev.pci.bus"]: u8 = 18,
        devfn ["dev.pci.devfn"]: u8 = 19,
        _pad: u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservation_flags_carry_node_plus_one() {
        assert_eq!(xenmemf_get_node(0), None);
        assert_eq!(xenmemf_get_node(1 << 8), Some(0));
        assert_eq!(
            xenmemf_get_node(XENMEMF_POPULATE_ON_DEMAND | 3 << 8),
            Some(2)
        );
        assert_eq!(xenmemf_get_address_bits(0x0001_0120), 0x20);
    }

    #[test]
    fn memory_map_entries_are_packed() {
        let bytes: [u8; 20] = zerocopy::transmute!(E820Entry {
            addr: 1,
            size: 2,
            kind: 3
        });
        assert_eq!((bytes[0], bytes[8], bytes[16]), (1, 2, 3));
    }
}
