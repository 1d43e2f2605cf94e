//! The emulator against two oracles: its decoder against iced-x86, its execution against the
//! processor that runs the test.

use std::collections::BTreeMap;

use galvan_kernel::emulate::{
    Alu, Bits, DecodeError, Insn, Mem, NONE, Op, Operand, RIP, Rep, decode,
};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// xorshift64*: the same sequence in every run.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
}

/// Random bytes that are likely to be an instruction of interest.
fn random_code(r: &mut Rng) -> [u8; 16] {
    const PREFIXES: [u8; 11] = [
        0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65,
    ];
    let mut code = [0; 16];
    let mut at = 0;
    while at < 14 && r.below(5) < 2 {
        code[at] = match r.below(3) {
            0 => 0x40 | r.below(16) as u8,
            _ => PREFIXES[r.below(11) as usize],
        };
        at += 1;
    }
    for b in &mut code[at..] {
        *b = r.next() as u8;
    }
    match r.below(8) {
        0..=2 => {
            const TWO: [u8; 12] = [
                0x38, 0x40, 0x90, 0xa3, 0xab, 0xb3, 0xbb, 0xba, 0xae, 0xb0, 0xc0, 0xc7,
            ];
            code[at] = 0x0f;
            if at < 15 && r.below(2) == 0 {
                code[at + 1] = TWO[r.below(12) as usize];
                if at < 14 && code[at + 1] == 0x38 {
                    code[at + 2] = 0xf0 | r.below(2) as u8;
                }
            }
        }
        3 => code[at] = [0xf6, 0xf7, 0xfe, 0xff, 0xc6, 0xc7, 0x8f, 0x63][r.below(8) as usize],
        4 => code[at] = 0xa0 | r.below(16) as u8,
        _ => {}
    }
    code
}

fn mode(bits: Bits) -> u32 {
    match bits {
        Bits::B16 => 16,
        Bits::B32 => 32,
        Bits::B64 => 64,
    }
}

fn iced(code: &[u8], bits: Bits) -> Instruction {
    let mut d = Decoder::with_ip(mode(bits), code, 0, DecoderOptions::NONE);
    d.decode()
}

fn mnemonic(i: &Insn) -> Option<&'static [Mnemonic]> {
    use Mnemonic as M;
    Some(match i.op {
        Op::Mov => &[M::Mov, M::Movnti, M::Movsxd],
        Op::Movzx(_) => &[M::Movzx],
        Op::Movsx(4) => &[M::Movsxd],
        Op::Movsx(_) => &[M::Movsx],
        Op::Movbe => &[M::Movbe],
        Op::Alu(Alu::Add) => &[M::Add],
        Op::Alu(Alu::Or) => &[M::Or],
        Op::Alu(Alu::Adc) => &[M::Adc],
        Op::Alu(Alu::Sbb) => &[M::Sbb],
        Op::Alu(Alu::And) => &[M::And],
        Op::Alu(Alu::Sub) => &[M::Sub],
        Op::Alu(Alu::Xor) => &[M::Xor],
        Op::Alu(Alu::Cmp) => &[M::Cmp],
        Op::Test => &[M::Test],
        Op::Inc => &[M::Inc],
        Op::Dec => &[M::Dec],
        Op::Neg => &[M::Neg],
        Op::Not => &[M::Not],
        Op::Bt => &[M::Bt],
        Op::Bts => &[M::Bts],
        Op::Btr => &[M::Btr],
        Op::Btc => &[M::Btc],
        Op::Xchg => &[M::Xchg],
        Op::Xadd => &[M::Xadd],
        Op::Cmpxchg => &[M::Cmpxchg],
        Op::Cmpxchg8b => &[M::Cmpxchg8b],
        Op::Push => &[M::Push],
        Op::Pop => &[M::Pop],
        Op::Call => &[M::Call],
        Op::Jmp => &[M::Jmp],
        Op::Movs => &[M::Movsb, M::Movsw, M::Movsd, M::Movsq],
        Op::Cmps => &[M::Cmpsb, M::Cmpsw, M::Cmpsd, M::Cmpsq],
        Op::Stos => &[M::Stosb, M::Stosw, M::Stosd, M::Stosq],
        Op::Lods => &[M::Lodsb, M::Lodsw, M::Lodsd, M::Lodsq],
        Op::Scas => &[M::Scasb, M::Scasw, M::Scasd, M::Scasq],
        Op::Ins => &[M::Insb, M::Insw, M::Insd],
        Op::Outs => &[M::Outsb, M::Outsw, M::Outsd],
        Op::Flush => &[M::Clflush, M::Clflushopt, M::Clwb],
        Op::Cmov(cc) => &[
            [M::Cmovo],
            [M::Cmovno],
            [M::Cmovb],
            [M::Cmovae],
            [M::Cmove],
            [M::Cmovne],
            [M::Cmovbe],
            [M::Cmova],
            [M::Cmovs],
            [M::Cmovns],
            [M::Cmovp],
            [M::Cmovnp],
            [M::Cmovl],
            [M::Cmovge],
            [M::Cmovle],
            [M::Cmovg],
        ][usize::from(cc)],
        Op::Set(cc) => &[
            [M::Seto],
            [M::Setno],
            [M::Setb],
            [M::Setae],
            [M::Sete],
            [M::Setne],
            [M::Setbe],
            [M::Seta],
            [M::Sets],
            [M::Setns],
            [M::Setp],
            [M::Setnp],
            [M::Setl],
            [M::Setge],
            [M::Setle],
            [M::Setg],
        ][usize::from(cc)],
    })
}

