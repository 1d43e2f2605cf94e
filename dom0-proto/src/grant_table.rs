//! `grant_table_op`: the shared table (version 1) and the arguments of each operation.
//!
//! All operations take an array of these structures and a count; results go into each element's
//! `status`. C: `grant_table.h`. Version 2 exists here only as far as its numbers must be refused.

use crate::{DomId, GntStatus, GuestHandle};

abi_consts! {
    u32 {
        /// [`GnttabMapGrantRef`].
        GNTTABOP_MAP_GRANT_REF = 0,
        /// [`GnttabUnmapGrantRef`].
        GNTTABOP_UNMAP_GRANT_REF = 1,
        /// [`GnttabSetupTable`].
        GNTTABOP_SETUP_TABLE = 2,
        /// [`GnttabDumpTable`].
        GNTTABOP_DUMP_TABLE = 3,
        /// [`GnttabTransfer`]; PV only.
        GNTTABOP_TRANSFER = 4,
        /// [`GnttabCopy`].
        GNTTABOP_COPY = 5,
        /// [`GnttabQuerySize`].
        GNTTABOP_QUERY_SIZE = 6,
        /// [`GnttabUnmapAndReplace`]; PV only.
        GNTTABOP_UNMAP_AND_REPLACE = 7,
        /// [`GnttabSetVersion`].
        GNTTABOP_SET_VERSION = 8,
        /// [`GnttabGetStatusFrames`]; version 2 only.
        GNTTABOP_GET_STATUS_FRAMES = 9,
        /// [`GnttabGetVersion`].
        GNTTABOP_GET_VERSION = 10,
        /// [`GnttabSwapGrantRef`].
        GNTTABOP_SWAP_GRANT_REF = 11,
        /// [`GnttabCacheFlush`].
        GNTTABOP_CACHE_FLUSH = 12,

        /// References that the toolstack uses for itself at the table's start.
        GNTTAB_NR_RESERVED_ENTRIES = 8,
        /// Reference of the console ring.
        GNTTAB_RESERVED_CONSOLE = 0,
        /// Reference of the xenstore ring.
        GNTTAB_RESERVED_XENSTORE = 1,

        /// Map for I/O: into the IOMMU.
        GNTMAP_DEVICE_MAP = 1 << 0,
        /// Map for the CPU.
        GNTMAP_HOST_MAP = 1 << 1,
        /// Map for reading only.
        GNTMAP_READONLY = 1 << 2,
        /// Accessible by applications; PV only.
        GNTMAP_APPLICATION_MAP = 1 << 3,
        /// `host_addr` is the address of a page-table entry; PV only.
        GNTMAP_CONTAINS_PTE = 1 << 4,
        /// Software bits of the page-table entry; PV only.
        GNTMAP_GUEST_AVAIL_MASK = 0xffff_0000,

        /// Cache flush: write back.
        GNTTAB_CACHE_CLEAN = 1 << 0,
        /// Cache flush: invalidate.
        GNTTAB_CACHE_INVAL = 1 << 1,
        /// Cache flush: the union is a grant reference.
        GNTTAB_CACHE_SOURCE_GREF = 1 << 31,
    }
    u16 {
        /// Entry type: unused.
        GTF_INVALID = 0,
        /// Entry type: the domain may map or copy.
        GTF_PERMIT_ACCESS = 1,
        /// Entry type: the domain may transfer a page here.
        GTF_ACCEPT_TRANSFER = 2,
        /// Entry type: through another grant; version 2.
        GTF_TRANSITIVE = 3,
        /// Mask of the entry type.
        GTF_TYPE_MASK = 3,
        /// Access for reading only.
        GTF_READONLY = 1 << 2,
        /// Set by the hypervisor: mapped or being read.
        GTF_READING = 1 << 3,
        /// Set by the hypervisor: mapped or being written.
        GTF_WRITING = 1 << 4,
        /// Cache attribute of the mapping.
        GTF_PWT = 1 << 5,
        /// Cache attribute of the mapping.
        GTF_PCD = 1 << 6,
        /// Cache attribute of the mapping.
        GTF_PAT = 1 << 7,
        /// Only a part of the page; version 2.
        GTF_SUB_PAGE = 1 << 8,
        /// Transfer: the page is chosen.
        GTF_TRANSFER_COMMITTED = 1 << 2,
        /// Transfer: `frame` is valid.
        GTF_TRANSFER_COMPLETED = 1 << 3,

        /// Copy: the source is a grant reference.
        GNTCOPY_SOURCE_GREF = 1 << 0,
        /// Copy: the destination is a grant reference.
        GNTCOPY_DEST_GREF = 1 << 1,
    }
    u32 {
        /// Entries in one frame of a version-1 table.
        GRANT_ENTRIES_V1_PER_FRAME = 512,
        /// The handle of a failed mapping, by convention of the guests.
        GRANT_INVALID_HANDLE = u32::MAX,
    }
}

