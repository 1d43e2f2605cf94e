//! Hypercalls over a whole hypervisor in this process: what no sequence of them may do.
//!
//! The machine has dom0 and two guests, all with vCPUs that are up. An input is a program: it writes
//! words to the guests' memory, most of them of a kind that hypercalls take (domain ids, frame numbers,
//! ports, addresses), makes calls, and lets time pass. After each call no lock is held (the ranks
//! see to that); after the last the books must balance, and once the guests are destroyed all that
//! was theirs is free.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use galvan_base::testing::MachineEnd;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen as nr;
use galvan_kernel::domain::Domain;
use galvan_kernel::hvm_context::{self, Sink, Source};
use galvan_kernel::hypercall::{Args, Outcome};
use galvan_kernel::lifecycle;
use galvan_kernel::mm::Owner;
use galvan_kernel::p2m::Budget;
use galvan_kernel::testing::{RAM, World};

use crate::{Bytes, Scratch};

/// Guests beside dom0.
const GUESTS: u16 = 2;
/// Arguments lie in these pages, from guest frame [`ARGS`] on.
const ARGS: u64 = 8;
const ARG_PAGES: u64 = 4;
/// Calls in one input; longer ones find nothing more.
const CALLS: usize = 96;

/// The calls of which a PVH kernel or a toolstack makes many.
const NUMBERS: &[u32] = &[
    nr::HYPERVISOR_MEMORY_OP,
    nr::HYPERVISOR_GRANT_TABLE_OP,
    nr::HYPERVISOR_EVENT_CHANNEL_OP,
    nr::HYPERVISOR_DOMCTL,
    nr::HYPERVISOR_GRANT_TABLE_OP,
    nr::HYPERVISOR_MEMORY_OP,
    nr::HYPERVISOR_SYSCTL,
    nr::HYPERVISOR_VCPU_OP,
    nr::HYPERVISOR_HVM_OP,
    nr::HYPERVISOR_PHYSDEV_OP,
    nr::HYPERVISOR_SCHED_OP,
    nr::HYPERVISOR_MULTICALL,
    nr::HYPERVISOR_XEN_VERSION,
    nr::HYPERVISOR_CONSOLE_IO,
    nr::HYPERVISOR_PLATFORM_OP,
    nr::HYPERVISOR_SET_TIMER_OP,
    nr::HYPERVISOR_VM_ASSIST,
    nr::HYPERVISOR_DM_OP,
    nr::HYPERVISOR_HYPFS_OP,
];

/// A number of a kind that means something to some call.
fn word(b: &mut Bytes<'_>) -> u64 {
    match b.below(12) {
        0 => 0,
        1 => b.below(8) as u64,
        2 => u64::from(b.u8()),
        // A domain: dom0, the guests, none, the caller, the special ones.
        3 => b.pick(&[0, 1, 2, 3, 0x7ff0, 0x7ff1, 0x7ff2, 0x7ff4]),
        // A frame, most of them RAM.
        4 => b.below(RAM as usize + 8) as u64,
        // Two 32-bit fields.
        5 => b.below(16) as u64 | (b.below(16) as u64) << 32,
        // A page's address, or one within.
        6 => (b.below(RAM as usize + 4) as u64) << 12,
        7 => ARGS << 12 | u64::from(b.u16() & 0x3ff8),
        8 => b.pick(&[
            u64::MAX,
            u64::MAX - 7,
            1 << 63,
            1 << 40,
            1 << 32,
            0xffff_ffff,
            0xfee0_0000,
        ]),
        // Versions of the toolstack's interfaces in the upper half, the operation in the lower.
        9 => b.below(90) as u64 | b.pick(&[0x17u64, 0x15, 0x16]) << 32,
        // A grant entry: flags, domain, frame.
        10 => b.below(32) as u64 | (b.below(4) as u64) << 16 | (b.below(RAM as usize) as u64) << 32,
        _ => b.u64(),
    }
}

/// Writes a structure of some words; returns its address.
fn structure(w: &World, dom: u16, b: &mut Bytes<'_>) -> u64 {
    let at = ARGS << 12 | (b.below(ARG_PAGES as usize) as u64) << 12 | u64::from(b.u8()) << 3;
    for i in 0..b.below(10) as u64 {
        poke(w, dom, at + i * 8, word(b));
    }
    at
}

/// Writes a word, where there is memory still.
fn poke(w: &World, dom: u16, at: u64, value: u64) {
    w.try_put(dom, at, &value);
}

fn call(w: &World, dom: u16, b: &mut Bytes<'_>) {
    let number = match b.below(16) {
        0 => u32::from(b.u8()),
        _ => b.pick(NUMBERS),
    };
    let at = structure(w, dom, b);
    let args: Args = match number {
        // The operation is in the structure.
        nr::HYPERVISOR_DOMCTL | nr::HYPERVISOR_SYSCTL | nr::HYPERVISOR_PLATFORM_OP => {
            let version = match number {
                nr::HYPERVISOR_SYSCTL => 0x15,
                nr::HYPERVISOR_DOMCTL => b.pick(&[0x17u64, 0x15, 0x16]),
                _ => 0x0300_0001,
            };
            let (op, domain) = (b.below(96) as u64, b.below(4) as u64);
            poke(w, dom, at, op | version << 32);
            if number == nr::HYPERVISOR_DOMCTL && b.below(4) != 0 {
                poke(w, dom, at + 8, domain);
            }
            [at, 0, 0, 0, 0]
        }
        nr::HYPERVISOR_MULTICALL => [at, word(b), 0, 0, 0],
        nr::HYPERVISOR_GRANT_TABLE_OP => [b.below(14) as u64, at, word(b), 0, 0],
        nr::HYPERVISOR_VCPU_OP => [b.below(16) as u64, b.below(3) as u64, at, 0, 0],
        nr::HYPERVISOR_CONSOLE_IO => [b.below(3) as u64, word(b), at, 0, 0],
        nr::HYPERVISOR_SET_TIMER_OP => [word(b), 0, 0, 0, 0],
        nr::HYPERVISOR_DM_OP => [word(b), word(b), at, 0, 0],
        _ => [b.below(40) as u64, at, word(b), word(b), word(b)],
    };
    let vcpu = b.below(2) as u32;
    go(w, dom, vcpu, number, args);
}

