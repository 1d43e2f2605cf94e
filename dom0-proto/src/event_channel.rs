//! `event_channel_op`: the arguments of each operation, and the FIFO ABI's shared structures.
//!
//! C: `event_channel.h`. The 2-level ABI lives in [`crate::xen::SharedInfo`].

use crate::DomId;

abi_consts! {
    u32 {
        /// [`EvtchnBindInterdomain`].
        EVTCHNOP_BIND_INTERDOMAIN = 0,
        /// [`EvtchnBindVirq`].
        EVTCHNOP_BIND_VIRQ = 1,
        /// [`EvtchnBindPirq`].
        EVTCHNOP_BIND_PIRQ = 2,
        /// [`EvtchnPort`].
        EVTCHNOP_CLOSE = 3,
        /// [`EvtchnPort`].
        EVTCHNOP_SEND = 4,
        /// [`EvtchnStatus`].
        EVTCHNOP_STATUS = 5,
        /// [`EvtchnAllocUnbound`].
        EVTCHNOP_ALLOC_UNBOUND = 6,
        /// [`EvtchnBindIpi`].
        EVTCHNOP_BIND_IPI = 7,
        /// [`EvtchnBindVcpu`].
        EVTCHNOP_BIND_VCPU = 8,
        /// [`EvtchnPort`].
        EVTCHNOP_UNMASK = 9,
        /// [`EvtchnReset`].
        EVTCHNOP_RESET = 10,
        /// [`EvtchnInitControl`].
        EVTCHNOP_INIT_CONTROL = 11,
        /// [`EvtchnExpandArray`].
        EVTCHNOP_EXPAND_ARRAY = 12,
        /// [`EvtchnSetPriority`].
        EVTCHNOP_SET_PRIORITY = 13,

        /// [`EvtchnBindPirq::flags`]: the pirq may be shared.
        BIND_PIRQ__WILL_SHARE = 1,

        /// Status: free.
        EVTCHNSTAT_CLOSED = 0,
        /// Status: waits for the remote side.
        EVTCHNSTAT_UNBOUND = 1,
        /// Status: connected.
        EVTCHNSTAT_INTERDOMAIN = 2,
        /// Status: a physical interrupt.
        EVTCHNSTAT_PIRQ = 3,
        /// Status: a virtual interrupt.
        EVTCHNSTAT_VIRQ = 4,
        /// Status: between vCPUs.
        EVTCHNSTAT_IPI = 5,

        /// Ports of the 2-level ABI for 64-bit guests.
        EVTCHN_2L_NR_CHANNELS = 4096,
        /// Highest priority.
        EVTCHN_FIFO_PRIORITY_MAX = 0,
        /// Priority of a new port.
        EVTCHN_FIFO_PRIORITY_DEFAULT = 7,
        /// Lowest priority.
        EVTCHN_FIFO_PRIORITY_MIN = 15,
        /// Queues per vCPU.
        EVTCHN_FIFO_MAX_QUEUES = 16,
        /// Bit of an event word: pending.
        EVTCHN_FIFO_PENDING = 31,
        /// Bit of an event word: masked.
        EVTCHN_FIFO_MASKED = 30,
        /// Bit of an event word: on a queue.
        EVTCHN_FIFO_LINKED = 29,
        /// Bit of an event word: the link is being changed.
        EVTCHN_FIFO_BUSY = 28,
        /// Width of the link field.
        EVTCHN_FIFO_LINK_BITS = 17,
        /// The link field.
        EVTCHN_FIFO_LINK_MASK = (1 << 17) - 1,
        /// Ports of the FIFO ABI.
        EVTCHN_FIFO_NR_CHANNELS = 1 << 17,

        /// Ports of the 2-level ABI for 32-bit guests.
        EVTCHN_2L_NR_CHANNELS_COMPAT = 1024,
        /// Event words in one page of the FIFO array.
        EVTCHN_FIFO_EVENT_WORDS_PER_PAGE = 1024,
        /// Pages of the FIFO array when full.
        EVTCHN_FIFO_MAX_EVENT_ARRAY_PAGES = EVTCHN_FIFO_NR_CHANNELS / EVTCHN_FIFO_EVENT_WORDS_PER_PAGE,
    }
}

