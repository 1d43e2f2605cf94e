//! Shared-memory rings: console, xenstore, and the head that all split drivers' rings have.
//!
//! Producers and consumers share the page with an untrusted peer: indices are read once, as volatile
//! or atomic, and only their difference modulo 2^32 is used. The types here give the layout.
//!
//! C: `io/console.h`, `io/xs_wire.h`, `io/ring.h`, `io/xenbus.h`.

abi_consts! {
    u32 {
        /// Message: control.
        XS_CONTROL = 0,
        /// Message: list children.
        XS_DIRECTORY = 1,
        /// Message: read.
        XS_READ = 2,
        /// Message: permissions.
        XS_GET_PERMS = 3,
        /// Message: set a watch.
        XS_WATCH = 4,
        /// Message: remove a watch.
        XS_UNWATCH = 5,
        /// Message: begin a transaction.
        XS_TRANSACTION_START = 6,
        /// Message: end a transaction.
        XS_TRANSACTION_END = 7,
        /// Message: a domain is to be served.
        XS_INTRODUCE = 8,
        /// Message: a domain is gone.
        XS_RELEASE = 9,
        /// Message: path of a domain.
        XS_GET_DOMAIN_PATH = 10,
        /// Message: write.
        XS_WRITE = 11,
        /// Message: make a node.
        XS_MKDIR = 12,
        /// Message: remove a node.
        XS_RM = 13,
        /// Message: set permissions.
        XS_SET_PERMS = 14,
        /// Message: a watch fired.
        XS_WATCH_EVENT = 15,
        /// Message: error.
        XS_ERROR = 16,
        /// Message: whether a domain is served.
        XS_IS_DOMAIN_INTRODUCED = 17,
        /// Message: a domain was resumed.
        XS_RESUME = 18,
        /// Message: a domain may act for another.
        XS_SET_TARGET = 19,
        /// Message: remove all watches.
        XS_RESET_WATCHES = 21,
        /// Message: list children in parts.
        XS_DIRECTORY_PART = 22,

        /// Bytes of each xenstore ring.
        XENSTORE_RING_SIZE = 1024,
        /// Longest payload of a message.
        XENSTORE_PAYLOAD_MAX = 4096,
        /// Longest absolute path.
        XENSTORE_ABS_PATH_MAX = 3072,
        /// Longest relative path.
        XENSTORE_REL_PATH_MAX = 2048,
        /// Server feature: can reconnect.
        XENSTORE_SERVER_FEATURE_RECONNECTION = 1,
        /// Server feature: reports errors of the connection.
        XENSTORE_SERVER_FEATURE_ERROR = 2,
        /// Connection: in order.
        XENSTORE_CONNECTED = 0,
        /// Connection: the guest asks for a new one.
        XENSTORE_RECONNECT = 1,
        /// Error: none.
        XENSTORE_ERROR_NONE = 0,
        /// Error: communication.
        XENSTORE_ERROR_COMM = 1,
        /// Error: index of a ring.
        XENSTORE_ERROR_RINGIDX = 2,
        /// Error: protocol.
        XENSTORE_ERROR_PROTO = 3,
    }
}

abi_newtype! {
    /// The state of one end of a split driver, as its `state` node has it.
    pub struct XenbusState(u32) {
        /// No such node.
        UNKNOWN = 0, "XenbusStateUnknown";
        /// The front or back end starts.
        INITIALISING = 1, "XenbusStateInitialising";
        /// The back end waits for the front end's details.
        INIT_WAIT = 2, "XenbusStateInitWait";
        /// The end's details are in the store.
        INITIALISED = 3, "XenbusStateInitialised";
        /// Connected.
        CONNECTED = 4, "XenbusStateConnected";
        /// Shutting down.
        CLOSING = 5, "XenbusStateClosing";
        /// Shut down.
        CLOSED = 6, "XenbusStateClosed";
        /// Its configuration changes.
        RECONFIGURING = 7, "XenbusStateReconfiguring";
        /// Its configuration has changed.
        RECONFIGURED = 8, "XenbusStateReconfigured";
    }
}

abi_structs! {
    /// The console page.
    pub struct XenconsInterface("struct xencons_interface", 3088) {
        /// To the guest.
        input ["in"]: [u8; 1024] = 0,
        /// From the guest.
        output ["out"]: [u8; 2048] = 1024,
        in_cons: u32 = 3072,
        in_prod: u32 = 3076,
        out_cons: u32 = 3080,
        out_prod: u32 = 3084,
    }

    /// Head of a xenstore message.
    pub struct XsdSockmsg("struct xsd_sockmsg", 16) {
        /// `XS_*`.
        kind ["type"]: u32 = 0,
        req_id: u32 = 4,
        tx_id: u32 = 8,
        /// Bytes that follow.
        len: u32 = 12,
    }

    /// The xenstore page.
    pub struct XenstoreDomainInterface("struct xenstore_domain_interface", 2076) {
        /// From the guest.
        req: [u8; 1024] = 0,
        /// To the guest, watch events included.
        rsp: [u8; 1024] = 1024,
        req_cons: u32 = 2048,
        req_prod: u32 = 2052,
        rsp_cons: u32 = 2056,
        rsp_prod: u32 = 2060,
        server_features: u32 = 2064,
        connection: u32 = 2068,
        error: u32 = 2072,
    }

    /// Head of every split driver's ring; the entries follow, as many as fit, rounded down to a power
    /// of two.
    pub struct SringHeader("struct galvan_sring", 64) {
        req_prod: u32 = 0,
        req_event: u32 = 4,
        rsp_prod: u32 = 8,
        rsp_event: u32 = 12,
        _pad: [u8; 48],
    }
}

/// Bytes between a producer and a consumer index, or `None` if the peer made them inconsistent.
#[must_use]
pub const fn ring_used(prod: u32, cons: u32, size: u32) -> Option<u32> {
    let used = prod.wrapping_sub(cons);
    if used <= size { Some(used) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_indices_wrap_and_lies_are_found() {
        assert_eq!(ring_used(5, 5, 1024), Some(0));
        assert_eq!(ring_used(3, u32::MAX - 4, 1024), Some(8));
        assert_eq!(ring_used(1024, 0, 1024), Some(1024));
        assert_eq!(ring_used(0, 1, 1024), None);
        assert_eq!(ring_used(1025, 0, 1024), None);
    }
}
