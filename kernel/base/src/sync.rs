//! Locks with ranks.
//!
//! A lock is taken only while no lock of the same or a higher rank is held by the same CPU; the one
//! list of ranks is [`rank`]. Debug builds and host tests check it at every acquisition. Exit
//! handling runs with interrupts disabled and interrupt handlers run only where no lock is held
//! (see [`crate::hw`]), so no lock disables interrupts.
//!
//! `cargo xtask shuttle` builds with `cfg(galvan_shuttle)`. Then locks and the atomics of [`atomic`]
//! are those of the crate `shuttle`, which tries the orders in which threads can get at them.

use core::fmt;
use core::ops::{Deref, DerefMut};

#[cfg(galvan_shuttle)]
use explored as spinning;
#[cfg(not(galvan_shuttle))]
use spin as spinning;
use spinning::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The atomics of what is shared between CPUs without a lock.
#[cfg(not(galvan_shuttle))]
pub use core::sync::atomic;
/// The atomics of what is shared between CPUs without a lock.
#[cfg(galvan_shuttle)]
pub use shuttle::sync::atomic;

/// The order in which locks are taken, outermost first, with the reason for each place.
pub mod rank {
    /// Domain creation and destruction: everything else happens inside it.
    pub const DOMCTL: u8 = 2;
    /// A vCPU's state, held by the CPU that runs it while its exits are handled.
    pub const VCPU: u8 = 5;
    /// The state of a vCPU of another, paused domain, taken by a control operation.
    pub const VCPU_OTHER: u8 = 6;
    /// A domain's lifecycle (pause counts, shutdown, dying): decided on, then others are told.
    pub const LIFE: u8 = 8;
    /// A domain's parameters, policy and other configuration.
    pub const CONFIG: u8 = 10;
    /// Virtual PCI: a configuration write reaches BAR mappings (p2m) and interrupts.
    pub const VPCI: u8 = 14;
    /// Virtual IO-APIC: a register write reaches host interrupts and local APICs.
    pub const VIOAPIC: u8 = 16;
    /// Bindings of the machine's interrupts.
    pub const IRQ: u8 = 18;
    /// Device-model servers.
    pub const IOREQ: u8 = 20;
    /// Grant tables; two are taken in the order of domain ids. A grant operation changes p2ms.
    pub const GNTTAB: u8 = 24;
    /// The second of two grant tables.
    pub const GNTTAB2: u8 = 25;
    /// Event channels; two are taken in the order of domain ids.
    pub const EVTCHN: u8 = 28;
    /// The second of two event-channel tables.
    pub const EVTCHN2: u8 = 29;
    /// The FIFO queues of a vCPU; those of two are taken in the order of their ids.
    pub const EVTCHN_QUEUE: u8 = 30;
    /// The second of two vCPUs' FIFO queues.
    pub const EVTCHN_QUEUE2: u8 = 31;
    /// A domain's p2m; two are taken in the order of domain ids.
    pub const P2M: u8 = 32;
    /// The second of two p2ms.
    pub const P2M2: u8 = 33;
    /// IOMMU tables: changed together with a p2m.
    pub const IOMMU: u8 = 36;
    /// The free-frame heap: needed by nearly everything.
    pub const FRAMES: u8 = 40;
    /// The table of domains: looked up from nearly everywhere, held for a few instructions.
    pub const DOMAINS: u8 = 44;
    /// A run queue: woken from nearly everywhere.
    pub const SCHED: u8 = 48;
    /// What is left of a capped domain's time: drawn on while a run queue is held.
    pub const SCHED_SHARE: u8 = 49;
    /// Timer queues.
    pub const TIMER: u8 = 50;
    /// Platform registers with an index or sequence (configuration space, CMOS, IO-APIC).
    pub const PLATFORM: u8 = 54;
    /// The hypervisor's own page tables.
    pub const PLATFORM_PAGING: u8 = 56;
    /// The hypervisor's heap.
    pub const HEAP: u8 = 58;
    /// The console ring: log lines come from everywhere.
    pub const CONSOLE: u8 = 60;
    /// The device behind the console.
    pub const CONSOLE_DEVICE: u8 = 61;
}

/// A step in a model, before which other threads may go on; elsewhere nothing. For fakes, whose memory is no
/// [`atomic`].
#[cfg(any(test, feature = "testing"))]
pub fn step() {
    // Not a yield, which says that this thread waits for another.
    #[cfg(galvan_shuttle)]
    atomic::AtomicBool::new(false).load(atomic::Ordering::SeqCst);
}

/// In a loop that waits for another CPU.
#[inline(always)]
pub fn relax() {
    #[cfg(galvan_shuttle)]
    shuttle::hint::spin_loop();
    #[cfg(not(galvan_shuttle))]
    core::hint::spin_loop();
}

#[cfg(galvan_shuttle)]
mod explored {
    //! The locks of shuttle with the interface of those of `spin`. It knows when all threads wait.

    use shuttle::sync;
    pub(super) use shuttle::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

    pub(super) struct Mutex<T>(sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(super) const fn new(v: T) -> Self {
            Self(sync::Mutex::new(v))
        }

        pub(super) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().expect("no holder panicked")
        }

        pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            self.0.try_lock().ok()
        }

        pub(super) fn get_mut(&mut self) -> &mut T {
            self.0.get_mut().expect("no holder panicked")
        }
    }

    pub(super) struct RwLock<T>(sync::RwLock<T>);

    impl<T> RwLock<T> {
        pub(super) const fn new(v: T) -> Self {
            Self(sync::RwLock::new(v))
        }

        pub(super) fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().expect("no holder panicked")
        }

        pub(super) fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write().expect("no holder panicked")
        }

        pub(super) fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
            self.0.try_read().ok()
        }

        pub(super) fn get_mut(&mut self) -> &mut T {
            self.0.get_mut().expect("no holder panicked")
        }
    }
}

