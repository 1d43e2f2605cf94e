//! Error numbers of hypercalls ([`Errno`]) and the status codes of grant-table operations
//! ([`GntStatus`]).
//!
//! Xen's error numbers are those of Linux on x86. A hypercall returns them negated in the whole
//! result register; grant operations carry their own code in each argument structure.

abi_newtype! {
    /// A positive error number. Any number is representable; known ones are constants.
    pub struct Errno(i32) {
        /// Not permitted for this caller.
        EPERM = 1, "XEN_EPERM";
        /// No such object.
        ENOENT = 2, "XEN_ENOENT";
        /// No such domain or vCPU.
        ESRCH = 3, "XEN_ESRCH";
        /// I/O error.
        EIO = 5, "XEN_EIO";
        /// No such device or address.
        ENXIO = 6, "XEN_ENXIO";
        /// Argument list too long.
        E2BIG = 7, "XEN_E2BIG";
        /// Not an executable format.
        ENOEXEC = 8, "XEN_ENOEXEC";
        /// Bad number of an open object.
        EBADF = 9, "XEN_EBADF";
        /// No child.
        ECHILD = 10, "XEN_ECHILD";
        /// Try again.
        EAGAIN = 11, "XEN_EAGAIN";
        /// Out of memory, or above the domain's limit.
        ENOMEM = 12, "XEN_ENOMEM";
        /// Wrong interface version, or denied by policy.
        EACCES = 13, "XEN_EACCES";
        /// A guest pointer could not be read or written.
        EFAULT = 14, "XEN_EFAULT";
        /// In use.
        EBUSY = 16, "XEN_EBUSY";
        /// Already exists.
        EEXIST = 17, "XEN_EEXIST";
        /// Crosses a boundary that cannot be crossed.
        EXDEV = 18, "XEN_EXDEV";
        /// No such device.
        ENODEV = 19, "XEN_ENODEV";
        /// Not a directory (hypfs).
        ENOTDIR = 20, "XEN_ENOTDIR";
        /// Is a directory (hypfs).
        EISDIR = 21, "XEN_EISDIR";
        /// Invalid argument.
        EINVAL = 22, "XEN_EINVAL";
        /// Table of the whole system full.
        ENFILE = 23, "XEN_ENFILE";
        /// Too many open objects.
        EMFILE = 24, "XEN_EMFILE";
        /// No room.
        ENOSPC = 28, "XEN_ENOSPC";
        /// Read-only.
        EROFS = 30, "XEN_EROFS";
        /// Too many links.
        EMLINK = 31, "XEN_EMLINK";
        /// Outside the domain of the function.
        EDOM = 33, "XEN_EDOM";
        /// Result out of range.
        ERANGE = 34, "XEN_ERANGE";
        /// Would deadlock.
        EDEADLK = 35, "XEN_EDEADLK";
        /// Name too long.
        ENAMETOOLONG = 36, "XEN_ENAMETOOLONG";
        /// No locks available.
        ENOLCK = 37, "XEN_ENOLCK";
        /// Not implemented: unknown hypercall or operation.
        ENOSYS = 38, "XEN_ENOSYS";
        /// Directory not empty.
        ENOTEMPTY = 39, "XEN_ENOTEMPTY";
        /// No data available.
        ENODATA = 61, "XEN_ENODATA";
        /// The time is past.
        ETIME = 62, "XEN_ETIME";
        /// Malformed message.
        EBADMSG = 74, "XEN_EBADMSG";
        /// Value too large for its type.
        EOVERFLOW = 75, "XEN_EOVERFLOW";
        /// Illegal byte sequence.
        EILSEQ = 84, "XEN_EILSEQ";
        /// Internal: the hypercall is to be re-executed. A guest never sees it.
        ERESTART = 85, "";
        /// Not a socket.
        ENOTSOCK = 88, "XEN_ENOTSOCK";
        /// Message too long.
        EMSGSIZE = 90, "XEN_EMSGSIZE";
        /// Known, but not supported here.
        EOPNOTSUPP = 95, "XEN_EOPNOTSUPP";
        /// Address in use.
        EADDRINUSE = 98, "XEN_EADDRINUSE";
        /// Address not available.
        EADDRNOTAVAIL = 99, "XEN_EADDRNOTAVAIL";
        /// Buffer too small; the size needed is usually returned beside it.
        ENOBUFS = 105, "XEN_ENOBUFS";
        /// Already connected.
        EISCONN = 106, "XEN_EISCONN";
        /// Not connected.
        ENOTCONN = 107, "XEN_ENOTCONN";
        /// Timed out.
        ETIMEDOUT = 110, "XEN_ETIMEDOUT";
        /// Refused by the other side.
        ECONNREFUSED = 111, "XEN_ECONNREFUSED";
        /// Already in progress. Xen's headers do not list it; the number is that of Linux.
        EALREADY = 114, "";
    }
}

