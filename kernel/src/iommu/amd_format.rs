//! What the hardware reads and writes: device table entries, commands, events, registers.
//!
//! Values only; who puts them where, and in which order, is [`super::amd`]'s and `kernel/bare`'s.
//! (AMD IOMMU specification, "Device Table", "Commands", "Event Logging", "Registers".)

use core::fmt;

use galvan_base::{Dfn, Mfn, Mpa, PageOrder};

/// Offsets of registers in the window of an IOMMU; all are 8 bytes wide.
pub mod reg {
    /// Device table: address, and its length in the low bits.
    pub const DEVICE_TABLE: usize = 0x0000;
    /// Command buffer: address, and its length in bits 56..=59.
    pub const COMMAND_BASE: usize = 0x0008;
    /// Event log: address, and its length in bits 56..=59.
    pub const EVENT_BASE: usize = 0x0010;
    /// Control.
    pub const CONTROL: usize = 0x0018;
    /// A range that is not translated: its start and the enable bit.
    pub const EXCLUSION_BASE: usize = 0x0020;
    /// Its end.
    pub const EXCLUSION_LIMIT: usize = 0x0028;
    /// Extended features.
    pub const FEATURES: usize = 0x0030;
    /// Where the IOMMU reads the next command.
    pub const COMMAND_HEAD: usize = 0x2000;
    /// Where software writes the next command.
    pub const COMMAND_TAIL: usize = 0x2008;
    /// Where software reads the next event.
    pub const EVENT_HEAD: usize = 0x2010;
    /// Where the IOMMU writes the next event.
    pub const EVENT_TAIL: usize = 0x2018;
    /// Status.
    pub const STATUS: usize = 0x2020;
}

/// Bits of the control register.
pub mod control {
    /// Translate.
    pub const ENABLE: u64 = 1 << 0;
    /// HyperTransport tunnel translation.
    pub const HT_TUNNEL: u64 = 1 << 1;
    /// Log events.
    pub const EVENT_LOG: u64 = 1 << 2;
    /// Pass posted writes.
    pub const PASS_PW: u64 = 1 << 8;
    /// Responses pass posted writes.
    pub const RES_PASS_PW: u64 = 1 << 9;
    /// Table reads snoop the processors' caches.
    pub const COHERENT: u64 = 1 << 10;
    /// Isochronous requests.
    pub const ISOC: u64 = 1 << 11;
    /// Execute commands.
    pub const COMMANDS: u64 = 1 << 12;
}

/// Bits of the status register; the first three are cleared by writing 1.
pub mod status {
    /// An event was lost for want of room.
    pub const EVENT_OVERFLOW: u64 = 1 << 0;
    /// An event was logged.
    pub const EVENT_INTERRUPT: u64 = 1 << 1;
    /// A completion wait asked for an interrupt.
    pub const WAIT_INTERRUPT: u64 = 1 << 2;
    /// Events are being logged.
    pub const EVENT_LOG_RUNS: u64 = 1 << 3;
    /// Commands are being executed.
    pub const COMMANDS_RUN: u64 = 1 << 4;
    /// All that is cleared by writing 1, those of the page request log included.
    pub const CLEAR: u64 = 0x67;
}

/// Entries of the command buffer and of the event log: one page each.
pub const RING_ENTRIES: usize = 256;
/// The length of such a ring, for its base register.
pub const RING_LENGTH: u64 = 8 << 56;
/// Size of a command and of an event in bytes.
pub const RING_ENTRY: usize = 16;
/// Size of a device table entry in bytes.
pub const DTE_SIZE: usize = 32;
/// The width of the tables in use: four levels, 48 bits. Every IOMMU has them.
pub const LEVELS: u64 = 4;

/// The value of [`reg::DEVICE_TABLE`] for a table of so many pages, 1 to 512.
pub const fn device_table(base: Mpa, pages: usize) -> u64 {
    base.get() | ((pages as u64).saturating_sub(1) & 0x1ff)
}

