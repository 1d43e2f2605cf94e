use std::collections::BTreeMap;
use std::vec::Vec;

use galvan_base::state::{Event, Seg, Segment};
use proptest::prelude::*;

use super::*;

const MEMORY: u64 = 0x4000;

/// A processor whose first 16 KiB are memory. What is above is absent, up to 0x8000: there stands
/// a device that remembers what was done to it.
struct Model {
    regs: [u64; 16],
    rip: u64,
    rflags: u64,
    segs: [Segment; 6],
    protected: bool,
    memory: BTreeMap<u64, u8>,
    read_only: bool,
    device: Vec<(char, u64, u64)>,
    ports: Vec<(char, u16, u8, u32)>,
}

fn flat(sel: u16, attr: u16) -> Segment {
    Segment {
        sel,
        attr,
        limit: !0,
        base: 0,
    }
}

impl Model {
    fn new(bits: Bits) -> Model {
        let mut segs = [flat(0x18, 0xc93); 6];
        segs[Seg::Cs as usize] = flat(0x10, if bits == Bits::B64 { 0xa9b } else { 0xc9b });
        if bits == Bits::B16 {
            segs = [Segment {
                sel: 0x100,
                attr: 0x93,
                limit: 0xffff,
                base: 0x1000,
            }; 6];
        }
        Model {
            regs: [0; 16],
            rip: 0x100,
            rflags: 2,
            segs,
            protected: bits != Bits::B16,
            memory: BTreeMap::new(),
            read_only: false,
            device: Vec::new(),
            ports: Vec::new(),
        }
    }

    fn run(&mut self, bits: Bits, code: &[u8]) -> Result<Flow, Stop> {
        let insn = decode(code, bits).expect("decodes");
        assert_eq!(usize::from(insn.len), code.len());
        execute(self, &insn, 16)
    }

    fn poke(&mut self, at: u64, bytes: &[u8]) {
        for (i, b) in bytes.iter().enumerate() {
            self.memory.insert(at + i as u64, *b);
        }
    }

    fn peek(&self, at: u64, size: u8) -> u64 {
        (0..u64::from(size))
            .map(|i| u64::from(*self.memory.get(&(at + i)).unwrap_or(&0)) << (i * 8))
            .sum()
    }

    fn check(&self, at: u64, size: u8, write: bool) -> Result<bool, Stop> {
        let end = at.wrapping_add(u64::from(size));
        if end <= MEMORY && at < end {
            if write && self.read_only {
                return Err(Stop::PageFault {
                    address: at,
                    error: 3,
                });
            }
            return Ok(true);
        }
        if (0x8000..0x9000).contains(&at) {
            return Ok(false);
        }
        Err(Stop::PageFault {
            address: at.max(MEMORY),
            error: if write { 2 } else { 0 },
        })
    }
}

impl Cpu for Model {
    fn reg(&self, n: u8) -> u64 {
        self.regs[usize::from(n & 15)]
    }
    fn set_reg(&mut self, n: u8, v: u64) {
        self.regs[usize::from(n & 15)] = v;
    }
    fn rip(&self) -> u64 {
        self.rip
    }
    fn rflags(&self) -> u64 {
        self.rflags
    }
    fn set_rflags(&mut self, v: u64) {
        self.rflags = v;
    }
    fn segment(&self, s: Seg) -> Segment {
        self.segs[s as usize]
    }
    fn protected(&self) -> bool {
        self.protected
    }
    fn read(&mut self, at: u64, size: u8) -> Result<u64, Stop> {
        if self.check(at, size, false)? {
            return Ok(self.peek(at, size));
        }
        self.device.push(('r', at, u64::from(size)));
        Ok(0x1122_3344_5566_7788)
    }
    fn write(&mut self, at: u64, size: u8, v: u64) -> Result<(), Stop> {
        if self.check(at, size, true)? {
            self.poke(at, &v.to_le_bytes()[..usize::from(size)]);
        } else {
            self.device.push(('w', at, v));
        }
        Ok(())
    }
    fn prepare_write(&mut self, at: u64, size: u8) -> Result<(), Stop> {
        self.check(at, size, true).map(|_| ())
    }
    fn prepare_update(&mut self, at: u64, size: u8) -> Result<(), Stop> {
        if self.check(at, size, true)? {
            Err(Stop::Retry)
        } else {
            Ok(())
        }
    }
    fn port_in(&mut self, port: u16, size: u8) -> Result<u32, Stop> {
        self.ports.push(('i', port, size, 0));
        Ok(0xaabb_ccdd)
    }
    fn port_out(&mut self, port: u16, size: u8, v: u32) -> Result<(), Stop> {
        self.ports.push(('o', port, size, v));
        Ok(())
    }
}