impl Errno {
    /// The number itself (positive).
    #[must_use]
    pub const fn get(self) -> i32 {
        self.0
    }

    /// The result register of a failed hypercall: the number negated, in two's complement.
    #[must_use]
    pub const fn as_ret(self) -> u64 {
        (self.0 as i64).wrapping_neg() as u64
    }

    /// The negated number as C's `int`, as found in per-item error arrays (`errs` of
    /// `XENMEM_add_to_physmap_batch`).
    #[must_use]
    pub const fn as_neg(self) -> i32 {
        self.0.wrapping_neg()
    }
}

impl core::fmt::Display for Errno {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Debug::fmt(self, f)
    }
}

impl core::error::Error for Errno {}

abi_newtype! {
    /// The status of one grant-table operation: zero, or negative.
    pub struct GntStatus(i16) {
        /// Done.
        OKAY = 0, "GNTST_okay";
        /// Any error without a better name.
        GENERAL_ERROR = -1, "GNTST_general_error";
        /// Unknown domain.
        BAD_DOMAIN = -2, "GNTST_bad_domain";
        /// The grant reference is out of range or does not permit the access.
        BAD_GNTREF = -3, "GNTST_bad_gntref";
        /// The mapping handle is unknown.
        BAD_HANDLE = -4, "GNTST_bad_handle";
        /// The host address cannot be used.
        BAD_VIRT_ADDR = -5, "GNTST_bad_virt_addr";
        /// The bus address does not match.
        BAD_DEV_ADDR = -6, "GNTST_bad_dev_addr";
        /// No room in the IOMMU or maptrack table.
        NO_DEVICE_SPACE = -7, "GNTST_no_device_space";
        /// The caller may not do this.
        PERMISSION_DENIED = -8, "GNTST_permission_denied";
        /// The frame is not one that can be granted.
        BAD_PAGE = -9, "GNTST_bad_page";
        /// A copy would cross a page boundary.
        BAD_COPY_ARG = -10, "GNTST_bad_copy_arg";
        /// The frame number does not fit.
        ADDRESS_TOO_BIG = -11, "GNTST_address_too_big";
        /// Not done now; the guest should try again.
        EAGAIN = -12, "GNTST_eagain";
        /// No room in the table.
        NO_SPACE = -13, "GNTST_no_space";
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn failed_hypercall_returns_the_negated_number_in_all_64_bits() {
        assert_eq!(Errno::ENOSYS.as_ret(), 0xffff_ffff_ffff_ffda);
        assert_eq!(Errno::EOPNOTSUPP.as_ret() as i64, -95);
        assert_eq!(Errno::EFAULT.as_neg(), -14);
        // A number made up by nobody must not overflow.
        assert_eq!(Errno(i32::MIN).as_ret(), 0x8000_0000);
    }

    #[test]
    fn unknown_numbers_print_as_numbers() {
        assert_eq!(format!("{:?}", Errno::EINVAL), "EINVAL");
        assert_eq!(format!("{:?}", Errno(4095)), "Errno(0xfff)");
        assert_eq!(format!("{:?}", GntStatus::BAD_GNTREF), "BAD_GNTREF");
    }
}