abi_structs! {
    /// Arguments of [`EVTCHNOP_ALLOC_UNBOUND`].
    pub struct EvtchnAllocUnbound("struct evtchn_alloc_unbound", 8) {
        /// Whose port it will be.
        dom: DomId = 0,
        /// Who may bind to it.
        remote_dom: DomId = 2,
        /// Out.
        port: u32 = 4,
    }

    /// Arguments of [`EVTCHNOP_BIND_INTERDOMAIN`].
    pub struct EvtchnBindInterdomain("struct evtchn_bind_interdomain", 12) {
        remote_dom: DomId = 0,
        _pad: u16,
        remote_port: u32 = 4,
        /// Out.
        local_port: u32 = 8,
    }

    /// Arguments of [`EVTCHNOP_BIND_VIRQ`].
    pub struct EvtchnBindVirq("struct evtchn_bind_virq", 12) {
        /// `VIRQ_*`.
        virq: u32 = 0,
        vcpu: u32 = 4,
        /// Out.
        port: u32 = 8,
    }

    /// Arguments of [`EVTCHNOP_BIND_PIRQ`].
    pub struct EvtchnBindPirq("struct evtchn_bind_pirq", 12) {
        pirq: u32 = 0,
        /// [`BIND_PIRQ__WILL_SHARE`].
        flags: u32 = 4,
        /// Out.
        port: u32 = 8,
    }

    /// Arguments of [`EVTCHNOP_BIND_IPI`].
    pub struct EvtchnBindIpi("struct evtchn_bind_ipi", 8) {
        vcpu: u32 = 0,
        /// Out.
        port: u32 = 4,
    }

    /// Argument of [`EVTCHNOP_CLOSE`], [`EVTCHNOP_SEND`] and [`EVTCHNOP_UNMASK`].
    pub struct EvtchnPort("struct evtchn_close", 4) {
        port: u32 = 0,
    }

    /// Arguments of [`EVTCHNOP_STATUS`].
    pub struct EvtchnStatus("struct evtchn_status", 24) {
        /// In.
        dom: DomId = 0,
        _pad: u16,
        /// In.
        port: u32 = 4,
        /// Out: `EVTCHNSTAT_*`.
        status: u32 = 8,
        /// Out: the vCPU notified.
        vcpu: u32 = 12,
        /// Out: a union. The remote domain (unbound, interdomain) in the low 16 bits, the pirq, or
        /// the virq: see [`EvtchnStatus::set_remote`].
        u ["u.pirq"]: u32 = 16,
        /// Out: the remote port (interdomain).
        remote_port ["u.interdomain.port"]: u32 = 20,
    }

    /// Arguments of [`EVTCHNOP_BIND_VCPU`].
    pub struct EvtchnBindVcpu("struct evtchn_bind_vcpu", 8) {
        port: u32 = 0,
        vcpu: u32 = 4,
    }

    /// Argument of [`EVTCHNOP_RESET`].
    pub struct EvtchnReset("struct evtchn_reset", 2) {
        dom: DomId = 0,
    }

    /// Arguments of [`EVTCHNOP_INIT_CONTROL`].
    pub struct EvtchnInitControl("struct evtchn_init_control", 24) {
        /// Frame that holds the control block.
        control_gfn: u64 = 0,
        /// Its offset there, 8-byte aligned, not crossing the page.
        offset: u32 = 8,
        vcpu: u32 = 12,
        /// Out: width of the link field, [`EVTCHN_FIFO_LINK_BITS`].
        link_bits: u8 = 16,
        _pad: [u8; 7],
    }

    /// Argument of [`EVTCHNOP_EXPAND_ARRAY`].
    pub struct EvtchnExpandArray("struct evtchn_expand_array", 8) {
        array_gfn: u64 = 0,
    }

    /// Arguments of [`EVTCHNOP_SET_PRIORITY`].
    pub struct EvtchnSetPriority("struct evtchn_set_priority", 8) {
        port: u32 = 0,
        priority: u32 = 4,
    }

    /// What a vCPU shares with the hypervisor for its FIFO queues.
    pub struct EvtchnFifoControlBlock("struct evtchn_fifo_control_block", 72) {
        /// One bit per queue that may have events.
        ready: u32 = 0,
        _pad ["_rsvd"]: u32,
        /// The first event of each queue.
        head: [u32; 16] = 8,
    }
}

impl EvtchnStatus {
    /// Fills in the remote side; `port` is `None` while unbound.
    pub const fn set_remote(&mut self, dom: DomId, port: Option<u32>) {
        self.u = dom.0 as u32;
        if let Some(port) = port {
            self.remote_port = port;
        }
    }
}

/// An event word of the FIFO array, as a value; the shared copy is only touched atomically.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventWord(pub u32);

impl EventWord {
    /// Value of the pending bit.
    pub const PENDING: u32 = 1 << EVTCHN_FIFO_PENDING;
    /// Value of the masked bit.
    pub const MASKED: u32 = 1 << EVTCHN_FIFO_MASKED;
    /// Value of the linked bit.
    pub const LINKED: u32 = 1 << EVTCHN_FIFO_LINKED;
    /// Value of the busy bit.
    pub const BUSY: u32 = 1 << EVTCHN_FIFO_BUSY;

    /// The port this one links to; zero ends the queue.
    #[must_use]
    pub const fn link(self) -> u32 {
        self.0 & EVTCHN_FIFO_LINK_MASK
    }

    /// The same word with another link.
    #[must_use]
    pub const fn with_link(self, port: u32) -> Self {
        Self(self.0 & !EVTCHN_FIFO_LINK_MASK | port & EVTCHN_FIFO_LINK_MASK)
    }

    /// Whether all the given bits are set.
    #[must_use]
    pub const fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_leaves_the_state_bits_alone() {
        let w = EventWord(EventWord::PENDING | EventWord::LINKED | 5).with_link(0x1_ffff);
        assert_eq!(w.link(), 0x1_ffff);
        assert!(w.has(EventWord::PENDING | EventWord::LINKED));
        assert!(!w.has(EventWord::BUSY));
        assert_eq!(w.with_link(u32::MAX).0, w.0);
    }
}
