//! The traits behind which the hardware stands.
//!
//! [`Platform`] is the machine: memory, clock, interrupts, configuration space, IOMMU. [`HwVcpu`] is
//! one virtual processor of the vendor in use. `kernel/bare` implements both for the real machine,
//! [`crate::testing`] for a machine that lives in a host process.
//!
//! Concurrency contract: all methods of [`Platform`] may be called by any CPU at any time, with any
//! lock held, unless they say otherwise. Galvan handles exits with physical interrupts disabled;
//! they are taken only inside [`Platform::take_interrupts`] and [`Platform::idle`], which the run
//! loop calls with no lock held but that of the vCPU it runs. So no lock needs an interrupt-disabling variant.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt::{self, Debug};

use crate::exit::Exit;
use crate::state::{ArchState, CR0_PG, CR4_PAE, CR4_PSE, EFER_LMA, Event, Gprs, Seg, Segment};
use crate::{Dfn, Mfn, Mpa, PageOrder};

/// A physical CPU, numbered from 0 (the boot CPU) without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuId(pub u32);

/// The frame number or the range is not memory that this call may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemFault;

/// A resource of the machine (frames, interrupt vectors, table space) is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted;

/// Byte and atomic access to machine frames that are RAM.
///
/// A range must lie within one frame (`off + len <= 4096`) and atomics must be naturally aligned;
/// otherwise, and for frames that are not RAM, [`MemFault`]. Other agents (guests, devices) may
/// write the same bytes at the same time: nothing here ever hands out a reference.
pub trait HostMem: Sync {
    /// Copies out of a frame.
    fn read(&self, m: Mfn, off: usize, buf: &mut [u8]) -> Result<(), MemFault>;
    /// Copies into a frame.
    fn write(&self, m: Mfn, off: usize, buf: &[u8]) -> Result<(), MemFault>;
    /// Copies between frames.
    fn copy(
        &self,
        dst: Mfn,
        dst_off: usize,
        src: Mfn,
        src_off: usize,
        len: usize,
    ) -> Result<(), MemFault>;
    /// Fills a whole frame with zeroes.
    fn zero(&self, m: Mfn) -> Result<(), MemFault>;
    /// Reads an aligned u64 (Acquire).
    fn load_u64(&self, m: Mfn, off: usize) -> Result<u64, MemFault>;
    /// Writes an aligned u64 (Release).
    fn store_u64(&self, m: Mfn, off: usize, v: u64) -> Result<(), MemFault>;
    /// Reads an aligned u32 (Acquire).
    fn load_u32(&self, m: Mfn, off: usize) -> Result<u32, MemFault>;
    /// Writes an aligned u32 (Release).
    fn store_u32(&self, m: Mfn, off: usize, v: u32) -> Result<(), MemFault>;
    /// Compares and exchanges a u64; gives the value found (SeqCst).
    fn cmpxchg_u64(&self, m: Mfn, off: usize, old: u64, new: u64) -> Result<u64, MemFault>;
    /// Compares and exchanges a u32; gives the value found (SeqCst).
    fn cmpxchg_u32(&self, m: Mfn, off: usize, old: u32, new: u32) -> Result<u32, MemFault>;
    /// ORs into a u64; gives the value before (SeqCst).
    fn or_u64(&self, m: Mfn, off: usize, bits: u64) -> Result<u64, MemFault>;
    /// ANDs into a u64; gives the value before (SeqCst).
    fn and_u64(&self, m: Mfn, off: usize, mask: u64) -> Result<u64, MemFault>;
    /// ORs into a u32; gives the value before (SeqCst).
    fn or_u32(&self, m: Mfn, off: usize, bits: u32) -> Result<u32, MemFault>;
    /// ANDs into a u32; gives the value before (SeqCst).
    fn and_u32(&self, m: Mfn, off: usize, mask: u32) -> Result<u32, MemFault>;
    /// Swaps a byte; gives the value before (SeqCst).
    fn swap_u8(&self, m: Mfn, off: usize, v: u8) -> Result<u8, MemFault>;
}

/// Conversion from TSC ticks to nanoseconds as pvclock expresses it:
/// `ns = ((ticks << shift) * mul) >> 32`, a negative shift shifting right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    /// 32.32 fixed-point factor.
    pub mul: u32,
    /// Binary exponent applied to the ticks first.
    pub shift: i8,
}

