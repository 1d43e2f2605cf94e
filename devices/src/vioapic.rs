//! Virtual IO-APIC: turns the state of interrupt pins into interrupts for local APICs.
//!
//! (Intel 82093AA datasheet "I/O Advanced Programmable Interrupt Controller"; Intel ICH datasheets
//! "EOIR - EOI Register" for versions from 0x20.)
//!
//! Owned by a domain, under its lock. Every call that can cause something takes a sink, called with
//! each [`Effect`] in the order in which they are due.
//!
//! Pins are given as asserted or not; polarity is only a matter for the physical pin, and reported
//! in [`Effect::RteChanged`]. How edges and levels behave:
//!
//! - An edge on a masked pin is lost: it is "not delivered or held pending" (82093AA, interrupt
//!   mask bit).
//! - A level interrupt is delivered when the pin is asserted, unmasked and remote IRR is clear,
//!   whichever of the three comes last; it sets remote IRR until the EOI.
//! - Changing an entry to edge-triggered clears remote IRR. Guests rely on it to end an interrupt
//!   whose EOI broadcast will not match, where there is no EOI register.
//!
//! A pin that is bound to one of the machine's level interrupts is [`Vioapic::set_host_driven`]:
//! the machine's pin stays masked from its interrupt until [`Effect::Eoi`], so the virtual line is
//! a latch. The kernel asserts it when the interrupt arrives and never lowers it; the EOI does, and
//! if the device still asserts its pin the next host interrupt follows. While such an entry is
//! edge-triggered the kernel calls [`Vioapic::pulse`] instead; so it may declare all pins of an
//! IO-APIC host-driven from the start, if all of them are.

#[cfg(test)]
mod tests;

use alloc::boxed::Box;

use crate::interrupt::{DeliveryMode, Destination, Interrupt};

/// The most pins that the 8-bit register index can address.
pub const MAX_PINS: u32 = 120;
/// Length in bytes of the register window.
pub const MMIO_LEN: u64 = 0x1000;
/// Version of the 82093AA, without EOI register.
pub const VERSION_82093AA: u8 = 0x11;
/// The first version with an EOI register.
pub const VERSION_EOI: u8 = 0x20;

/// What follows from an access or a change of a pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send this interrupt.
    Deliver {
        /// The pin it comes from.
        pin: u32,
        /// The interrupt.
        interrupt: Interrupt,
    },
    /// Mask, trigger mode or polarity of an entry changed: bind the machine's interrupt at the
    /// first unmask, program it again when the rest changes.
    RteChanged {
        /// Which entry.
        pin: u32,
        /// It was masked.
        was_masked: bool,
        /// It is masked.
        now_masked: bool,
        /// It is level-triggered.
        level: bool,
        /// It is active low.
        active_low: bool,
    },
    /// A level interrupt ended: remote IRR of the pin was cleared, by an EOI or by a change of the
    /// trigger mode.
    Eoi {
        /// Which pin.
        pin: u32,
    },
}

/// One IO-APIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vioapic {
    rtes: Box<[u64]>,
    /// Pins that are asserted.
    lines: u128,
    /// Entries with remote IRR set, for the search at an EOI; the same as their bit 14.
    in_service: u128,
    /// See the module.
    host_driven: u128,
    gsi_base: u32,
    id: u8,
    version: u8,
    index: u8,
}

impl Vioapic {
    /// An IO-APIC after reset: all entries masked. `pins` is clamped to 1..=[`MAX_PINS`].
    pub fn new(id: u8, version: u8, gsi_base: u32, pins: u32) -> Self {
        let pins = pins.clamp(1, MAX_PINS) as usize;
        Self {
            rtes: alloc::vec![RTE_MASKED; pins].into_boxed_slice(),
            lines: 0,
            in_service: 0,
            host_driven: 0,
            gsi_base,
            id,
            version,
            index: 0,
        }
    }

    /// The first global system interrupt it serves.
    pub fn gsi_base(&self) -> u32 {
        self.gsi_base
    }

    /// Number of pins.
    pub fn pins(&self) -> u32 {
        self.rtes.len() as u32
    }

    /// The pin of a global system interrupt, if it is one of this IO-APIC's.
    pub fn pin_of_gsi(&self, gsi: u32) -> Option<u32> {
        gsi.checked_sub(self.gsi_base).filter(|&p| p < self.pins())
    }

    /// Declares that the pin is bound to a level interrupt of the machine, or no longer. See the
    /// module.
    pub fn set_host_driven(&mut self, pin: u32, host_driven: bool) {
        if pin < self.pins() {
            set_bit(&mut self.host_driven, pin, host_driven);
        }
    }

