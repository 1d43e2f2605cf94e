//! Under which ids the accesses of a function arrive at the IOMMU.
//!
//! Under its own, unless it is behind a bridge that speaks for the devices behind it: a bridge from PCI
//! Express to conventional PCI uses device 0 of its secondary bus, one between conventional buses its
//! own id. What firmware says of aliases counts, too. (PCI Express to PCI/PCI-X Bridge Specification,
//! "Requester ID"; PCI Local Bus Specification, "Type 1 Configuration Space Header".)
//!
//! Bridges are looked for once, by the boot code; one that is plugged in later is not known.

use alloc::vec::Vec;

use galvan_base::hw::Sbdf;

/// How a bridge passes accesses up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// As they are: the ports of PCI Express.
    Unchanged,
    /// As coming from device 0 of its secondary bus, or unchanged.
    AsSecondary,
    /// As coming from itself.
    AsBridge,
}

/// A bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Its function.
    pub dev: Sbdf,
    /// The bus right behind it.
    pub secondary: u8,
    /// The last bus behind it.
    pub subordinate: u8,
    /// How it passes accesses up.
    pub pass: Pass,
}

/// Reads configuration space: function, offset, size.
pub type ReadConfig<'a> = &'a dyn Fn(Sbdf, u16, u8) -> u32;

/// The bridges on these buses of a segment, as firmware has numbered them.
pub fn find_bridges(
    segment: u16,
    buses: impl Iterator<Item = u8>,
    read: ReadConfig<'_>,
) -> Vec<Bridge> {
    let mut out = Vec::new();
    for bus in buses {
        for device in 0..32u8 {
            for function in 0..8u8 {
                let dev = Sbdf::new(segment, bus, device << 3 | function);
                if read(dev, 0, 2) == 0xffff {
                    if function == 0 {
                        break;
                    }
                    continue;
                }
                let header = read(dev, 0x0e, 1);
                if header & 0x7f == 1 {
                    let secondary = read(dev, 0x19, 1) as u8;
                    // Not set up.
                    if secondary > bus {
                        out.push(Bridge {
                            dev,
                            secondary,
                            subordinate: read(dev, 0x1a, 1) as u8,
                            pass: pass(dev, read),
                        });
                    }
                }
                if function == 0 && header & 0x80 == 0 {
                    break;
                }
            }
        }
    }
    out
}

/// By the bridge's PCI Express capability.
fn pass(dev: Sbdf, read: ReadConfig<'_>) -> Pass {
    if read(dev, 6, 2) & 1 << 4 != 0 {
        let mut at = read(dev, 0x34, 1) as u16 & 0xfc;
        for _ in 0..48 {
            if at < 0x40 {
                break;
            }
            if read(dev, at, 1) == 0x10 {
                return match read(dev, at + 2, 2) >> 4 & 0xf {
                    4..=6 => Pass::Unchanged,
                    7 => Pass::AsSecondary,
                    _ => Pass::AsBridge,
                };
            }
            at = read(dev, at + 1, 1) as u16 & 0xfc;
        }
    }
    Pass::AsBridge
}

