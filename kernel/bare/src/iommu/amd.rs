//! AMD IOMMUs: registers, device tables, command buffers and event logs.
//!
//! Each unit has a device table of its own, a page of commands, a page of events, and 8 bytes in
//! which it says how far it has come. Commands are always waited for: a batch ends with a
//! COMPLETION_WAIT, so that the command buffer is empty between batches.
//! (AMD IOMMU specification, "Registers", "Commands", "Event Logging", "Initialization".)

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use galvan_base::hw::{Exhausted, HostMem, Sbdf};
use galvan_base::sync::{RankedLock, rank};
use galvan_base::{Mfn, Mpa, PAGE_SIZE};
use galvan_boot::info::PhysRange;
use galvan_ept::TableAlloc;
use galvan_kernel::iommu::amd::{AmdHw, AmdVi};
use galvan_kernel::iommu::amd_format::{
    Capability, Command, DTE_SIZE, Dte, Event, Features, RING_ENTRIES, RING_ENTRY, RING_LENGTH,
    control, control_value, device_table, reg, status,
};
use galvan_kernel::iommu::ivrs::{Ivrs, Unit as Description};
use galvan_kernel::iommu::requester::find_bridges;
use galvan_kernel::mm::Owner;

use crate::platform::MACHINE;

/// Commands take microseconds; a unit that takes longer than this is broken.
const PATIENCE_NS: u64 = 2_000_000_000;
/// Events that are written out each time the logs are looked at.
const REPORTS: u32 = 8;
/// Ring offsets in the head and tail registers.
const RING_MASK: u64 = (RING_ENTRIES * RING_ENTRY - 1) as u64;

/// Zeroed pages that the hardware reads or writes, too; kept for ever.
fn shared_pages(pages: usize) -> (Mpa, &'static [AtomicU64]) {
    let at = crate::bootmem::alloc(pages);
    // SAFETY: fresh zeroed pages that are never given back, mapped by the direct map; the other users
    // are devices, to whom an atomic makes no promise.
    let words = unsafe {
        core::slice::from_raw_parts(
            crate::paging::direct_ptr(at).cast::<AtomicU64>(),
            pages * PAGE_SIZE / 8,
        )
    };
    (at, words)
}

/// The register window of a unit.
struct Registers(*mut u8);

// SAFETY: device memory that stays mapped; each access is one volatile read or write of 8 bytes, and
// registers that are changed in several steps are changed under a lock.
unsafe impl Send for Registers {}
// SAFETY: as above.
unsafe impl Sync for Registers {}

impl Registers {
    fn read(&self, at: usize) -> u64 {
        // SAFETY: `at` is of `reg`, inside the window mapped by `Unit::new`.
        unsafe { self.0.add(at).cast::<u64>().read_volatile() }
    }

    fn write(&self, at: usize, v: u64) {
        // SAFETY: as in `read`.
        unsafe { self.0.add(at).cast::<u64>().write_volatile(v) }
    }

    /// Waits for status bits to be clear; false if they do not become so.
    fn wait_clear(&self, bits: u64) -> bool {
        let start = crate::clock::now_ns();
        while self.read(reg::STATUS) & bits != 0 {
            if crate::clock::now_ns() - start > PATIENCE_NS {
                return false;
            }
            core::hint::spin_loop();
        }
        true
    }

    /// Stops the unit, whatever firmware was doing with it: accesses pass untranslated.
    fn stop(&self) {
        let was = self.read(reg::CONTROL);
        // The rings first, as the specification demands, with translation as it was.
        self.write(reg::CONTROL, was & control::ENABLE);
        self.wait_clear(status::EVENT_LOG_RUNS | status::COMMANDS_RUN);
        self.write(reg::CONTROL, 0);
    }
}

/// The writing end of a command buffer.
struct Commands {
    ring: &'static [AtomicU64],
    tail: usize,
    /// What the last completion wait has stored.
    sequence: u64,
}

impl Commands {
    /// Writes a command into the ring.
    #[inline]
    fn put(&mut self, Command([first, second]): Command) {
        if let Some([a, b]) = self.ring.get(self.tail * 2..self.tail * 2 + 2) {
            a.store(first, Ordering::Relaxed);
            b.store(second, Ordering::Relaxed);
        }
        self.tail = (self.tail + 1) % RING_ENTRIES;
    }
}

