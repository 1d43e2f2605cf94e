//! Accesses that the second-stage tables do not allow: emulated devices, memory of a special kind,
//! and nothing.
//!
//! What stands at the address decides ([`nested_fault`]). For a device the instruction is emulated
//! ([`crate::emulate`]); its operands go through [`Guest`], which reaches RAM, the local APIC, the
//! hardware domain's emulated devices, the machine's own device memory, and nobody, where reads give
//! all ones and writes are lost.

use galvan_base::exit::FaultKind;
use galvan_base::state::{CR0_PE, Seg, Segment};
use galvan_base::{Gfn, Gpa, Mpa, PAGE_SIZE};

use super::insn::{self, stopped};
use super::{Next, Why, apic, pio};
use crate::emulate::{
    Bits, Cpu, DecodeError, Flags, Flow, Insn, MAX_LEN, Op, Stop, decode, execute, mask,
};
use crate::guest_access::{Access, Cx, note_write, written};
use crate::p2m::{P2mType, PageError, Want};

/// Iterations of a repeated instruction between two looks at interrupts.
const ITERATIONS: u32 = 64;

/// An access that the second-stage tables did not allow.
pub fn nested_fault(cx: &mut Cx<'_>, kind: FaultKind, gpa: Gpa) -> Next {
    let frame = gpa.frame();
    let is = |k| kind.contains(k);
    let mut hole = None;
    if !apic::claims(cx.st, frame.addr().get()) {
        let ty = cx.dom.p2m.lookup(frame).ty;
        if ty == P2mType::None {
            hole = Some(frame);
        }
        match ty {
            // Another CPU has mapped it in the meantime.
            P2mType::Ram | P2mType::MmioDirect => return Next::Resume,
            P2mType::LogDirty => {
                return match is(FaultKind::WRITE).then(|| note_write(cx.hv, cx.dom, frame)) {
                    None | Some(Ok(())) => Next::Resume,
                    Some(Err(_)) => Next::Crash(Why::NoMemoryToSplit),
                };
            }
            P2mType::RamRo if !is(FaultKind::WRITE) => return Next::Resume,
            P2mType::ForeignRw | P2mType::GrantRw | P2mType::Shared if !is(FaultKind::FETCH) => {
                return Next::Resume;
            }
            P2mType::ForeignRo | P2mType::GrantRo
                if !is(FaultKind::FETCH) && !is(FaultKind::WRITE) =>
            {
                return Next::Resume;
            }
            P2mType::RamRo if is(FaultKind::WALK) => return Next::Crash(Why::TablesReadOnly),
            // Writes are lost.
            P2mType::RamRo | P2mType::ForeignRo | P2mType::GrantRo if !is(FaultKind::FETCH) => {}
            P2mType::ForeignRw
            | P2mType::ForeignRo
            | P2mType::GrantRw
            | P2mType::GrantRo
            | P2mType::Shared => return Next::Crash(Why::ExecutionShared),
            P2mType::Broken => return Next::Crash(Why::FailedMemory),
            P2mType::None
            | P2mType::RamRo
            | P2mType::RamDm
            | P2mType::MmioDm
            | P2mType::Pod
            | P2mType::ApicPage => {}
        }
    }
    if is(FaultKind::FETCH) {
        return Next::Crash(Why::ExecutionNowhere);
    }
    if is(FaultKind::WALK) {
        return Next::Crash(Why::TablesNowhere);
    }
    if cx.st.hw.event_pending() {
        // It was not the instruction but the delivery of an event, to a stack or table there.
        return Next::Crash(Why::EventNowhere);
    }
    if cx.st.shows_apic
        && !is(FaultKind::PRESENT)
        && apic::claims(cx.st, frame.addr().get())
        && cx.dom.apic_page.map(cx.hv, cx.dom)
    {
        return Next::Resume;
    }
    emulate(cx, kind, gpa, hole)
}

