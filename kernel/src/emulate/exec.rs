//! Carrying out an [`Insn`] on a [`Cpu`].
//!
//! Order matters: whatever can fault is tried before anything that cannot be undone, since reading a
//! device register may change it. Registers and flags change last.

use galvan_base::state::Seg;

use super::alu::{self, Flags};
use super::{Alu, Bits, Cpu, Flow, Insn, NONE, Op, Operand, RIP, Rep, Stop, mask};

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RSP: u8 = 4;
const RSI: u8 = 6;
const RDI: u8 = 7;

const CODE: u16 = 1 << 3;
/// Of a data segment: the offsets are those above the limit.
const EXPAND_DOWN: u16 = 1 << 2;
/// A data segment may be written, a code segment read.
const ALLOWED: u16 = 1 << 1;
const PRESENT: u16 = 1 << 7;
const BIG: u16 = 1 << 10;

/// Executes an instruction on `cpu`, which is in the mode that it was decoded for. Of a repeated
/// one, at most `iterations` (not 0). The instruction pointer is left to the caller.
pub fn execute<C: Cpu>(cpu: &mut C, insn: &Insn, iterations: u32) -> Result<Flow, Stop> {
    let mut m = Machine { cpu, i: insn };
    match insn.op {
        Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas | Op::Ins | Op::Outs => {
            m.string(iterations)
        }
        _ => m.plain(),
    }
}

struct Machine<'a, C> {
    cpu: &'a mut C,
    i: &'a Insn,
}

