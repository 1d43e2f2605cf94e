//! From bytes to an [`Insn`] (AMD APM volume 3 "Instruction Encoding").

use galvan_base::state::Seg;

use super::Alu;

/// No instruction is longer.
pub const MAX_LEN: usize = 15;
/// In [`Mem`]: there is no such register.
pub const NONE: u8 = 16;
/// In [`Mem`]: the base is the instruction pointer behind the instruction.
pub const RIP: u8 = 17;

/// The width of a code segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// 16-bit: real mode, virtual-8086 mode, 16-bit protected mode.
    B16,
    /// 32-bit.
    B32,
    /// 64-bit.
    B64,
}

/// Why bytes gave no instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// It goes on behind the bytes given.
    Short,
    /// It is longer than an instruction may be: #GP.
    TooLong,
    /// It is no instruction: #UD.
    Invalid,
    /// It is none that is emulated.
    Unsupported,
}

/// Repetition prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rep {
    /// None.
    No,
    /// F3: REP, REPE.
    Equal,
    /// F2: REPNE; REP where the instruction compares nothing.
    NotEqual,
}

/// The operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// dst = src
    Mov,
    /// dst = src of this many bytes, zero-extended
    Movzx(u8),
    /// dst = src of this many bytes, sign-extended
    Movsx(u8),
    /// dst = src with its bytes in the other order
    Movbe,
    /// add, or, adc, sbb, and, sub, xor, cmp
    Alu(Alu),
    /// and, for the flags only
    Test,
    /// inc
    Inc,
    /// dec
    Dec,
    /// neg
    Neg,
    /// not
    Not,
    /// bt
    Bt,
    /// bts
    Bts,
    /// btr
    Btr,
    /// btc
    Btc,
    /// xchg
    Xchg,
    /// xadd
    Xadd,
    /// cmpxchg
    Cmpxchg,
    /// cmpxchg8b
    Cmpxchg8b,
    /// cmovcc, by condition
    Cmov(u8),
    /// setcc, by condition
    Set(u8),
    /// push
    Push,
    /// pop
    Pop,
    /// Near call.
    Call,
    /// Near jump.
    Jmp,
    /// movs
    Movs,
    /// cmps
    Cmps,
    /// stos
    Stos,
    /// lods
    Lods,
    /// scas
    Scas,
    /// ins
    Ins,
    /// outs
    Outs,
    /// clflush, clflushopt, clwb: no effect on what is emulated
    Flush,
}

/// An operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// There is none.
    None,
    /// A general purpose register.
    Reg(u8),
    /// Bits 15:8 of register 0 to 3.
    High(u8),
    /// A segment register's selector.
    Selector(Seg),
    /// The instruction's memory operand.
    Mem,
    /// A constant, sign-extended.
    Imm(u64),
}

/// A memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    /// Segment.
    pub seg: Seg,
    /// Base register, [`RIP`] or [`NONE`].
    pub base: u8,
    /// Index register or [`NONE`].
    pub index: u8,
    /// The index is shifted left by this.
    pub scale: u8,
    /// Displacement, sign-extended.
    pub disp: u64,
}

/// An instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    /// Length in bytes.
    pub len: u8,
    /// The width of the code segment it was decoded for.
    pub bits: Bits,
    /// Operation.
    pub op: Op,
    /// Size of the operands in bytes.
    pub size: u8,
    /// Size of addresses in bytes.
    pub addr: u8,
    /// Destination, or first operand.
    pub dst: Operand,
    /// Source, or second operand.
    pub src: Operand,
    /// The memory operand where one of the operands is [`Operand::Mem`]; for string instructions,
    /// `seg` is the segment of the source.
    pub mem: Mem,
    /// Repetition.
    pub rep: Rep,
}

impl Insn {
    /// Whether it writes its memory operand, and nothing else of memory.
    pub fn writes_operand(&self) -> bool {
        self.dst == Operand::Mem
            && !matches!(
                self.op,
                Op::Alu(Alu::Cmp) | Op::Test | Op::Bt | Op::Push | Op::Call | Op::Jmp | Op::Flush
            )
    }
}

/// Prefixes, the REX prefix among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefixes {
    /// 66
    pub opsize: bool,
    /// 67
    pub addrsize: bool,
    /// F3, F2: the last counts.
    pub rep: Rep,
    /// F0
    pub lock: bool,
    /// Segment override, the last that counts.
    pub seg: Option<Seg>,
    /// REX prefix in front of the opcode, or 0.
    pub rex: u8,
}

