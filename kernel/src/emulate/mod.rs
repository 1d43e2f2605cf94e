//! Execution of the guest's instructions that reach emulated devices.
//!
//! [`decode()`] turns bytes into an [`Insn`], [`execute`] carries it out over a [`Cpu`]: registers,
//! segments, memory by linear address. Neither knows the hypervisor; `exit::mmio` and `exit::pio`
//! join them. (AMD APM volume 3 "General-Purpose and System Instructions"; Intel SDM volume 2.)
//!
//! What is here is what software uses on device memory: moves in all forms, string instructions,
//! logic and arithmetic on a memory operand, bit tests, exchanges, and pushes, pops, calls and jumps
//! through memory. Shifts, multiplications, x87, MMX and SSE are not (the hypervisor is built
//! without SSE, so that the guest's extended registers stay where they are): they are
//! [`DecodeError::Unsupported`] and become #UD.
//!
//! The decoder is our own rather than a general one: it is a table of some hundred opcodes, serves
//! all three modes with one form of operand, and is compared with a general one (iced-x86), as the
//! execution is with a real processor, in `kernel/tests/emulate.rs`.

mod alu;
mod decode;
mod exec;
#[cfg(test)]
mod tests;

use galvan_base::state::{Event, Seg, Segment};

pub use alu::{Alu, Flags};
pub use decode::{
    Bits, Code, DecodeError, Insn, MAX_LEN, Mem, NONE, Op, Operand, Prefixes, RIP, Rep, decode,
};
pub use exec::execute;

/// Why an instruction was not completed. Nothing of it has taken effect, except whole iterations
/// of a repeated one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It raises this exception.
    Exception(Event),
    /// It raises #PF.
    PageFault {
        /// For CR2.
        address: u64,
        /// Error code.
        error: u32,
    },
    /// It needs no emulation, or no longer: the guest is to execute it itself.
    Retry,
    /// The device model has been asked; the instruction is executed again when it has answered.
    Wait,
}

impl Stop {
    /// #GP(0)
    pub const GP: Stop = Stop::Exception(Event::GP);
    /// #SS(0)
    pub const SS: Stop = Stop::Exception(Event::Exception(12, Some(0)));
    /// #UD
    pub const UD: Stop = Stop::Exception(Event::UD);
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Execution goes on behind it.
    Next,
    /// Execution goes on at this instruction pointer.
    Jump(u64),
    /// It is a repeated one and has iterations left: execution goes on at it.
    Again,
}

/// The processor that an instruction is executed on.
///
/// Memory accesses are of 1, 2, 4 or 8 bytes at a linear address at which the segment allows them,
/// and may cross a page. They are checked against the guest's page tables at its privilege level,
/// and a failing one has no effect.
pub trait Cpu {
    /// A general purpose register by its number in encodings, all 64 bits.
    fn reg(&self, n: u8) -> u64;
    /// Changes a general purpose register, all 64 bits.
    fn set_reg(&mut self, n: u8, v: u64);
    /// Address of the instruction within its code segment.
    fn rip(&self) -> u64;
    /// Flags.
    fn rflags(&self) -> u64;
    /// Changes the flags.
    fn set_rflags(&mut self, v: u64);
    /// A segment register.
    fn segment(&self, s: Seg) -> Segment;
    /// In protected mode and not in virtual-8086 mode: segments have types.
    fn protected(&self) -> bool;

    /// Reads memory.
    fn read(&mut self, linear: u64, size: u8) -> Result<u64, Stop>;
    /// Writes memory.
    fn write(&mut self, linear: u64, size: u8, v: u64) -> Result<(), Stop>;
    /// A write to these bytes will follow after something that cannot be undone: fails if the write
    /// would.
    fn prepare_write(&mut self, linear: u64, size: u8) -> Result<(), Stop>;
    /// These bytes will be read, then written: fails if one of them would. [`Stop::Retry`] where
    /// they are memory that the guest can write itself, for only the processor can do both in one.
    fn prepare_update(&mut self, linear: u64, size: u8) -> Result<(), Stop>;
    /// Reads an I/O port.
    fn port_in(&mut self, port: u16, size: u8) -> Result<u32, Stop>;
    /// Writes an I/O port.
    fn port_out(&mut self, port: u16, size: u8, v: u32) -> Result<(), Stop>;
}

/// All ones in the low `size` bytes.
#[inline]
pub const fn mask(size: u8) -> u64 {
    match size {
        0..=7 => (1 << (size * 8)) - 1,
        _ => !0,
    }
}