/// A call to its end, or as long as its vCPU would still be let to make it.
fn go(w: &World, dom: u16, vcpu: u32, number: u32, mut args: Args) {
    for _ in 0..100_000 {
        if w.dom(dom).is_dying() {
            return;
        }
        match w.call_once(dom, vcpu, number, args) {
            Ok(Outcome::Again(again)) => args = again,
            Ok(_) | Err(_) => return,
        }
    }
    panic!("hypercall {number} ({args:x?}) does not end");
}

/// A program. It ends early where it has dom0 switch the machine off.
pub fn run(data: &[u8]) {
    let scratch = Scratch::new(GUESTS + 1, 2);
    let w = scratch.world();
    w.machine.end_quietly();
    let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| play(w, data)));
    if let Err(why) = played
        && !why.is::<MachineEnd>()
    {
        std::panic::resume_unwind(why);
    }
}

fn play(w: &World, data: &[u8]) {
    let before = w.hv.frames.free_frames() + owned(w);
    let b = &mut Bytes(data);
    for _ in 0..CALLS {
        if b.is_empty() {
            break;
        }
        let dom = b.pick(&[0u16, 1, 1, 2]);
        match b.below(8) {
            0 => {
                structure(w, dom, b);
            }
            1 => w.machine.advance_ns(word(b) & 0xffff_ffff),
            // A grant table where a kernel has it, and its entries.
            2 => {
                structure(w, dom, b);
                go(
                    w,
                    dom,
                    0,
                    nr::HYPERVISOR_MEMORY_OP,
                    [7, ARGS << 12, 0, 0, 0],
                );
            }
            _ => call(w, dom, b),
        }
    }
    end(w);
    let after = w.hv.frames.free_frames() + owned(w);
    assert_eq!(before, after, "frames between heaven and earth");
}

/// Frames that belong to somebody, or wait for the last who uses them.
fn owned(w: &World) -> u64 {
    let frames = &w.hv.frames;
    (0..8)
        .map(|id| frames.count_owned(Owner::Guest(id)))
        .sum::<u64>()
        + frames.count_owned(Owner::Galvan)
        + frames.count_limbo()
}

/// Destroys all guests, also such as the input made, and looks at what they left.
fn end(w: &World) {
    // dom0 is 0.
    let guests = core::iter::successors(w.hv.domains.first_from(1), |d| {
        w.hv.domains.first_from(d.id.checked_add(1)?)
    });
    for d in &guests.collect::<Vec<Arc<Domain>>>() {
        let mut steps = 0;
        while !lifecycle::destroy(w.hv, d, &mut Budget::new(64)).expect("a guest") {
            steps += 1;
            assert!(steps < 100_000, "{d:?} does not end");
        }
        let left = w.hv.frames.count_owned(Owner::Guest(d.id));
        assert_eq!(left, 0, "{d:?} has frames after its end");
        assert_eq!(
            d.tot_pages.load(Ordering::Relaxed),
            0,
            "{d:?} counts frames"
        );
    }
}

/// All bytes, and how many of them were taken.
struct Bytestream<'a>(&'a [u8], usize);

impl Source for Bytestream<'_> {
    fn take(&mut self, bytes: &mut [u8]) -> Result<(), Errno> {
        let left = self.0.get(self.1..).unwrap_or_default();
        bytes.copy_from_slice(left.get(..bytes.len()).ok_or(Errno::ENODATA)?);
        self.1 += bytes.len();
        Ok(())
    }

    fn rewind(&mut self) {
        self.1 = 0;
    }
}

#[derive(Default)]
struct Saved(Vec<u8>);

impl Sink for Saved {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// Changes bytes of a saved context and loads it; what was taken can be saved, and that loaded.
pub fn records(data: &[u8]) {
    let scratch = Scratch::new(2, 2);
    let w = scratch.world();
    let d = w.dom(1);
    let mut context = Saved::default();
    hvm_context::save(w.hv, d, true, &mut context).expect("a context");
    let b = &mut Bytes(data);
    while !b.is_empty() {
        let at = usize::from(b.u16()) % context.0.len().max(1);
        match b.below(4) {
            0 => context.0.truncate(at),
            1 => {
                for byte in context.0[at..].iter_mut().take(8) {
                    *byte = b.u8();
                }
            }
            _ => {
                if let Some(byte) = context.0.get_mut(at) {
                    *byte = b.u8();
                }
            }
        }
    }
    if hvm_context::load(w.hv, d, &mut Bytestream(&context.0, 0)).is_ok() {
        let mut again = Saved::default();
        hvm_context::save(w.hv, d, true, &mut again).expect("what was loaded can be saved");
        let r = hvm_context::load(w.hv, d, &mut Bytestream(&again.0, 0));
        assert_eq!(r, Ok(()), "what was saved can be loaded");
    }
}