/// Bytes of an instruction, taken one by one.
#[derive(Clone, Debug)]
pub struct Code<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Code<'a> {
    /// The bytes from the instruction pointer on.
    pub fn new(bytes: &'a [u8]) -> Self {
        Code { bytes, pos: 0 }
    }

    /// How many bytes were taken, at most [`MAX_LEN`].
    pub fn taken(&self) -> u8 {
        self.pos as u8
    }

    /// The next byte.
    pub fn byte(&mut self) -> Result<u8, DecodeError> {
        if self.pos >= MAX_LEN {
            return Err(DecodeError::TooLong);
        }
        let b = *self.bytes.get(self.pos).ok_or(DecodeError::Short)?;
        self.pos += 1;
        Ok(b)
    }

    /// A constant of 1, 2, 4 or 8 bytes, sign-extended.
    fn signed(&mut self, size: u8) -> Result<u64, DecodeError> {
        let mut v = 0u64;
        for i in 0..u32::from(size) {
            v |= u64::from(self.byte()?) << (i * 8);
        }
        let unused = 64 - u32::from(size) * 8;
        Ok(((v << unused) as i64 >> unused) as u64)
    }

    /// Takes the prefixes; gives the first byte of the opcode too.
    pub fn prefixes(&mut self, bits: Bits) -> Result<(Prefixes, u8), DecodeError> {
        let mut p = Prefixes {
            opsize: false,
            addrsize: false,
            rep: Rep::No,
            lock: false,
            seg: None,
            rex: 0,
        };
        loop {
            let b = self.byte()?;
            match b {
                0x66 => p.opsize = true,
                0x67 => p.addrsize = true,
                0xf0 => p.lock = true,
                0xf2 => p.rep = Rep::NotEqual,
                0xf3 => p.rep = Rep::Equal,
                0x64 => p.seg = Some(Seg::Fs),
                0x65 => p.seg = Some(Seg::Gs),
                // In 64-bit mode the others do nothing, not even override an earlier one.
                0x26 | 0x2e | 0x36 | 0x3e => {
                    if bits != Bits::B64 {
                        p.seg = Some(selector(b >> 3 & 3));
                    }
                }
                0x40..=0x4f if bits == Bits::B64 => {
                    p.rex = b;
                    continue;
                }
                _ => return Ok((p, b)),
            }
            // A REX prefix counts only in front of the opcode.
            p.rex = 0;
        }
    }
}

/// es, cs, ss, ds, fs, gs by number.
fn selector(n: u8) -> Seg {
    match n & 7 {
        0 => Seg::Es,
        1 => Seg::Cs,
        2 => Seg::Ss,
        3 => Seg::Ds,
        4 => Seg::Fs,
        _ => Seg::Gs,
    }
}

/// Decodes the instruction that `bytes` begin with.
pub fn decode(bytes: &[u8], bits: Bits) -> Result<Insn, DecodeError> {
    let mut code = Code::new(bytes);
    let (p, opcode) = code.prefixes(bits)?;
    let size = match bits {
        Bits::B64 if p.rex & 8 != 0 => 8,
        Bits::B16 if p.opsize => 4,
        Bits::B16 => 2,
        _ if p.opsize => 2,
        _ => 4,
    };
    let addr = match (bits, p.addrsize) {
        (Bits::B64, false) => 8,
        (Bits::B64, true) | (Bits::B32, false) | (Bits::B16, true) => 4,
        (Bits::B32, true) | (Bits::B16, false) => 2,
    };
    let mem = Mem {
        seg: p.seg.unwrap_or(Seg::Ds),
        base: NONE,
        index: NONE,
        scale: 0,
        disp: 0,
    };
    let insn = Insn {
        len: 0,
        bits,
        op: Op::Mov,
        size,
        addr,
        dst: Operand::None,
        src: Operand::None,
        mem,
        rep: p.rep,
    };
    let mut d = Decoder {
        code,
        p,
        insn,
        reg: 0,
    };
    if opcode == 0x0f {
        d.two_byte()?;
    } else {
        d.one_byte(opcode)?;
    }
    let mut insn = d.insn;
    if p.lock && !lockable(&insn) {
        return Err(DecodeError::Invalid);
    }
    insn.len = d.code.taken();
    Ok(insn)
}

/// Whether a LOCK prefix is legal.
fn lockable(i: &Insn) -> bool {
    let op = match i.op {
        Op::Alu(a) => a != Alu::Cmp,
        Op::Inc | Op::Dec | Op::Neg | Op::Not | Op::Bts | Op::Btr | Op::Btc => true,
        Op::Xadd | Op::Cmpxchg | Op::Cmpxchg8b => true,
        // Its operands have no order.
        Op::Xchg => return true,
        _ => false,
    };
    op && i.dst == Operand::Mem
}