#[cfg(any(test, feature = "testing"))]
mod check {
    //! Rank checking where threads stand for CPUs.
    use core::cell::Cell;
    #[cfg(galvan_shuttle)]
    use shuttle::thread_local;
    #[cfg(not(galvan_shuttle))]
    use std::thread_local;

    thread_local! { static HELD: Cell<u64> = const { Cell::new(0) }; }

    pub(super) fn acquire(rank: u8) {
        HELD.with(|h| {
            let held = h.get();
            assert!(
                held >> rank == 0,
                "lock of rank {rank} taken while holding ranks {held:#b}"
            );
            h.set(held | 1 << rank);
        });
    }

    pub(super) fn release(rank: u8) {
        HELD.with(|h| h.set(h.get() & !(1 << rank)));
    }
}

#[cfg(not(any(test, feature = "testing")))]
mod check {
    //! Outside host tests the ranks are not checked: the tests drive every path that locks.
    #[inline(always)]
    pub(super) fn acquire(_: u8) {}
    #[inline(always)]
    pub(super) fn release(_: u8) {}
}

/// A spin lock with a rank of [`rank`].
pub struct RankedLock<T, const RANK: u8>(Mutex<T>);

impl<T, const RANK: u8> RankedLock<T, RANK> {
    /// A new lock.
    pub const fn new(v: T) -> Self {
        Self(Mutex::new(v))
    }

    /// Spins until the lock is ours.
    #[inline]
    pub fn lock(&self) -> Guard<'_, T> {
        self.lock_as(RANK)
    }

    /// Takes the lock under another rank than its own: for the second of a pair of equals, whose
    /// order the caller has settled by domain id.
    #[inline]
    pub fn lock_as(&self, rank: u8) -> Guard<'_, T> {
        check::acquire(rank);
        Guard {
            inner: self.0.lock(),
            rank,
        }
    }

    /// Takes the lock if nobody has it.
    #[inline]
    pub fn try_lock(&self) -> Option<Guard<'_, T>> {
        let inner = self.0.try_lock()?;
        check::acquire(RANK);
        Some(Guard { inner, rank: RANK })
    }

    /// The value, without locking: there is no other user.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

impl<T: fmt::Debug, const RANK: u8> fmt::Debug for RankedLock<T, RANK> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.try_lock() {
            Some(g) => fmt::Debug::fmt(&*g, f),
            None => f.write_str("<locked>"),
        }
    }
}

/// A held [`RankedLock`].
#[derive(Debug)]
pub struct Guard<'a, T> {
    inner: MutexGuard<'a, T>,
    rank: u8,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Guard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T> Drop for Guard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        check::release(self.rank);
    }
}

/// A readers-writer spin lock with a rank of [`rank`].
pub struct RankedRwLock<T, const RANK: u8>(RwLock<T>);

impl<T, const RANK: u8> RankedRwLock<T, RANK> {
    /// A new lock.
    pub const fn new(v: T) -> Self {
        Self(RwLock::new(v))
    }

    /// Shared access.
    #[inline]
    pub fn read(&self) -> ReadGuard<'_, T> {
        self.read_as(RANK)
    }

    /// Shared access under another rank, for the second of a pair of equals.
    #[inline]
    pub fn read_as(&self, rank: u8) -> ReadGuard<'_, T> {
        check::acquire(rank);
        ReadGuard {
            inner: self.0.read(),
            rank,
        }
    }

    /// Exclusive access.
    #[inline]
    pub fn write(&self) -> WriteGuard<'_, T> {
        self.write_as(RANK)
    }

    /// Exclusive access under another rank, for the second of a pair of equals.
    #[inline]
    pub fn write_as(&self, rank: u8) -> WriteGuard<'_, T> {
        check::acquire(rank);
        WriteGuard {
            inner: self.0.write(),
            rank,
        }
    }

    /// The value, without locking: there is no other user.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

impl<T: fmt::Debug, const RANK: u8> fmt::Debug for RankedRwLock<T, RANK> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.try_read() {
            Some(g) => fmt::Debug::fmt(&*g, f),
            None => f.write_str("<locked>"),
        }
    }
}

/// Shared access to a [`RankedRwLock`].
#[derive(Debug)]
pub struct ReadGuard<'a, T> {
    inner: RwLockReadGuard<'a, T>,
    rank: u8,
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    fn drop(&mut self) {
        check::release(self.rank);
    }
}

/// Exclusive access to a [`RankedRwLock`].
#[derive(Debug)]
pub struct WriteGuard<'a, T> {
    inner: RwLockWriteGuard<'a, T>,
    rank: u8,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        check::release(self.rank);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "rank 32")]
    fn taking_a_lower_rank_inside_a_higher_one_is_caught() {
        let frames = RankedLock::<(), { rank::FRAMES }>::new(());
        let p2m = RankedRwLock::<(), { rank::P2M }>::new(());
        let _f = frames.lock();
        let _p = p2m.write();
    }

    #[test]
    fn ranks_may_be_taken_again_after_release() {
        let a = RankedLock::<u32, { rank::EVTCHN }>::new(1);
        let b = RankedLock::<u32, { rank::EVTCHN }>::new(2);
        {
            let x = a.lock();
            let y = b.lock_as(rank::EVTCHN2);
            assert_eq!(*x + *y, 3);
        }
        assert_eq!(*b.lock(), 2);
    }
}