abi_structs! {
    /// One entry of a version-1 table. The guest writes it, the hypervisor changes only
    /// [`GTF_READING`] and [`GTF_WRITING`], atomically with the check of the rest.
    pub struct GrantEntryV1("struct grant_entry_v1", 8) {
        flags: u16 = 0,
        /// Who may use it.
        domid: DomId = 2,
        /// The gfn granted.
        frame: u32 = 4,
    }

    /// Arguments of [`GNTTABOP_MAP_GRANT_REF`].
    pub struct GnttabMapGrantRef("struct gnttab_map_grant_ref", 32) {
        /// Guest-physical address at which a translated caller wants it.
        host_addr: u64 = 0,
        /// `GNTMAP_*`.
        flags: u32 = 8,
        gref ["ref"]: u32 = 12,
        /// The granter.
        dom: DomId = 16,
        /// Out.
        status: GntStatus = 18,
        /// Out.
        handle: u32 = 20,
        /// Out: the address devices use.
        dev_bus_addr: u64 = 24,
    }

    /// Arguments of [`GNTTABOP_UNMAP_GRANT_REF`].
    pub struct GnttabUnmapGrantRef("struct gnttab_unmap_grant_ref", 24) {
        host_addr: u64 = 0,
        dev_bus_addr: u64 = 8,
        handle: u32 = 16,
        /// Out.
        status: GntStatus = 20,
        _pad: u16,
    }

    /// Arguments of [`GNTTABOP_SETUP_TABLE`].
    pub struct GnttabSetupTable("struct gnttab_setup_table", 24) {
        dom: DomId = 0,
        _pad0: u16,
        nr_frames: u32 = 4,
        /// Out.
        status: GntStatus = 8,
        _pad1: [u8; 6],
        /// Out: the frames.
        frame_list: GuestHandle<u64> = 16,
    }

    /// Arguments of [`GNTTABOP_DUMP_TABLE`].
    pub struct GnttabDumpTable("struct gnttab_dump_table", 4) {
        dom: DomId = 0,
        /// Out.
        status: GntStatus = 2,
    }

    /// Arguments of [`GNTTABOP_TRANSFER`].
    pub struct GnttabTransfer("struct gnttab_transfer", 24) {
        mfn: u64 = 0,
        domid: DomId = 8,
        _pad0: u16,
        gref ["ref"]: u32 = 12,
        /// Out.
        status: GntStatus = 16,
        _pad1: [u8; 6],
    }

    /// One side of a copy.
    pub struct GnttabCopyPtr("struct gnttab_copy_ptr", 16) {
        /// A gfn, or a grant reference in the low 32 bits: see [`GnttabCopyPtr::gref`].
        gmfn ["u.gmfn"]: u64 = 0,
        domid: DomId = 8,
        /// Byte in the page.
        offset: u16 = 10,
        _pad: u32,
    }

    /// Arguments of [`GNTTABOP_COPY`].
    pub struct GnttabCopy("struct gnttab_copy", 40) {
        source: GnttabCopyPtr = 0,
        dest: GnttabCopyPtr = 16,
        /// Bytes.
        len: u16 = 32,
        /// `GNTCOPY_*`.
        flags: u16 = 34,
        /// Out.
        status: GntStatus = 36,
        _pad: u16,
    }

    /// Arguments of [`GNTTABOP_QUERY_SIZE`].
    pub struct GnttabQuerySize("struct gnttab_query_size", 16) {
        dom: DomId = 0,
        _pad0: u16,
        /// Out: frames in use.
        nr_frames: u32 = 4,
        /// Out: the limit.
        max_nr_frames: u32 = 8,
        /// Out.
        status: GntStatus = 12,
        _pad1: u16,
    }

    /// Arguments of [`GNTTABOP_UNMAP_AND_REPLACE`].
    pub struct GnttabUnmapAndReplace("struct gnttab_unmap_and_replace", 24) {
        host_addr: u64 = 0,
        new_addr: u64 = 8,
        handle: u32 = 16,
        /// Out.
        status: GntStatus = 20,
        _pad: u16,
    }

    /// Argument of [`GNTTABOP_SET_VERSION`].
    pub struct GnttabSetVersion("struct gnttab_set_version", 4) {
        /// In: wanted. Out: in force.
        version: u32 = 0,
    }

    /// Arguments of [`GNTTABOP_GET_STATUS_FRAMES`].
    pub struct GnttabGetStatusFrames("struct gnttab_get_status_frames", 16) {
        nr_frames: u32 = 0,
        dom: DomId = 4,
        /// Out.
        status: GntStatus = 6,
        frame_list: GuestHandle<u64> = 8,
    }

    /// Arguments of [`GNTTABOP_GET_VERSION`].
    pub struct GnttabGetVersion("struct gnttab_get_version", 8) {
        dom: DomId = 0,
        _pad: u16,
        /// Out.
        version: u32 = 4,
    }

    /// Arguments of [`GNTTABOP_SWAP_GRANT_REF`].
    pub struct GnttabSwapGrantRef("struct gnttab_swap_grant_ref", 12) {
        ref_a: u32 = 0,
        ref_b: u32 = 4,
        /// Out.
        status: GntStatus = 8,
        _pad: u16,
    }

    /// Arguments of [`GNTTABOP_CACHE_FLUSH`].
    pub struct GnttabCacheFlush("struct gnttab_cache_flush", 16) {
        /// A bus address, or a grant reference in the low 32 bits.
        addr ["a.dev_bus_addr"]: u64 = 0,
        offset: u16 = 8,
        length: u16 = 10,
        /// `GNTTAB_CACHE_*`.
        op: u32 = 12,
    }
}

impl GnttabCopyPtr {
    /// The grant reference, where the copy's flags say that this side is one.
    #[must_use]
    pub const fn gref(self) -> u32 {
        self.gmfn as u32
    }
}
