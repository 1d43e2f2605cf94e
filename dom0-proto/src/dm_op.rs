//! `dm_op` and ioreq pages: how a device model emulates hardware for a guest.
//!
//! The hypercall takes a domain and a list of buffers ([`XenDmOpBuf`]); the first holds [`XenDmOp`],
//! which may be shorter or longer than the type here: missing bytes read as zero.
//!
//! C: `hvm/dm_op.h`, `hvm/ioreq.h`.

use crate::GuestHandle;

abi_consts! {
    u32 {
        /// [`XenDmOpCreateIoreqServer`].
        XEN_DMOP_CREATE_IOREQ_SERVER = 1,
        /// [`XenDmOpGetIoreqServerInfo`].
        XEN_DMOP_GET_IOREQ_SERVER_INFO = 2,
        /// [`XenDmOpIoreqServerRange`].
        XEN_DMOP_MAP_IO_RANGE_TO_IOREQ_SERVER = 3,
        /// [`XenDmOpIoreqServerRange`].
        XEN_DMOP_UNMAP_IO_RANGE_FROM_IOREQ_SERVER = 4,
        /// [`XenDmOpSetIoreqServerState`].
        XEN_DMOP_SET_IOREQ_SERVER_STATE = 5,
        /// [`XenDmOpDestroyIoreqServer`].
        XEN_DMOP_DESTROY_IOREQ_SERVER = 6,
        /// [`XenDmOpTrackDirtyVram`]; the second buffer is the bitmap.
        XEN_DMOP_TRACK_DIRTY_VRAM = 7,
        /// [`XenDmOpSetPciIntxLevel`].
        XEN_DMOP_SET_PCI_INTX_LEVEL = 8,
        /// [`XenDmOpSetIsaIrqLevel`].
        XEN_DMOP_SET_ISA_IRQ_LEVEL = 9,
        /// [`XenDmOpSetPciLinkRoute`].
        XEN_DMOP_SET_PCI_LINK_ROUTE = 10,
        /// [`XenDmOpModifiedMemory`]; the second buffer holds [`XenDmOpModifiedMemoryExtent`]s.
        XEN_DMOP_MODIFIED_MEMORY = 11,
        /// [`XenDmOpSetMemType`].
        XEN_DMOP_SET_MEM_TYPE = 12,
        /// [`XenDmOpInjectEvent`].
        XEN_DMOP_INJECT_EVENT = 13,
        /// [`XenDmOpInjectMsi`].
        XEN_DMOP_INJECT_MSI = 14,
        /// [`XenDmOpMapMemTypeToIoreqServer`].
        XEN_DMOP_MAP_MEM_TYPE_TO_IOREQ_SERVER = 15,
        /// [`XenDmOpRemoteShutdown`].
        XEN_DMOP_REMOTE_SHUTDOWN = 16,
        /// [`XenDmOpRelocateMemory`].
        XEN_DMOP_RELOCATE_MEMORY = 17,
        /// [`XenDmOpPinMemoryCacheattr`].
        XEN_DMOP_PIN_MEMORY_CACHEATTR = 18,
        /// Arm only.
        XEN_DMOP_SET_IRQ_LEVEL = 19,
        /// [`XenDmOpNrVcpus`].
        XEN_DMOP_NR_VCPUS = 20,

        /// Range of ports.
        XEN_DMOP_IO_RANGE_PORT = 0,
        /// Range of guest-physical memory.
        XEN_DMOP_IO_RANGE_MEMORY = 1,
        /// Range of PCI functions.
        XEN_DMOP_IO_RANGE_PCI = 2,
        /// Memory accesses to forward: reads.
        XEN_DMOP_IOREQ_MEM_ACCESS_READ = 1 << 0,
        /// Memory accesses to forward: writes.
        XEN_DMOP_IOREQ_MEM_ACCESS_WRITE = 1 << 1,
        /// Cache attribute: uncached.
        XEN_DMOP_MEM_CACHEATTR_UC = 0,
        /// Cache attribute: write combining.
        XEN_DMOP_MEM_CACHEATTR_WC = 1,
        /// Cache attribute: write through.
        XEN_DMOP_MEM_CACHEATTR_WT = 4,
        /// Cache attribute: write protected.
        XEN_DMOP_MEM_CACHEATTR_WP = 5,
        /// Cache attribute: write back.
        XEN_DMOP_MEM_CACHEATTR_WB = 6,
        /// Cache attribute: uncached, MTRRs may say otherwise.
        XEN_DMOP_MEM_CACHEATTR_UCM = 7,
        /// No longer pinned.
        XEN_DMOP_DELETE_MEM_CACHEATTR = u32::MAX,

        /// Slots of the buffered page.
        IOREQ_BUFFER_SLOT_NUM = 511,
    }
    u16 {
        /// The gfns are not wanted.
        XEN_DMOP_NO_GFNS = 1 << 0,
    }
    u8 {
        /// Event: external interrupt.
        XEN_DMOP_EVENT_EXT_INT = 0,
        /// Event: NMI.
        XEN_DMOP_EVENT_NMI = 2,
        /// Event: exception.
        XEN_DMOP_EVENT_HW_EXC = 3,
        /// Event: INT n.
        XEN_DMOP_EVENT_SW_INT = 4,
        /// Event: INT1.
        XEN_DMOP_EVENT_PRI_SW_EXC = 5,
        /// Event: INT3 or INTO.
        XEN_DMOP_EVENT_SW_EXC = 6,

        /// Direction: the guest reads.
        IOREQ_READ = 1,
        /// Direction: the guest writes.
        IOREQ_WRITE = 0,
        /// State: free.
        STATE_IOREQ_NONE = 0,
        /// State: for the device model to take.
        STATE_IOREQ_READY = 1,
        /// State: taken.
        STATE_IOREQ_INPROCESS = 2,
        /// State: for the hypervisor to take.
        STATE_IORESP_READY = 3,
        /// Type: port.
        IOREQ_TYPE_PIO = 0,
        /// Type: memory.
        IOREQ_TYPE_COPY = 1,
        /// Type: configuration space; address is `sbdf << 32 | register`.
        IOREQ_TYPE_PCI_CONFIG = 2,
        /// Type: the clock was set.
        IOREQ_TYPE_TIMEOFFSET = 7,
        /// Type: the device model's map cache is stale.
        IOREQ_TYPE_INVALIDATE = 8,
    }
    usize {
        /// Longest argument union.
        DM_OP_PAYLOAD_LEN = 24,
        /// Offset of the byte in [`Ioreq`] that holds the state; it is written last, with release ordering.
        IOREQ_STATE_OFFSET = 30,
    }
}