/// The reading end of an event log.
struct Events {
    ring: &'static [AtomicU64],
    head: u64,
}

/// One IOMMU.
struct Unit {
    dev: Sbdf,
    window: (Mpa, u64),
    regs: Registers,
    features: Features,
    caches_absent: bool,
    table: &'static [AtomicU64],
    /// Where completion waits store, and the address of that.
    done: &'static AtomicU64,
    done_at: Mpa,
    commands: RankedLock<Commands, { rank::PLATFORM }>,
    events: RankedLock<Events, { rank::PLATFORM }>,
}

/// All IOMMUs of the machine.
pub struct Units(Vec<Unit>);

impl Unit {
    /// Takes a unit over from firmware, with everything blocked; it does not translate yet.
    fn new(d: &Description) -> Result<Unit, &'static str> {
        let capability = Capability(crate::pci::read(d.dev, d.capability, 4));
        if !capability.is_iommu() {
            log::warn!("AMD-Vi {}: no capability in configuration space", d.dev);
        } else {
            // The register window is where the capability says, if it is enabled at all.
            let low = crate::pci::read(d.dev, d.capability + 4, 4);
            if low & 1 == 0 {
                let base = d.base.get();
                crate::pci::write(d.dev, d.capability + 8, 4, (base >> 32) as u32);
                crate::pci::write(d.dev, d.capability + 4, 4, base as u32 | 1);
            }
        }
        let regs = Registers(crate::paging::map_device(
            d.base,
            Features::default().window(),
        ));
        if regs.read(reg::CONTROL) == u64::MAX {
            return Err("its registers do not answer");
        }
        let has_features = capability.is_iommu() && capability.has_features();
        let features = Features(if has_features {
            regs.read(reg::FEATURES)
        } else {
            0
        });
        let was_on = regs.read(reg::CONTROL) & control::ENABLE != 0;
        regs.stop();

