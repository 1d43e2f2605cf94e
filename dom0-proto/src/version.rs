//! `xen_version`: the release, its strings, and the feature bits a guest may rely on.
//!
//! C: `version.h`, `features.h`.

abi_consts! {
    u32 {
        /// Returns `major << 16 | minor`; no argument.
        XENVER_VERSION = 0,
        /// 16 bytes of text.
        XENVER_EXTRAVERSION = 1,
        /// [`XenCompileInfo`].
        XENVER_COMPILE_INFO = 2,
        /// 1024 bytes of text.
        XENVER_CAPABILITIES = 3,
        /// 64 bytes of text.
        XENVER_CHANGESET = 4,
        /// [`XenPlatformParameters`].
        XENVER_PLATFORM_PARAMETERS = 5,
        /// [`XenFeatureInfo`].
        XENVER_GET_FEATURES = 6,
        /// Returns the page size; no argument.
        XENVER_PAGESIZE = 7,
        /// The caller's UUID, 16 bytes.
        XENVER_GUEST_HANDLE = 8,
        /// 1024 bytes of text.
        XENVER_COMMANDLINE = 9,
        /// [`XenVarbuf`]: the build id.
        XENVER_BUILD_ID = 10,
        /// [`XenVarbuf`] form of 1 (4.18).
        XENVER_EXTRAVERSION2 = 11,
        /// [`XenVarbuf`] form of 3 (4.18).
        XENVER_CAPABILITIES2 = 12,
        /// [`XenVarbuf`] form of 4 (4.18).
        XENVER_CHANGESET2 = 13,
        /// [`XenVarbuf`] form of 9 (4.18).
        XENVER_COMMANDLINE2 = 14,

        /// Feature bit: page tables need not be read-only.
        XENFEAT_WRITABLE_PAGE_TABLES = 0,
        /// Feature bit: descriptor tables need not be read-only.
        XENFEAT_WRITABLE_DESCRIPTOR_TABLES = 1,
        /// Feature bit: guest-physical addresses are translated.
        XENFEAT_AUTO_TRANSLATED_PHYSMAP = 2,
        /// Feature bit: the kernel runs in ring 0.
        XENFEAT_SUPERVISOR_MODE_KERNEL = 3,
        /// Feature bit: PAE page directories may lie above 4 GiB.
        XENFEAT_PAE_PGDIR_ABOVE_4GB = 4,
        /// Feature bit: PV only.
        XENFEAT_MMU_PT_UPDATE_PRESERVE_AD = 5,
        /// Feature bit: PV only.
        XENFEAT_HIGHMEM_ASSIST = 6,
        /// Feature bit: software bits in grant mappings.
        XENFEAT_GNTTAB_MAP_AVAIL_BITS = 7,
        /// Feature bit: events can come as a vector.
        XENFEAT_HVM_CALLBACK_VECTOR = 8,
        /// Feature bit: the PV clock is safe for HVM guests.
        XENFEAT_HVM_SAFE_PVCLOCK = 9,
        /// Feature bit: emulated interrupts can be bound to event channels.
        XENFEAT_HVM_PIRQS = 10,
        /// Feature bit: the caller is the control domain.
        XENFEAT_DOM0 = 11,
        /// Feature bit: reservations may name virtual nodes.
        XENFEAT_MEMORY_OP_VNODE_SUPPORTED = 13,
        /// Feature bit: Arm only.
        XENFEAT_ARM_SMCCC_SUPPORTED = 14,
        /// Feature bit: asked for by kernels whose RSDP may lie anywhere.
        XENFEAT_LINUX_RSDP_UNRESTRICTED = 15,
        /// Feature bit: gfn differs from mfn.
        XENFEAT_NOT_DIRECT_MAPPED = 16,
        /// Feature bit: gfn equals mfn.
        XENFEAT_DIRECT_MAPPED = 17,
        /// Feature bit: `VCPUOP_register_runstate_phys_area` exists (4.18).
        XENFEAT_RUNSTATE_PHYS_AREA = 18,
        /// Feature bit: `VCPUOP_register_vcpu_time_phys_area` exists (4.18).
        XENFEAT_VCPU_TIME_PHYS_AREA = 19,
        /// Feature bit: device models see all MSI-X writes (4.20).
        XENFEAT_DM_MSIX_ALL_WRITES = 20,
        /// Words of feature bits.
        XENFEAT_NR_SUBMAPS = 1,
    }
    usize {
        /// Length of [`XENVER_EXTRAVERSION`] text, NUL included.
        XEN_EXTRAVERSION_LEN = 16,
        /// Length of [`XENVER_CAPABILITIES`] text, NUL included.
        XEN_CAPABILITIES_INFO_LEN = 1024,
        /// Length of [`XENVER_CHANGESET`] text, NUL included.
        XEN_CHANGESET_INFO_LEN = 64,
        /// Length of [`XENVER_COMMANDLINE`] text, NUL included.
        XEN_COMMANDLINE_LEN = 1024,
    }
}

abi_structs! {
    /// Result of [`XENVER_COMPILE_INFO`]: NUL-terminated texts.
    pub struct XenCompileInfo("struct xen_compile_info", 144) {
        compiler: [u8; 64] = 0,
        compile_by: [u8; 16] = 64,
        compile_domain: [u8; 32] = 80,
        compile_date: [u8; 32] = 112,
    }

    /// Result of [`XENVER_PLATFORM_PARAMETERS`].
    pub struct XenPlatformParameters("struct xen_platform_parameters", 8) {
        /// Where the hypervisor's reserved address range starts; PV only.
        virt_start: u64 = 0,
    }

    /// Argument and result of [`XENVER_GET_FEATURES`].
    pub struct XenFeatureInfo("struct xen_feature_info", 8) {
        /// In: which word.
        submap_idx: u32 = 0,
        /// Out: its bits.
        submap: u32 = 4,
    }

    /// Head of the results of variable length: `len` bytes follow. The operation returns the length
    /// needed, or with a handle the number of bytes stored.
    pub struct XenVarbuf("struct xen_build_id", 4) {
        /// In: room.
        len: u32 = 0,
    }
}