/// The control register of an IOMMU in use, with what firmware wants of it (`FLAG_` bits of
/// [`super::ivrs`]).
pub const fn control_value(firmware: u8) -> u64 {
    use super::ivrs::{FLAG_HT_TUNNEL, FLAG_ISOC, FLAG_PASS_PW, FLAG_RES_PASS_PW};
    const fn set(flags: u8, flag: u8, bit: u64) -> u64 {
        if flags & flag != 0 { bit } else { 0 }
    }
    control::ENABLE
        | control::EVENT_LOG
        | control::COMMANDS
        | control::COHERENT
        | set(firmware, FLAG_HT_TUNNEL, control::HT_TUNNEL)
        | set(firmware, FLAG_PASS_PW, control::PASS_PW)
        | set(firmware, FLAG_RES_PASS_PW, control::RES_PASS_PW)
        | set(firmware, FLAG_ISOC, control::ISOC)
}

/// The capability in the configuration space of an IOMMU's function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability(pub u32);

impl Capability {
    /// Whether it is the capability of an IOMMU.
    pub const fn is_iommu(self) -> bool {
        self.0 & 0xff == 0x0f && self.0 >> 16 & 7 == 3
    }
    /// It caches what is not present, so that new mappings need an invalidation, too.
    pub const fn caches_absent(self) -> bool {
        self.0 & 1 << 26 != 0
    }
    /// It has the register of extended features.
    pub const fn has_features(self) -> bool {
        self.0 & 1 << 27 != 0
    }
}

/// The register of extended features.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// One command invalidates everything.
    pub const fn invalidate_all(self) -> bool {
        self.0 & 1 << 6 != 0
    }
    /// There are performance counters, which make the register window longer.
    pub const fn counters(self) -> bool {
        self.0 & 1 << 9 != 0
    }
    /// Most levels of tables.
    pub const fn levels(self) -> u32 {
        4 + (self.0 >> 10 & 3) as u32
    }
    /// Length of the register window in bytes.
    pub const fn window(self) -> usize {
        if self.counters() { 0x8_0000 } else { 0x4000 }
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} (up to {} levels", self.0, self.levels())?;
        for (bit, name) in [
            (0, "prefetch"),
            (1, "PPR"),
            (2, "x2APIC"),
            (4, "guest tables"),
            (6, "invalidate all"),
            (7, "guest APIC"),
            (9, "counters"),
        ] {
            if self.0 & 1 << bit != 0 {
                write!(f, ", {name}")?;
            }
        }
        f.write_str(")")
    }
}

const DTE_V: u64 = 1;
const DTE_TV: u64 = 1 << 1;
const DTE_MODE_SHIFT: u32 = 9;
const DTE_IR: u64 = 1 << 61;
const DTE_IW: u64 = 1 << 62;

/// A device table entry. Interrupts are never remapped (IV is clear), so that messages to the local
/// APICs' addresses pass as they are, translated or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dte(pub [u64; 4]);

impl Dte {
    /// The domain id of entries without a domain, which no domain has. (QEMU takes bit 8 of a
    /// domain id for a reserved one.)
    pub const NO_DOMAIN: u16 = 0xfeff;

    /// An entry that lets no access pass: translated by no levels of tables, without any right.
    /// `settings` is the byte of the device's entry in the IVRS table, "DTE Setting".
    pub const fn blocked(settings: u8) -> Dte {
        Self::with(DTE_V | DTE_TV, Self::NO_DOMAIN, settings)
    }

    /// An entry that has accesses translated by this table of [`LEVELS`] levels.
    pub const fn translated(root: Mfn, domid: u16, settings: u8) -> Dte {
        let mode = LEVELS << DTE_MODE_SHIFT;
        Self::with(
            DTE_V | DTE_TV | DTE_IR | DTE_IW | mode | root.addr().get(),
            domid,
            settings,
        )
    }

    const fn with(first: u64, domid: u16, settings: u8) -> Dte {
        let s = settings as u64;
        // System management messages.
        let second = domid as u64 | (s >> 4 & 3) << 40;
        // INIT, ExtInt and NMI; LINT0 and LINT1.
        let third = (s & 7) << 56 | (s >> 6 & 3) << 62;
        Dte([first, second, third, 0])
    }
}

/// A command.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Command(pub [u64; 2]);

impl Command {
    const fn new(opcode: u64, first: u64, second: u64) -> Command {
        Command([opcode << 60 | first, second])
    }

