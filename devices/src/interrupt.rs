//! The terms in which interrupts travel between the interrupt controllers: delivery mode,
//! destination, and the message that an IO-APIC pin or an MSI becomes.
//!
//! Made by [`crate::vioapic`], [`crate::vmsi`] and the ICR of [`crate::vlapic`]; carried by the
//! kernel to the vCPUs whose [`crate::vlapic::ApicAddress`] matches. (Intel SDM "Advanced
//! Programmable Interrupt Controller (APIC)", "Determining IPI Destination"; AMD APM of the same
//! name.)

/// How an interrupt acts on the processor that receives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DeliveryMode {
    /// The vector, on every destination.
    Fixed = 0,
    /// The vector, on the one destination of lowest priority.
    LowestPriority = 1,
    /// System management interrupt.
    Smi = 2,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// INIT.
    Init = 5,
    /// Start-up IPI; only the ICR can send it.
    Startup = 6,
    /// The vector comes from an 8259; only pins can have it.
    ExtInt = 7,
}

impl DeliveryMode {
    /// From the three bits that all registers and messages encode it in; `None` for the reserved
    /// encoding 3.
    #[inline]
    pub const fn decode(bits: u32) -> Option<Self> {
        Some(match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            7 => Self::ExtInt,
            _ => return None,
        })
    }

    /// Whether the interrupt has a vector and goes through IRR, so that level triggering and
    /// remote IRR mean something.
    #[inline]
    pub const fn is_vectored(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// The destination field of an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// An APIC id, or a logical address, or [`Destination::BROADCAST`].
    pub id: u32,
    /// `id` is a logical address.
    pub logical: bool,
}

impl Destination {
    /// The id that names all processors, in both modes. Narrower broadcasts are widened to it
    /// where they enter.
    pub const BROADCAST: u32 = u32::MAX;

    /// From the 8-bit field of an xAPIC's ICR.
    #[inline]
    pub const fn from_xapic(id: u8, logical: bool) -> Self {
        Self {
            id: if id == 0xff {
                Self::BROADCAST
            } else {
                id as u32
            },
            logical,
        }
    }

    /// From the 8-bit field of a message or redirection entry and the 7 bits of the extended
    /// destination id (bits 14:8 of the id; see `XEN_HVM_CPUID_EXT_DEST_ID` in the public
    /// `arch-x86/cpuid.h`). Guests that were not told of the extension leave them 0.
    ///
    /// A physical 0xff is the broadcast of the 8-bit format, even to processors in x2APIC mode. A
    /// logical one is not widened: to those it is cluster 0, members 0 to 7.
    #[inline]
    pub const fn from_message(id: u8, extended: u8, logical: bool) -> Self {
        let extended = extended & 0x7f;
        if id == 0xff && extended == 0 && !logical {
            return Self {
                id: Self::BROADCAST,
                logical,
            };
        }
        Self {
            id: id as u32 | (extended as u32) << 8,
            logical,
        }
    }
}

/// An interrupt on its way from a pin or device to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// Vector; without meaning where the mode has none.
    pub vector: u8,
    /// Delivery mode.
    pub mode: DeliveryMode,
    /// Who gets it.
    pub dest: Destination,
    /// Level-triggered: the end of interrupt is broadcast to the IO-APICs.
    pub level: bool,
}
