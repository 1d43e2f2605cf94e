//! `sched_op`: yielding, waiting for events, shutting down, watchdogs.
//!
//! C: `sched.h`.

use crate::{DomId, GuestHandle};

abi_consts! {
    u32 {
        /// Give up the CPU; no argument.
        SCHEDOP_YIELD = 0,
        /// Wait for an event with upcalls enabled; no argument.
        SCHEDOP_BLOCK = 1,
        /// [`SchedShutdown`].
        SCHEDOP_SHUTDOWN = 2,
        /// [`SchedPoll`].
        SCHEDOP_POLL = 3,
        /// [`SchedRemoteShutdown`].
        SCHEDOP_REMOTE_SHUTDOWN = 4,
        /// [`SchedShutdown`]: note the reason, do not shut down yet.
        SCHEDOP_SHUTDOWN_CODE = 5,
        /// [`SchedWatchdog`].
        SCHEDOP_WATCHDOG = 6,
        /// [`SchedPinOverride`].
        SCHEDOP_PIN_OVERRIDE = 7,

        /// Reason: powered off.
        SHUTDOWN_POWEROFF = 0,
        /// Reason: wants a restart.
        SHUTDOWN_REBOOT = 1,
        /// Reason: stopped to be saved.
        SHUTDOWN_SUSPEND = 2,
        /// Reason: crashed.
        SHUTDOWN_CRASH = 3,
        /// Reason: its watchdog fired.
        SHUTDOWN_WATCHDOG = 4,
        /// Reason: wants its state reset with memory kept (kexec).
        SHUTDOWN_SOFT_RESET = 5,
        /// The highest reason.
        SHUTDOWN_MAX = 5,

        /// The shutdown code of a domain that is not shut down, as reported by `getdomaininfo`.
        SHUTDOWN_CODE_INVALID = 0xff,
    }
}

abi_structs! {
    /// Argument of [`SCHEDOP_SHUTDOWN`].
    pub struct SchedShutdown("struct sched_shutdown", 4) {
        /// `SHUTDOWN_*`.
        reason: u32 = 0,
    }

    /// Arguments of [`SCHEDOP_POLL`].
    pub struct SchedPoll("struct sched_poll", 24) {
        ports: GuestHandle<u32> = 0,
        nr_ports: u32 = 8,
        _pad: u32,
        /// Absolute system time in ns; 0 is never.
        timeout: u64 = 16,
    }

    /// Arguments of [`SCHEDOP_REMOTE_SHUTDOWN`].
    pub struct SchedRemoteShutdown("struct sched_remote_shutdown", 8) {
        domain_id: DomId = 0,
        _pad: u16,
        /// `SHUTDOWN_*`.
        reason: u32 = 4,
    }

    /// Arguments of [`SCHEDOP_WATCHDOG`].
    pub struct SchedWatchdog("struct sched_watchdog", 8) {
        /// 0 asks for a new one.
        id: u32 = 0,
        /// Seconds; 0 stops it.
        timeout: u32 = 4,
    }

    /// Argument of [`SCHEDOP_PIN_OVERRIDE`].
    pub struct SchedPinOverride("struct sched_pin_override", 4) {
        /// Negative ends the override.
        pcpu: i32 = 0,
    }
}