impl TscScale {
    /// The scale of a TSC of this frequency. `khz` must not be 0.
    pub fn from_khz(khz: u64) -> Self {
        // Find the shift that brings 10^9 * 2^32 / (hz * 2^shift) just below 2^32.
        let hz = u128::from(khz.max(1)) * 1000;
        let mut shift = 0i8;
        let mut num = 1_000_000_000u128 << 32;
        let mut den = hz;
        while num / den > u128::from(u32::MAX) {
            den <<= 1;
            shift += 1;
        }
        while num / den <= u128::from(u32::MAX >> 1) {
            num <<= 1;
            shift -= 1;
        }
        TscScale {
            mul: (num / den) as u32,
            shift,
        }
    }

    /// Nanoseconds of so many ticks.
    #[inline]
    pub fn ticks_to_ns(self, ticks: u64) -> u64 {
        let t = if self.shift >= 0 {
            u128::from(ticks) << self.shift
        } else {
            u128::from(ticks >> -self.shift)
        };
        ((t * u128::from(self.mul)) >> 32) as u64
    }

    /// Ticks of so many nanoseconds, rounded up enough that converting back gives at least `ns`
    /// less one tick.
    #[inline]
    pub fn ns_to_ticks(self, ns: u64) -> u64 {
        let t = (u128::from(ns) << 32).div_ceil(u128::from(self.mul.max(1)));
        let t = if self.shift >= 0 {
            t >> self.shift
        } else {
            t << -self.shift
        };
        u64::try_from(t).unwrap_or(u64::MAX)
    }
}

/// The second-stage table format of the processor in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage2Format {
    /// AMD nested page tables.
    Npt,
    /// Intel extended page tables.
    Ept,
}

/// A physical IO-APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApicInfo {
    /// APIC id.
    pub id: u8,
    /// Base address of its registers.
    pub base: Mpa,
    /// The first global system interrupt it serves.
    pub gsi_base: u32,
    /// How many pins it has.
    pub pins: u32,
}

/// PCI segment, bus, device and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sbdf(pub u32);

impl Sbdf {
    /// From the parts; `devfn` is device << 3 | function.
    pub const fn new(segment: u16, bus: u8, devfn: u8) -> Self {
        Sbdf((segment as u32) << 16 | (bus as u32) << 8 | devfn as u32)
    }
    /// PCI segment group.
    pub const fn segment(self) -> u16 {
        (self.0 >> 16) as u16
    }
    /// Bus number.
    pub const fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }
    /// Device << 3 | function.
    pub const fn devfn(self) -> u8 {
        self.0 as u8
    }
    /// Bus and devfn: the requester id within the segment.
    pub const fn bdf(self) -> u16 {
        self.0 as u16
    }
}

impl fmt::Display for Sbdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (segment, bus, devfn) = (self.segment(), self.bus(), self.devfn());
        write!(
            f,
            "{segment:04x}:{bus:02x}:{:02x}.{}",
            devfn >> 3,
            devfn & 7
        )
    }
}

/// One memory-mapped configuration space window (PCI Firmware Specification "MCFG Table").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EcamWindow {
    /// Address of bus `first_bus`, device 0, function 0.
    pub base: Mpa,
    /// Segment group.
    pub segment: u16,
    /// First bus decoded.
    pub first_bus: u8,
    /// Last bus decoded.
    pub last_bus: u8,
}

/// An interrupt of the machine that a domain may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostIrq {
    /// A pin of an IO-APIC, by global system interrupt number.
    Gsi(u32),
    /// A message-signalled interrupt, by the index [`Platform::msi_alloc`] gave.
    Msi(u32),
    /// Something was typed on the physical console ([`Platform::console_read`]).
    Console,
}

/// Where a device must write to raise a message-signalled interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiTarget {
    /// The index by which the interrupt is later named.
    pub index: u32,
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// How linear addresses are translated (AMD APM "Page Translation and Protection"; Intel SDM
/// "Paging").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagingMode {
    /// Not at all.
    Off,
    /// 32-bit paging with pages of 4 KiB.
    Legacy,
    /// 32-bit paging with pages of 4 KiB and 4 MiB.
    LegacyPse,
    /// PAE paging.
    Pae,
    /// Four levels.
    Long,
}

