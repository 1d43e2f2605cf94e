//! The firmware's tables: finding them, and the facts Galvan itself needs.
//!
//! Called once by the boot code, which supplies the memory behind physical addresses; everything
//! returned is a copy or borrows that memory.

use alloc::vec::Vec;
use core::fmt;

use galvan_base::Mpa;
use galvan_base::hw::EcamWindow;

use super::bytes::{array, u16, u32, u64};
use super::{HEADER_LEN, entries, sum};

/// Gives the `len` bytes at a physical address, or `None` where they are not all memory that may be
/// read. Must be prepared for any address and length.
pub type Phys<'a, 'p> = &'p dyn Fn(u64, usize) -> Option<&'a [u8]>;

/// Longer tables than this are mistakes.
const MAX_TABLE: usize = 16 << 20;
const MAX_TABLES: usize = 256;
const RSDP_ANCHOR: &[u8; 8] = b"RSD PTR ";

/// Why there are no usable tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcpiError {
    /// There is no root pointer at this address, or a damaged one.
    Rsdp(u64),
    /// Neither of the root tables can be read; its address.
    Root(u64),
}

impl fmt::Display for AcpiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rsdp(at) => write!(f, "no valid ACPI root pointer at {at:#x}"),
            Self::Root(at) => write!(f, "no ACPI root table at {at:#x}"),
        }
    }
}

/// A table of the firmware.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Table<'a> {
    /// Physical address.
    pub address: u64,
    /// The whole table.
    pub bytes: &'a [u8],
}

impl<'a> Table<'a> {
    fn read(phys: Phys<'a, '_>, address: u64) -> Option<Self> {
        let len = u32(phys(address, 8)?, 4)? as usize;
        if address == 0 || !(8..=MAX_TABLE).contains(&len) {
            return None;
        }
        let bytes = phys(address, len)?;
        (bytes.len() == len).then_some(Self { address, bytes })
    }

    /// The four letters that name its kind.
    pub fn signature(&self) -> [u8; 4] {
        array(self.bytes, 0).unwrap_or_default()
    }

    /// Whether its checksum is right. Of the FACS, which has none, it is not.
    pub fn is_intact(&self) -> bool {
        sum(self.bytes) == 0
    }

    /// Physical address of the first byte after it.
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.bytes.len() as u64)
    }
}

impl fmt::Debug for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let signature = self.signature();
        let name = core::str::from_utf8(&signature).unwrap_or("????");
        let (at, len) = (self.address, self.bytes.len());
        write!(f, "{name} at {at:#x}, {len} bytes")?;
        if self.is_intact() || signature == *b"FACS" {
            return Ok(());
        }
        f.write_str(" (wrong checksum)")
    }
}

/// What the firmware says about the machine. Parts that it does not describe are `None` or empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostAcpi<'a> {
    /// Physical address of the root pointer.
    pub rsdp: u64,
    /// Its revision: 0 is ACPI 1.0, without an XSDT.
    pub revision: u8,
    /// Who made the firmware.
    pub oem_id: [u8; 6],
    /// All tables, in the order of the root table; DSDT and FACS last.
    pub tables: Vec<Table<'a>>,
    /// Processors and interrupt controllers.
    pub madt: Option<Madt>,
    /// Fixed hardware.
    pub fadt: Option<Fadt>,
    /// The first HPET.
    pub hpet: Option<Hpet>,
    /// Memory-mapped PCI configuration space.
    pub ecam: Vec<EcamWindow>,
}