fn is_string(op: Op) -> bool {
    matches!(
        op,
        Op::Movs | Op::Cmps | Op::Stos | Op::Lods | Op::Scas | Op::Ins | Op::Outs
    )
}

fn register(o: Operand, size: u8) -> Option<Register> {
    use Register as R;
    const NAMES: [[R; 16]; 4] = [
        [
            R::AL,
            R::CL,
            R::DL,
            R::BL,
            R::SPL,
            R::BPL,
            R::SIL,
            R::DIL,
            R::R8L,
            R::R9L,
            R::R10L,
            R::R11L,
            R::R12L,
            R::R13L,
            R::R14L,
            R::R15L,
        ],
        [
            R::AX,
            R::CX,
            R::DX,
            R::BX,
            R::SP,
            R::BP,
            R::SI,
            R::DI,
            R::R8W,
            R::R9W,
            R::R10W,
            R::R11W,
            R::R12W,
            R::R13W,
            R::R14W,
            R::R15W,
        ],
        [
            R::EAX,
            R::ECX,
            R::EDX,
            R::EBX,
            R::ESP,
            R::EBP,
            R::ESI,
            R::EDI,
            R::R8D,
            R::R9D,
            R::R10D,
            R::R11D,
            R::R12D,
            R::R13D,
            R::R14D,
            R::R15D,
        ],
        [
            R::RAX,
            R::RCX,
            R::RDX,
            R::RBX,
            R::RSP,
            R::RBP,
            R::RSI,
            R::RDI,
            R::R8,
            R::R9,
            R::R10,
            R::R11,
            R::R12,
            R::R13,
            R::R14,
            R::R15,
        ],
    ];
    match o {
        Operand::Reg(n) => Some(NAMES[size.trailing_zeros() as usize][usize::from(n)]),
        Operand::High(n) => Some([R::AH, R::CH, R::DH, R::BH][usize::from(n)]),
        Operand::Selector(s) => Some([R::ES, R::CS, R::SS, R::DS, R::FS, R::GS][s as usize]),
        _ => None,
    }
}