/// What the guest has to do before an interrupt that waits outside can be brought in: then it exits
/// with [`Exit::InterruptWindow`], at once or a little too early, and the question is asked anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// Nothing waits.
    Closed,
    /// It has to be able to take interrupts: IF is set, and there is no shadow.
    Open,
    /// It has to lower its task priority (CR8) below this class of vectors, 1 to 15, which is not above
    /// what is in CR8 now.
    Below(u8),
}

/// What a virtual processor is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuConfig {
    /// Root of the domain's second-stage tables.
    pub nested_root: Mpa,
    /// The vCPU belongs to the hardware domain: its port accesses go by
    /// [`Platform::hwdom_ports`]; those of all others exit.
    pub hardware_domain: bool,
}

/// Access rights of a second-stage or IOMMU mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Reads allowed.
    pub read: bool,
    /// Writes allowed.
    pub write: bool,
}

/// DMA translation of one domain's devices. Each domain that owns devices has a context, named by
/// its domain id.
pub trait Iommu: Sync {
    /// Maps `1 << order` frames for the devices of `domid`, replacing what was there.
    fn map(&self, domid: u16, d: Dfn, m: Mfn, order: PageOrder, a: Access)
    -> Result<(), Exhausted>;
    /// Removes `1 << order` frames; absent ones are skipped.
    fn unmap(&self, domid: u16, d: Dfn, order: PageOrder) -> Result<(), Exhausted>;
    /// Returns when no device of `domid` can use a translation removed before the call.
    fn flush(&self, domid: u16);
    /// Gives a function to `domid`, or takes it from everybody.
    fn attach(&self, dev: Sbdf, domid: Option<u16>) -> Result<(), Exhausted>;
    /// Frees the context of a domain that has no devices.
    fn destroy(&self, domid: u16);
}

/// The machine.
pub trait Platform: HostMem + Debug {
    /// The CPU that executes the caller.
    fn cpu(&self) -> CpuId;
    /// How many CPUs run.
    fn cpus(&self) -> u32;
    /// Local APIC id of a CPU.
    fn apic_id(&self, cpu: CpuId) -> u32;
    /// Makes `cpu` leave guest mode or [`Platform::idle`] soon; a no-op for the calling CPU. The
    /// effect may come at any later time, and more than once.
    fn kick(&self, cpu: CpuId);
    /// Tells a CPU other than the caller's that [`Posting::post`] asked for it.
    fn notify_posted(&self, cpu: CpuId) {
        self.kick(cpu);
    }
    /// A hint in a spin loop.
    fn relax(&self);
    /// Lets pending physical interrupts in, then closes the window again. No lock but the running
    /// vCPU's may be held.
    fn take_interrupts(&self);
    /// Waits for an interrupt with the window open, unless `stay_awake()` says, with the window
    /// closed, that there is work. No lock may be held.
    fn idle(&self, stay_awake: &dyn Fn() -> bool);

    /// The time stamp counter of this CPU.
    fn tsc(&self) -> u64;
    /// Its frequency.
    fn tsc_khz(&self) -> u64;
    /// Its conversion to system time: nanoseconds since the hypervisor started are
    /// `scale.ticks_to_ns(tsc - tsc_base)`.
    fn tsc_scale(&self) -> TscScale;
    /// The TSC value at system time 0.
    fn tsc_base(&self) -> u64;
    /// The TSC runs at one rate in all power states, in step on all CPUs.
    fn tsc_stable(&self) -> bool;
    /// Nanoseconds since the hypervisor started, the same on all CPUs.
    fn now_ns(&self) -> u64 {
        self.tsc_scale()
            .ticks_to_ns(self.tsc().saturating_sub(self.tsc_base()))
    }
    /// Seconds and nanoseconds since 1970 at system time 0, by the machine's clock.
    fn wallclock_base(&self) -> (u64, u32);
    /// Asks for a timer interrupt on this CPU at this system time in ns (or at once if it is past);
    /// `None` for none. Replaces the earlier request.
    fn set_timer(&self, deadline_ns: Option<u64>);

    /// Executes CPUID.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// The format of second-stage tables, and the largest page they may use.
    fn stage2(&self) -> (Stage2Format, PageOrder);
    /// The frame to which the second-stage tables must lead from [`APIC_PAGE`] for the processors to answer
    /// accesses to that themselves ([`HwVcpu::shows_apic`]), if they can. It is the machine's for ever, and
    /// nobody reads or writes it: to a vCPU for which it is not being done it must not be mapped.
    fn apic_access_page(&self) -> Option<Mfn> {
        None
    }
    /// Makes a virtual processor.
    fn new_vcpu(&self, cfg: &VcpuConfig) -> Result<Box<dyn HwVcpu>, Exhausted>;
    /// Allows or denies the hardware domain direct access to ports `first..=last`.
    fn hwdom_ports(&self, first: u16, last: u16, direct: bool);