const AX: usize = 0;
const CX: usize = 1;
const DX: usize = 2;
const BX: usize = 3;
const SP: usize = 4;
const SI: usize = 6;
const DI: usize = 7;

#[test]
fn movs_to_an_unmapped_page_does_not_touch_the_device() {
    let mut m = Model::new(Bits::B64);
    m.regs[SI] = 0x8000;
    m.regs[DI] = 0x5000;
    let r = m.run(Bits::B64, &[0xa5]);
    assert_eq!(
        r,
        Err(Stop::PageFault {
            address: 0x5000,
            error: 2
        })
    );
    assert_eq!(m.device, []);
    assert_eq!(m.regs[SI], 0x8000);
}

#[test]
fn a_repeated_move_keeps_what_it_did_before_a_fault() {
    let mut m = Model::new(Bits::B64);
    m.regs[SI] = 0x8000;
    m.regs[DI] = MEMORY - 8;
    m.regs[CX] = 5;
    let r = m.run(Bits::B64, &[0xf3, 0xa5]);
    assert_eq!(
        r,
        Err(Stop::PageFault {
            address: MEMORY,
            error: 2
        })
    );
    assert_eq!((m.regs[SI], m.regs[DI], m.regs[CX]), (0x8008, MEMORY, 3));
    assert_eq!(m.device.len(), 2);
}

#[test]
fn a_long_repetition_is_done_in_portions() {
    let mut m = Model::new(Bits::B64);
    m.regs[DI] = 0x8000;
    m.regs[CX] = 20;
    assert_eq!(m.run(Bits::B64, &[0xf3, 0xab]), Ok(Flow::Again));
    assert_eq!(m.regs[CX], 4);
    assert_eq!(m.run(Bits::B64, &[0xf3, 0xab]), Ok(Flow::Next));
    assert_eq!((m.regs[CX], m.device.len()), (0, 20));
    assert_eq!(m.run(Bits::B64, &[0xf3, 0xab]), Ok(Flow::Next));
    assert_eq!(m.device.len(), 20);
}

#[test]
fn sixteen_bit_strings_wrap_within_their_segment() {
    let mut m = Model::new(Bits::B16);
    m.rflags |= Flags::DF;
    m.regs[AX] = 0x1234;
    m.regs[CX] = 0xffff_0002;
    m.regs[DI] = 0xabcd_0000;
    assert_eq!(
        m.run(Bits::B16, &[0xf3, 0xaa]),
        Err(Stop::PageFault {
            address: 0x10fff,
            error: 2
        })
    );
    assert_eq!(m.peek(0x1000, 1), 0x34);
    assert_eq!((m.regs[CX], m.regs[DI]), (0xffff_0001, 0xabcd_ffff));
}

#[test]
fn cmps_and_scas_stop_where_told() {
    let mut m = Model::new(Bits::B64);
    m.poke(0x100, b"abcX");
    m.poke(0x200, b"abcY");
    (m.regs[SI], m.regs[DI], m.regs[CX]) = (0x100, 0x200, 10);
    assert_eq!(m.run(Bits::B64, &[0xf3, 0xa6]), Ok(Flow::Next));
    assert_eq!((m.regs[CX], m.rflags & Flags::ZF), (6, 0));
    (m.regs[AX], m.regs[DI], m.regs[CX]) = (u64::from(b'c'), 0x100, 10);
    assert_eq!(m.run(Bits::B64, &[0xf2, 0xae]), Ok(Flow::Next));
    assert_eq!((m.regs[CX], m.rflags & Flags::ZF), (7, Flags::ZF));
}

#[test]
fn an_update_of_a_device_reads_then_writes_and_one_of_memory_is_left_to_the_guest() {
    let mut m = Model::new(Bits::B64);
    m.regs[BX] = 0x8000;
    assert_eq!(m.run(Bits::B64, &[0xf0, 0x83, 0x0b, 0x01]), Ok(Flow::Next));
    assert_eq!(m.device, [('r', 0x8000, 4), ('w', 0x8000, 0x5566_7789)]);
    m.regs[BX] = 0x100;
    assert_eq!(
        m.run(Bits::B64, &[0xf0, 0x83, 0x0b, 0x01]),
        Err(Stop::Retry)
    );
}

