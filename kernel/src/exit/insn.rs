//! The instruction that exited: its bytes, its length, and stepping over it.
//!
//! Processors without NRIP save do not tell the length of the instruction (`InsnLen` 0), so it is
//! decoded from the guest's memory. That is cached per vCPU ([`InsnCache`]), since a kernel executes
//! its few CPUID, HLT and WRMSR instructions over and over.
//!
//! (AMD APM volume 2 "State Saved on Exit": nRIP; Intel SDM "VM-Exit Instruction Length".)

use core::cell::Cell;
use core::num::NonZeroU8;

use galvan_base::direct::KnownBytes;
use galvan_base::state::{CR0_PE, EFER_LMA, EFER_NXE, Event, Seg, Segment};
use galvan_base::{Gpa, Mpa, PAGE_SIZE};

use super::Next;
use crate::emulate::{Bits, Code, DecodeError, Flags, MAX_LEN, Rep, Stop};
use crate::guest_access::{Access, Cx, WalkFault};
use crate::p2m::{P2mType, Stamp, Want};

/// Instructions whose length is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// VMMCALL or VMCALL
    Hypercall = 1,
    /// CPUID
    Cpuid,
    /// HLT
    Hlt,
    /// PAUSE
    Pause,
    /// WBINVD or INVD
    Wbinvd,
    /// RDMSR
    Rdmsr,
    /// WRMSR
    Wrmsr,
    /// XSETBV
    Xsetbv,
    /// RDPMC
    Rdpmc,
    /// IN or OUT
    Io,
}

/// Lengths of instructions that exited before.
///
/// An entry is found by the instruction's linear address and CR3, and used only if the same bytes
/// are still at its machine address. That address is the guest's for as long as no RAM was taken
/// from the domain, which moves the epoch of its p2m. So a guest that changes its code is seen;
/// only one that maps another page at the same address under the same CR3, with the same
/// instruction in a form of another length there, is not, and then harms nobody but itself.
#[derive(Debug, Default)]
pub struct InsnCache {
    slots: [Slot; SLOTS],
}

const SLOTS: usize = 16;
/// Longer instructions, by useless prefixes, are not cached.
const CACHED_LEN: usize = 4;

#[derive(Debug)]
#[repr(align(128))]
struct Slot {
    linear: u64,
    cr3: u64,
    stamp: Cell<Stamp>,
    /// Four bytes in which it lies, those of them that are its, and what they are.
    at: KnownBytes,
    mask: u32,
    bytes: u32,
    /// A [`Kind`], or 0.
    kind: u8,
    len: NonZeroU8,
}

const _: () = assert!(size_of::<Slot>() == 128);

impl Default for Slot {
    fn default() -> Self {
        Self {
            linear: 0,
            cr3: 0,
            stamp: Cell::default(),
            at: KnownBytes::new(Mpa::new_truncate(0)),
            mask: 0,
            bytes: 0,
            kind: 0,
            len: NonZeroU8::MIN,
        }
    }
}

/// The entries of a hypercall page are 32 bytes apart, other code is anywhere.
#[inline(always)]
fn slot_of(linear: u64) -> usize {
    (linear >> 5) as usize % SLOTS
}

/// The length of the instruction at the instruction pointer, which exited as `kind`. `given` is what
/// the processor said, 0 for nothing.
///
/// `None`: resume the guest. Either it is another instruction by now, which the guest is to execute,
/// or it cannot be fetched, for which an exception has been injected.
#[inline(always)]
pub fn length(cx: &mut Cx<'_>, given: u8, kind: Kind) -> Option<u8> {
    // One byte through all of it: a length is not 0.
    known_length(cx, given, kind).map(NonZeroU8::get)
}

/// The same, as the cache has it.
#[inline(always)]
fn known_length(cx: &mut Cx<'_>, given: u8, kind: Kind) -> Option<NonZeroU8> {
    if given != 0 {
        return NonZeroU8::new(given);
    }
    let (linear, cr3) = cx.st.hw.code_address();
    if let Some(s) = cx.st.icache.slots.get(slot_of(linear))
        && s.linear == linear
        && s.kind == kind as u8
        && s.cr3 == cr3
        && s.at.load(cx.hv.hw).is_ok_and(|b| b & s.mask == s.bytes)
        && cx.dom.p2m.still(&s.stamp)
    {
        return Some(s.len);
    }
    look(cx, kind, linear)
}

#[cold]
#[inline(never)]
fn look(cx: &mut Cx<'_>, kind: Kind, key: u64) -> Option<NonZeroU8> {
    let bits = bits(cx);
    match with_code(cx, |bytes| {
        match_kind(bytes, bits, kind).map(|n| (n, prefix_of(bytes)))
    }) {
        Ok(Ok((len, bytes))) => {
            let len = NonZeroU8::new(len)?;
            remember(cx, kind, key, len, bytes);
            Some(len)
        }
        Ok(Err(_)) => None,
        Err(stop) => {
            let _ = stopped(cx, stop);
            None
        }
    }
}