/// The ids of a function: its own first. `alias` is what firmware says of each id.
pub fn requester_ids(
    dev: Sbdf,
    bridges: &[Bridge],
    alias: impl Fn(u16) -> Option<u16>,
) -> Vec<u16> {
    let mut ids = alloc::vec![dev.bdf()];
    let mut bus = dev.bus();
    // Each step goes to a lower bus.
    while let Some(b) = bridges
        .iter()
        .filter(|b| b.dev.segment() == dev.segment() && b.dev.bus() < bus)
        .find(|b| b.secondary == bus)
    {
        match b.pass {
            Pass::Unchanged => {}
            Pass::AsSecondary => ids.push(u16::from(b.secondary) << 8),
            Pass::AsBridge => ids.push(b.dev.bdf()),
        }
        bus = b.dev.bus();
    }
    for i in 0..ids.len() {
        if let Some(a) = ids.get(i).and_then(|id| alias(*id)) {
            ids.push(a);
        }
    }
    let mut known = Vec::new();
    ids.retain(|id| {
        let new = !known.contains(id);
        known.push(*id);
        new
    });
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Configuration spaces by function.
    #[derive(Default)]
    struct Config(BTreeMap<Sbdf, [u8; 256]>);

    impl Config {
        fn function(&mut self, dev: Sbdf, header: u8) -> &mut [u8; 256] {
            let c = self.0.entry(dev).or_insert([0; 256]);
            c[0] = 0x86;
            c[0x0e] = header;
            c
        }
        /// A bridge to `secondary`; `port` is the type in its PCI Express capability.
        fn bridge(&mut self, dev: Sbdf, secondary: u8, port: Option<u8>) {
            let c = self.function(dev, 1);
            (c[0x19], c[0x1a]) = (secondary, secondary);
            if let Some(p) = port {
                c[6] = 1 << 4;
                // Power management comes first.
                (c[0x34], c[0x40], c[0x41]) = (0x40, 1, 0x50);
                (c[0x50], c[0x52]) = (0x10, p << 4);
            }
        }
        fn read(&self, dev: Sbdf, reg: u16, size: u8) -> u32 {
            let Some(c) = self.0.get(&dev) else {
                return u32::MAX >> (32 - 8 * u32::from(size));
            };
            (0..u16::from(size))
                .rev()
                .fold(0, |v, i| v << 8 | u32::from(c[usize::from(reg + i)]))
        }
        fn bridges(&self) -> Vec<Bridge> {
            find_bridges(0, 0..=255, &|d, r, s| self.read(d, r, s))
        }
    }

    fn at(bus: u8, device: u8, function: u8) -> Sbdf {
        Sbdf::new(0, bus, device << 3 | function)
    }

    #[test]
    fn bridges_are_found_with_how_they_pass_accesses() {
        let mut c = Config::default();
        c.bridge(at(0, 1, 0), 1, Some(4));
        c.bridge(at(1, 0, 0), 2, Some(7));
        c.bridge(at(0, 0x14, 4), 3, None);
        // Function 4 is looked at only if function 0 says there are more.
        c.function(at(0, 0x14, 0), 0x80);
        c.bridge(at(0, 0x1e, 1), 9, None);
        c.function(at(0, 0x1e, 0), 0);
        // A bridge nobody has set up.
        c.bridge(at(0, 5, 0), 0, Some(4));
        let found: Vec<_> = c
            .bridges()
            .iter()
            .map(|b| (b.dev, b.secondary, b.pass))
            .collect();
        assert_eq!(
            found,
            [
                (at(0, 1, 0), 1, Pass::Unchanged),
                (at(0, 0x14, 4), 3, Pass::AsBridge),
                (at(1, 0, 0), 2, Pass::AsSecondary),
            ]
        );
    }

    #[test]
    fn a_function_has_the_ids_of_the_bridges_that_speak_for_it() {
        let mut c = Config::default();
        c.bridge(at(0, 1, 0), 1, Some(4));
        c.bridge(at(1, 0, 0), 2, Some(7));
        c.bridge(at(2, 4, 0), 3, None);
        let bridges = c.bridges();
        let ids = |dev| requester_ids(dev, &bridges, |_| None);
        assert_eq!(ids(at(0, 3, 0)), [0x18]);
        assert_eq!(ids(at(1, 0, 0)), [0x100]);
        assert_eq!(ids(at(2, 5, 0)), [0x228, 0x200]);
        assert_eq!(ids(at(2, 0, 0)), [0x200], "no id twice");
        assert_eq!(ids(at(3, 1, 0)), [0x308, 0x220, 0x200]);
    }

    #[test]
    fn aliases_of_firmware_are_added() {
        let alias = |id| (id == 0x228).then_some(0x10);
        assert_eq!(requester_ids(at(2, 5, 0), &[], alias), [0x228, 0x10]);
        assert_eq!(requester_ids(at(2, 6, 0), &[], alias), [0x230]);
    }

    #[test]
    fn bridges_in_a_circle_end() {
        let b = |dev: Sbdf, secondary| Bridge {
            dev,
            secondary,
            subordinate: 255,
            pass: Pass::AsBridge,
        };
        let bridges = [b(at(1, 0, 0), 2), b(at(2, 0, 0), 1), b(at(3, 0, 0), 3)];
        assert_eq!(
            requester_ids(at(2, 1, 0), &bridges, |_| None),
            [0x208, 0x100]
        );
        assert_eq!(requester_ids(at(3, 1, 0), &bridges, |_| None), [0x308]);
    }
}