impl<'a> HostAcpi<'a> {
    /// Reads the tables that hang on the root pointer at physical address `rsdp`.
    pub fn read(rsdp: u64, phys: Phys<'a, '_>) -> Result<Self, AcpiError> {
        let pointer = phys(rsdp, 20)
            .filter(|p| p.starts_with(RSDP_ANCHOR) && sum(p) == 0)
            .ok_or(AcpiError::Rsdp(rsdp))?;
        let revision = pointer.get(15).copied().unwrap_or(0);
        let rsdt = u32(pointer, 16).unwrap_or(0).into();
        let xsdt = match revision {
            0 | 1 => None,
            _ => phys(rsdp, 36)
                .filter(|p| sum(p) == 0)
                .and_then(|p| u64(p, 24))
                .filter(|at| *at != 0),
        };
        let root = |address, signature: &[u8; 4]| {
            Table::read(phys, address).filter(|t| t.signature() == *signature)
        };
        // Firmware that announces an XSDT it does not have does exist.
        let (root, width) = xsdt
            .and_then(|at| root(at, b"XSDT"))
            .map(|t| (t, 8))
            .or_else(|| root(rsdt, b"RSDT").map(|t| (t, 4)))
            .ok_or(AcpiError::Root(xsdt.unwrap_or(rsdt)))?;

        let mut tables = root
            .bytes
            .get(HEADER_LEN..)
            .unwrap_or_default()
            .chunks_exact(width)
            .take(MAX_TABLES)
            .filter_map(|entry| {
                let address = match width {
                    8 => u64(entry, 0)?,
                    _ => u32(entry, 0)?.into(),
                };
                Table::read(phys, address)
            })
            .collect::<Vec<_>>();
        let fadt = find(&tables, b"FACP").map(Fadt::read);
        if let Some(fadt) = &fadt {
            let referenced = [(fadt.dsdt, b"DSDT"), (fadt.facs, b"FACS")];
            tables.extend(referenced.iter().filter_map(|(at, signature)| {
                Table::read(phys, *at).filter(|t| t.signature() == **signature)
            }));
        }
        Ok(Self {
            rsdp,
            revision,
            oem_id: array(pointer, 9).unwrap_or_default(),
            madt: find(&tables, b"APIC").map(Madt::read),
            hpet: find(&tables, b"HPET").and_then(Hpet::read),
            ecam: find(&tables, b"MCFG").map(read_mcfg).unwrap_or_default(),
            fadt,
            tables,
        })
    }

    /// The bytes of the first table of this kind, for example `IVRS` or `DMAR`.
    pub fn table(&self, signature: &[u8; 4]) -> Option<&'a [u8]> {
        find(&self.tables, signature)
    }
}

fn find<'a>(tables: &[Table<'a>], signature: &[u8; 4]) -> Option<&'a [u8]> {
    tables
        .iter()
        .find(|t| t.signature() == *signature)
        .map(|t| t.bytes)
}

/// Looks for the root pointer where a BIOS puts it: in the first KiB of the extended BIOS data area
/// or between 0xe0000 and 1 MiB. Loaders started by UEFI know better.
pub fn find_rsdp(phys: Phys<'_, '_>) -> Option<u64> {
    let ebda = phys(0x40e, 2)
        .and_then(|b| u16(b, 0))
        .map_or(0, |segment| u64::from(segment) << 4);
    [(ebda, 0x400), (0xe_0000, 0x2_0000)]
        .into_iter()
        .filter(|(start, _)| (0x400..0x10_0000).contains(start))
        .find_map(|(start, len)| {
            let area = phys(start, len)?;
            let candidate = |at: usize| {
                let pointer = area.get(at..)?.get(..20)?;
                pointer.starts_with(RSDP_ANCHOR).then_some(pointer)
            };
            (0..len)
                .step_by(16)
                .find(|at| candidate(*at).is_some_and(|pointer| sum(pointer) == 0))
                .map(|at| start + at as u64)
        })
}

/// The Multiple APIC Description Table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Madt {
    /// Revision of the table.
    pub revision: u8,
    /// Physical address of the local APICs.
    pub lapic_address: u64,
    /// The machine also has a pair of 8259s.
    pub has_8259: bool,
    /// The processors, in the firmware's order; the first is usually the boot processor.
    pub cpus: Vec<Cpu>,
    /// The IO-APICs.
    pub ioapics: Vec<IoApic>,
    /// ISA interrupts that do not arrive where and how ISA interrupts do.
    pub overrides: Vec<Override>,
    /// IO-APIC inputs that are NMIs: flags and global system interrupt.
    pub nmi_sources: Vec<(u16, u32)>,
    /// Local interrupt inputs that are NMIs.
    pub lapic_nmis: Vec<LapicNmi>,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Local APIC id.
    pub apic_id: u32,
    /// The id by which AML and other tables name it.
    pub uid: u32,
    /// It can be used now.
    pub enabled: bool,
    /// It cannot, but may be enabled at run time.
    pub online_capable: bool,
}