        let entries = (usize::from(d.last_device()) | 0xff) + 1;
        let pages = (entries * DTE_SIZE).div_ceil(PAGE_SIZE);
        let (table_at, table) = shared_pages(pages);
        for (id, entry) in (0..).zip(table.chunks_exact(DTE_SIZE / 8)) {
            for (word, v) in entry.iter().zip(Dte::blocked(d.settings(id)).0) {
                word.store(v, Ordering::Relaxed);
            }
        }
        let (commands_at, commands) = shared_pages(1);
        let (events_at, events) = shared_pages(1);
        let (done_at, done) = shared_pages(1);
        regs.write(reg::EXCLUSION_BASE, 0);
        regs.write(reg::EXCLUSION_LIMIT, 0);
        regs.write(reg::DEVICE_TABLE, device_table(table_at, pages));
        regs.write(reg::COMMAND_BASE, commands_at.get() | RING_LENGTH);
        regs.write(reg::EVENT_BASE, events_at.get() | RING_LENGTH);
        for at in [
            reg::COMMAND_HEAD,
            reg::COMMAND_TAIL,
            reg::EVENT_HEAD,
            reg::EVENT_TAIL,
        ] {
            regs.write(at, 0);
        }
        regs.write(reg::STATUS, status::CLEAR);
        log::info!(
            "AMD-Vi {} at {}{}: features {features:?}; {} devices{}",
            d.dev,
            d.base,
            if was_on { ", firmware had it on" } else { "" },
            entries,
            if capability.caches_absent() {
                "; caches what is not present"
            } else {
                ""
            },
        );
        Ok(Unit {
            dev: d.dev,
            window: (d.base, features.window() as u64),
            regs,
            features,
            caches_absent: !capability.is_iommu() || capability.caches_absent(),
            table,
            done: &done[0],
            done_at,
            commands: RankedLock::new(Commands {
                ring: commands,
                tail: 0,
                sequence: 0,
            }),
            events: RankedLock::new(Events {
                ring: events,
                head: 0,
            }),
        })
    }

    /// Has it translate, and forget everything it may remember. False if it does not answer.
    fn start(&self, flags: u8) -> bool {
        self.regs.write(reg::CONTROL, control_value(flags));
        if self.features.invalidate_all() {
            return self.run(&[Command::invalidate_all()]);
        }
        let ids = self.table.len() / (DTE_SIZE / 8);
        let mut all: Vec<Command> = Vec::with_capacity(RING_ENTRIES);
        let devices = (0..=u16::MAX).take(ids);
        let of_devices = devices.flat_map(|id| {
            [
                Command::invalidate_device(id),
                Command::invalidate_interrupts(id),
            ]
        });
        for c in of_devices.chain((0..=u16::MAX).map(Command::invalidate_domain)) {
            all.push(c);
            if all.len() == RING_ENTRIES - 2 {
                if !self.run(&all) {
                    return false;
                }
                all.clear();
            }
        }
        self.run(&all)
    }

    /// Executes commands; false if they are not done after [`PATIENCE_NS`].
    fn run(&self, commands: &[Command]) -> bool {
        let mut c = self.commands.lock();
        let c = &mut *c;
        // One entry always stays free, by which a full ring is told from an empty one.
        for batch in commands.chunks(RING_ENTRIES - 2) {
            c.sequence += 1;
            for command in batch {
                c.put(*command);
            }
            c.put(Command::completion_wait(self.done_at, c.sequence));
            // The uncached write comes after all those before it.
            core::sync::atomic::fence(Ordering::SeqCst);
            self.regs
                .write(reg::COMMAND_TAIL, (c.tail * RING_ENTRY) as u64);
            if self.done.load(Ordering::Acquire) == c.sequence {
                continue;
            }
            let start = crate::clock::now_ns();
            while self.done.load(Ordering::Acquire) != c.sequence {
                if crate::clock::now_ns() - start > PATIENCE_NS {
                    return false;
                }
                core::hint::spin_loop();
            }
        }
        true
    }

    /// Empties the event log into Galvan's, and starts it again if it was full.
    fn report_events(&self) {
        let Some(mut e) = self.events.try_lock() else {
            return;
        };
        let e = &mut *e;
        let tail = self.regs.read(reg::EVENT_TAIL) & RING_MASK;
        let overflow = self.regs.read(reg::STATUS) & status::EVENT_OVERFLOW != 0;
        let mut seen = 0;
        while e.head != tail {
            let at = (e.head / 8) as usize;
            let (Some(first), Some(second)) = (e.ring.get(at), e.ring.get(at + 1)) else {
                break;
            };
            let mut event = Event([
                first.load(Ordering::Acquire),
                second.load(Ordering::Acquire),
            ]);
            // The pointer may be ahead of the entry.
            for _ in 0..1000 {
                if event.code() != 0 {
                    break;
                }
                core::hint::spin_loop();
                event = Event([
                    first.load(Ordering::Acquire),
                    second.load(Ordering::Acquire),
                ]);
            }
            if seen < REPORTS {
                log::warn!("AMD-Vi {}: {event}", self.dev);
            }
            seen += 1;
            first.store(0, Ordering::Relaxed);
            second.store(0, Ordering::Relaxed);
            e.head = (e.head + RING_ENTRY as u64) & RING_MASK;
        }
        if seen > 0 {
            self.regs.write(reg::EVENT_HEAD, e.head);
        }
        if seen > REPORTS || overflow {
            let more = if overflow { " and more" } else { "" };
            log::warn!(
                "AMD-Vi {}: {} events{more} not shown",
                self.dev,
                seen.saturating_sub(REPORTS)
            );
        }
        if overflow {
            let on = self.regs.read(reg::CONTROL);
            self.regs.write(reg::CONTROL, on & !control::EVENT_LOG);
            self.regs.wait_clear(status::EVENT_LOG_RUNS);
            self.regs.write(
                reg::STATUS,
                status::EVENT_OVERFLOW | status::EVENT_INTERRUPT,
            );
            self.regs.write(reg::CONTROL, on | control::EVENT_LOG);
        }
    }
}

impl Units {
    /// The functions and the register windows.
    pub fn private(&self) -> (Vec<Sbdf>, Vec<(Mpa, u64)>) {
        self.0.iter().map(|u| (u.dev, u.window)).unzip()
    }

    /// Reports what the units have logged.
    pub fn report_events(&self) {
        for u in &self.0 {
            u.report_events();
        }
    }
}