    /// Asserts or deasserts a pin. For an edge-triggered entry the rising edge is what counts.
    pub fn set_line(&mut self, pin: u32, asserted: bool, mut sink: impl FnMut(Effect)) {
        let Some(&rte) = self.rtes.get(pin as usize) else {
            return;
        };
        let rises = asserted && self.lines & bit(pin) == 0;
        set_bit(&mut self.lines, pin, asserted);
        if is_level(rte) {
            self.evaluate(pin, &mut sink);
        } else if rises && rte & RTE_MASKED == 0 {
            deliver(pin, rte, &mut sink);
        }
    }

    /// A pin is asserted and deasserted at once. Whether that caused an interrupt: not if it is
    /// masked, or level-triggered and still in service. The line's own state is not touched.
    pub fn pulse(&mut self, pin: u32, mut sink: impl FnMut(Effect)) -> bool {
        let Some(rte) = self.rtes.get_mut(pin as usize) else {
            return false;
        };
        if *rte & (RTE_MASKED | RTE_REMOTE_IRR) != 0 {
            return false;
        }
        if is_level(*rte) {
            *rte |= RTE_REMOTE_IRR;
            self.in_service |= bit(pin);
        }
        deliver(pin, *rte, &mut sink)
    }

    /// A local APIC ended the level-triggered interrupt `vector`: clears remote IRR of all entries
    /// with it. One whose pin is still asserted is delivered again.
    #[inline]
    pub fn eoi_broadcast(&mut self, vector: u8, mut sink: impl FnMut(Effect)) {
        let mut left = self.in_service;
        while left != 0 {
            let pin = left.trailing_zeros();
            left &= left - 1;
            if let Some(rte) = self.rtes.get_mut(pin as usize)
                && *rte as u8 == vector
            {
                *rte &= !RTE_REMOTE_IRR;
                self.ended(pin, &mut sink);
                self.evaluate(pin, &mut sink);
            }
        }
    }

    /// Reads `len` bytes at `offset` of the window. Registers are 32 bits wide; all else reads 0.
    pub fn mmio_read(&self, offset: u32, len: u8) -> u32 {
        let value = match offset {
            INDEX => u32::from(self.index),
            WINDOW => self.read(self.index),
            _ => 0,
        };
        match len {
            0..=3 => value & ((1 << (len * 8)) - 1),
            _ => value,
        }
    }

    /// Writes `len` bytes at `offset` of the window. The index and EOI registers take any width,
    /// for only their low byte counts; the data window takes 32 bits. All else is dropped.
    pub fn mmio_write(&mut self, offset: u32, len: u8, value: u32, mut sink: impl FnMut(Effect)) {
        match offset {
            INDEX => self.index = value as u8,
            WINDOW if len >= 4 => match self.index {
                0 => self.id = (value >> 24) as u8,
                i => {
                    if let Some(n) = i.checked_sub(FIRST_RTE) {
                        self.write_rte(u32::from(n / 2), n % 2 != 0, value, &mut sink);
                    }
                }
            },
            EOI if self.version >= VERSION_EOI => self.eoi_broadcast(value as u8, sink),
            _ => {}
        }
    }

    fn read(&self, index: u8) -> u32 {
        match index {
            // The arbitration id follows the id.
            0 | 2 => u32::from(self.id) << 24,
            1 => u32::from(self.version) | (self.pins() - 1) << 16,
            i => i
                .checked_sub(FIRST_RTE)
                .and_then(|n| Some((n, self.rtes.get(usize::from(n / 2))?)))
                .map_or(0, |(n, rte)| (rte >> (u32::from(n % 2) * 32)) as u32),
        }
    }

    fn write_rte(&mut self, pin: u32, high: bool, value: u32, sink: &mut impl FnMut(Effect)) {
        let Some(rte) = self.rtes.get_mut(pin as usize) else {
            return;
        };
        let old = *rte;
        let written = if high {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & !0xffff_ffff | u64::from(value)
        };
        let mut new = written & RTE_WRITABLE | old & RTE_REMOTE_IRR;
        if !is_level(new) {
            new &= !RTE_REMOTE_IRR;
        }
        *rte = new;
        if (old ^ new) & (RTE_MASKED | RTE_LEVEL | RTE_ACTIVE_LOW) != 0 {
            sink(Effect::RteChanged {
                pin,
                was_masked: old & RTE_MASKED != 0,
                now_masked: new & RTE_MASKED != 0,
                level: new & RTE_LEVEL != 0,
                active_low: new & RTE_ACTIVE_LOW != 0,
            });
        }
        if old & !new & RTE_REMOTE_IRR != 0 {
            self.ended(pin, sink);
        }
        self.evaluate(pin, sink);
    }

    /// Remote IRR of the pin has been cleared.
    fn ended(&mut self, pin: u32, sink: &mut impl FnMut(Effect)) {
        self.in_service &= !bit(pin);
        self.lines &= !(bit(pin) & self.host_driven);
        sink(Effect::Eoi { pin });
    }