struct Decoder<'a> {
    code: Code<'a>,
    p: Prefixes,
    insn: Insn,
    /// The register field of ModRM, without its REX extension.
    reg: u8,
}

use DecodeError::Unsupported;

impl Decoder<'_> {
    fn one_byte(&mut self, b: u8) -> Result<(), DecodeError> {
        let byte_sized = b & 1 == 0;
        match b {
            0x00..=0x3f if b & 7 < 6 => {
                self.insn.op = Op::Alu(Alu::of(b >> 3));
                self.sized(byte_sized);
                match b & 7 {
                    0 | 1 => self.rm_reg(),
                    2 | 3 => self.reg_rm(),
                    _ => {
                        self.insn.dst = Operand::Reg(0);
                        self.immediate()
                    }
                }
            }
            0x63 if self.insn.bits == Bits::B64 => {
                // Without REX.W it is a plain move, of 16 bits if so prefixed.
                self.insn.op = if self.insn.size == 8 {
                    Op::Movsx(4)
                } else {
                    Op::Mov
                };
                self.reg_rm()
            }
            0x6c..=0x6f => {
                self.insn.op = if b < 0x6e { Op::Ins } else { Op::Outs };
                self.sized(byte_sized);
                self.insn.size = self.insn.size.min(4);
                Ok(())
            }
            0x82 if self.insn.bits == Bits::B64 => Err(DecodeError::Invalid),
            0x80..=0x83 => {
                self.sized(b != 0x81 && b != 0x83);
                self.modrm()?;
                self.insn.dst = self.insn.src;
                self.insn.op = Op::Alu(Alu::of(self.reg));
                if b == 0x81 {
                    self.immediate()
                } else {
                    self.immediate_of(1)
                }
            }
            0x84 | 0x85 => {
                self.insn.op = Op::Test;
                self.sized(byte_sized);
                self.rm_reg()
            }
            0x86 | 0x87 => {
                self.insn.op = Op::Xchg;
                self.sized(byte_sized);
                self.rm_reg()?;
                self.lock_needs_memory()
            }
            0x88 | 0x89 => {
                self.sized(byte_sized);
                self.rm_reg()
            }
            0x8a | 0x8b => {
                self.sized(byte_sized);
                self.reg_rm()
            }
            0x8c => {
                self.modrm()?;
                if self.reg > 5 {
                    return Err(DecodeError::Invalid);
                }
                self.insn.dst = self.insn.src;
                // Memory always gets 16 bits.
                if self.insn.dst == Operand::Mem {
                    self.insn.size = 2;
                }
                self.insn.src = Operand::Selector(selector(self.reg));
                Ok(())
            }
            0x8f => {
                self.stack_sized();
                self.modrm()?;
                if self.reg != 0 {
                    return Err(Unsupported);
                }
                self.insn.op = Op::Pop;
                self.insn.dst = self.insn.src;
                self.insn.src = Operand::None;
                Ok(())
            }
            0xa0..=0xa3 => {
                self.sized(byte_sized);
                self.insn.mem.disp = self.code.signed(self.insn.addr)?;
                (self.insn.dst, self.insn.src) = match b {
                    0xa0 | 0xa1 => (Operand::Reg(0), Operand::Mem),
                    _ => (Operand::Mem, Operand::Reg(0)),
                };
                Ok(())
            }
            0xa4..=0xa7 | 0xaa..=0xaf => {
                self.insn.op = match b >> 1 {
                    0x52 => Op::Movs,
                    0x53 => Op::Cmps,
                    0x55 => Op::Stos,
                    0x56 => Op::Lods,
                    _ => Op::Scas,
                };
                self.sized(byte_sized);
                Ok(())
            }
            0xa8 | 0xa9 => {
                self.insn.op = Op::Test;
                self.sized(byte_sized);
                self.insn.dst = Operand::Reg(0);
                self.immediate()
            }
            0xc6 | 0xc7 => {
                self.sized(byte_sized);
                self.modrm()?;
                if self.reg != 0 {
                    return Err(Unsupported);
                }
                self.insn.dst = self.insn.src;
                self.immediate()
            }
            0xf6 | 0xf7 => {
                self.sized(byte_sized);
                self.modrm()?;
                self.insn.dst = self.insn.src;
                self.insn.src = Operand::None;
                match self.reg {
                    0 | 1 => {
                        self.insn.op = Op::Test;
                        self.immediate()?;
                    }
                    2 => self.insn.op = Op::Not,
                    3 => self.insn.op = Op::Neg,
                    _ => return Err(Unsupported),
                }
                Ok(())
            }
            0xfe | 0xff => {
                self.sized(byte_sized);
                self.modrm()?;
                self.insn.dst = self.insn.src;
                self.insn.src = Operand::None;
                self.insn.op = match self.reg {
                    0 => Op::Inc,
                    1 => Op::Dec,
                    2 if b == 0xff => Op::Call,
                    4 if b == 0xff => Op::Jmp,
                    6 if b == 0xff => Op::Push,
                    _ => return Err(Unsupported),
                };
                match self.insn.op {
                    Op::Push => self.stack_sized(),
                    // 64-bit mode knows only 64-bit targets.
                    Op::Call | Op::Jmp if self.insn.bits == Bits::B64 => self.insn.size = 8,
                    _ => {}
                }
                Ok(())
            }
            _ => Err(Unsupported),
        }
    }

    fn two_byte(&mut self) -> Result<(), DecodeError> {
        let b = self.code.byte()?;
        let byte_sized = b & 1 == 0;
        let plain = !self.p.opsize && self.p.rep == Rep::No;
        match b {
            0x38 => match self.code.byte()? {
                // With F2 they are CRC32.
                m @ (0xf0 | 0xf1) if self.p.rep == Rep::No => {
                    self.insn.op = Op::Movbe;
                    if m == 0xf0 {
                        self.reg_rm()?
                    } else {
                        self.rm_reg()?
                    }
                    if self.insn.dst != Operand::Mem && self.insn.src != Operand::Mem {
                        return Err(DecodeError::Invalid);
                    }
                    Ok(())
                }
                _ => Err(Unsupported),
            },
            0x40..=0x4f => {
                self.insn.op = Op::Cmov(b & 15);
                self.reg_rm()
            }
            0x90..=0x9f => {
                self.sized(true);
                self.modrm()?;
                self.insn.op = Op::Set(b & 15);
                self.insn.dst = self.insn.src;
                self.insn.src = Operand::None;
                Ok(())
            }
            0xa3 | 0xab | 0xb3 | 0xbb => {
                self.insn.op = bit_op(b >> 3 & 3);
                self.rm_reg()
            }
            0xba => {
                self.modrm()?;
                if self.reg < 4 {
                    return Err(DecodeError::Invalid);
                }
                self.insn.op = bit_op(self.reg & 3);
                self.insn.dst = self.insn.src;
                self.immediate_of(1)
            }
            0xae if self.p.rep == Rep::No => {
                self.modrm()?;
                let known = self.reg == 7 || self.reg == 6 && self.p.opsize;
                if self.insn.src != Operand::Mem || !known {
                    return Err(Unsupported);
                }
                self.sized(true);
                self.insn.op = Op::Flush;
                self.insn.dst = Operand::Mem;
                self.insn.src = Operand::None;
                Ok(())
            }
            0xb0 | 0xb1 => {
                self.insn.op = Op::Cmpxchg;
                self.sized(byte_sized);
                self.rm_reg()
            }
            0xb6 | 0xb7 | 0xbe | 0xbf => {
                let from = if byte_sized { 1 } else { 2 };
                self.insn.op = if b < 0xb8 {
                    Op::Movzx(from)
                } else {
                    Op::Movsx(from)
                };
                let size = self.insn.size;
                self.insn.size = from;
                self.modrm()?;
                self.insn.size = size;
                self.insn.dst = Operand::Reg(self.reg_number());
                Ok(())
            }
            0xc0 | 0xc1 => {
                self.insn.op = Op::Xadd;
                self.sized(byte_sized);
                self.rm_reg()
            }
            // MOVNTI
            0xc3 if plain => {
                self.insn.size = self.insn.size.max(4);
                self.rm_reg()?;
                if self.insn.dst != Operand::Mem {
                    return Err(DecodeError::Invalid);
                }
                Ok(())
            }
            0xc7 => {
                self.modrm()?;
                if self.reg != 1 || self.insn.src != Operand::Mem || self.p.rex & 8 != 0 {
                    return Err(Unsupported);
                }
                self.insn.op = Op::Cmpxchg8b;
                self.insn.size = 8;
                self.insn.dst = Operand::Mem;
                self.insn.src = Operand::None;
                Ok(())
            }
            _ => Err(Unsupported),
        }
    }

    fn sized(&mut self, byte: bool) {
        if byte {
            self.insn.size = 1;
        }
    }

    /// Pushes and pops are of 64 bits in 64-bit mode, or of 16.
    fn stack_sized(&mut self) {
        if self.insn.bits == Bits::B64 {
            self.insn.size = if self.p.opsize && self.p.rex & 8 == 0 {
                2
            } else {
                8
            };
        }
    }

    fn lock_needs_memory(&self) -> Result<(), DecodeError> {
        if self.p.lock && self.insn.dst != Operand::Mem {
            return Err(DecodeError::Invalid);
        }
        Ok(())
    }

    fn reg_number(&self) -> u8 {
        self.reg | (self.p.rex & 4) << 1
    }

    fn register(&self, n: u8) -> Operand {
        // Without a REX prefix the byte registers 4 to 7 are ah, ch, dh, bh.
        if self.insn.size == 1 && self.p.rex == 0 && n >= 4 {
            Operand::High(n - 4)
        } else {
            Operand::Reg(n)
        }
    }

    fn rm_reg(&mut self) -> Result<(), DecodeError> {
        self.modrm()?;
        self.insn.dst = self.insn.src;
        self.insn.src = self.register(self.reg_number());
        Ok(())
    }

    fn reg_rm(&mut self) -> Result<(), DecodeError> {
        self.modrm()?;
        self.insn.dst = self.register(self.reg_number());
        Ok(())
    }

    /// A constant of the operand size, at most four bytes.
    fn immediate(&mut self) -> Result<(), DecodeError> {
        self.immediate_of(self.insn.size.min(4))
    }

    fn immediate_of(&mut self, size: u8) -> Result<(), DecodeError> {
        self.insn.src = Operand::Imm(self.code.signed(size)?);
        Ok(())
    }

    /// Takes ModRM and what belongs to it; the operand it names becomes the source.
    fn modrm(&mut self) -> Result<(), DecodeError> {
        let b = self.code.byte()?;
        let (mode, rm) = (b >> 6, b & 7);
        self.reg = b >> 3 & 7;
        if mode == 3 {
            self.insn.src = self.register(rm | (self.p.rex & 1) << 3);
            return Ok(());
        }
        self.insn.src = Operand::Mem;
        if self.insn.addr == 2 {
            self.mem16(mode, rm)
        } else {
            self.mem32(mode, rm)
        }
    }

    fn mem16(&mut self, mode: u8, rm: u8) -> Result<(), DecodeError> {
        const BX: u8 = 3;
        const BP: u8 = 5;
        const SI: u8 = 6;
        const DI: u8 = 7;
        let (base, index) = match rm {
            0 => (BX, SI),
            1 => (BX, DI),
            2 => (BP, SI),
            3 => (BP, DI),
            4 => (SI, NONE),
            5 => (DI, NONE),
            6 if mode == 0 => (NONE, NONE),
            6 => (BP, NONE),
            _ => (BX, NONE),
        };
        let disp = match mode {
            0 if base == NONE => self.code.signed(2)?,
            0 => 0,
            1 => self.code.signed(1)?,
            _ => self.code.signed(2)?,
        };
        self.set_mem(base, index, 0, disp, base == BP);
        Ok(())
    }

    fn mem32(&mut self, mode: u8, rm: u8) -> Result<(), DecodeError> {
        let mut base = rm | (self.p.rex & 1) << 3;
        let (mut index, mut scale) = (NONE, 0);
        let mut no_base = mode == 0 && rm == 5;
        if rm == 4 {
            let sib = self.code.byte()?;
            base = sib & 7 | (self.p.rex & 1) << 3;
            no_base = mode == 0 && sib & 7 == 5;
            let i = sib >> 3 & 7 | (self.p.rex & 2) << 2;
            if i != 4 {
                (index, scale) = (i, sib >> 6);
            }
        }
        let stack = !no_base && (base == 4 || base == 5);
        if no_base {
            base = if rm == 5 && self.insn.bits == Bits::B64 {
                RIP
            } else {
                NONE
            };
        }
        let disp = match mode {
            0 if no_base => self.code.signed(4)?,
            0 => 0,
            1 => self.code.signed(1)?,
            _ => self.code.signed(4)?,
        };
        self.set_mem(base, index, scale, disp, stack);
        Ok(())
    }

    fn set_mem(&mut self, base: u8, index: u8, scale: u8, disp: u64, stack: bool) {
        let seg = match self.p.seg {
            Some(s) => s,
            None if stack => Seg::Ss,
            None => Seg::Ds,
        };
        self.insn.mem = Mem {
            seg,
            base,
            index,
            scale,
            disp,
        };
    }
}

fn bit_op(n: u8) -> Op {
    match n & 3 {
        0 => Op::Bt,
        1 => Op::Bts,
        2 => Op::Btr,
        _ => Op::Btc,
    }
}