/// The first bytes of an instruction.
pub(super) fn prefix_of<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut b = [0; N];
    for (to, from) in b.iter_mut().zip(bytes) {
        *to = *from;
    }
    b
}

fn remember(cx: &mut Cx<'_>, kind: Kind, key: u64, len: NonZeroU8, bytes: [u8; CACHED_LEN]) {
    let linear = linear_ip(cx);
    let size = usize::from(len.get());
    if size > CACHED_LEN || linear as usize % PAGE_SIZE + size > PAGE_SIZE {
        return;
    }
    let Ok(gpa) = cx.translate(linear, false) else {
        return;
    };
    let mut stamp = cx.dom.p2m.stamp();
    cx.dom.p2m.watch(&mut stamp, gpa.frame());
    let page = match cx.dom.p2m.get_page(gpa.frame(), Want::Read) {
        Ok(page) if page.ty() == P2mType::Ram => page,
        _ => return,
    };
    let cr3 = cx.st.hw.cr(3);
    if let Some(s) = cx.st.icache.slots.get_mut(slot_of(key)) {
        // Near the end of the page it does not begin with them.
        let start = gpa.offset().min(KnownBytes::LAST);
        let shift = (gpa.offset() - start) as u32 * 8;
        let mask = u32::MAX >> (32 - size * 8) << shift;
        *s = Slot {
            linear: key,
            cr3,
            stamp: Cell::new(stamp),
            at: KnownBytes::new(Mpa::new_truncate(page.mfn().addr().get() + start as u64)),
            mask,
            bytes: u32::from_le_bytes(bytes) << shift & mask,
            kind: kind as u8,
            len,
        };
    }
}

/// The length of the instruction if it is of this kind; `Unsupported` if it is none.
fn match_kind(bytes: &[u8], bits: Bits, kind: Kind) -> Result<u8, DecodeError> {
    let mut code = Code::new(bytes);
    let (p, first) = code.prefixes(bits)?;
    let matches = match (first, kind) {
        (0xf4, Kind::Hlt) => true,
        (0x90, Kind::Pause) => p.rep == Rep::Equal,
        (0xe4..=0xe7, Kind::Io) => {
            code.byte()?;
            true
        }
        (0xec..=0xef, Kind::Io) => true,
        (0x0f, _) => match (code.byte()?, kind) {
            (0xa2, Kind::Cpuid)
            | (0x08 | 0x09, Kind::Wbinvd)
            | (0x32, Kind::Rdmsr)
            | (0x30, Kind::Wrmsr)
            | (0x33, Kind::Rdpmc) => true,
            (0x01, Kind::Hypercall) => matches!(code.byte()?, 0xc1 | 0xd9),
            (0x01, Kind::Xsetbv) => code.byte()? == 0xd1,
            _ => false,
        },
        _ => false,
    };
    if matches && !p.lock {
        Ok(code.taken())
    } else {
        Err(DecodeError::Unsupported)
    }
}

/// Steps over the instruction that was emulated, as the processor ends one: the interrupt shadow
/// and RFLAGS.RF go, and a guest that single-steps gets its #DB.
#[inline]
pub fn advance(cx: &mut Cx<'_>, len: u8) {
    if cx.st.hw.step_over(len) & (Flags::TF | Flags::RF) != 0 {
        completed(cx);
    }
}

/// Goes on at another instruction pointer after an instruction.
pub(super) fn jump(cx: &mut Cx<'_>, to: u64) {
    cx.st.hw.set_rip(to);
    if cx.st.hw.rflags() & (Flags::TF | Flags::RF) != 0 {
        completed(cx);
    }
}

const LONG: u16 = Segment::LONG;
const DEFAULT_32: u16 = Segment::DEFAULT_32;

/// What follows an instruction under RFLAGS.TF or RF.
#[cold]
pub(super) fn completed(cx: &mut Cx<'_>) {
    const DR6_BS: u64 = 1 << 14;
    let hw = &mut cx.st.hw;
    let flags = hw.rflags();
    hw.set_rflags(flags & !Flags::RF);
    // A fault of the same instruction comes first, and its handler returns to the trap.
    if flags & Flags::TF != 0 && !hw.event_pending() {
        let mut s = hw.state();
        s.dr6 |= DR6_BS;
        hw.set_state(&s);
        hw.inject(Event::Exception(1, None));
    }
}

/// The width of the code that is executing.
pub(super) fn bits(cx: &Cx<'_>) -> Bits {
    let hw = &cx.st.hw;
    let cs = hw.code_attributes();
    if cs & LONG != 0 && hw.efer() & EFER_LMA != 0 {
        Bits::B64
    } else if cs & DEFAULT_32 != 0 {
        Bits::B32
    } else {
        Bits::B16
    }
}

/// The linear address of the instruction pointer.
fn linear_ip(cx: &Cx<'_>) -> u64 {
    let hw = &cx.st.hw;
    match bits(cx) {
        Bits::B64 => hw.rip(),
        _ => hw.segment(Seg::Cs).base.wrapping_add(hw.rip()) & 0xffff_ffff,
    }
}