    /// Delivers a level interrupt if it is due.
    fn evaluate(&mut self, pin: u32, sink: &mut impl FnMut(Effect)) {
        let Some(rte) = self.rtes.get_mut(pin as usize) else {
            return;
        };
        if is_level(*rte) && *rte & (RTE_MASKED | RTE_REMOTE_IRR) == 0 && self.lines & bit(pin) != 0
        {
            *rte |= RTE_REMOTE_IRR;
            self.in_service |= bit(pin);
            deliver(pin, *rte, sink);
        }
    }
}

/// The public save record IOAPIC, `struct hvm_hw_vioapic` for any number of pins. (The record's
/// own number is 48; it does not hold the state of the lines.)
impl Vioapic {
    /// Length in bytes of the record.
    pub fn record_len(&self) -> usize {
        RECORD_HEAD + self.rtes.len() * 8
    }

    /// Writes the record to the first [`Self::record_len`] bytes of `buf`; false if it is too
    /// short. `base` is the window's guest physical address.
    pub fn save(&self, base: u64, buf: &mut [u8]) -> bool {
        let Some(buf) = buf.get_mut(..self.record_len()) else {
            return false;
        };
        let head = u64::from(self.index) | u64::from(self.id) << 32;
        let words = [base, head].into_iter().chain(self.rtes.iter().copied());
        for (to, w) in buf.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&w.to_le_bytes());
        }
        true
    }

    /// Replaces registers by those of a record, and gives the window's guest physical address.
    /// `None`, with nothing changed, if the record is of another length or has bits set that no
    /// register has. Lines and bindings stay; nothing is delivered.
    pub fn load(&mut self, record: &[u8]) -> Option<u64> {
        if record.len() != self.record_len() {
            return None;
        }
        let words = || {
            record
                .chunks_exact(8)
                .filter_map(|c| c.first_chunk().map(|c| u64::from_le_bytes(*c)))
        };
        let base = words().next()?;
        let head = words().nth(1)?;
        let valid = |rte: u64| {
            rte & !(RTE_WRITABLE | RTE_REMOTE_IRR | RTE_STATUS) == 0
                && (rte & RTE_REMOTE_IRR == 0 || is_level(rte))
        };
        let index = u8::try_from(head as u32).ok()?;
        let id = u8::try_from(head >> 32).ok()?;
        if !words().skip(2).all(valid) {
            return None;
        }
        self.index = index;
        self.id = id;
        self.in_service = 0;
        for (pin, (to, w)) in self.rtes.iter_mut().zip(words().skip(2)).enumerate() {
            *to = w & !RTE_STATUS;
            set_bit(&mut self.in_service, pin as u32, w & RTE_REMOTE_IRR != 0);
        }
        Some(base)
    }
}

/// Whether remote IRR governs the entry: the trigger mode says level and the delivery mode has a
/// vector; the others are always edge-triggered.
fn is_level(rte: u64) -> bool {
    rte & RTE_LEVEL != 0 && rte >> 8 & 7 <= DeliveryMode::LowestPriority as u64
}

/// Hands out the interrupt of an entry; false if its delivery mode is none that a pin can have.
fn deliver(pin: u32, rte: u64, sink: &mut impl FnMut(Effect)) -> bool {
    let mode = match DeliveryMode::decode((rte >> 8) as u32) {
        None | Some(DeliveryMode::Startup) => return false,
        Some(m) => m,
    };
    sink(Effect::Deliver {
        pin,
        interrupt: Interrupt {
            vector: rte as u8,
            mode,
            dest: Destination::from_message(
                (rte >> 56) as u8,
                (rte >> 49) as u8,
                rte & RTE_LOGICAL != 0,
            ),
            level: is_level(rte),
        },
    });
    true
}

fn bit(pin: u32) -> u128 {
    1u128.checked_shl(pin).unwrap_or(0)
}

fn set_bit(set: &mut u128, pin: u32, on: bool) {
    if on {
        *set |= bit(pin);
    } else {
        *set &= !bit(pin);
    }
}

const INDEX: u32 = 0x00;
const WINDOW: u32 = 0x10;
const EOI: u32 = 0x40;
const FIRST_RTE: u8 = 0x10;
const RECORD_HEAD: usize = 16;

const RTE_LOGICAL: u64 = 1 << 11;
const RTE_STATUS: u64 = 1 << 12;
const RTE_ACTIVE_LOW: u64 = 1 << 13;
const RTE_REMOTE_IRR: u64 = 1 << 14;
const RTE_LEVEL: u64 = 1 << 15;
const RTE_MASKED: u64 = 1 << 16;
/// Vector, modes, polarity, trigger, mask, extended and plain destination.
const RTE_WRITABLE: u64 = 0xfffe_0000_0001_afff;
