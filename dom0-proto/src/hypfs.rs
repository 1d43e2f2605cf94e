//! `hypfs_op`: the hypervisor's parameters as a small file system.
//!
//! C: `hypfs.h`.

abi_consts! {
    u32 {
        /// The version that [`XEN_HYPFS_OP_GET_VERSION`] returns.
        XEN_HYPFS_VERSION = 1,
        /// Longest path, NUL included.
        XEN_HYPFS_MAX_PATHLEN = 1024,
        /// No argument.
        XEN_HYPFS_OP_GET_VERSION = 0,
        /// Path, its length, buffer, its size.
        XEN_HYPFS_OP_READ = 1,
        /// Path, its length, buffer, its size.
        XEN_HYPFS_OP_WRITE_CONTENTS = 2,
    }
    u8 {
        /// Entry type.
        XEN_HYPFS_TYPE_DIR = 0,
        /// Entry type.
        XEN_HYPFS_TYPE_BLOB = 1,
        /// Entry type.
        XEN_HYPFS_TYPE_STRING = 2,
        /// Entry type.
        XEN_HYPFS_TYPE_UINT = 3,
        /// Entry type.
        XEN_HYPFS_TYPE_INT = 4,
        /// Entry type.
        XEN_HYPFS_TYPE_BOOL = 5,
        /// Encoding.
        XEN_HYPFS_ENC_PLAIN = 0,
        /// Encoding.
        XEN_HYPFS_ENC_GZIP = 1,
    }
}

abi_structs! {
    /// An entry; its contents follow in the buffer.
    pub struct XenHypfsDirentry("struct xen_hypfs_direntry", 12) {
        /// `XEN_HYPFS_TYPE_*`.
        kind ["type"]: u8 = 0,
        /// `XEN_HYPFS_ENC_*`.
        encoding: u8 = 1,
        _pad: u16,
        content_len: u32 = 4,
        /// 0: read-only.
        max_write_len: u32 = 8,
    }
}