impl<C: Cpu> Machine<'_, C> {
    fn plain(&mut self) -> Result<Flow, Stop> {
        let i = self.i;
        let size = i.size;
        match i.op {
            Op::Mov => {
                let v = self.load(i.src, size)?;
                self.store(i.dst, size, v)?;
            }
            Op::Movzx(from) => {
                let v = self.load(i.src, from)?;
                self.store(i.dst, size, v)?;
            }
            Op::Movsx(from) => {
                let unused = 64 - u32::from(from) * 8;
                let v = self.load(i.src, from)?;
                self.store(i.dst, size, ((v << unused) as i64 >> unused) as u64)?;
            }
            Op::Movbe => {
                let v = self.load(i.src, size)?;
                self.store(i.dst, size, v.swap_bytes() >> (64 - u32::from(size) * 8))?;
            }
            Op::Alu(Alu::Cmp) => self.compare(|a, b, f| Alu::Cmp.apply(a, b, size, f).1)?,
            Op::Test => self.compare(|a, b, f| alu::logic(a & b, size, f).1)?,
            Op::Alu(op) => self.update(|a, b, f| op.apply(a, b, size, f))?,
            Op::Inc => self.update(|a, _, f| alu::step(a, true, size, f))?,
            Op::Dec => self.update(|a, _, f| alu::step(a, false, size, f))?,
            Op::Neg => self.update(|a, _, f| alu::sub(0, a, 0, size, f))?,
            Op::Not => self.update(|a, _, f| (!a, f))?,
            Op::Bt | Op::Bts | Op::Btr | Op::Btc => self.bit()?,
            Op::Xchg => {
                let at = self.begin_update(i.dst, size)?;
                let old = self.load_at(i.dst, at, size)?;
                let new = self.load(i.src, size)?;
                self.store_at(i.dst, at, size, new)?;
                self.store(i.src, size, old)?;
            }
            Op::Xadd => {
                let at = self.begin_update(i.dst, size)?;
                let old = self.load_at(i.dst, at, size)?;
                let by = self.load(i.src, size)?;
                let (new, flags) = alu::add(old, by, 0, size, self.cpu.rflags());
                if i.dst == Operand::Mem {
                    self.store_at(i.dst, at, size, new)?;
                    self.store(i.src, size, old)?;
                } else {
                    // The sum wins where both are one register.
                    self.store(i.src, size, old)?;
                    self.store(i.dst, size, new)?;
                }
                self.cpu.set_rflags(flags);
            }
            Op::Cmpxchg => {
                let at = self.begin_update(i.dst, size)?;
                let old = self.load_at(i.dst, at, size)?;
                let accumulator = self.cpu.reg(RAX) & mask(size);
                let (_, flags) = alu::sub(accumulator, old, 0, size, self.cpu.rflags());
                let equal = accumulator == old;
                // Memory is written in either case, a register is not.
                if equal || i.dst == Operand::Mem {
                    let new = if equal { self.load(i.src, size)? } else { old };
                    self.store_at(i.dst, at, size, new)?;
                }
                if !equal {
                    self.store(Operand::Reg(RAX), size, old)?;
                }
                self.cpu.set_rflags(flags);
            }
            Op::Cmpxchg8b => {
                let at = self.begin_update(i.dst, 8)?;
                let old = self.load_at(i.dst, at, 8)?;
                let pair = |c: &C, high, low| c.reg(high) << 32 | c.reg(low) & 0xffff_ffff;
                let equal = old == pair(self.cpu, RDX, RAX);
                let new = if equal { pair(self.cpu, RCX, RBX) } else { old };
                self.store_at(i.dst, at, 8, new)?;
                let mut flags = self.cpu.rflags() & !Flags::ZF;
                if equal {
                    flags |= Flags::ZF;
                } else {
                    self.cpu.set_reg(RAX, old & 0xffff_ffff);
                    self.cpu.set_reg(RDX, old >> 32);
                }
                self.cpu.set_rflags(flags);
            }
            Op::Cmov(cc) => {
                let v = self.load(i.src, size)?;
                if alu::condition(cc, self.cpu.rflags()) {
                    self.store(i.dst, size, v)?;
                } else if size == 4 {
                    // The upper half is cleared all the same.
                    let old = self.load(i.dst, size)?;
                    self.store(i.dst, size, old)?;
                }
            }
            Op::Set(cc) => {
                let v = alu::condition(cc, self.cpu.rflags());
                self.store(i.dst, 1, u64::from(v))?;
            }
            Op::Push => {
                let (top, at) = self.stack_down(size)?;
                self.cpu.prepare_write(at, size)?;
                let v = self.load(i.dst, size)?;
                self.cpu.write(at, size, v)?;
                self.set_stack(top);
            }
            Op::Pop => {
                let at = self.stack_top(size)?;
                let old = self.cpu.reg(RSP);
                let v = self.cpu.read(at, size)?;
                // An address relative to the stack pointer sees it popped.
                self.set_stack(old.wrapping_add(u64::from(size)));
                if let Err(e) = self.store(i.dst, size, v) {
                    self.cpu.set_reg(RSP, old);
                    return Err(e);
                }
            }
            Op::Call => {
                let back = self.cpu.rip().wrapping_add(u64::from(i.len)) & mask(self.ip_size());
                let (top, at) = self.stack_down(size)?;
                self.cpu.prepare_write(at, size)?;
                let to = self.target()?;
                self.cpu.write(at, size, back)?;
                self.set_stack(top);
                return Ok(Flow::Jump(to));
            }
            Op::Jmp => return Ok(Flow::Jump(self.target()?)),
            Op::Flush => {
                let at = self.address(i.dst, false)?;
                self.cpu.read(at, 1)?;
            }
            Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas | Op::Ins | Op::Outs => {}
        }
        Ok(Flow::Next)
    }

    fn compare(&mut self, f: impl FnOnce(u64, u64, u64) -> u64) -> Result<(), Stop> {
        let a = self.load(self.i.dst, self.i.size)?;
        let b = self.load(self.i.src, self.i.size)?;
        let flags = f(a, b, self.cpu.rflags());
        self.cpu.set_rflags(flags);
        Ok(())
    }

    fn update(&mut self, f: impl FnOnce(u64, u64, u64) -> (u64, u64)) -> Result<(), Stop> {
        let (dst, size) = (self.i.dst, self.i.size);
        let b = self.load(self.i.src, size)?;
        let at = self.begin_update(dst, size)?;
        let a = self.load_at(dst, at, size)?;
        let (r, flags) = f(a, b, self.cpu.rflags());
        self.store_at(dst, at, size, r)?;
        self.cpu.set_rflags(flags);
        Ok(())
    }

    fn bit(&mut self) -> Result<(), Stop> {
        let i = self.i;
        let bits = u64::from(i.size) * 8;
        let n = self.load(i.src, i.size)?;
        let bit = 1u64 << (n & (bits - 1));
        let mut at = 0;
        if i.dst == Operand::Mem {
            let mut ea = self.effective();
            if !matches!(i.src, Operand::Imm(_)) {
                // A register names any bit of memory around the operand.
                let unused = 64 - bits as u32;
                let n = (n << unused) as i64 >> unused;
                let unit = n >> bits.trailing_zeros();
                ea = ea.wrapping_add((unit as u64).wrapping_mul(u64::from(i.size))) & mask(i.addr);
            }
            at = self.linear(i.mem.seg, ea, i.size, i.op != Op::Bt)?;
            if i.op != Op::Bt {
                self.cpu.prepare_update(at, i.size)?;
            }
        }
        let old = self.load_at(i.dst, at, i.size)?;
        let new = match i.op {
            Op::Bts => old | bit,
            Op::Btr => old & !bit,
            Op::Btc => old ^ bit,
            _ => old,
        };
        if i.op != Op::Bt {
            self.store_at(i.dst, at, i.size, new)?;
        }
        let flags = self.cpu.rflags() & !Flags::CF;
        self.cpu.set_rflags(if old & bit != 0 {
            flags | Flags::CF
        } else {
            flags
        });
        Ok(())
    }

    // ---- string instructions

    fn string(&mut self, iterations: u32) -> Result<Flow, Stop> {
        let i = self.i;
        let repeat = i.rep != Rep::No;
        for _ in 0..iterations.max(1) {
            if repeat && self.cpu.reg(RCX) & mask(i.addr) == 0 {
                return Ok(Flow::Next);
            }
            self.iteration()?;
            if !repeat {
                return Ok(Flow::Next);
            }
            let left = self.cpu.reg(RCX).wrapping_sub(1) & mask(i.addr);
            self.set_address_register(RCX, left);
            let compares = matches!(i.op, Op::Cmps | Op::Scas);
            let equal = self.cpu.rflags() & Flags::ZF != 0;
            if left == 0 || compares && equal != (i.rep == Rep::Equal) {
                return Ok(Flow::Next);
            }
        }
        Ok(Flow::Again)
    }

    fn iteration(&mut self) -> Result<(), Stop> {
        let i = self.i;
        let size = i.size;
        let has_src = matches!(i.op, Op::Movs | Op::Cmps | Op::Lods | Op::Outs);
        let has_dst = matches!(i.op, Op::Movs | Op::Cmps | Op::Stos | Op::Scas | Op::Ins);
        let writes = matches!(i.op, Op::Movs | Op::Stos | Op::Ins);
        let (mut src, mut dst) = (0, 0);
        if has_src {
            src = self.linear(i.mem.seg, self.cpu.reg(RSI) & mask(i.addr), size, false)?;
        }
        if has_dst {
            // The destination's segment cannot be overridden.
            dst = self.linear(Seg::Es, self.cpu.reg(RDI) & mask(i.addr), size, writes)?;
        }
        if matches!(i.op, Op::Movs | Op::Ins) {
            self.cpu.prepare_write(dst, size)?;
        }
        match i.op {
            Op::Movs => {
                let v = self.cpu.read(src, size)?;
                self.cpu.write(dst, size, v)?;
            }
            Op::Stos => {
                let v = self.cpu.reg(RAX) & mask(size);
                self.cpu.write(dst, size, v)?;
            }
            Op::Lods => {
                let v = self.cpu.read(src, size)?;
                self.store(Operand::Reg(RAX), size, v)?;
            }
            Op::Cmps | Op::Scas => {
                let a = if has_src {
                    self.cpu.read(src, size)?
                } else {
                    self.cpu.reg(RAX)
                };
                let b = self.cpu.read(dst, size)?;
                let (_, flags) = alu::sub(a, b, 0, size, self.cpu.rflags());
                self.cpu.set_rflags(flags);
            }
            Op::Ins => {
                let v = self.cpu.port_in(self.cpu.reg(RDX) as u16, size)?;
                self.cpu.write(dst, size, u64::from(v))?;
            }
            _ => {
                let v = self.cpu.read(src, size)?;
                self.cpu
                    .port_out(self.cpu.reg(RDX) as u16, size, v as u32)?;
            }
        }
        let down = self.cpu.rflags() & Flags::DF != 0;
        let step = if down {
            u64::from(size).wrapping_neg()
        } else {
            u64::from(size)
        };
        if has_src {
            self.set_address_register(RSI, self.cpu.reg(RSI).wrapping_add(step));
        }
        if has_dst {
            self.set_address_register(RDI, self.cpu.reg(RDI).wrapping_add(step));
        }
        Ok(())
    }

    /// Changes a register that is as wide as addresses are.
    fn set_address_register(&mut self, n: u8, v: u64) {
        self.set_reg(n, self.i.addr, v);
    }

    // ---- operands

    fn load(&mut self, o: Operand, size: u8) -> Result<u64, Stop> {
        let at = self.address(o, false)?;
        self.load_at(o, at, size)
    }

    /// Loads an operand whose linear address, if it is in memory, is known.
    fn load_at(&mut self, o: Operand, at: u64, size: u8) -> Result<u64, Stop> {
        Ok(match o {
            Operand::None => 0,
            Operand::Reg(n) => self.cpu.reg(n) & mask(size),
            Operand::High(n) => self.cpu.reg(n) >> 8 & 0xff,
            Operand::Selector(s) => u64::from(self.cpu.segment(s).sel),
            Operand::Imm(v) => v & mask(size),
            Operand::Mem => self.cpu.read(at, size)? & mask(size),
        })
    }

    fn store(&mut self, o: Operand, size: u8, v: u64) -> Result<(), Stop> {
        let at = self.address(o, true)?;
        self.store_at(o, at, size, v)
    }

    fn store_at(&mut self, o: Operand, at: u64, size: u8, v: u64) -> Result<(), Stop> {
        match o {
            Operand::Reg(n) => self.set_reg(n, size, v),
            Operand::High(n) => {
                let old = self.cpu.reg(n);
                self.cpu.set_reg(n, old & !0xff00 | (v & 0xff) << 8);
            }
            Operand::Mem => self.cpu.write(at, size, v & mask(size))?,
            Operand::None | Operand::Selector(_) | Operand::Imm(_) => {}
        }
        Ok(())
    }

    /// Writes the low `size` bytes of a register; of four, the upper half becomes 0.
    fn set_reg(&mut self, n: u8, size: u8, v: u64) {
        let v = match size {
            1 | 2 => self.cpu.reg(n) & !mask(size) | v & mask(size),
            _ => v & mask(size),
        };
        self.cpu.set_reg(n, v);
    }

    /// The linear address of an operand in memory; 0 for others.
    fn address(&mut self, o: Operand, write: bool) -> Result<u64, Stop> {
        if o != Operand::Mem {
            return Ok(0);
        }
        let size = match self.i.op {
            Op::Movzx(from) | Op::Movsx(from) => from,
            _ => self.i.size,
        };
        self.linear(self.i.mem.seg, self.effective(), size, write)
    }

    /// The linear address of an operand that is read and then written.
    fn begin_update(&mut self, o: Operand, size: u8) -> Result<u64, Stop> {
        let at = self.address(o, true)?;
        if o == Operand::Mem {
            self.cpu.prepare_update(at, size)?;
        }
        Ok(at)
    }

    /// The offset of the memory operand within its segment.
    fn effective(&self) -> u64 {
        let m = &self.i.mem;
        let mut ea = m.disp;
        ea = ea.wrapping_add(match m.base {
            NONE => 0,
            RIP => self.cpu.rip().wrapping_add(u64::from(self.i.len)),
            n => self.cpu.reg(n),
        });
        if m.index != NONE {
            ea = ea.wrapping_add(self.cpu.reg(m.index) << m.scale);
        }
        ea & mask(self.i.addr)
    }

    /// The linear address of `size` bytes at an offset of a segment, if the segment allows the
    /// access (AMD APM volume 2 "Segment Protection").
    fn linear(&self, s: Seg, offset: u64, size: u8, write: bool) -> Result<u64, Stop> {
        let refused = if s == Seg::Ss { Stop::SS } else { Stop::GP };
        let last = u64::from(size).saturating_sub(1);
        if self.i.bits == Bits::B64 {
            let base = if matches!(s, Seg::Fs | Seg::Gs) {
                self.cpu.segment(s).base
            } else {
                0
            };
            let at = base.wrapping_add(offset);
            let canonical = |a: u64| (a << 16) as i64 >> 16 == a as i64;
            return if canonical(at) && canonical(at.wrapping_add(last)) {
                Ok(at)
            } else {
                Err(refused)
            };
        }
        let seg = self.cpu.segment(s);
        let code = seg.attr & CODE != 0;
        if self.cpu.protected() {
            let allowed = match (code, write) {
                (true, true) => false,
                (false, false) => true,
                _ => seg.attr & ALLOWED != 0,
            };
            if seg.attr & PRESENT == 0 || !allowed {
                return Err(refused);
            }
        }
        let end = offset.checked_add(last).ok_or(refused)?;
        let limit = u64::from(seg.limit);
        let inside = if !code && seg.attr & EXPAND_DOWN != 0 {
            offset > limit
                && end
                    <= if seg.attr & BIG != 0 {
                        0xffff_ffff
                    } else {
                        0xffff
                    }
        } else {
            end <= limit
        };
        if !inside {
            return Err(refused);
        }
        Ok(seg.base.wrapping_add(offset) & 0xffff_ffff)
    }

    // ---- stack and targets

    fn stack_size(&self) -> u8 {
        match self.i.bits {
            Bits::B64 => 8,
            _ if self.cpu.segment(Seg::Ss).attr & BIG != 0 => 4,
            _ => 2,
        }
    }

    fn stack_top(&self, size: u8) -> Result<u64, Stop> {
        self.linear(
            Seg::Ss,
            self.cpu.reg(RSP) & mask(self.stack_size()),
            size,
            false,
        )
    }

    /// The stack pointer after a push, and the linear address there.
    fn stack_down(&self, size: u8) -> Result<(u64, u64), Stop> {
        let top = self.cpu.reg(RSP).wrapping_sub(u64::from(size));
        Ok((
            top,
            self.linear(Seg::Ss, top & mask(self.stack_size()), size, true)?,
        ))
    }

    fn set_stack(&mut self, top: u64) {
        let size = self.stack_size();
        self.set_reg(RSP, size, top);
    }

    fn ip_size(&self) -> u8 {
        match self.i.bits {
            Bits::B16 => 2,
            Bits::B32 => 4,
            Bits::B64 => 8,
        }
    }

    /// Where a near jump or call goes.
    fn target(&mut self) -> Result<u64, Stop> {
        let to = self.load(self.i.dst, self.i.size)?;
        let inside = match self.i.bits {
            Bits::B64 => (to << 16) as i64 >> 16 == to as i64,
            _ => to <= u64::from(self.cpu.segment(Seg::Cs).limit),
        };
        if inside { Ok(to) } else { Err(Stop::GP) }
    }
}