    /// Reads a port of the machine; `size` is 1, 2 or 4.
    fn port_in(&self, port: u16, size: u8) -> u32;
    /// Writes a port of the machine; `size` is 1, 2 or 4.
    fn port_out(&self, port: u16, size: u8, v: u32);
    /// Reads device memory, naturally aligned; `size` is 1, 2, 4 or 8.
    fn mmio_read(&self, a: Mpa, size: u8) -> u64;
    /// Writes device memory, naturally aligned; `size` is 1, 2, 4 or 8.
    fn mmio_write(&self, a: Mpa, size: u8, v: u64);
    /// Reads configuration space, naturally aligned; all ones where there is nothing.
    fn pci_read(&self, dev: Sbdf, reg: u16, size: u8) -> u32;
    /// Writes configuration space, naturally aligned.
    fn pci_write(&self, dev: Sbdf, reg: u16, size: u8, v: u32);
    /// The memory-mapped configuration windows.
    fn ecam(&self) -> &[EcamWindow];

    /// PCI functions that Galvan uses itself (an IOMMU, its serial port).
    fn private_pci(&self) -> &[Sbdf] {
        &[]
    }
    /// Ranges of ports, first and last, that Galvan uses itself.
    fn private_ports(&self) -> &[(u16, u16)] {
        &[]
    }
    /// Ranges of device memory, address and length, that no domain may have mapped.
    fn private_mmio(&self) -> &[(Mpa, u64)] {
        &[]
    }

    /// The IO-APICs, by ascending GSI base.
    fn ioapics(&self) -> &[IoApicInfo];
    /// Routes a pin to `cpu` and unmasks it. From then on its interrupts arrive at the handler as
    /// [`HostIrq::Gsi`]; a level interrupt stays masked after each until [`Platform::gsi_eoi`].
    fn gsi_bind(
        &self,
        gsi: u32,
        level: bool,
        active_low: bool,
        cpu: CpuId,
    ) -> Result<(), Exhausted>;
    /// Masks the pin and forgets the route.
    fn gsi_unbind(&self, gsi: u32);
    /// The domain has ended its handling of a level interrupt.
    fn gsi_eoi(&self, gsi: u32);
    /// Reserves a message-signalled interrupt that arrives on `cpu`.
    fn msi_alloc(&self, cpu: CpuId) -> Result<MsiTarget, Exhausted>;
    /// Gives it back.
    fn msi_free(&self, index: u32);
    /// The IOMMU, if the machine has one that is in use.
    fn iommu(&self) -> Option<&dyn Iommu>;

    /// Writes to the physical console.
    fn console_write(&self, text: &[u8]);
    /// Takes a byte that was typed on the physical console.
    fn console_read(&self) -> Option<u8>;
    /// Resets the machine.
    fn reset(&self) -> !;
    /// Stops the machine for good, with power off where Galvan can do that.
    fn power_off(&self) -> !;
}

/// What a [`HwVcpu`] counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HwCounts {
    /// Exits that its own part has dealt with, so that the policy has not seen them.
    pub hidden_exits: u64,
    /// Flushes of the TLB, and fresh tags taken in their place.
    pub tlb_flushes: u64,
    /// VMREAD and VMWRITE.
    #[cfg(feature = "count-vmcs")]
    pub vmcs: [u64; 2],
}

/// What a processor does by itself for a local APIC in x2APIC mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum VirtualApic {
    /// Nothing.
    #[default]
    None,
    /// It ends interrupts as the guest writes EOI.
    Ends,
    /// It delivers those that wait, too, as soon as the guest can take them.
    Delivers,
}

/// Interrupts of a local APIC, for a processor that deals with them by itself: vector v is bit v % 64 of
/// word v / 64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lent {
    /// IRR: those that wait. None where the processor does not deliver them ([`VirtualApic::Delivers`]).
    pub waiting: [u64; 4],
    /// ISR: those that are being handled.
    pub in_service: [u64; 4],
    /// Those whose end is an exit ([`Exit::Eoi`]).
    pub exits: [u64; 4],
}