abi_structs! {
    /// One buffer of a call.
    pub struct XenDmOpBuf("struct xen_dm_op_buf", 16) {
        h: GuestHandle<u8> = 0,
        size: u64 = 8,
    }

    /// The first buffer.
    pub struct XenDmOp("struct xen_dm_op", 32) {
        /// `XEN_DMOP_*`.
        op: u32 = 0,
        _pad: u32,
        /// One of the arguments below.
        u: [u8; 24] = 8,
    }

    /// A new server.
    pub struct XenDmOpCreateIoreqServer("struct xen_dm_op_create_ioreq_server", 6) {
        /// `HVM_IOREQSRV_BUFIOREQ_*`.
        handle_bufioreq: u8 = 0,
        _pad: [u8; 3],
        /// Out.
        id: u16 = 4,
    }

    /// The pages of a server.
    pub struct XenDmOpGetIoreqServerInfo("struct xen_dm_op_get_ioreq_server_info", 24) {
        id: u16 = 0,
        /// [`XEN_DMOP_NO_GFNS`].
        flags: u16 = 2,
        /// Out.
        bufioreq_port: u32 = 4,
        /// Out.
        ioreq_gfn: u64 = 8,
        /// Out.
        bufioreq_gfn: u64 = 16,
    }

    /// A range that a server emulates, both ends included.
    pub struct XenDmOpIoreqServerRange("struct xen_dm_op_ioreq_server_range", 24) {
        id: u16 = 0,
        _pad: u16,
        /// `XEN_DMOP_IO_RANGE_*`.
        kind ["type"]: u32 = 4,
        start: u64 = 8,
        end: u64 = 16,
    }

    /// Whether a server is asked.
    pub struct XenDmOpSetIoreqServerState("struct xen_dm_op_set_ioreq_server_state", 4) {
        id: u16 = 0,
        enabled: u8 = 2,
        _pad: u8,
    }

    /// The end of a server.
    pub struct XenDmOpDestroyIoreqServer("struct xen_dm_op_destroy_ioreq_server", 4) {
        id: u16 = 0,
        _pad: u16,
    }

    /// Video memory to watch.
    pub struct XenDmOpTrackDirtyVram("struct xen_dm_op_track_dirty_vram", 16) {
        /// Pages; 0 stops.
        nr: u32 = 0,
        _pad: u32,
        first_pfn: u64 = 8,
    }

    /// A PCI line.
    pub struct XenDmOpSetPciIntxLevel("struct xen_dm_op_set_pci_intx_level", 6) {
        domain: u16 = 0,
        bus: u8 = 2,
        device: u8 = 3,
        intx: u8 = 4,
        level: u8 = 5,
    }

    /// An ISA line.
    pub struct XenDmOpSetIsaIrqLevel("struct xen_dm_op_set_isa_irq_level", 2) {
        isa_irq: u8 = 0,
        level: u8 = 1,
    }

    /// Where a PCI link goes.
    pub struct XenDmOpSetPciLinkRoute("struct xen_dm_op_set_pci_link_route", 2) {
        link: u8 = 0,
        /// 0 is nowhere.
        isa_irq: u8 = 1,
    }

    /// The device model wrote to guest memory.
    pub struct XenDmOpModifiedMemory("struct xen_dm_op_modified_memory", 8) {
        nr_extents: u32 = 0,
        /// Progress of a long call.
        opaque: u32 = 4,
    }

    /// One range of it.
    pub struct XenDmOpModifiedMemoryExtent("struct xen_dm_op_modified_memory_extent", 16) {
        nr: u32 = 0,
        _pad: u32,
        first_pfn: u64 = 8,
    }

    /// The type of a range.
    pub struct XenDmOpSetMemType("struct xen_dm_op_set_mem_type", 16) {
        nr: u32 = 0,
        /// `HVMMEM_*`.
        mem_type: u16 = 4,
        _pad: u16,
        first_pfn: u64 = 8,
    }

    /// An event for a vCPU.
    pub struct XenDmOpInjectEvent("struct xen_dm_op_inject_event", 24) {
        vcpuid: u32 = 0,
        vector: u8 = 4,
        /// `XEN_DMOP_EVENT_*`.
        kind ["type"]: u8 = 5,
        insn_len: u8 = 6,
        _pad0: u8,
        /// All ones is none.
        error_code: u32 = 8,
        _pad1: u32,
        cr2: u64 = 16,
    }

    /// A message-signalled interrupt.
    pub struct XenDmOpInjectMsi("struct xen_dm_op_inject_msi", 16) {
        data: u32 = 0,
        _pad: u32,
        addr: u64 = 8,
    }

    /// A memory type that a server emulates.
    pub struct XenDmOpMapMemTypeToIoreqServer("struct xen_dm_op_map_mem_type_to_ioreq_server", 16) {
        id: u16 = 0,
        kind ["type"]: u16 = 2,
        /// `XEN_DMOP_IOREQ_MEM_ACCESS_*`; 0 ends it.
        flags: u32 = 4,
        /// Progress of a long call.
        opaque: u64 = 8,
    }

    /// Shut the guest down.
    pub struct XenDmOpRemoteShutdown("struct xen_dm_op_remote_shutdown", 4) {
        /// `SHUTDOWN_*`.
        reason: u32 = 0,
    }

    /// Move pages.
    pub struct XenDmOpRelocateMemory("struct xen_dm_op_relocate_memory", 24) {
        /// Pages.
        size: u32 = 0,
        _pad: u32,
        src_gfn: u64 = 8,
        dst_gfn: u64 = 16,
    }

    /// Fix the cache attribute of a range, both ends included.
    pub struct XenDmOpPinMemoryCacheattr("struct xen_dm_op_pin_memory_cacheattr", 24) {
        start: u64 = 0,
        end: u64 = 8,
        /// `XEN_DMOP_MEM_CACHEATTR_*`.
        kind ["type"]: u32 = 16,
        _pad: u32,
    }

    /// How many vCPUs there are.
    pub struct XenDmOpNrVcpus("struct xen_dm_op_nr_vcpus", 4) {
        /// Out.
        vcpus: u32 = 0,
    }

    /// A request for emulation: one per vCPU in the synchronous pages.
    pub struct Ioreq("struct ioreq", 32) {
        /// Address, or configuration register.
        addr: u64 = 0,
        /// Data, or the guest-physical address of it.
        data: u64 = 8,
        /// Repetitions.
        count: u32 = 16,
        /// Bytes.
        size: u32 = 20,
        /// Port by which the device model is told, and tells.
        vp_eport: u32 = 24,
        _pad: u16,
        /// State and flags: see the methods.
        bits [""]: u8 = 30,
        /// `IOREQ_TYPE_*`.
        kind ["type"]: u8 = 31,
    }

    /// A write that needs no answer, in the buffered page.
    pub struct BufIoreq("struct buf_ioreq", 8) {
        /// `IOREQ_TYPE_*`.
        kind ["type"]: u8 = 0,
        /// Direction, size and address: see [`BufIoreq::new`].
        bits [""]: [u8; 3] = 1,
        data: u32 = 4,
    }

    /// The buffered page: pointers and slots.
    pub struct BufferedIopage("struct buffered_iopage", 4096) {
        read_pointer: u32 = 0,
        write_pointer: u32 = 4,
        buf_ioreq: [BufIoreq; 511] = 8,
    }
}

