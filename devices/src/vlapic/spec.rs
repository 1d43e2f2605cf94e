//! Register numbers and bits (Intel SDM "The Local APIC Block Diagram", "x2APIC Register Address
//! Space").

pub(super) const FIRST_VECTOR: u8 = 16;
pub(super) const VERSION: u32 = 0x50014;
pub(super) const LVTS: usize = 6;

pub(super) const BASE_BSP: u64 = 1 << 8;
pub(super) const BASE_EXTEND: u64 = 1 << 10;
pub(super) const BASE_ENABLE: u64 = 1 << 11;

pub(super) const SVR_ENABLE: u32 = 1 << 8;
/// Vector, enable, and the focus-processor bit that some processors still store.
pub(super) const SVR_WRITABLE: u32 = 0x3ff;

pub(super) const LVT_MODE: u32 = 7 << 8;
pub(super) const LVT_STATUS: u32 = 1 << 12;
pub(super) const LVT_POLARITY: u32 = 1 << 13;
pub(super) const LVT_REMOTE_IRR: u32 = 1 << 14;
pub(super) const LVT_LEVEL: u32 = 1 << 15;
pub(super) const LVT_MASKED: u32 = 1 << 16;
pub(super) const EXTINT: u32 = 7 << 8;

pub(super) const ICR_LOGICAL: u32 = 1 << 11;
pub(super) const ICR_BUSY: u32 = 1 << 12;
pub(super) const ICR_ASSERT: u32 = 1 << 14;
pub(super) const ICR_LEVEL: u32 = 1 << 15;
pub(super) const ICR_STORED: u32 = 0x000c_cfff;
/// The busy bit is not among them: it is read-only.
pub(super) const ICR_RESERVED: u32 = !(ICR_STORED | ICR_BUSY);

pub(super) const ESR_SEND_ILLEGAL: u32 = 1 << 5;
pub(super) const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
pub(super) const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;
pub(super) const ESR_BITS: u32 = ESR_SEND_ILLEGAL | ESR_RECEIVE_ILLEGAL | ESR_ILLEGAL_REGISTER;

/// Register numbers: offset in the page / 16, or MSR - 0x800.
pub(super) mod reg {
    pub(in super::super) const ID: u32 = 0x02;
    pub(in super::super) const VERSION: u32 = 0x03;
    pub(in super::super) const TPR: u32 = 0x08;
    pub(in super::super) const APR: u32 = 0x09;
    pub(in super::super) const PPR: u32 = 0x0a;
    pub(in super::super) const EOI: u32 = 0x0b;
    pub(in super::super) const LDR: u32 = 0x0d;
    pub(in super::super) const DFR: u32 = 0x0e;
    pub(in super::super) const SVR: u32 = 0x0f;
    pub(in super::super) const ISR: u32 = 0x10;
    pub(in super::super) const ISR_LAST: u32 = 0x17;
    pub(in super::super) const TMR: u32 = 0x18;
    pub(in super::super) const TMR_LAST: u32 = 0x1f;
    pub(in super::super) const IRR: u32 = 0x20;
    pub(in super::super) const IRR_LAST: u32 = 0x27;
    pub(in super::super) const ESR: u32 = 0x28;
    pub(in super::super) const ICR: u32 = 0x30;
    pub(in super::super) const ICR2: u32 = 0x31;
    /// The timer's LVT entry; the other five follow.
    pub(in super::super) const LVT: u32 = 0x32;
    pub(in super::super) const LVT_OTHERS: u32 = 0x33;
    pub(in super::super) const LVT_LAST: u32 = 0x37;
    pub(in super::super) const TMICT: u32 = 0x38;
    pub(in super::super) const TMCCT: u32 = 0x39;
    pub(in super::super) const DCR: u32 = 0x3e;
    pub(in super::super) const SELF_IPI: u32 = 0x3f;
}