impl Lent {
    /// One that waits and one that is in service, 0 for none; neither's end is an exit.
    pub fn few(waiting: u8, in_service: u8) -> Self {
        let only = |v: u8| match v {
            0 => [0; 4],
            _ => core::array::from_fn(|n| u64::from(usize::from(v >> 6) == n) << (v & 63)),
        };
        Lent {
            waiting: only(waiting),
            in_service: only(in_service),
            exits: [0; 4],
        }
    }
}

/// Guest physical address of the page by which a local APIC in xAPIC mode is reached, where a processor can
/// deal with accesses to it by itself.
pub const APIC_PAGE: u64 = 0xfee0_0000;

/// A local APIC in xAPIC mode, for a processor that answers accesses to its page by itself.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    /// Task priority, all of its bits.
    pub tpr: u8,
    /// TMR: which interrupts are level-triggered.
    pub level: [u64; 4],
    /// The guest can read them in any case. What the processor does with them is in `does`.
    pub interrupts: Lent,
    /// No more than [`HwVcpu::virtual_apic`] says. With `Ends` the processor delivers those that the guest
    /// sends to itself, too.
    pub does: VirtualApic,
    /// All other registers that can be read there, by offset in the page; empty if they are as when they
    /// were shown last.
    pub registers: &'a [(u16, u32)],
}

/// Where other CPUs post interrupts for a virtual processor while it is in its guest, without an exit: the
/// processor takes them in when it is told by [`Platform::notify_posted`]. Owned by the [`HwVcpu`], and
/// used by all CPUs at any time.
pub trait Posting: Send + Sync + Debug {
    /// Posts an edge-triggered interrupt. True if the processor has to be told; else somebody else who has
    /// posted does that.
    fn post(&self, vector: u8) -> bool;
    /// Whether something was posted that nobody has taken.
    fn any(&self) -> bool;
    /// Takes what was posted.
    fn take(&self) -> [u64; 4];
}

/// The instruction pointer after an instruction of so many bytes, by the attributes of CS.
#[inline(always)]
pub fn next_rip(cs: u16, rip: u64, len: u8) -> u64 {
    let next = rip.wrapping_add(len.into());
    if cs & Segment::LONG != 0 {
        next
    } else if cs & Segment::DEFAULT_32 != 0 || rip > 0xffff {
        // Beyond 64 KiB a 16-bit segment has a limit that its guest has enlarged.
        next & 0xffff_ffff
    } else {
        next & 0xffff
    }
}

/// One virtual processor of the vendor in use, owned by the vCPU that it runs.
///
/// Only the CPU on which it is loaded may use a loaded one: the owner sees to that by holding the
/// vCPU's state lock from `load` to `unload`.
pub trait HwVcpu: Send + Debug {
    /// Makes the vCPU's extended state (FPU, MSRs that are not switched by entry) current on this
    /// CPU.
    fn load(&mut self);
    /// Takes it back out of the CPU.
    fn unload(&mut self);
    /// Runs the guest until its next exit. Called loaded, with interrupts disabled. An event whose
    /// delivery the exit interrupted is kept and injected again at the next entry.
    fn enter(&mut self, regs: &mut Gprs) -> Exit {
        self.enter_behind(regs, 0)
    }
    /// [`HwVcpu::step_over`] an instruction of `len` bytes, unless that is 0, and [`HwVcpu::enter`] in one. Gives
    /// [`Exit::StepFirst`] where not all is as it mostly is, as in any case where the flags have TF or RF set.
    fn enter_behind(&mut self, regs: &mut Gprs, len: u8) -> Exit;

    /// The bytes of the instruction whose access was the last [`Exit::NestedFault`], and how many of them
    /// are valid: 0 where the processor provides none (AMD decode assists do).
    fn fault_insn(&self) -> ([u8; 15], u8) {
        ([0; 15], 0)
    }