payload_methods!(XenDmOp, DM_OP_PAYLOAD_LEN);

impl Ioreq {
    /// The state: `STATE_*`.
    #[must_use]
    pub const fn state(self) -> u8 {
        self.bits & 0xf
    }

    /// Sets the state and leaves the flags.
    pub const fn set_state(&mut self, state: u8) {
        self.bits = self.bits & 0xf0 | state & 0xf;
    }

    /// Whether `data` is the address of the data.
    #[must_use]
    pub const fn data_is_ptr(self) -> bool {
        self.bits & 1 << 4 != 0
    }

    /// [`IOREQ_READ`] or [`IOREQ_WRITE`].
    #[must_use]
    pub const fn dir(self) -> u8 {
        self.bits >> 5 & 1
    }

    /// Whether addresses count down.
    #[must_use]
    pub const fn df(self) -> bool {
        self.bits & 1 << 6 != 0
    }

    /// The byte that the four accessors read.
    #[must_use]
    pub const fn pack_bits(state: u8, data_is_ptr: bool, dir: u8, df: bool) -> u8 {
        state & 0xf | (data_is_ptr as u8) << 4 | (dir & 1) << 5 | (df as u8) << 6
    }
}

impl BufIoreq {
    /// A slot, or `None` if the address does not fit into 20 bits or the size is not 1, 2, 4 or 8.
    ///
    /// An 8-byte access takes two slots; the second holds only the high half of the data.
    #[must_use]
    pub const fn new(kind: u8, dir: u8, size: u8, addr: u32, data: u32) -> Option<Self> {
        let log2 = match size {
            1 => 0,
            2 => 1,
            4 => 2,
            8 => 3,
            _ => return None,
        };
        if addr >> 20 != 0 {
            return None;
        }
        let word = (dir as u32 & 1) << 1 | log2 << 2 | addr << 4;
        let [a, b, c, _] = word.to_le_bytes();
        Some(Self {
            kind,
            bits: [a, b, c],
            data,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromZeros, IntoBytes};

    #[test]
    fn the_state_of_a_request_is_apart_from_its_flags() {
        let mut r = Ioreq::new_zeroed();
        r.bits = Ioreq::pack_bits(STATE_IOREQ_READY, true, IOREQ_READ, false);
        assert_eq!(
            (r.state(), r.data_is_ptr(), r.dir(), r.df()),
            (1, true, 1, false)
        );
        r.set_state(STATE_IORESP_READY);
        assert_eq!(
            (r.state(), r.data_is_ptr(), r.dir(), r.df()),
            (3, true, 1, false)
        );
        assert_eq!(r.as_bytes()[IOREQ_STATE_OFFSET], 0x33);
    }

    #[test]
    fn buffered_slots_refuse_what_they_cannot_hold() {
        let b = BufIoreq::new(IOREQ_TYPE_COPY, IOREQ_WRITE, 4, 0xa_1234, 7).unwrap();
        assert_eq!(b.bits, [0x48, 0x23, 0xa1]);
        assert!(BufIoreq::new(IOREQ_TYPE_COPY, 0, 4, 0x10_0000, 0).is_none());
        assert!(BufIoreq::new(IOREQ_TYPE_COPY, 0, 3, 0, 0).is_none());
    }
}