fn same_memory(i: &Insn, o: &Instruction) -> Result<(), String> {
    let want = |n: u8| match n {
        NONE => Register::None,
        RIP if i.addr == 8 => Register::RIP,
        RIP => Register::EIP,
        n => register(Operand::Reg(n), i.addr).unwrap(),
    };
    let seg = [
        Register::ES,
        Register::CS,
        Register::SS,
        Register::DS,
        Register::FS,
        Register::GS,
    ][i.mem.seg as usize];
    // What has no base in 64-bit mode has no default either.
    let flat = |s| mode(i.bits) == 64 && !matches!(s, Register::FS | Register::GS);
    if seg != o.memory_segment() && !(flat(seg) && flat(o.memory_segment())) {
        return Err(format!("segment {seg:?}"));
    }
    // Without a base, iced gives a 16-bit form with one register as an index-less base too.
    let regs = (want(i.mem.base), want(i.mem.index));
    if regs != (o.memory_base(), o.memory_index()) {
        return Err(format!("registers {regs:?}"));
    }
    if i.mem.index != NONE && 1 << i.mem.scale != o.memory_index_scale() {
        return Err("scale".into());
    }
    let mut disp = i.mem.disp;
    if i.mem.base == RIP {
        disp = disp.wrapping_add(u64::from(i.len));
    }
    let m = if i.addr == 8 {
        !0
    } else {
        (1u64 << (i.addr * 8)) - 1
    };
    if disp & m != o.memory_displacement64() & m {
        return Err(format!("displacement {disp:#x}"));
    }
    Ok(())
}

fn same(i: &Insn, o: &Instruction) -> Result<(), String> {
    if o.code() == Code::INVALID {
        return Err("not an instruction".into());
    }
    if usize::from(i.len) != o.len() {
        return Err("length".into());
    }
    if !mnemonic(i).is_some_and(|m| m.contains(&o.mnemonic())) {
        return Err("mnemonic".into());
    }
    if is_string(i.op) {
        if o.has_rep_prefix() != (i.rep == Rep::Equal)
            || o.has_repne_prefix() != (i.rep == Rep::NotEqual)
        {
            return Err("repetition".into());
        }
        let suffix = match i.size {
            1 => "sb",
            2 => "sw",
            4 => "sd",
            _ => "sq",
        };
        if !format!("{:?}", o.mnemonic()).ends_with(suffix) {
            return Err("size".into());
        }
        return Ok(());
    }
    let size = |k: usize| match (i.op, k) {
        (Op::Movzx(n) | Op::Movsx(n), 1) => n,
        _ => i.size,
    };
    for (k, operand) in [i.dst, i.src].into_iter().enumerate() {
        if operand == Operand::None {
            continue;
        }
        let kind = o.op_kind(k as u32);
        match operand {
            Operand::Mem => {
                if kind != OpKind::Memory {
                    return Err(format!("operand {k} is memory"));
                }
                if !matches!(i.op, Op::Flush) && o.memory_size().size() != usize::from(size(k)) {
                    return Err(format!("memory of {} bytes", size(k)));
                }
                same_memory(i, o)?;
            }
            Operand::Imm(v) => {
                let v = if i.size == 8 {
                    v
                } else {
                    v & ((1 << (i.size * 8)) - 1)
                };
                // iced extends what the form of the instruction extends.
                let theirs = o.immediate(k as u32);
                let m = if i.size == 8 {
                    !0
                } else {
                    (1u64 << (i.size * 8)) - 1
                };
                let bit = matches!(i.op, Op::Bt | Op::Bts | Op::Btr | Op::Btc);
                if if bit {
                    v & 63 != theirs & 63
                } else {
                    v != theirs & m
                } {
                    return Err(format!("constant {v:#x}"));
                }
            }
            _ => {
                if kind != OpKind::Register {
                    return Err(format!("operand {k} is a register"));
                }
                let selector = matches!(operand, Operand::Selector(_));
                let dst_of_selector = k == 0 && matches!(i.src, Operand::Selector(_));
                if !dst_of_selector
                    && register(operand, if selector { 2 } else { size(k) })
                        != Some(o.op_register(k as u32))
                {
                    return Err(format!("operand {k} {operand:?}"));
                }
            }
        }
    }
    Ok(())
}