    /// COMPLETION_WAIT: once all earlier commands have taken effect, stores `value` at `at`, which is
    /// aligned to 8 bytes.
    pub const fn completion_wait(at: Mpa, value: u64) -> Command {
        Self::new(1, (at.get() & !7) | 1, value)
    }

    /// INVALIDATE_DEVTAB_ENTRY.
    pub const fn invalidate_device(id: u16) -> Command {
        Self::new(2, id as u64, 0)
    }

    /// INVALIDATE_IOMMU_PAGES for all of a domain, and for what is cached of its tables.
    pub const fn invalidate_domain(domid: u16) -> Command {
        Self::new(3, (domid as u64) << 32, 0x7fff_ffff_ffff_f003)
    }

    /// INVALIDATE_IOMMU_PAGES for `1 << order` frames, aligned to that, and for what is cached of
    /// their tables.
    pub const fn invalidate_pages(domid: u16, d: Dfn, order: PageOrder) -> Command {
        let at = d.align_down(order).addr().get();
        // The size is told by the lowest clear bit of the address.
        let size = match order.get() {
            0 => 0,
            n => ((1u64 << (n - 1)) - 1) << 12 | 1,
        };
        Self::new(3, (domid as u64) << 32, at | size | 2)
    }

    /// INVALIDATE_INTERRUPT_TABLE.
    pub const fn invalidate_interrupts(id: u16) -> Command {
        Self::new(5, id as u64, 0)
    }

    /// INVALIDATE_IOMMU_ALL, where [`Features::invalidate_all`] says so.
    pub const fn invalidate_all() -> Command {
        Self::new(8, 0, 0)
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x} {:#018x}", self.0[0], self.0[1])
    }
}

/// An entry of the event log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(pub [u64; 2]);