#[test]
fn a_bit_test_by_register_reaches_around_its_operand() {
    let mut m = Model::new(Bits::B64);
    m.regs[BX] = 0x200;
    m.regs[AX] = (-33i64) as u64;
    m.poke(0x1f8, &0x8000_0000u32.to_le_bytes());
    assert_eq!(m.run(Bits::B64, &[0x0f, 0xa3, 0x03]), Ok(Flow::Next));
    assert_eq!(m.rflags & Flags::CF, Flags::CF);
}

#[test]
fn push_and_call_through_a_device_use_the_stack() {
    let mut m = Model::new(Bits::B64);
    m.regs[BX] = 0x8000;
    m.regs[SP] = 0x1000;
    assert_eq!(m.run(Bits::B64, &[0xff, 0x33]), Ok(Flow::Next));
    assert_eq!(
        (m.regs[SP], m.peek(0xff8, 8)),
        (0xff8, 0x1122_3344_5566_7788)
    );
    assert_eq!(m.run(Bits::B64, &[0x8f, 0x03]), Ok(Flow::Next));
    assert_eq!(m.device.last(), Some(&('w', 0x8000, 0x1122_3344_5566_7788)));
    // The target is not canonical.
    assert_eq!(m.run(Bits::B64, &[0xff, 0x13]), Err(Stop::GP));
    assert_eq!(m.regs[SP], 0x1000);

    let mut m = Model::new(Bits::B32);
    m.regs[BX] = 0x8000;
    m.regs[SP] = 0x1000;
    assert_eq!(m.run(Bits::B32, &[0xff, 0x13]), Ok(Flow::Jump(0x5566_7788)));
    assert_eq!((m.regs[SP], m.peek(0xffc, 4)), (0xffc, 0x102));
}

#[test]
fn pop_computes_its_address_with_the_stack_popped() {
    let mut m = Model::new(Bits::B64);
    m.regs[SP] = 0x1000;
    m.poke(0x1000, &7u64.to_le_bytes());
    // pop [rsp + 0x7000 - 8]
    assert_eq!(
        m.run(Bits::B64, &[0x8f, 0x84, 0x24, 0xf8, 0x6f, 0, 0]),
        Ok(Flow::Next)
    );
    assert_eq!(m.device, [('w', 0x8000, 7)]);
}

#[test]
fn segments_are_checked_outside_64_bit_mode() {
    let read = [0x8b, 0x03];
    let write = [0x89, 0x03];
    let ds = Seg::Ds as usize;
    let mut m = Model::new(Bits::B32);
    m.regs[BX] = 0x100;
    m.segs[ds].limit = 0x102;
    assert_eq!(m.run(Bits::B32, &read), Err(Stop::GP));
    m.segs[ds].limit = 0x103;
    assert_eq!(m.run(Bits::B32, &read), Ok(Flow::Next));
    // Expand-down: what is up to the limit is outside.
    m.segs[ds].attr |= 4;
    assert_eq!(m.run(Bits::B32, &read), Err(Stop::GP));
    m.segs[ds].limit = 0xff;
    assert_eq!(m.run(Bits::B32, &read), Ok(Flow::Next));
    // Not writable.
    m.segs[ds] = flat(0x18, 0xc91);
    assert_eq!(m.run(Bits::B32, &read), Ok(Flow::Next));
    assert_eq!(m.run(Bits::B32, &write), Err(Stop::GP));
    // Null.
    m.segs[ds].attr = 0;
    assert_eq!(m.run(Bits::B32, &read), Err(Stop::GP));
    // The stack has its own exception.
    m.segs[Seg::Ss as usize].limit = 0x10;
    assert_eq!(m.run(Bits::B32, &[0x36, 0x8b, 0x03]), Err(Stop::SS));
}

#[test]
fn addresses_beyond_the_canonical_halves_fault() {
    let mut m = Model::new(Bits::B64);
    m.regs[BX] = 0x7fff_ffff_fffe;
    assert_eq!(m.run(Bits::B64, &[0x8b, 0x03]), Err(Stop::GP));
    m.regs[SP] = 0x8000_0000_0000;
    assert_eq!(m.run(Bits::B64, &[0x8b, 0x04, 0x24]), Err(Stop::SS));
}