fn emulate(cx: &mut Cx<'_>, kind: FaultKind, gpa: Gpa, hole: Option<Gfn>) -> Next {
    let bits = insn::bits(cx);
    let (insn, len) = cx.st.hw.fault_insn();
    let given = insn.get(..len.into()).unwrap_or(&[]);
    let decoded = match decode(given, bits) {
        Err(DecodeError::Short) => insn::with_code(cx, |code| decode(code, bits)),
        d => Ok(d),
    };
    let insn = match decoded {
        Ok(Ok(i)) => i,
        Ok(Err(e)) => return not_emulated(cx, gpa, e),
        Err(stop) => return stopped(cx, stop),
    };
    let limit = iterations(cx);
    let mut guest = Guest::new(cx, bits);
    if hint_applies(&insn, kind) {
        guest.hint = Some(gpa);
    }
    guest.hole = hole;
    let r = execute(&mut guest, &insn, limit);
    let quiet = guest.quiet;
    match r {
        Ok(Flow::Next) if quiet => Next::Quiet(insn.len),
        r => finish(cx, &insn, r),
    }
}

/// Whether the one memory operand of the instruction is what faulted, so that its address need not
/// be translated again. If it is written, the fault must have been a write, or the right to write
/// has not been checked.
fn hint_applies(i: &Insn, kind: FaultKind) -> bool {
    !matches!(
        i.op,
        Op::Push
            | Op::Pop
            | Op::Call
            | Op::Movs
            | Op::Cmps
            | Op::Stos
            | Op::Lods
            | Op::Scas
            | Op::Ins
            | Op::Outs
    ) && (kind.contains(FaultKind::WRITE) || !i.writes_operand())
}

/// How many iterations of a repeated instruction are done at once: one where each is a step.
pub(super) fn iterations(cx: &Cx<'_>) -> u32 {
    if cx.st.hw.rflags() & Flags::TF != 0 {
        1
    } else {
        ITERATIONS
    }
}

/// Carries out how an emulated instruction ended.
pub(super) fn finish(cx: &mut Cx<'_>, i: &Insn, r: Result<Flow, Stop>) -> Next {
    match r {
        Ok(Flow::Next) => insn::advance(cx, i.len),
        Ok(Flow::Jump(to)) => insn::jump(cx, to),
        Ok(Flow::Again) => {
            if cx.st.hw.rflags() & Flags::TF != 0 {
                insn::completed(cx);
            }
        }
        Err(stop) => return stopped(cx, stop),
    }
    Next::Resume
}

#[cold]
fn not_emulated(cx: &mut Cx<'_>, gpa: Gpa, e: DecodeError) -> Next {
    if cx.dom.may_log(cx.hv) {
        let code = insn::with_code(cx, |b| Ok(insn::prefix_of::<MAX_LEN>(b)));
        log::warn!(
            "{:?}: instruction {code:02x?} at {:#x} on {}: {e:?}, answered with an exception",
            cx.vcpu,
            cx.st.hw.rip(),
            gpa
        );
    }
    stopped(
        cx,
        match e {
            DecodeError::TooLong | DecodeError::Short => Stop::GP,
            DecodeError::Invalid | DecodeError::Unsupported => Stop::UD,
        },
    )
}

/// The vCPU as the emulator sees it.
pub(super) struct Guest<'a, 'b> {
    cx: &'a mut Cx<'b>,
    long: bool,
    /// Where the memory operand is, if that is known.
    hint: Option<Gpa>,
    /// A guest frame that had nothing when the access was made.
    hole: Option<Gfn>,
    /// Nothing an entry depends on has been touched.
    quiet: bool,
}

/// A stretch of guest physical memory within a page.
#[derive(Clone, Copy)]
struct Part {
    gpa: Gpa,
    len: u8,
}

impl<'a, 'b> Guest<'a, 'b> {
    pub(super) fn new(cx: &'a mut Cx<'b>, bits: Bits) -> Self {
        Guest {
            cx,
            long: bits == Bits::B64,
            hint: None,
            hole: None,
            quiet: true,
        }
    }