/// What an access of the guest is, as the processor stands.
pub(super) fn access(cx: &Cx<'_>, a: Access) -> Access {
    const CR0_WP: u64 = galvan_base::state::CR0_WP;
    const CR4_SMEP: u64 = 1 << 20;
    const CR4_SMAP: u64 = 1 << 21;
    let hw = &cx.st.hw;
    let mut a = a;
    if hw.cpl() == 3 {
        a |= Access::USER;
    } else {
        let cr4 = hw.cr(4);
        let forbidden = if a.contains(Access::FETCH) {
            cr4 & CR4_SMEP != 0
        } else {
            cr4 & CR4_SMAP != 0 && hw.rflags() & Flags::AC == 0
        };
        a.set(Access::NO_USER_PAGES, forbidden);
        a.set(Access::IGNORE_READ_ONLY, hw.cr(0) & CR0_WP == 0);
    }
    a.set(Access::NX, hw.efer() & EFER_NXE != 0);
    a
}

/// What becomes of an access that the page walk refused at this address.
pub(super) fn walk_fault(f: WalkFault, address: u64, a: Access) -> Stop {
    const PRESENT: u32 = 1;
    const WRITE: u32 = 1 << 1;
    const USER: u32 = 1 << 2;
    const RESERVED: u32 = 1 << 3;
    const FETCH: u32 = 1 << 4;
    let mut error = 0;
    match f {
        WalkFault::NotCanonical => return Stop::GP,
        WalkFault::PageFault { present } => {
            if present {
                error |= PRESENT;
            }
        }
        // A table where there is nothing reads all ones, and so has reserved bits set.
        WalkFault::NotRam(_) => error |= PRESENT | RESERVED,
    }
    for (what, bit) in [(Access::WRITE, WRITE), (Access::USER, USER)] {
        if a.contains(what) {
            error |= bit;
        }
    }
    if a.contains(Access::FETCH) && a.intersects(Access::NX | Access::NO_USER_PAGES) {
        error |= FETCH;
    }
    Stop::PageFault { address, error }
}

/// Runs `f` on the bytes from the instruction pointer on: those of its page first, and those of the
/// next page too if `f` finds them too few.
pub(super) fn with_code<T>(
    cx: &Cx<'_>,
    f: impl Fn(&[u8]) -> Result<T, DecodeError>,
) -> Result<Result<T, DecodeError>, Stop> {
    let start = linear_ip(cx);
    let long = bits(cx) == Bits::B64;
    let access = access(cx, Access::FETCH);
    let mut buf = [0; MAX_LEN];
    let here = MAX_LEN.min(PAGE_SIZE - start as usize % PAGE_SIZE);
    let (first, rest) = buf.split_at_mut(here);
    fetch(cx, start, access, first)?;
    match f(first) {
        Err(DecodeError::Short) if !rest.is_empty() => {}
        done => return Ok(done),
    }
    let next = start.wrapping_add(here as u64);
    let next = if long { next } else { next & 0xffff_ffff };
    fetch(cx, next, access, rest)?;
    Ok(f(&buf))
}

/// Fetches bytes that lie in one page.
fn fetch(cx: &Cx<'_>, linear: u64, a: Access, buf: &mut [u8]) -> Result<(), Stop> {
    match cx.read_as(linear, a, buf) {
        Ok(()) => Ok(()),
        // A table may be what is no RAM: then the walk fails again.
        Err(WalkFault::NotRam(_)) => {
            let gpa = cx
                .translate_as(linear, a)
                .map_err(|f| walk_fault(f, linear, a))?;
            fetch_device(cx, gpa, buf)
        }
        Err(f) => Err(walk_fault(f, linear, a)),
    }
}

/// Fetches code from the machine's own memory that is no RAM: the firmware's, which the hardware
/// domain executes in place.
#[cold]
fn fetch_device(cx: &Cx<'_>, gpa: Gpa, buf: &mut [u8]) -> Result<(), Stop> {
    let l = cx.dom.p2m.lookup(gpa.frame());
    if l.ty != P2mType::MmioDirect {
        return Err(Stop::GP);
    }
    for (i, b) in buf.iter_mut().enumerate() {
        let at = l.mfn.addr().get() + (gpa.offset() + i) as u64;
        *b = cx.hv.hw.mmio_read(Mpa::new_truncate(at), 1) as u8;
    }
    Ok(())
}

/// Carries out what an instruction ended with that was not completed.
pub(super) fn stopped(cx: &mut Cx<'_>, stop: Stop) -> Next {
    match stop {
        Stop::Exception(e) => inject(cx, e),
        Stop::PageFault { address, error } => {
            cx.st.hw.set_cr(2, address);
            inject(cx, Event::page_fault(error));
        }
        Stop::Retry => {}
        Stop::Wait => return Next::Block,
    }
    Next::Resume
}

/// Injects an exception. In real mode there are no error codes.
pub(super) fn inject(cx: &mut Cx<'_>, e: Event) {
    let hw = &mut cx.st.hw;
    hw.inject(match e {
        Event::Exception(v, Some(_)) if hw.cr(0) & CR0_PE == 0 => Event::Exception(v, None),
        e => e,
    });
}
