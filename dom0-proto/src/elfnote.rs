//! ELF notes by which a kernel says how it wants to be started. Owner name "Xen".
//!
//! C: `elfnote.h`.

abi_consts! {
    u32 {
        /// Text: informational.
        XEN_ELFNOTE_INFO = 0,
        /// Address: PV entry point.
        XEN_ELFNOTE_ENTRY = 1,
        /// Address: PV hypercall page.
        XEN_ELFNOTE_HYPERCALL_PAGE = 2,
        /// Address: where the kernel is linked.
        XEN_ELFNOTE_VIRT_BASE = 3,
        /// Offset of `p_paddr` against guest-physical addresses.
        XEN_ELFNOTE_PADDR_OFFSET = 4,
        /// Text: "xen-3.0".
        XEN_ELFNOTE_XEN_VERSION = 5,
        /// Text.
        XEN_ELFNOTE_GUEST_OS = 6,
        /// Text.
        XEN_ELFNOTE_GUEST_VERSION = 7,
        /// Text: "generic".
        XEN_ELFNOTE_LOADER = 8,
        /// Text: PAE.
        XEN_ELFNOTE_PAE_MODE = 9,
        /// Text: features wanted, `|`-separated, `!` before those required.
        XEN_ELFNOTE_FEATURES = 10,
        /// Text: load the symbol table.
        XEN_ELFNOTE_BSD_SYMTAB = 11,
        /// Address: lowest the hypervisor may take; PV.
        XEN_ELFNOTE_HV_START_LOW = 12,
        /// PV page-table entry format.
        XEN_ELFNOTE_L1_MFN_VALID = 13,
        /// Whether a suspension can be cancelled.
        XEN_ELFNOTE_SUSPEND_CANCEL = 14,
        /// Address: where PV wants its p2m.
        XEN_ELFNOTE_INIT_P2M = 15,
        /// Whether the module is given by frame number.
        XEN_ELFNOTE_MOD_START_PFN = 16,
        /// Bits: features supported.
        XEN_ELFNOTE_SUPPORTED_FEATURES = 17,
        /// Address, guest-physical: PVH entry point, 32-bit.
        XEN_ELFNOTE_PHYS32_ENTRY = 18,
        /// The PVH kernel can be moved: alignment, lowest, highest address (4.20).
        XEN_ELFNOTE_PHYS32_RELOC = 19,
    }
}