    /// Where an operand is: one part, or two where it crosses a page.
    fn parts(&self, linear: u64, size: u8, a: Access) -> Result<(Part, Option<Part>), Stop> {
        let room = PAGE_SIZE - linear as usize % PAGE_SIZE;
        if usize::from(size) <= room {
            let gpa = match self.hint {
                Some(h) if h.offset() == linear as usize % PAGE_SIZE => h,
                _ => self.translate(linear, a)?,
            };
            return Ok((Part { gpa, len: size }, None));
        }
        let first = Part {
            gpa: self.translate(linear, a)?,
            len: room as u8,
        };
        let next = linear.wrapping_add(room as u64);
        let next = if self.long { next } else { next & 0xffff_ffff };
        let second = Part {
            gpa: self.translate(next, a)?,
            len: size - room as u8,
        };
        Ok((first, Some(second)))
    }

    fn translate(&self, linear: u64, a: Access) -> Result<Gpa, Stop> {
        let a = insn::access(self.cx, a);
        self.cx
            .translate_as(linear, a)
            .map_err(|f| insn::walk_fault(f, linear, a))
    }

    fn read_part(&mut self, p: Part) -> u64 {
        let frame = p.gpa.frame();
        if apic::claims(self.cx.st, frame.addr().get()) {
            return pieces(p, |at, n| apic::mmio_read(self.cx, at.offset() as u32, n));
        }
        if self.hole == Some(frame) {
            return pieces(p, |at, n| device_read(self.cx, at, n));
        }
        match self.cx.dom.p2m.get_page(frame, Want::Read) {
            Ok(page) => {
                let mut b = [0; 8];
                let r = b
                    .get_mut(..p.len.into())
                    .map(|b| self.cx.hv.hw.read(page.mfn(), p.gpa.offset(), b));
                match r {
                    Some(Ok(())) => u64::from_le_bytes(b),
                    _ => mask(p.len),
                }
            }
            Err(PageError::NotRam(P2mType::MmioDirect)) => {
                let m = self.cx.dom.p2m.lookup(frame).mfn;
                pieces(p, |at, n| {
                    let at = Mpa::new_truncate(m.addr().get() + at.offset() as u64);
                    self.cx.hv.hw.mmio_read(at, n)
                })
            }
            Err(_) => pieces(p, |at, n| device_read(self.cx, at, n)),
        }
    }

    fn write_part(&mut self, p: Part, v: u64) {
        let frame = p.gpa.frame();
        if apic::claims(self.cx.st, frame.addr().get()) {
            self.quiet = false;
            pieces(p, |at, n| {
                let piece = v >> (at.get().wrapping_sub(p.gpa.get()) * 8) & mask(n);
                apic::mmio_write(self.cx, at.offset() as u32, n, piece);
                0
            });
            return;
        }
        match self.cx.dom.p2m.get_page(frame, Want::Write) {
            Ok(page) => {
                if let Some(b) = v.to_le_bytes().get(..p.len.into()) {
                    // A frame that is held is RAM.
                    let _ = self.cx.hv.hw.write(page.mfn(), p.gpa.offset(), b);
                }
                written(self.cx.hv, self.cx.dom, frame, page);
            }
            Err(PageError::ReadOnly) => {}
            Err(PageError::NotRam(P2mType::MmioDirect)) => {
                let m = self.cx.dom.p2m.lookup(frame).mfn;
                pieces(p, |at, n| {
                    let piece = v >> (at.get().wrapping_sub(p.gpa.get()) * 8) & mask(n);
                    let at = Mpa::new_truncate(m.addr().get() + at.offset() as u64);
                    self.cx.hv.hw.mmio_write(at, n, piece);
                    0
                });
            }
            Err(PageError::NotRam(_)) => {
                pieces(p, |at, n| {
                    let piece = v >> (at.get().wrapping_sub(p.gpa.get()) * 8) & mask(n);
                    device_write(self.cx, at, n, piece);
                    0
                });
            }
        }
    }
}