/// An IO-APIC. How many pins it has, only its registers tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// APIC id.
    pub id: u8,
    /// Physical address of its registers.
    pub address: u32,
    /// Its first global system interrupt.
    pub gsi_base: u32,
}

/// How an ISA interrupt really arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Override {
    /// ISA interrupt number.
    pub isa_irq: u8,
    /// Global system interrupt it arrives as.
    pub gsi: u32,
    /// Polarity and trigger mode as in the table ("MPS INTI Flags").
    pub flags: u16,
}

impl Override {
    /// Whether it is active low; ISA interrupts are not, unless said otherwise.
    pub fn is_active_low(&self) -> bool {
        self.flags & 3 == 3
    }

    /// Whether it is level-triggered; ISA interrupts are not, unless said otherwise.
    pub fn is_level(&self) -> bool {
        self.flags >> 2 & 3 == 3
    }
}

/// A local interrupt input that is an NMI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LapicNmi {
    /// The processor by its uid, `None` for all.
    pub uid: Option<u32>,
    /// Polarity and trigger mode as in the table.
    pub flags: u16,
    /// Input 0 or 1.
    pub lint: u8,
}

impl Madt {
    fn read(table: &[u8]) -> Self {
        let mut madt = Self {
            revision: table.get(8).copied().unwrap_or(0),
            lapic_address: u32(table, 36).unwrap_or(0xfee0_0000).into(),
            has_8259: u32(table, 40).unwrap_or(0) & 1 != 0,
            ..Self::default()
        };
        for (kind, entry) in entries(table.get(44..).unwrap_or_default()) {
            // An entry too short for its kind is passed over.
            let _ = madt.entry(kind, entry);
        }
        madt
    }

    fn entry(&mut self, kind: u8, entry: &[u8]) -> Option<()> {
        let byte = |at: usize| entry.get(at).copied();
        let cpu = |apic_id, uid, flags: u32| Cpu {
            apic_id,
            uid,
            enabled: flags & 1 != 0,
            online_capable: flags & 3 == 2,
        };
        match kind {
            // 0xff is the broadcast id: such an entry is a place-holder.
            0 if byte(3)? != 0xff => {
                let cpu = cpu(byte(3)?.into(), byte(2)?.into(), u32(entry, 4)?);
                self.add_cpu(cpu);
            }
            1 => self.ioapics.push(IoApic {
                id: byte(2)?,
                address: u32(entry, 4)?,
                gsi_base: u32(entry, 8)?,
            }),
            2 => self.overrides.push(Override {
                isa_irq: byte(3)?,
                gsi: u32(entry, 4)?,
                flags: u16(entry, 8)?,
            }),
            3 => self.nmi_sources.push((u16(entry, 2)?, u32(entry, 4)?)),
            4 => self.lapic_nmis.push(LapicNmi {
                uid: Some(byte(2)?.into()).filter(|uid| *uid != 0xff),
                flags: u16(entry, 3)?,
                lint: byte(5)?,
            }),
            5 => self.lapic_address = u64(entry, 4)?,
            9 if u32(entry, 4)? != u32::MAX => {
                let cpu = cpu(u32(entry, 4)?, u32(entry, 12)?, u32(entry, 8)?);
                self.add_cpu(cpu);
            }
            10 => self.lapic_nmis.push(LapicNmi {
                uid: Some(u32(entry, 4)?).filter(|uid| *uid != u32::MAX),
                flags: u16(entry, 2)?,
                lint: byte(8)?,
            }),
            _ => {}
        }
        Some(())
    }

    /// Some firmware lists a processor both as APIC and as x2APIC.
    fn add_cpu(&mut self, cpu: Cpu) {
        match self.cpus.iter_mut().find(|c| c.apic_id == cpu.apic_id) {
            Some(known) if !known.enabled => *known = cpu,
            Some(_) => {}
            None => self.cpus.push(cpu),
        }
    }
}

