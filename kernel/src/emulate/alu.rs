//! Arithmetic and what it does to the flags (AMD APM volume 1 "Flags Register").

use super::mask;

/// Bits of the flags register.
#[derive(Clone, Copy, Debug)]
pub struct Flags;

impl Flags {
    /// Carry.
    pub const CF: u64 = 1;
    /// Parity of the low byte.
    pub const PF: u64 = 1 << 2;
    /// Carry out of bit 3.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Single step.
    pub const TF: u64 = 1 << 8;
    /// String instructions go down.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check, or access to user pages.
    pub const AC: u64 = 1 << 18;
    /// The flags that arithmetic sets.
    pub const STATUS: u64 = Self::CF | Self::PF | Self::AF | Self::ZF | Self::SF | Self::OF;
}

/// Two-operand operations, in the order of their encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alu {
    /// add
    Add,
    /// or
    Or,
    /// adc
    Adc,
    /// sbb
    Sbb,
    /// and
    And,
    /// sub
    Sub,
    /// xor
    Xor,
    /// cmp
    Cmp,
}

impl Alu {
    /// From bits 5:3 of an opcode, or the register field of a group's ModRM.
    pub(super) const fn of(n: u8) -> Alu {
        match n & 7 {
            0 => Alu::Add,
            1 => Alu::Or,
            2 => Alu::Adc,
            3 => Alu::Sbb,
            4 => Alu::And,
            5 => Alu::Sub,
            6 => Alu::Xor,
            _ => Alu::Cmp,
        }
    }

    /// Result and flags of `a op b`.
    pub(super) fn apply(self, a: u64, b: u64, size: u8, flags: u64) -> (u64, u64) {
        let carry = flags & Flags::CF;
        match self {
            Alu::Add => add(a, b, 0, size, flags),
            Alu::Adc => add(a, b, carry, size, flags),
            Alu::Sub | Alu::Cmp => sub(a, b, 0, size, flags),
            Alu::Sbb => sub(a, b, carry, size, flags),
            Alu::Or => logic(a | b, size, flags),
            Alu::And => logic(a & b, size, flags),
            Alu::Xor => logic(a ^ b, size, flags),
        }
    }
}

fn sign(size: u8) -> u64 {
    1 << (u32::from(size) * 8 - 1)
}

/// ZF, SF and PF of a result.
fn of_result(r: u64, size: u8) -> u64 {
    let mut f = 0;
    if r == 0 {
        f |= Flags::ZF;
    }
    if r & sign(size) != 0 {
        f |= Flags::SF;
    }
    if (r as u8).count_ones().is_multiple_of(2) {
        f |= Flags::PF;
    }
    f
}

fn put(flags: u64, status: u64) -> u64 {
    flags & !Flags::STATUS | status
}

pub(super) fn add(a: u64, b: u64, carry: u64, size: u8, flags: u64) -> (u64, u64) {
    let m = mask(size);
    let (a, b) = (a & m, b & m);
    let r = a.wrapping_add(b).wrapping_add(carry) & m;
    let mut f = of_result(r, size) | (a ^ b ^ r) & Flags::AF;
    if r < a || carry != 0 && r == a {
        f |= Flags::CF;
    }
    if (a ^ r) & (b ^ r) & sign(size) != 0 {
        f |= Flags::OF;
    }
    (r, put(flags, f))
}

pub(super) fn sub(a: u64, b: u64, borrow: u64, size: u8, flags: u64) -> (u64, u64) {
    let m = mask(size);
    let (a, b) = (a & m, b & m);
    let r = a.wrapping_sub(b).wrapping_sub(borrow) & m;
    let mut f = of_result(r, size) | (a ^ b ^ r) & Flags::AF;
    if a < b || borrow != 0 && a == b {
        f |= Flags::CF;
    }
    if (a ^ b) & (a ^ r) & sign(size) != 0 {
        f |= Flags::OF;
    }
    (r, put(flags, f))
}

pub(super) fn logic(r: u64, size: u8, flags: u64) -> (u64, u64) {
    let r = r & mask(size);
    (r, put(flags, of_result(r, size)))
}

/// INC (`by` 1) and DEC (`by` -1), which leave CF alone.
pub(super) fn step(a: u64, up: bool, size: u8, flags: u64) -> (u64, u64) {
    let (r, f) = if up {
        add(a, 1, 0, size, flags)
    } else {
        sub(a, 1, 0, size, flags)
    };
    (r, f & !Flags::CF | flags & Flags::CF)
}

/// Whether condition `cc`, the low four bits of an opcode, holds.
pub(super) fn condition(cc: u8, flags: u64) -> bool {
    let is = |f: u64| flags & f != 0;
    let less = is(Flags::SF) != is(Flags::OF);
    let holds = match cc >> 1 & 7 {
        0 => is(Flags::OF),
        1 => is(Flags::CF),
        2 => is(Flags::ZF),
        3 => is(Flags::CF | Flags::ZF),
        4 => is(Flags::SF),
        5 => is(Flags::PF),
        6 => less,
        _ => less || is(Flags::ZF),
    };
    holds != (cc & 1 != 0)
}