impl Event {
    /// What happened; 0 in an entry that is not written yet.
    pub const fn code(self) -> u8 {
        (self.0[0] >> 60) as u8
    }
    /// The device.
    pub const fn device(self) -> u16 {
        self.0[0] as u16
    }
    const fn flags(self) -> u64 {
        self.0[0] >> 48 & 0xfff
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.device();
        let (bus, dev, function) = (id >> 8, id >> 3 & 0x1f, id & 7);
        let address = self.0[1];
        let flags = self.flags();
        match self.code() {
            2 => {
                let what = match (flags & 1 << 3 != 0, flags & 1 << 5 != 0) {
                    (true, _) => "an interrupt",
                    (false, true) => "a write",
                    (false, false) => "a read",
                };
                let why = match (flags & 1 << 4 != 0, flags & 1 << 6 != 0) {
                    (true, true) => "not permitted",
                    (true, false) => "refused",
                    (false, _) => "nothing is mapped there",
                };
                let domain = (self.0[0] >> 32) as u16;
                write!(
                    f,
                    "{bus:02x}:{dev:02x}.{function}: {what} at {address:#x} was blocked: {why}"
                )?;
                if domain == Dte::NO_DOMAIN {
                    return f.write_str(" (the device is nobody's)");
                }
                write!(f, " (d{domain})")
            }
            code @ (1 | 3 | 4 | 7 | 8) => {
                let name = match code {
                    1 => "illegal device table entry",
                    3 => "device table cannot be read",
                    4 => "page table cannot be read",
                    7 => "invalidation timed out",
                    _ => "invalid request",
                };
                write!(
                    f,
                    "{bus:02x}:{dev:02x}.{function}: {name}, at {address:#x}, flags {flags:#x}"
                )
            }
            5 => write!(f, "illegal command at {address:#x}"),
            6 => write!(f, "command at {address:#x} cannot be read"),
            code => write!(f, "event {code:#x}: {:#018x} {address:#018x}", self.0[0]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn mpa(a: u64) -> Mpa {
        Mpa::new(a).unwrap()
    }

    #[test]
    fn a_blocked_entry_is_valid_and_grants_nothing() {
        let d = Dte::blocked(0);
        // Valid, translated, mode 0, neither read nor write.
        assert_eq!(d.0, [0b11, 0xfeff, 0, 0]);
    }

    #[test]
    fn a_translated_entry_names_root_levels_rights_and_domain() {
        let d = Dte::translated(mpa(0x1_2345_6000).frame(), 5, 0);
        assert_eq!(d.0, [0x6000_0001_2345_6803, 5, 0, 0]);
    }

    #[test]
    fn settings_of_firmware_go_to_their_bits() {
        // INIT, ExtInt, NMI, LINT0, LINT1, and system management messages of kind 1.
        let all = Dte::blocked(0xd7).0;
        assert_eq!(all[1] >> 40 & 3, 1);
        assert_eq!(all[2], 1 << 56 | 1 << 57 | 1 << 58 | 1 << 62 | 1 << 63);
        assert_eq!(Dte::blocked(0x08).0, Dte::blocked(0).0, "a reserved bit");
        // Remapping stays off whatever firmware says.
        assert_eq!(Dte::blocked(0xff).0[2] & 1, 0);
    }

    #[test]
    fn commands_are_encoded_as_specified() {
        assert_eq!(
            Command::completion_wait(mpa(0x1000_0008), 7).0,
            [0x1000_0000_1000_0009, 7]
        );
        assert_eq!(
            Command::invalidate_device(0x0118).0,
            [0x2000_0000_0000_0118, 0]
        );
        assert_eq!(
            Command::invalidate_domain(3).0,
            [0x3000_0003_0000_0000, 0x7fff_ffff_ffff_f003]
        );
        assert_eq!(
            Command::invalidate_interrupts(0xa0).0,
            [0x5000_0000_0000_00a0, 0]
        );
        assert_eq!(Command::invalidate_all().0, [0x8000_0000_0000_0000, 0]);
    }

    #[test]
    fn the_size_of_an_invalidation_is_told_by_the_lowest_clear_address_bit() {
        let at = |d: u64, order| Command::invalidate_pages(0, Dfn::new(d).unwrap(), order).0[1];
        assert_eq!(at(0x1234, PageOrder::P4K), 0x0123_4002);
        assert_eq!(at(0x1234, PageOrder::new(1).unwrap()), 0x0123_4003);
        assert_eq!(at(0x1234, PageOrder::new(2).unwrap()), 0x0123_5003);
        assert_eq!(at(0x1200, PageOrder::P2M), 0x012f_f003);
        assert_eq!(at(0x4_0000, PageOrder::P1G), 0x5fff_f003);
    }

    #[test]
    fn registers_carry_lengths_and_the_flags_of_firmware() {
        assert_eq!(device_table(mpa(0x20_0000), 1), 0x20_0000);
        assert_eq!(device_table(mpa(0x20_0000), 512), 0x20_01ff);
        assert_eq!(control_value(0), 0x1405);
        assert_eq!(control_value(0xff), 0x1f07);
        assert_eq!(RING_ENTRIES * RING_ENTRY, galvan_base::PAGE_SIZE);
    }

    #[test]
    fn capability_and_features_of_an_emulated_machine() {
        let c = Capability(0x1f03_400f);
        assert!(c.is_iommu() && c.caches_absent() && c.has_features());
        assert!(!Capability(0x0003_0005).is_iommu() && !Capability(u32::MAX).is_iommu());
        let f = Features(0x29d3);
        assert!(f.invalidate_all() && !f.counters());
        assert_eq!((f.levels(), f.window()), (6, 0x4000));
        assert_eq!(Features::default().levels(), 4);
    }

    #[test]
    fn events_say_who_did_what_and_where() {
        // A write to what is not mapped.
        let e = Event([2 << 60 | 1 << 53 | 1 << 32 | 0x0118, 0xdead_b000]);
        assert_eq!((e.code(), e.device()), (2, 0x118));
        assert_eq!(
            e.to_string(),
            "01:03.0: a write at 0xdeadb000 was blocked: nothing is mapped there (d1)"
        );
        let e = Event([2 << 60 | 1 << 52 | 1 << 54 | 0xfeff << 32 | 0x0011, 0x1000]);
        assert_eq!(
            e.to_string(),
            "00:02.1: a read at 0x1000 was blocked: not permitted (the device is nobody's)"
        );
        let e = Event([1 << 60 | 0x0011, 0x1000]);
        assert_eq!(
            e.to_string(),
            "00:02.1: illegal device table entry, at 0x1000, flags 0x0"
        );
        assert_eq!(
            Event([5 << 60, 0x40]).to_string(),
            "illegal command at 0x40"
        );
        assert_eq!(Event([0; 2]).code(), 0);
    }
}