#[test]
fn fs_has_a_base_in_64_bit_mode_and_ds_has_none() {
    let mut m = Model::new(Bits::B64);
    m.segs[Seg::Fs as usize].base = 0x300;
    m.segs[Seg::Ds as usize].base = 0x500;
    m.poke(0x310, &[1]);
    m.poke(0x10, &[2]);
    m.regs[BX] = 0x10;
    assert_eq!(m.run(Bits::B64, &[0x64, 0x8a, 0x03]), Ok(Flow::Next));
    assert_eq!(m.regs[AX], 1);
    assert_eq!(m.run(Bits::B64, &[0x3e, 0x8a, 0x03]), Ok(Flow::Next));
    assert_eq!(m.regs[AX], 2);
    // The ignored override does not take back the one that counts.
    assert_eq!(m.run(Bits::B64, &[0x64, 0x3e, 0x8a, 0x03]), Ok(Flow::Next));
    assert_eq!(m.regs[AX], 1);
}

#[test]
fn ins_and_outs_move_between_port_and_memory() {
    let mut m = Model::new(Bits::B64);
    (m.regs[DX], m.regs[DI], m.regs[CX]) = (0x1f0, 0x100, 2);
    assert_eq!(m.run(Bits::B64, &[0xf3, 0x66, 0x6d]), Ok(Flow::Next));
    assert_eq!(m.peek(0x100, 4), 0xccdd_ccdd);
    m.regs[SI] = 0x100;
    assert_eq!(m.run(Bits::B64, &[0x6f]), Ok(Flow::Next));
    assert_eq!(m.ports.last(), Some(&('o', 0x1f0, 4, 0xccdd_ccdd)));
    // Memory that cannot be written is found out before the port is read.
    m.read_only = true;
    m.ports.clear();
    assert_eq!(
        m.run(Bits::B64, &[0x6c]),
        Err(Stop::PageFault {
            address: 0x104,
            error: 3
        })
    );
    assert_eq!(m.ports, []);
}

#[test]
fn lock_is_legal_only_on_updates_of_memory() {
    for bad in [
        &[0xf0, 0x8b, 0x03][..],
        &[0xf0, 0x01, 0xc3],
        &[0xf0, 0x39, 0x03],
        &[0xf0, 0x0f, 0xa3, 0x03],
    ] {
        assert_eq!(
            decode(bad, Bits::B64),
            Err(DecodeError::Invalid),
            "{bad:x?}"
        );
    }
    for good in [
        &[0xf0, 0x01, 0x03][..],
        &[0xf0, 0x87, 0x03],
        &[0xf0, 0x0f, 0xb1, 0x03],
        &[0xf0, 0x0f, 0xc7, 0x0b],
    ] {
        assert!(decode(good, Bits::B64).is_ok(), "{good:x?}");
    }
}

#[test]
fn fifteen_bytes_are_the_limit() {
    let mut code = [0x66u8; 16];
    code[14] = 0x90;
    assert_eq!(decode(&code, Bits::B64), Err(DecodeError::Unsupported));
    code[13..].copy_from_slice(&[0x8b, 0x03, 0x90]);
    assert_eq!(decode(&code, Bits::B64).map(|i| i.len), Ok(15));
    code[13..].copy_from_slice(&[0x66, 0x8b, 0x03]);
    assert_eq!(decode(&code, Bits::B64), Err(DecodeError::TooLong));
    assert_eq!(decode(&code[..7], Bits::B64), Err(DecodeError::Short));
}

fn any_bits() -> impl Strategy<Value = Bits> {
    prop_oneof![Just(Bits::B16), Just(Bits::B32), Just(Bits::B64)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn no_bytes_and_no_state_panic(
        code in any::<[u8; 16]>(),
        bits in any_bits(),
        regs in any::<[u64; 16]>(),
        near in any::<[bool; 16]>(),
        rflags in any::<u64>(),
        attrs in any::<[u16; 6]>(),
        limits in any::<[u32; 6]>(),
    ) {
        let mut m = Model::new(bits);
        m.rflags = rflags;
        for (n, (r, near)) in regs.iter().zip(near).enumerate() {
            m.regs[n] = if near { r & 0xffff } else { *r };
        }
        for (s, (a, l)) in m.segs.iter_mut().zip(attrs.iter().zip(limits)) {
            s.attr = *a;
            s.limit = l;
        }
        if let Ok(i) = decode(&code, bits) {
            prop_assert!(usize::from(i.len) <= MAX_LEN);
            match execute(&mut m, &i, 8) {
                Err(Stop::Exception(Event::Exception(v, _))) => prop_assert!(matches!(v, 12 | 13)),
                Err(Stop::Exception(e)) => prop_assert!(false, "{e:?}"),
                _ => {}
            }
        }
    }
}