/// What the emulator promises to know, where it has a memory operand.
fn promised(o: &Instruction) -> bool {
    use Mnemonic as M;
    let has_memory = (0..o.op_count()).any(|k| o.op_kind(k) == OpKind::Memory);
    let gpr_only = (0..o.op_count()).all(|k| {
        o.op_kind(k) != OpKind::Register
            || o.op_register(k).is_gpr()
            || o.op_register(k).is_segment_register()
    });
    match o.mnemonic() {
        M::Mov => {
            has_memory
                && gpr_only
                && !(o.op_kind(0) == OpKind::Register && o.op_register(0).is_segment_register())
        }
        M::Movzx | M::Movsx | M::Movsxd | M::Movbe | M::Movnti => has_memory,
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test => {
            has_memory
        }
        M::Inc | M::Dec | M::Neg | M::Not | M::Bt | M::Bts | M::Btr | M::Btc => has_memory,
        M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Push | M::Pop => has_memory,
        M::Call | M::Jmp => {
            has_memory
                && !matches!(
                    o.code(),
                    Code::Call_m1616
                        | Code::Call_m1632
                        | Code::Call_m1664
                        | Code::Jmp_m1616
                        | Code::Jmp_m1632
                        | Code::Jmp_m1664
                )
        }
        M::Movsb | M::Movsw | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq => true,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq | M::Insb | M::Insw | M::Insd => true,
        M::Outsb | M::Outsw | M::Outsd => true,
        _ => false,
    }
}

#[test]
fn the_decoder_agrees_with_iced() {
    let mut r = Rng(0x1234_5678_9abc_def1);
    let mut seen = BTreeMap::<String, u32>::new();
    for n in 0..1_000_000u32 {
        let code = random_code(&mut r);
        let bits = [Bits::B16, Bits::B32, Bits::B64][n as usize % 3];
        let theirs = iced(&code, bits);
        match decode(&code, bits) {
            Ok(i) => {
                if let Err(what) = same(&i, &theirs) {
                    panic!(
                        "{bits:?} {code:02x?}: {what}: {i:x?} is {theirs} {:?}",
                        theirs.code()
                    );
                }
                *seen.entry(format!("{:?}", theirs.mnemonic())).or_default() += 1;
            }
            Err(DecodeError::Invalid | DecodeError::TooLong) => {
                assert_eq!(
                    theirs.code(),
                    Code::INVALID,
                    "{bits:?} {code:02x?}: {theirs}"
                );
            }
            Err(e) => {
                assert!(
                    !promised(&theirs),
                    "{bits:?} {code:02x?}: {theirs} is {e:?}"
                );
            }
        }
    }
    assert!(
        seen.len() > 90,
        "{} kinds of instruction seen: {seen:?}",
        seen.len()
    );
}