/// Where a register is (ACPI specification, "Generic Address Structure").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// At a physical address.
    Memory(u64),
    /// At an I/O port.
    Port(u16),
    /// In configuration space of bus 0: device << 16 | function, offset.
    Pci(u32, u16),
}

impl Register {
    fn read(gas: &[u8; 12]) -> Option<Self> {
        let address = u64(gas, 4)?;
        match gas[0] {
            _ if address == 0 => None,
            0 => Some(Self::Memory(address)),
            1 => u16::try_from(address).ok().map(Self::Port),
            2 => Some(Self::Pci((address >> 16) as u32, address as u16)),
            _ => None,
        }
    }
}

/// The Fixed ACPI Description Table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fadt {
    /// Physical address of the DSDT; 0 if there is none.
    pub dsdt: u64,
    /// Physical address of the FACS; 0 if there is none.
    pub facs: u64,
    /// ISA number of the system control interrupt; through an [`Override`] if there is one.
    pub sci_irq: u16,
    /// The port that reaches the firmware; 0 if there is none.
    pub smi_command: u32,
    /// The value that turns ACPI mode on there; 0 if it always is.
    pub acpi_enable: u8,
    /// Event registers: status, then enable.
    pub pm1a_event: Option<Register>,
    /// The register that ends in sleep states.
    pub pm1a_control: Option<Register>,
    /// Its second half on machines that have one.
    pub pm1b_control: Option<Register>,
    /// The 3.579545 MHz timer.
    pub pm_timer: Option<Register>,
    /// That timer has 32 bits instead of 24.
    pub pm_timer_32: bool,
    /// The register whose writing resets the machine, and the value to write.
    pub reset: Option<(Register, u8)>,
    /// "IA-PC Boot Architecture Flags".
    pub boot_arch: u16,
    /// "Fixed Feature Flags".
    pub flags: u32,
}

impl Fadt {
    fn read(table: &[u8]) -> Self {
        let dword = |at| u32(table, at).unwrap_or(0);
        let byte = |at: usize| table.get(at).copied().unwrap_or(0);
        let gas = |at| array(table, at).and_then(|gas| Register::read(&gas));
        // Later revisions have a wider second copy of most fields, which counts where it is set.
        let register = |narrow, wide| {
            let port = u16::try_from(dword(narrow)).unwrap_or(0);
            gas(wide).or((port != 0).then_some(Register::Port(port)))
        };
        let address = |narrow, wide| match u64(table, wide) {
            Some(at) if at != 0 => at,
            _ => dword(narrow).into(),
        };
        let flags = dword(112);
        Self {
            dsdt: address(40, 140),
            facs: address(36, 132),
            sci_irq: u16(table, 46).unwrap_or(0),
            smi_command: dword(48),
            acpi_enable: byte(52),
            pm1a_event: register(56, 148),
            pm1a_control: register(64, 172),
            pm1b_control: register(68, 184),
            // The length says whether it exists.
            pm_timer: register(76, 208).filter(|_| byte(91) == 4),
            pm_timer_32: flags & 1 << 8 != 0,
            reset: gas(116)
                .filter(|_| flags & 1 << 10 != 0)
                .map(|register| (register, byte(128))),
            boot_arch: u16(table, 109).unwrap_or(0),
            flags,
        }
    }
}

/// A High Precision Event Timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hpet {
    /// Physical address of its registers.
    pub address: u64,
    /// Low half of its capability register, as the table has it.
    pub id: u32,
}

impl Hpet {
    fn read(table: &[u8]) -> Option<Self> {
        match Register::read(&array(table, 40)?)? {
            Register::Memory(address) => Some(Self {
                address,
                id: u32(table, 36)?,
            }),
            _ => None,
        }
    }
}