/// Makes naturally aligned accesses of 1, 2, 4 or 8 bytes of a part; puts together what they give.
fn pieces(p: Part, mut f: impl FnMut(Gpa, u8) -> u64) -> u64 {
    let (mut done, mut v) = (0u8, 0);
    while done < p.len {
        // Within a page, so the sum is no other.
        let at = Gpa::new_truncate(p.gpa.get() + u64::from(done));
        let left = p.len - done;
        let largest = 1 << left.ilog2();
        let aligned = 1u8 << at.get().trailing_zeros().min(3);
        let n = aligned.min(largest).min(8);
        v |= (f(at, n) & mask(n)) << (u32::from(done) * 8);
        done += n;
    }
    v
}

fn device_read(cx: &mut Cx<'_>, gpa: Gpa, size: u8) -> u64 {
    cx.dom
        .hardware
        .as_ref()
        .and_then(|h| h.mmio_read(cx.hv, cx.dom, gpa, size))
        .unwrap_or(!0)
}

fn device_write(cx: &mut Cx<'_>, gpa: Gpa, size: u8, v: u64) {
    if let Some(h) = &cx.dom.hardware {
        h.mmio_write(cx.hv, cx.dom, gpa, size, v);
    }
}

impl Cpu for Guest<'_, '_> {
    fn reg(&self, n: u8) -> u64 {
        let st = &self.cx.st;
        st.regs.get(n).unwrap_or_else(|| st.hw.rsp())
    }

    fn set_reg(&mut self, n: u8, v: u64) {
        let st = &mut *self.cx.st;
        match st.regs.get_mut(n) {
            Some(r) => *r = v,
            None => st.hw.set_rsp(v),
        }
    }

    fn rip(&self) -> u64 {
        self.cx.st.hw.rip()
    }

    fn rflags(&self) -> u64 {
        self.cx.st.hw.rflags()
    }

    fn set_rflags(&mut self, v: u64) {
        self.quiet = false;
        self.cx.st.hw.set_rflags(v);
    }

    fn segment(&self, s: Seg) -> Segment {
        self.cx.st.hw.segment(s)
    }

    fn protected(&self) -> bool {
        let hw = &self.cx.st.hw;
        hw.cr(0) & CR0_PE != 0 && hw.rflags() & Flags::VM == 0
    }

    fn read(&mut self, linear: u64, size: u8) -> Result<u64, Stop> {
        let (first, second) = self.parts(linear, size, Access::empty())?;
        let low = self.read_part(first);
        Ok(match second {
            None => low,
            Some(p) => low & mask(first.len) | self.read_part(p) << (u32::from(first.len) * 8),
        })
    }

    fn write(&mut self, linear: u64, size: u8, v: u64) -> Result<(), Stop> {
        let (first, second) = self.parts(linear, size, Access::WRITE)?;
        self.write_part(first, v);
        if let Some(p) = second {
            self.write_part(p, v >> (u32::from(first.len) * 8));
        }
        Ok(())
    }

    fn prepare_write(&mut self, linear: u64, size: u8) -> Result<(), Stop> {
        self.parts(linear, size, Access::WRITE).map(|_| ())
    }

    fn prepare_update(&mut self, linear: u64, size: u8) -> Result<(), Stop> {
        let (first, second) = self.parts(linear, size, Access::WRITE)?;
        let mut all_ram = true;
        for p in [Some(first), second].into_iter().flatten() {
            let frame = p.gpa.frame();
            all_ram &= !apic::claims(self.cx.st, frame.addr().get())
                && self.cx.dom.p2m.get_page(frame, Want::Write).is_ok();
        }
        if all_ram { Err(Stop::Retry) } else { Ok(()) }
    }

    fn port_in(&mut self, port: u16, size: u8) -> Result<u32, Stop> {
        Ok(pio::port_read(self.cx, port, size))
    }

    fn port_out(&mut self, port: u16, size: u8, v: u32) -> Result<(), Stop> {
        pio::port_write(self.cx, port, size, v);
        Ok(())
    }
}