    /// The check for which the last [`Exit::EntryFailed`] was, as far as known.
    fn failed_check(&self) -> &'static str {
        ""
    }

    /// What it has counted since this was called last.
    fn take_counts(&mut self) -> HwCounts {
        HwCounts::default()
    }

    /// The architectural state; loaded or not.
    fn state(&self) -> ArchState;
    /// Whether the processor would enter a guest in this state; says what it would object to.
    fn check_state(&self, s: &ArchState) -> Result<(), &'static str>;
    /// Replaces the architectural state, discards an event waiting for injection; loaded or not.
    /// The caller has had it checked if it does not come from this program.
    fn set_state(&mut self, s: &ArchState);

    /// Instruction pointer.
    fn rip(&self) -> u64;
    /// Moves the instruction pointer; ends an interrupt shadow.
    fn set_rip(&mut self, rip: u64);
    /// Stack pointer.
    fn rsp(&self) -> u64;
    /// Changes the stack pointer.
    fn set_rsp(&mut self, v: u64);
    /// Flags.
    fn rflags(&self) -> u64;
    /// Changes the flags.
    fn set_rflags(&mut self, v: u64);
    /// CR0, CR2, CR3, CR4 by number; others read 0.
    fn cr(&self, n: u8) -> u64;
    /// CR4.
    fn cr4(&self) -> u64 {
        self.cr(4)
    }
    /// CR4 as far as CPUID shows it: OSXSAVE and PKE are right.
    fn cr4_shown(&self) -> u64 {
        self.cr4()
    }
    /// Changes CR0, CR2, CR3 or CR4 by number; translations are flushed where the change demands.
    fn set_cr(&mut self, n: u8, v: u64);
    /// EFER as the guest sees it.
    fn efer(&self) -> u64;
    /// Changes EFER.
    fn set_efer(&mut self, v: u64);
    /// A segment register; loaded or not.
    fn segment(&self, s: Seg) -> Segment;
    /// The attributes of CS alone, which every step over an instruction asks for.
    fn code_attributes(&self) -> u16 {
        self.segment(Seg::Cs).attr
    }
    /// The linear address of the instruction pointer, not cut to the width of the code, and CR3.
    fn code_address(&self) -> (u64, u64) {
        let base = if self.runs_long() {
            0
        } else {
            self.segment(Seg::Cs).base
        };
        (base.wrapping_add(self.rip()), self.cr(3))
    }
    /// Whether it executes 64-bit code.
    fn runs_long(&self) -> bool {
        self.code_attributes() & Segment::LONG != 0 && self.efer() & EFER_LMA != 0
    }
    /// How the guest's page tables are walked, and CR3.
    fn paging(&self) -> (PagingMode, u64) {
        let mode = if self.cr(0) & CR0_PG == 0 {
            PagingMode::Off
        } else if self.efer() & EFER_LMA != 0 {
            PagingMode::Long
        } else {
            match self.cr(4) {
                v if v & CR4_PAE != 0 => PagingMode::Pae,
                v if v & CR4_PSE != 0 => PagingMode::LegacyPse,
                _ => PagingMode::Legacy,
            }
        };
        (mode, self.cr(3))
    }
    /// Whether it executes 64-bit code, and at which privilege level.
    fn caller(&self) -> (bool, u8) {
        (self.runs_long(), self.cpl())
    }
    /// Whether it executes 64-bit code at privilege level 0.
    fn is_kernel_64(&self) -> bool {
        self.caller() == (true, 0)
    }
    /// Moves the instruction pointer beyond an instruction of so many bytes, as far as the width of
    /// the code goes; ends an interrupt shadow. Gives the flags.
    fn step_over(&mut self, len: u8) -> u64 {
        let (cs, rip) = (self.code_attributes(), self.rip());
        self.set_rip(next_rip(cs, rip, len));
        self.rflags()
    }
    /// Privilege level.
    fn cpl(&self) -> u8;
    /// An MSR that the processor or the VMCB/VMCS holds for the guest (syscall, sysenter, PAT, FS
    /// and GS base and the like); `None` for any other.
    fn msr(&self, index: u32) -> Option<u64>;
    /// Changes such an MSR; false for any other index, or for a value that the processor refuses.
    fn set_msr(&mut self, index: u32, v: u64) -> bool;

    /// The instruction before RIP blocks interrupts.
    fn shadow(&self) -> bool;
    /// Whether an event waits for injection at the next entry.
    fn event_pending(&self) -> bool;
    /// The event that waits for injection at the next entry.
    fn waiting_event(&self) -> Option<Event>;
    /// Injects at the next entry; replaces what waits there. An external interrupt may be injected
    /// only when the guest can take it ([`HwVcpu::can_take_interrupt`]).
    fn inject(&mut self, e: Event);
    /// IF is set, there is no interrupt shadow and no event waits.
    fn can_take_interrupt(&self) -> bool {
        self.rflags() & crate::state::RFLAGS_IF != 0 && !self.shadow() && !self.event_pending()
    }
    /// When to exit for an interrupt that the guest cannot take yet.
    fn set_interrupt_window(&mut self, w: Window);
    /// What this processor does by itself for the guest's local APIC; always the same.
    fn virtual_apic(&self) -> VirtualApic {
        VirtualApic::None
    }
    /// From the next entry on the processor has interrupts of the guest's local APIC, which is in x2APIC
    /// mode, and deals with them as [`HwVcpu::virtual_apic`] says, where that is not `None`. With `None`
    /// it stops that. Either way it no longer shows the APIC ([`HwVcpu::show_apic`]). Called loaded.
    fn lend_interrupts(&mut self, _: Option<&Lent>) {}
    /// The same for [`Lent::few`] of them.
    fn lend_few(&mut self, waiting: u8, in_service: u8) {
        self.lend_interrupts(Some(&Lent::few(waiting, in_service)));
    }
    /// What waits and what is in service of the interrupts last lent, and of those posted since; loaded or
    /// not.
    fn lent_interrupts(&self) -> ([u64; 4], [u64; 4]) {
        Default::default()
    }
    /// Whether it is certain, and quickly found, that nothing waits or is in service there.
    fn lent_is_empty(&self) -> bool {
        false
    }
    /// Whether this processor can answer accesses to the page of a local APIC in xAPIC mode, where the
    /// second-stage tables lead to [`Platform::apic_access_page`] from [`APIC_PAGE`]; always the same.
    fn shows_apic(&self) -> bool {
        false
    }
    /// From the next entry on it does that, with these registers, until [`HwVcpu::lend_interrupts`] is
    /// called. What it cannot answer is a [`Exit::NestedFault`]; what it has written, but leaves to others, an
    /// [`Exit::ApicWrite`]. Called loaded.
    fn show_apic(&mut self, _: &Shown<'_>) {}
    /// TPR and ICR of the APIC that is shown, which the guest changes without an exit, as it does what
    /// [`HwVcpu::lent_interrupts`] says; loaded or not.
    fn shown_apic(&self) -> (u8, u64) {
        (0, 0)
    }
    /// What the guest has written to the register of this offset. It reads as 0 until it is shown anew.
    fn take_written(&mut self, _offset: u16) -> u32 {
        0
    }
    /// Where interrupts can be posted while it is in its guest with interrupts lent, if that is possible.
    fn posting(&self) -> Option<Arc<dyn Posting>> {
        None
    }
    /// CR8 as last written by the guest.
    fn tpr(&self) -> u8;
    /// Sets what the guest reads from CR8.
    fn set_tpr(&mut self, v: u8);

    /// What is added to the host's TSC for the guest.
    fn set_tsc_offset(&mut self, offset: u64);
    /// Forgets all translations of this vCPU at its next entry.
    fn flush_tlb(&mut self);
    /// XCR0 of the guest.
    fn xcr0(&self) -> u64;
    /// Changes XCR0; the caller has checked it against what the guest may enable.
    fn set_xcr0(&mut self, v: u64);
    /// Copies the FPU state out in the layout of XSAVE's standard format (at least 512 bytes);
    /// gives its length. Unloaded only.
    fn fpu(&self, buf: &mut [u8]) -> usize;
    /// Replaces the FPU state from XSAVE's standard format. Unloaded only.
    fn set_fpu(&mut self, buf: &[u8]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tsc_scale_is_exact_to_a_few_parts_per_billion() {
        for khz in [
            1_000u64, 999_999, 1_000_000, 2_400_003, 3_999_871, 25_000_000,
        ] {
            let s = TscScale::from_khz(khz);
            let one_hour_ticks = khz * 1000 * 3600;
            let ns = s.ticks_to_ns(one_hour_ticks);
            let want = 3600 * 1_000_000_000u64;
            assert!(ns.abs_diff(want) < want / 100_000_000, "{khz} kHz: {ns}");
            let back = s.ns_to_ticks(want);
            assert!(
                back.abs_diff(one_hour_ticks) <= one_hour_ticks / 100_000_000 + 2,
                "{khz}"
            );
        }
    }

    #[test]
    fn sbdf_parts() {
        let s = Sbdf::new(0, 3, 0x1a);
        assert_eq!((s.bus(), s.devfn(), s.bdf()), (3, 0x1a, 0x31a));
    }
}