impl TableAlloc for Units {
    fn mem(&self) -> &dyn HostMem {
        &MACHINE
    }
    fn alloc(&self) -> Result<Mfn, Exhausted> {
        let hv = crate::platform::hypervisor().ok_or(Exhausted)?;
        hv.frames.alloc_zeroed(Owner::Galvan)
    }
    fn free(&self, m: Mfn) {
        let hv = crate::platform::hypervisor();
        if hv.is_none_or(|hv| hv.frames.release(m, 1, Owner::Galvan).is_err()) {
            log::error!("an I/O page table page at {m:?} was not Galvan's");
        }
    }
}

impl AmdHw for Units {
    fn caches_absent(&self, unit: usize) -> bool {
        self.0.get(unit).is_none_or(|u| u.caches_absent)
    }

    fn has_entry(&self, unit: usize, id: u16) -> bool {
        self.0
            .get(unit)
            .is_some_and(|u| usize::from(id) < u.table.len() / (DTE_SIZE / 8))
    }

    fn write_entry(&self, unit: usize, id: u16, part: usize, v: u64) {
        let word = self
            .0
            .get(unit)
            .and_then(|u| u.table.get(usize::from(id) * (DTE_SIZE / 8) + part));
        if let Some(w) = word {
            w.store(v, Ordering::SeqCst);
        }
    }

    fn execute(&self, unit: usize, commands: &[Command]) {
        let Some(u) = self.0.get(unit) else { return };
        if !u.run(commands) {
            u.report_events();
            // Frames that are about to be given to somebody else may still be written by devices.
            panic!("AMD-Vi {}: no answer to {commands:?}", u.dev);
        }
    }
}

/// Takes all IOMMUs of the machine over and starts them.
pub fn start(table: &[u8]) -> Result<AmdVi<Units>, &'static str> {
    let mut topology = Ivrs::parse(table).map_err(|e| {
        log::error!("{e}");
        "firmware's description of it is of no use"
    })?;
    // What devices always reach must not be anybody's.
    topology.unity.retain(|u| {
        let range = PhysRange::new(u.start, u.end - u.start);
        let given = crate::start::memory_map()
            .iter()
            .any(|r| (r.kind.is_reclaimable() || r.kind == galvan_boot::info::MemoryKind::HYPERVISOR_IMAGE)
                && PhysRange::new(r.start, r.end() - r.start).overlaps(&range));
        if given {
            log::error!(
                "devices {:#x}-{:#x} want memory {:#x}-{:#x}, which is not reserved for them: refused",
                u.first,
                u.last,
                u.start,
                u.end
            );
        } else {
            log::info!("devices {:#x}-{:#x} always reach memory {:#x}-{:#x}", u.first, u.last, u.start, u.end);
        }
        !given
    });
    let mut units: Vec<Unit> = Vec::new();
    for d in &topology.units {
        let unit = Unit::new(d).and_then(|u| {
            let answers = u.start(d.flags);
            answers.then_some(u).ok_or("it does not execute commands")
        });
        match unit {
            Ok(u) => units.push(u),
            Err(e) => {
                log::error!("AMD-Vi {}: {e}", d.dev);
                stop_all(&topology);
                return Err("it does not work");
            }
        }
    }
    let read = |dev, reg, size| crate::pci::read(dev, reg, size);
    let mut bridges = Vec::new();
    let windows = crate::pci::windows();
    for w in windows {
        bridges.extend(find_bridges(w.segment, w.first_bus..=w.last_bus, &read));
    }
    if windows.is_empty() {
        bridges.extend(find_bridges(0, 0..=255, &read));
    }
    Ok(AmdVi::new(Units(units), topology, bridges))
}

/// Switches off what firmware has left on of the IOMMUs in its table, for a machine that is to run
/// without.
pub fn leave_off(table: &[u8]) {
    if let Ok(topology) = Ivrs::parse(table) {
        stop_all(&topology);
    }
}

fn stop_all(topology: &Ivrs) {
    for d in &topology.units {
        let regs = Registers(crate::paging::map_device(
            d.base,
            Features::default().window(),
        ));
        let was = regs.read(reg::CONTROL);
        if was != u64::MAX && was & control::ENABLE != 0 {
            regs.stop();
        }
    }
}