#[test]
fn every_cut_of_an_instruction_is_short() {
    let mut r = Rng(42);
    for n in 0..200_000 {
        let code = random_code(&mut r);
        let bits = [Bits::B16, Bits::B32, Bits::B64][n % 3];
        let Ok(i) = decode(&code, bits) else { continue };
        for cut in 0..usize::from(i.len) {
            assert_eq!(
                decode(&code[..cut], bits),
                Err(DecodeError::Short),
                "{code:02x?} {cut}"
            );
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod native {
    //! Executes instructions of 64-bit code on the processor that runs the test.
    // UNSAFETY: runs machine code made by the test, on memory mapped for it.

    use std::ffi::c_void;

    use galvan_base::state::{Seg, Segment};
    use galvan_kernel::emulate::{Cpu, Flags, Flow, Stop, execute};
    use iced_x86::code_asm::{AsmRegister64, qword_ptr};
    use iced_x86::code_asm::{
        CodeAssembler, r8, r9, r10, r11, r12, r13, r14, r15, rax, rbp, rbx, rcx, rdi, rdx, rsi,
    };

    use super::*;

    const PAGES: usize = 3 * 4096;
    /// Offset of the block with registers and flags.
    const BLOCK: usize = 4096;
    const FLAGS: usize = 16;
    /// Offset of the memory that instructions work on.
    const DATA: usize = 8192;
    /// It is compared from DATA to here.
    const DATA_LEN: usize = 4096;

    unsafe extern "C" {
        fn mmap(
            at: *mut c_void,
            len: usize,
            prot: i32,
            flags: i32,
            fd: i32,
            off: i64,
        ) -> *mut c_void;
    }

    /// Machine code and data in the low 2 GiB, so that 32-bit addresses reach them too.
    struct Arena(*mut u8);

    const REGS: [(u8, AsmRegister64); 15] = [
        (0, rax),
        (1, rcx),
        (2, rdx),
        (3, rbx),
        (5, rbp),
        (6, rsi),
        (7, rdi),
        (8, r8),
        (9, r9),
        (10, r10),
        (11, r11),
        (12, r12),
        (13, r13),
        (14, r14),
        (15, r15),
    ];
    const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

    impl Arena {
        fn new() -> Self {
            // PROT_READ | PROT_WRITE | PROT_EXEC; MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT
            // SAFETY: a new anonymous mapping touches nothing that exists.
            let at = unsafe { mmap(std::ptr::null_mut(), PAGES, 7, 0x62, -1, 0) };
            assert_ne!(at as isize, -1, "no executable memory");
            Arena(at.cast())
        }

        fn base(&self) -> u64 {
            self.0 as u64
        }

        fn write(&self, off: usize, bytes: &[u8]) {
            assert!(off + bytes.len() <= PAGES);
            // SAFETY: within the mapping, which nothing refers to.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(off), bytes.len()) }
        }

        fn read(&self, off: usize, bytes: &mut [u8]) {
            assert!(off + bytes.len() <= PAGES);
            // SAFETY: within the mapping, which nothing refers to.
            unsafe {
                std::ptr::copy_nonoverlapping(self.0.add(off), bytes.as_mut_ptr(), bytes.len())
            }
        }

        fn slot(&self, n: usize) -> u64 {
            let mut b = [0; 8];
            self.read(BLOCK + n * 8, &mut b);
            u64::from_le_bytes(b)
        }

        fn set_slot(&self, n: usize, v: u64) {
            self.write(BLOCK + n * 8, &v.to_le_bytes());
        }

        /// Runs one instruction on the registers and flags in the block.
        fn run(&self, prologue: &[u8], insn: &[u8], epilogue: &[u8]) {
            self.write(0, prologue);
            self.write(prologue.len(), insn);
            self.write(prologue.len() + insn.len(), epilogue);
            // SAFETY: the code saves and restores what the calling convention asks for, leaves the
            // stack alone, and the instruction's memory operand, if any, lies in the arena: the
            // caller has seen to that.
            let f: extern "C" fn() = unsafe { std::mem::transmute(self.0) };
            f();
        }

        /// What stands before and after the instruction.
        fn frame(&self) -> (Vec<u8>, Vec<u8>) {
            let block = self.base() + BLOCK as u64;
            let slot = |n: usize| qword_ptr(block + n as u64 * 8);
            let assemble = |build: &dyn Fn(&mut CodeAssembler)| {
                let mut a = CodeAssembler::new(64).unwrap();
                build(&mut a);
                // All memory operands are absolute 32-bit addresses, so the place does not matter.
                a.assemble(self.base()).unwrap()
            };
            let prologue = assemble(&|a| {
                for r in SAVED {
                    a.push(r).unwrap();
                }
                a.push(slot(FLAGS)).unwrap();
                a.popfq().unwrap();
                for (n, r) in REGS {
                    a.mov(r, slot(usize::from(n))).unwrap();
                }
            });
            let epilogue = assemble(&|a| {
                for (n, r) in REGS {
                    a.mov(slot(usize::from(n)), r).unwrap();
                }
                a.pushfq().unwrap();
                a.pop(slot(FLAGS)).unwrap();
                a.cld().unwrap();
                for r in SAVED.iter().rev() {
                    a.pop(*r).unwrap();
                }
                a.ret().unwrap();
            });
            (prologue, epilogue)
        }
    }

    struct Model {
        regs: [u64; 16],
        rflags: u64,
        base: u64,
        data: Vec<u8>,
    }

    impl Cpu for Model {
        fn reg(&self, n: u8) -> u64 {
            self.regs[usize::from(n)]
        }
        fn set_reg(&mut self, n: u8, v: u64) {
            self.regs[usize::from(n)] = v;
        }
        fn rip(&self) -> u64 {
            0
        }
        fn rflags(&self) -> u64 {
            self.rflags
        }
        fn set_rflags(&mut self, v: u64) {
            self.rflags = v;
        }
        fn segment(&self, _: Seg) -> Segment {
            // The selectors that Linux has loaded.
            Segment::default()
        }
        fn protected(&self) -> bool {
            true
        }
        fn read(&mut self, at: u64, size: u8) -> Result<u64, Stop> {
            let at = (at - self.base) as usize;
            let mut b = [0; 8];
            b[..usize::from(size)].copy_from_slice(&self.data[at..at + usize::from(size)]);
            Ok(u64::from_le_bytes(b))
        }
        fn write(&mut self, at: u64, size: u8, v: u64) -> Result<(), Stop> {
            let at = (at - self.base) as usize;
            self.data[at..at + usize::from(size)]
                .copy_from_slice(&v.to_le_bytes()[..usize::from(size)]);
            Ok(())
        }
        fn prepare_write(&mut self, _: u64, _: u8) -> Result<(), Stop> {
            Ok(())
        }
        fn prepare_update(&mut self, _: u64, _: u8) -> Result<(), Stop> {
            Ok(())
        }
        fn port_in(&mut self, _: u16, _: u8) -> Result<u32, Stop> {
            unreachable!()
        }
        fn port_out(&mut self, _: u16, _: u8, _: u32) -> Result<(), Stop> {
            unreachable!()
        }
    }

    /// Flags that the instruction leaves undefined.
    fn undefined(op: Op) -> u64 {
        match op {
            Op::Alu(Alu::And | Alu::Or | Alu::Xor) | Op::Test => Flags::AF,
            Op::Bt | Op::Bts | Op::Btr | Op::Btc => Flags::OF | Flags::SF | Flags::AF | Flags::PF,
            _ => 0,
        }
    }

    fn uses_stack_pointer(i: &Insn) -> bool {
        let is = |o| o == Operand::Reg(4);
        let memory = i.dst == Operand::Mem || i.src == Operand::Mem;
        is(i.dst) || is(i.src) || memory && (i.mem.base == 4 || i.mem.index == 4)
    }

    /// Registers with which the instruction reaches only the arena's data, if that can be.
    fn registers(r: &mut Rng, i: &Insn, data: u64) -> Option<[u64; 16]> {
        let mut regs = [0u64; 16];
        for v in &mut regs {
            *v = match r.below(4) {
                0 => r.below(4),
                1 => 0u64.wrapping_sub(r.below(3)),
                2 => 1 << r.below(64),
                _ => r.next(),
            };
        }
        let middle = data + 1024 + r.below(2048);
        if is_string(i.op) {
            regs[6] = middle;
            regs[7] = data + 1024 + r.below(2048);
            regs[1] = r.below(5);
            if i.addr == 4 {
                regs[1] |= r.next() << 32;
            }
            return Some(regs);
        }
        if i.dst != Operand::Mem && i.src != Operand::Mem {
            return Some(regs);
        }
        let Mem {
            seg,
            base,
            index,
            scale,
            disp,
        } = i.mem;
        if matches!(seg, Seg::Fs | Seg::Gs) || base >= NONE || base == index {
            return None;
        }
        if matches!(i.op, Op::Bt | Op::Bts | Op::Btr | Op::Btc)
            && let Operand::Reg(n) = i.src
        {
            if n == base || n == index {
                return None;
            }
            // Of a narrow offset only the low part counts.
            let near = (r.below(4096) as i64 - 2048) as u64;
            let unused = 64 - u32::from(i.size) * 8;
            regs[usize::from(n)] = if unused == 0 {
                near
            } else {
                near << unused >> unused | r.next() << (64 - unused)
            };
        }
        let offset = if index == NONE {
            0
        } else {
            regs[usize::from(index)] << scale
        };
        regs[usize::from(base)] = middle.wrapping_sub(disp).wrapping_sub(offset);
        if i.addr == 4 {
            regs[usize::from(base)] = regs[usize::from(base)] & 0xffff_ffff | r.next() << 32;
        }
        Some(regs)
    }

    #[test]
    fn execution_agrees_with_the_processor() {
        let arena = Arena::new();
        let (prologue, epilogue) = arena.frame();
        let data_at = arena.base() + DATA as u64;
        let mut r = Rng(0xfeed_beef_cafe_f00d);
        let mut seen = BTreeMap::<String, u32>::new();
        let movbe = std::arch::is_x86_feature_detected!("movbe");
        let mut runs = 0;
        while runs < 100_000 {
            let code = random_code(&mut r);
            let Ok(i) = decode(&code, Bits::B64) else {
                continue;
            };
            if matches!(
                i.op,
                Op::Push | Op::Pop | Op::Call | Op::Jmp | Op::Ins | Op::Outs | Op::Flush
            ) || matches!(i.src, Operand::Selector(_))
                || matches!(i.op, Op::Movbe) && !movbe
                || uses_stack_pointer(&i)
                || is_string(i.op) && matches!(i.mem.seg, Seg::Fs | Seg::Gs)
            {
                continue;
            }
            let Some(regs) = registers(&mut r, &i, data_at) else {
                continue;
            };
            runs += 1;
            *seen.entry(format!("{:?} {}", i.op, i.size)).or_default() += 1;
            let mut flags = 0x202 | r.next() & Flags::STATUS;
            if is_string(i.op) {
                flags |= r.next() & Flags::DF;
            }
            let mut data: Vec<u8> = (0..DATA_LEN).map(|_| r.next() as u8).collect();
            if matches!(i.op, Op::Cmps | Op::Scas) {
                data.iter_mut().for_each(|b| *b &= 1);
            }

            arena.write(DATA, &data);
            for (n, v) in regs.iter().enumerate() {
                arena.set_slot(n, *v);
            }
            arena.set_slot(FLAGS, flags);
            arena.run(&prologue, &code[..usize::from(i.len)], &epilogue);

            let mut m = Model {
                regs,
                rflags: flags,
                base: data_at,
                data,
            };
            let text = iced(&code, Bits::B64);
            assert_eq!(execute(&mut m, &i, 100), Ok(Flow::Next), "{text}");

            for (n, v) in m.regs.iter().enumerate() {
                if n != 4 {
                    assert_eq!(
                        *v,
                        arena.slot(n),
                        "{text}: register {n} of {regs:x?}, flags {flags:x}"
                    );
                }
            }
            let relevant = (Flags::STATUS | Flags::DF) & !undefined(i.op);
            assert_eq!(
                m.rflags & relevant,
                arena.slot(FLAGS) & relevant,
                "{text}: flags; {regs:x?}"
            );
            let mut after = vec![0; DATA_LEN];
            arena.read(DATA, &mut after);
            assert!(m.data == after, "{text}: memory; {regs:x?}");
        }
        assert!(seen.len() > 120, "{} kinds: {seen:?}", seen.len());
    }
}