fn read_mcfg(table: &[u8]) -> Vec<EcamWindow> {
    table
        .get(44..)
        .unwrap_or_default()
        .chunks_exact(16)
        .filter_map(|entry| {
            let (&first_bus, &last_bus) = (entry.get(10)?, entry.get(11)?);
            let base = Mpa::new(u64(entry, 0)?)?;
            // The window of the last bus has to be within the address space, too.
            base.checked_add((u64::from(last_bus) + 1) << 20)?;
            (base.get() != 0 && first_bus <= last_bus).then_some(EcamWindow {
                // The table gives the address of bus 0, whether that is decoded or not.
                base: base.checked_add(u64::from(first_bus) << 20)?,
                segment: u16(entry, 8)?,
                first_bus,
                last_bus,
            })
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::boxed::Box;
    use std::string::ToString;

    /// Physical memory of a test: a few pieces.
    #[derive(Debug, Default)]
    pub struct Memory(Vec<(u64, &'static [u8])>);

    impl Memory {
        pub fn put(&mut self, at: u64, bytes: impl Into<Vec<u8>>) -> &mut Self {
            self.0
                .insert(0, (at, Box::leak(bytes.into().into_boxed_slice())));
            self
        }

        pub fn get(&self, at: u64, len: usize) -> Option<&'static [u8]> {
            self.0.iter().find_map(|(start, bytes)| {
                let offset = usize::try_from(at.checked_sub(*start)?).ok()?;
                bytes.get(offset..)?.get(..len)
            })
        }

        pub fn read(&self, rsdp: u64) -> Result<HostAcpi<'static>, AcpiError> {
            HostAcpi::read(rsdp, &|at, len| self.get(at, len))
        }
    }

    /// Sets the checksum.
    pub fn seal(mut table: Vec<u8>) -> Vec<u8> {
        table[9] = 0;
        table[9] = 0u8.wrapping_sub(sum(&table));
        table
    }

    pub fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut out = signature.to_vec();
        out.extend_from_slice(&(HEADER_LEN as u32 + body.len() as u32).to_le_bytes());
        out.extend_from_slice(b"\x05\0GALVANTEST    \x01\0\0\0TEST\x01\0\0\0");
        out.extend_from_slice(body);
        seal(out)
    }

    /// A root pointer at 0x1000 of revision 2 and an XSDT at 0x2000.
    pub fn root(memory: &mut Memory, tables: &[u64]) {
        let mut rsdp = b"RSD PTR \0GALVAN\x02".to_vec();
        rsdp.extend_from_slice(&0x9999_0000u32.to_le_bytes());
        rsdp.extend_from_slice(&36u32.to_le_bytes());
        rsdp.extend_from_slice(&0x2000u64.to_le_bytes());
        rsdp.extend_from_slice(&[0; 4]);
        rsdp[8] = 0u8.wrapping_sub(sum(&rsdp[..20]));
        rsdp[32] = 0u8.wrapping_sub(sum(&rsdp));
        let body = tables
            .iter()
            .flat_map(|t| t.to_le_bytes())
            .collect::<Vec<_>>();
        memory.put(0x1000, rsdp).put(0x2000, table(b"XSDT", &body));
    }

    pub const Q35_RSDP: u64 = 0xf_59e0;

    /// The tables of QEMU 7.2's q35 with SeaBIOS, 3 CPUs and an AMD IOMMU, without its DSDT.
    pub fn q35() -> Memory {
        let golden = include_bytes!("golden/q35-seabios.bin");
        let mut memory = Memory::default();
        memory
            .put(Q35_RSDP, &golden[..32])
            .put(0x7ffe_0000, &golden[32..96])
            .put(0x7ffe_215f, &golden[96..]);
        memory
    }

    #[test]
    fn a_machine_with_only_an_rsdt_is_read() {
        let acpi = q35().read(Q35_RSDP).unwrap();
        assert_eq!((acpi.revision, acpi.oem_id), (0, *b"BOCHS "));
        let names = acpi
            .tables
            .iter()
            .map(|t| t.signature())
            .collect::<Vec<_>>();
        // Of the DSDT the test has no bytes.
        let expected = [
            b"FACP", b"APIC", b"HPET", b"MCFG", b"IVRS", b"WAET", b"FACS",
        ];
        assert_eq!(names, expected.map(|n| *n));
        assert!(acpi.tables[..6].iter().all(Table::is_intact));
    }

    #[test]
    fn processors_and_interrupt_controllers_come_from_the_madt() {
        let madt = q35().read(Q35_RSDP).unwrap().madt.unwrap();
        assert_eq!((madt.lapic_address, madt.has_8259), (0xfee0_0000, true));
        let cpu = |n| Cpu {
            apic_id: n,
            uid: n,
            enabled: true,
            online_capable: false,
        };
        assert_eq!(madt.cpus, [cpu(0), cpu(1), cpu(2)]);
        assert_eq!(
            madt.ioapics,
            [IoApic {
                id: 0,
                address: 0xfec0_0000,
                gsi_base: 0
            }]
        );
        let overrides = madt
            .overrides
            .iter()
            .map(|o| (o.isa_irq, o.gsi, o.is_level(), o.is_active_low()));
        assert!(overrides.eq([
            (0, 2, false, false),
            (5, 5, true, false),
            (9, 9, true, false),
            (10, 10, true, false),
            (11, 11, true, false),
        ]));
        assert_eq!(
            madt.lapic_nmis,
            [LapicNmi {
                uid: None,
                flags: 0,
                lint: 1
            }]
        );
    }

    #[test]
    fn fixed_hardware_timers_and_windows_are_found() {
        let acpi = q35().read(Q35_RSDP).unwrap();
        let fadt = acpi.fadt.unwrap();
        assert_eq!((fadt.dsdt, fadt.facs), (0x7ffe_0040, 0x7ffe_0000));
        assert_eq!(
            (fadt.sci_irq, fadt.smi_command, fadt.acpi_enable),
            (9, 0xb2, 2)
        );
        assert_eq!(fadt.pm1a_event, Some(Register::Port(0x600)));
        assert_eq!(fadt.pm1a_control, Some(Register::Port(0x604)));
        assert_eq!(fadt.pm1b_control, None);
        assert_eq!(
            (fadt.pm_timer, fadt.pm_timer_32),
            (Some(Register::Port(0x608)), false)
        );
        assert_eq!(fadt.reset, Some((Register::Port(0xcf9), 0xf)));
        assert_eq!(acpi.hpet.unwrap().address, 0xfed0_0000);
        let window = acpi.ecam[0];
        assert_eq!(acpi.ecam.len(), 1);
        assert_eq!((window.base.get(), window.segment), (0xb000_0000, 0));
        assert_eq!((window.first_bus, window.last_bus), (0, 255));
        assert!(acpi.table(b"IVRS").unwrap().starts_with(b"IVRS\x6c"));
        assert_eq!(acpi.table(b"DMAR"), None);
    }

    #[test]
    fn the_xsdt_counts_where_there_is_one() {
        let mut memory = Memory::default();
        memory
            .put(0x3000, table(b"SSDT", b"one"))
            .put(0x1_0000_4000, table(b"SSDT", b"two"));
        root(&mut memory, &[0x3000, 0, 0x5000, 0x1_0000_4000]);
        let acpi = memory.read(0x1000).unwrap();
        let at = acpi.tables.iter().map(|t| t.address).collect::<Vec<_>>();
        assert_eq!(at, [0x3000, 0x1_0000_4000]);
        assert_eq!(acpi.oem_id, *b"GALVAN");
    }

    #[test]
    fn an_xsdt_that_is_not_there_falls_back_to_the_rsdt() {
        let mut memory = Memory::default();
        root(&mut memory, &[]);
        memory
            .put(0x2000, std::vec![0u8; 64])
            .put(0x9999_0000, table(b"RSDT", &0x3000u32.to_le_bytes()))
            .put(0x3000, table(b"WAET", b""));
        assert_eq!(memory.read(0x1000).unwrap().tables.len(), 1);
        memory.put(0x9999_0000, std::vec![0u8; 64]);
        assert_eq!(memory.read(0x1000), Err(AcpiError::Root(0x2000)));
        assert_eq!(
            memory.read(0x2000).unwrap_err().to_string(),
            "no valid ACPI root pointer at 0x2000"
        );
    }

    #[test]
    fn x2apic_entries_and_address_overrides_count() {
        let mut body = Vec::from([0u8; 8]);
        body.extend_from_slice(&[0, 8, 1, 4, 1, 0, 0, 0]); // APIC id 4
        body.extend_from_slice(&[0, 8, 2, 6, 2, 0, 0, 0]); // 6: may come online
        body.extend_from_slice(&[0, 8, 3, 0xff, 0, 0, 0, 0]); // place-holder
        body.extend_from_slice(&[9, 16, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]); // 4 again
        body.extend_from_slice(&[9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0]); // 256
        body.extend_from_slice(&[5, 12, 0, 0, 0, 0, 0, 0xfe, 1, 0, 0, 0]);
        body.extend_from_slice(&[3, 8, 0xf, 0, 7, 0, 0, 0]);
        body.extend_from_slice(&[10, 12, 5, 0, 9, 0, 0, 0, 1, 0, 0, 0]);
        body.extend_from_slice(&[1, 4, 0, 0]); // too short
        let mut memory = Memory::default();
        memory.put(0x3000, table(b"APIC", &body));
        root(&mut memory, &[0x3000]);
        let madt = memory.read(0x1000).unwrap().madt.unwrap();
        let cpus = madt
            .cpus
            .iter()
            .map(|c| (c.apic_id, c.uid, c.enabled, c.online_capable));
        assert!(cpus.eq([
            (4, 1, true, false),
            (6, 2, false, true),
            (256, 9, true, false)
        ]));
        assert_eq!(madt.lapic_address, 0x1_fe00_0000);
        assert_eq!(madt.nmi_sources, [(0xf, 7)]);
        assert_eq!(madt.lapic_nmis[0].uid, Some(9));
        assert!(madt.ioapics.is_empty());
    }

    #[test]
    fn a_configuration_window_may_begin_at_a_later_bus() {
        let mut body = Vec::from([0u8; 8]);
        body.extend_from_slice(&0xe000_0000u64.to_le_bytes());
        body.extend_from_slice(&[1, 0, 0x10, 0x1f, 0, 0, 0, 0]);
        body.extend_from_slice(&u64::MAX.to_le_bytes());
        body.extend_from_slice(&[2, 0, 0, 0xff, 0, 0, 0, 0]);
        let mut memory = Memory::default();
        memory.put(0x3000, table(b"MCFG", &body));
        root(&mut memory, &[0x3000]);
        let ecam = memory.read(0x1000).unwrap().ecam;
        assert_eq!(ecam.len(), 1);
        assert_eq!((ecam[0].base.get(), ecam[0].segment), (0xe100_0000, 1));
    }

    #[test]
    fn a_bios_root_pointer_is_found_in_its_places() {
        let mut memory = q35();
        let mut bios = std::vec![0u8; 0x2_0000];
        let pointer = memory.get(Q35_RSDP, 20).unwrap();
        let find = |memory: &Memory| find_rsdp(&|at, len| memory.get(at, len));
        // One has a wrong checksum, one stands at no 16-byte boundary.
        bios[0x100..0x108].copy_from_slice(RSDP_ANCHOR);
        bios[0x207..0x21b].copy_from_slice(pointer);
        memory.put(0xe_0000, bios.clone());
        assert_eq!(find(&memory), None);
        bios[0x1_59e0..0x1_59f4].copy_from_slice(pointer);
        memory.put(0xe_0000, bios);
        assert_eq!(find(&memory), Some(Q35_RSDP));
        let mut ebda = std::vec![0u8; 0x400];
        ebda[0x30..0x44].copy_from_slice(pointer);
        memory.put(0x40e, [0xc0, 0x9f]).put(0x9_fc00, ebda);
        assert_eq!(find(&memory), Some(0x9_fc30));
    }

    proptest! {
        #[test]
        fn damaged_tables_are_read_as_far_as_they_go(
            hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        ) {
            let mut golden = include_bytes!("golden/q35-seabios.bin").to_vec();
            for (at, value) in hits {
                // Behind the root pointer, so that more than its checksum is tested.
                let at = 96 + at.index(golden.len() - 96);
                golden[at] = value;
            }
            let mut memory = q35();
            memory.put(0x7ffe_215f, &golden[96..]);
            if let Ok(acpi) = memory.read(Q35_RSDP) {
                for t in &acpi.tables {
                    let _ = std::format!("{t:?}");
                }
                let _ = super::super::dom0_tables(Some(&acpi), 0x1000, 4, &[], &|_| true);
            }
        }
    }
}
