//! Virtual local APIC: registers, priorities, IPIs and timer of one vCPU, through the xAPIC page
//! or the x2APIC MSRs.
//!
//! (Intel SDM "Advanced Programmable Interrupt Controller (APIC)", "Extended XAPIC (x2APIC)"; AMD
//! APM "Advanced Programmable Interrupt Controller (APIC)", "x2APIC Support".)
//!
//! Owned by the vCPU and touched only by the CPU that runs it. Interrupts from elsewhere wait in a
//! bitmap that the vCPU owns, and enter through [`Vlapic::sync_posted`]; whom an interrupt is for
//! is decided without the vCPU's lock, on its published [`ApicAddress`].
//!
//! Before each guest entry the owner calls `sync_posted` if something was posted, then
//! [`Vlapic::highest_pending`], and [`Vlapic::accept`] as it injects. CR8 and TPR are one register:
//! after an exit that may have changed CR8, [`Vlapic::set_cr8`]; before entry the vCPU's CR8 is set
//! from [`Vlapic::cr8`].
//!
//! Deliberate limits: six LVT entries (version 0x50014), no EOI-broadcast suppression, the ID is
//! read-only, the page cannot be moved from 0xfee00000 (an attempt is #GP).

mod address;
mod bitmap;
mod save;
mod spec;
mod timer;

#[cfg(test)]
mod tests;

use crate::interrupt::{DeliveryMode, Destination};
use bitmap::Bitmap;
use spec::*;
use timer::Timer;

pub use address::{ApicAddress, lowest_priority};
pub use save::{BadRecord, HiddenState, REGS_LEN};
pub use timer::{MIN_PERIOD_NS, TICK_NS};

/// Guest physical address of the xAPIC page.
pub const MMIO_BASE: u64 = 0xfee0_0000;
/// Length in bytes of the xAPIC page.
pub const MMIO_LEN: u64 = 0x1000;
/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The first x2APIC MSR; register n of the page is MSR 0x800 + n.
pub const MSR_X2APIC: u32 = 0x800;
/// The last MSR of the range reserved for the x2APIC.
pub const MSR_X2APIC_LAST: u32 = 0x8ff;

/// What the guest did is answered with #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gp;

/// A moment, in the two clocks that the timer knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// System time in nanoseconds.
    pub ns: u64,
    /// The guest's TSC.
    pub guest_tsc: u64,
}

/// When the timer goes off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// At this system time in nanoseconds.
    Ns(u64),
    /// At this value of the guest's TSC.
    GuestTsc(u64),
}

/// What an APIC is made for; fixed for its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// APIC id.
    pub id: u32,
    /// The vCPU is the bootstrap processor.
    pub bsp: bool,
    /// The guest's CPUID shows x2APIC.
    pub x2apic: bool,
    /// The guest's CPUID shows the TSC-deadline timer.
    pub tsc_deadline: bool,
}

/// How the APIC is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Globally disabled in IA32_APIC_BASE.
    Disabled,
    /// Through the page at [`MMIO_BASE`].
    XApic,
    /// Through MSRs.
    X2Apic,
}

/// Processors named without a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The destination counts.
    None,
    /// All, the sender included; the destination has no meaning.
    AllIncludingSelf,
    /// All but the sender; the destination has no meaning.
    AllExcludingSelf,
}

/// An interprocessor interrupt to carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// Fixed, lowest priority, SMI, NMI, INIT or start-up.
    pub mode: DeliveryMode,
    /// The vector, at least 16 for fixed and lowest priority; the start page for start-up.
    pub vector: u8,
    /// Who gets it, unless the shorthand says it.
    pub dest: Destination,
    /// Processors named without a destination.
    pub shorthand: Shorthand,
}

/// What a register write asks of the rest of the machine. Pending interrupts may have changed with
/// any of them, [`Effect::None`] included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// A level-triggered interrupt ended: tell the IO-APICs.
    Eoi(u8),
    /// [`Vlapic::timer_deadline`] changed.
    TimerChanged,
    /// Send it; the sender itself may be among the receivers.
    Ipi(Ipi),
    /// [`Vlapic::address`] may have changed (publish it), [`Vlapic::timer_deadline`] and
    /// [`Vlapic::mode`] too.
    Reconfigured,
}

/// Local vector table entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Lvt {
    /// Timer.
    Timer = 0,
    /// Thermal sensor.
    Thermal,
    /// Performance counters.
    Perf,
    /// LINT0 pin.
    Lint0,
    /// LINT1 pin.
    Lint1,
    /// APIC error.
    Error,
}

/// The local APIC of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vlapic {
    irr: Bitmap,
    isr: Bitmap,
    tmr: Bitmap,
    /// Highest vector of `irr`, 0 for none.
    irrv: u8,
    /// Highest vector of `isr`, 0 for none.
    isrv: u8,
    tpr: u8,
    /// Follows from `tpr` and `isrv`.
    ppr: u8,
    mode: Mode,
    /// In x2APIC mode: the logical address is derived from `id / 2` (see `save`).
    compact_ldr: bool,
    cfg: Config,
    svr: u32,
    /// Error bits the guest sees, as of its last write of ESR.
    esr: u32,
    /// Error bits since then.
    esr_pending: u32,
    /// xAPIC logical address.
    ldr: u8,
    dfr: u32,
    icr: u64,
    lvt: [u32; LVTS],
    timer: Timer,
}

// The fast path.
impl Vlapic {
    /// The interrupt to inject now, if any: above the processor priority. The caller sees to the
    /// guest's interrupt flag and shadow.
    #[inline]
    pub fn highest_pending(&self) -> Option<u8> {
        if self.irrv > (self.ppr | 0xf) {
            Some(self.irrv)
        } else {
            None
        }
    }

    /// Whether no interrupt waits and none is in service.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.irrv == 0 && self.isrv == 0
    }

    /// The class (the upper half of the vector) of the highest interrupt that waits, if the task priority
    /// (CR8) holds it back, whatever else may.
    #[inline]
    pub fn held_by_priority(&self) -> Option<u8> {
        let class = self.irrv >> 4;
        (class != 0 && class <= self.tpr >> 4).then_some(class)
    }

    /// The processor takes `vector`, which [`Self::highest_pending`] named: it moves from IRR to
    /// ISR.
    #[inline]
    pub fn accept(&mut self, vector: u8) {
        self.irr.clear(vector);
        self.isr.set(vector);
        self.irrv = self.irr.highest();
        self.isrv = self.isrv.max(vector);
        self.update_ppr();
    }

    /// Ends the highest interrupt in service. Gives its vector if it was level-triggered, to tell
    /// the IO-APICs.
    #[inline]
    pub fn eoi(&mut self) -> Option<u8> {
        let vector = self.isrv;
        if vector == 0 {
            return None;
        }
        self.isr.clear(vector);
        self.isrv = self.isr.highest();
        self.update_ppr();
        self.tmr.test(vector).then_some(vector)
    }

    /// [`Self::eoi`] where it has no consequence: no interrupt waits, and the one in service came by an edge. False,
    /// having done nothing, where it may have one.
    #[inline(always)]
    pub fn eoi_quietly(&mut self) -> bool {
        let quiet = self.irrv == 0 && self.isrv != 0 && !self.tmr.test(self.isrv);
        if quiet {
            self.eoi();
        }
        quiet
    }

    /// An interrupt arrives on this vCPU. False if it was not accepted (the APIC is disabled by
    /// software or globally, or the vector is illegal).
    #[inline]
    pub fn post(&mut self, vector: u8, level: bool) -> bool {
        if vector < FIRST_VECTOR {
            self.error(ESR_RECEIVE_ILLEGAL);
            return false;
        }
        if !self.software_enabled() {
            return false;
        }
        self.irr.set(vector);
        if level {
            self.tmr.set(vector);
        } else {
            self.tmr.clear(vector);
        }
        self.irrv = self.irrv.max(vector);
        true
    }

    /// Takes over what other CPUs and devices posted: `taken` was swapped out of a word of the
    /// vCPU's bitmap, vector v being bit v % 64 of word v / 64, and `level` says which of those are
    /// level-triggered.
    #[inline]
    pub fn sync_posted(&mut self, word: usize, mut taken: u64, level: u64) {
        if !self.software_enabled() {
            return;
        }
        if word == 0 {
            // The poster checks vectors, but one below 16 here would break "0 is none".
            taken &= !0xffff;
        }
        let (Some(irr), Some(tmr)) = (self.irr.0.get_mut(word), self.tmr.0.get_mut(word)) else {
            return;
        };
        *irr |= taken;
        *tmr = *tmr & !taken | level & taken;
        self.irrv = self.irr.highest();
    }

    /// For a processor that ends interrupts by itself: ISR, and those in it whose end matters to somebody
    /// else, or to an interrupt that waits.
    #[inline]
    pub fn in_service(&self) -> ([u64; 4], [u64; 4]) {
        let (isr, tmr) = (self.isr.0, self.tmr.0);
        let waits = if self.irrv != 0 { !0 } else { 0 };
        (isr, core::array::from_fn(|n| isr[n] & (tmr[n] | waits)))
    }

    /// For a processor that delivers interrupts, too: IRR, and those in it or in ISR whose end matters to
    /// somebody else.
    #[inline]
    pub fn waiting(&self) -> ([u64; 4], [u64; 4]) {
        let (irr, isr, tmr) = (self.irr.0, self.isr.0, self.tmr.0);
        (irr, core::array::from_fn(|n| (irr[n] | isr[n]) & tmr[n]))
    }

    /// The one that waits and the one that is in service, 0 for none, if there are no more of either and
    /// their ends matter to nobody else.
    #[inline]
    pub fn few(&self) -> Option<(u8, u8)> {
        let (irrv, isrv) = (self.irrv, self.isrv);
        let few = self.irr.has_only(irrv)
            && self.isr.has_only(isrv)
            && !self.tmr.test(irrv)
            && !self.tmr.test(isrv);
        few.then_some((irrv, isrv))
    }

    /// What is still in service of what such a processor had.
    #[inline]
    pub fn set_in_service(&mut self, isr: [u64; 4]) {
        self.isr.0 = isr;
        self.isrv = self.isr.highest();
        self.update_ppr();
    }

    /// What waits of what a processor that delivers had, before [`Self::set_in_service`] of the same. What
    /// has come to it since is edge-triggered.
    #[inline]
    pub fn set_waiting(&mut self, irr: [u64; 4], isr: [u64; 4]) {
        for (n, tmr) in self.tmr.0.iter_mut().enumerate() {
            let known = self.irr.0[n] | self.isr.0[n];
            *tmr &= known | !(irr[n] | isr[n]);
        }
        self.irr.0 = irr;
        self.irrv = self.irr.highest();
    }

    /// For a processor that answers accesses to the page by itself: which interrupts are level-triggered.
    #[inline]
    pub fn level_triggered(&self) -> [u64; 4] {
        self.tmr.0
    }

    /// TPR, all of its bits.
    #[inline]
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// What such a processor has let the guest write: TPR and ICR.
    #[inline]
    pub fn set_shown(&mut self, tpr: u8, icr: u64) {
        self.tpr = tpr;
        self.icr = icr & (u64::from(ICR_STORED) | 0xff << 56);
        self.update_ppr();
    }

    /// WRMSR of one of [`MSR_APIC_BASE`], [`MSR_TSC_DEADLINE`] and [`MSR_X2APIC`]..=
    /// [`MSR_X2APIC_LAST`]. `now` is called only where the timer is concerned.
    #[inline]
    pub fn wrmsr(&mut self, msr: u32, value: u64, now: impl FnOnce() -> Now) -> Result<Effect, Gp> {
        if msr == MSR_X2APIC + reg::EOI && self.mode == Mode::X2Apic {
            return match value {
                0 => Ok(self.eoi().map_or(Effect::None, Effect::Eoi)),
                _ => Err(Gp),
            };
        }
        if msr == MSR_X2APIC + reg::ICR && self.mode == Mode::X2Apic {
            return self.write_x2apic_icr(value);
        }
        let now = if needs_time(msr.wrapping_sub(MSR_X2APIC)) || msr == MSR_TSC_DEADLINE {
            now()
        } else {
            Now::default()
        };
        self.wrmsr_other(msr, value, now)
    }

    #[inline]
    fn update_ppr(&mut self) {
        // TPR where its class is at least that of the interrupt in service, else that class.
        self.ppr = self.tpr.max(self.isrv & 0xf0);
    }

    /// Whether it takes interrupts: it is enabled by software (SVR).
    #[inline]
    pub fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }
}

impl Vlapic {
    /// An APIC as after power-on: globally enabled in xAPIC mode, disabled by software.
    pub const fn new(cfg: Config) -> Self {
        Self {
            irr: Bitmap([0; 4]),
            isr: Bitmap([0; 4]),
            tmr: Bitmap([0; 4]),
            irrv: 0,
            isrv: 0,
            tpr: 0,
            ppr: 0,
            mode: Mode::XApic,
            compact_ldr: false,
            cfg,
            svr: 0xff,
            esr: 0,
            esr_pending: 0,
            ldr: 0,
            dfr: !0,
            icr: 0,
            lvt: [LVT_MASKED; LVTS],
            timer: Timer::at_reset(),
        }
    }

    /// Power-on reset. The caller publishes [`Self::address`] and asks for the timer's deadline.
    pub fn reset(&mut self) {
        *self = Self::new(self.cfg);
    }

    /// INIT: as reset, but the mode stays (Intel SDM "Local APIC State After It Receives an
    /// INIT-Deassert IPI", "x2APIC After Reset/INIT"). The caller publishes [`Self::address`] and
    /// asks for the timer's deadline.
    pub fn init(&mut self) {
        let mode = self.mode;
        self.reset();
        self.mode = mode;
    }

    /// What such a processor shows beside TPR, TMR, IRR and ISR: the registers that read the same until they
    /// are written, by offset in the page. APR, PPR and the timer's current count are not among them.
    pub fn registers(&self) -> [(u16, u32); SHOWN.len()] {
        // EOI can only be written.
        SHOWN.map(|r| ((r << 4) as u16, self.read(r, Now::default()).unwrap_or(0)))
    }

    /// What it was made for.
    pub fn config(&self) -> Config {
        self.cfg
    }

    /// How the APIC is reached. Only in [`Mode::XApic`] do accesses to the page go to
    /// [`Self::mmio_read`] and [`Self::mmio_write`]; otherwise nothing answers there.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Processor priority, by which lowest-priority interrupts choose.
    pub fn ppr(&self) -> u8 {
        self.ppr
    }

    /// What the guest reads from CR8: the priority class of TPR.
    #[inline]
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// The guest has written CR8 (bits 3:0); a write that keeps the class keeps TPR's low bits.
    #[inline]
    pub fn set_cr8(&mut self, cr8: u8) {
        if cr8 != self.tpr >> 4 {
            self.tpr = cr8 << 4;
            self.update_ppr();
        }
    }

    /// By what destinations this APIC is reached, to publish.
    pub fn address(&self) -> ApicAddress {
        let kind = match (self.mode, self.compact_ldr) {
            (Mode::Disabled, _) => ApicAddress::DISABLED,
            (Mode::XApic, _) if self.dfr >> 28 == 0 => ApicAddress::CLUSTER,
            (Mode::XApic, _) => ApicAddress::FLAT,
            (Mode::X2Apic, false) => ApicAddress::X2APIC,
            (Mode::X2Apic, true) => ApicAddress::X2APIC_COMPACT,
        };
        ApicAddress::pack(self.cfg.id, self.ldr, kind, self.software_enabled())
    }

    /// A local interrupt source fires. A fixed one becomes pending here; any other mode is given
    /// back for the caller to carry out on this vCPU. `None` also when the entry is masked.
    pub fn signal(&mut self, source: Lvt) -> Option<DeliveryMode> {
        let lvt = *self.lvt_entry(source);
        if lvt & LVT_MASKED != 0 {
            return None;
        }
        let mode = match source {
            Lvt::Timer | Lvt::Error => DeliveryMode::Fixed,
            _ => DeliveryMode::decode(lvt >> 8)?,
        };
        if mode.is_vectored() {
            self.post(lvt as u8, false);
            return None;
        }
        Some(mode)
    }

    /// Whether an 8259's interrupt reaches the processor: through LINT0 in ExtINT mode, or directly
    /// with the APIC globally disabled.
    pub fn accepts_extint(&self) -> bool {
        let lint0 = self.lvt[Lvt::Lint0 as usize];
        self.mode == Mode::Disabled || lint0 & (LVT_MASKED | LVT_MODE) == EXTINT
    }

    /// When to call [`Self::tick`] at the latest; `None` when the timer is off or masked.
    #[inline]
    pub fn timer_deadline(&self) -> Option<Deadline> {
        if self.lvt[Lvt::Timer as usize] & LVT_MASKED != 0 {
            return None;
        }
        self.timer.deadline()
    }

    /// Lets the timer go off if it is due; whether it did. The caller then asks for the next
    /// deadline.
    pub fn tick(&mut self, now: Now) -> bool {
        let fired = self.timer.settle(now);
        if fired {
            self.signal(Lvt::Timer);
        }
        fired
    }

    /// RDMSR of the MSRs of [`Self::wrmsr`].
    pub fn rdmsr(&self, msr: u32, now: impl FnOnce() -> Now) -> Result<u64, Gp> {
        match msr {
            MSR_APIC_BASE => return Ok(self.apic_base()),
            MSR_TSC_DEADLINE if self.cfg.tsc_deadline => {
                return Ok(self.timer.tsc_deadline(now()));
            }
            MSR_X2APIC..=MSR_X2APIC_LAST if self.mode == Mode::X2Apic => {}
            _ => return Err(Gp),
        }
        match msr - MSR_X2APIC {
            reg::ICR => Ok(self.icr),
            reg::APR | reg::DFR | reg::ICR2 => Err(Gp),
            r => {
                let now = if needs_time(r) { now() } else { Now::default() };
                self.read(r, now).map(u64::from).ok_or(Gp)
            }
        }
    }

    /// Reads `len` bytes (1 to 8) at `offset` of the page. Registers are 32 bits wide every 16
    /// bytes; what lies between reads 0, and so do registers that do not exist, which is noted in
    /// ESR.
    pub fn mmio_read(&mut self, offset: u32, len: u8, now: impl FnOnce() -> Now) -> u64 {
        let r = offset >> 4;
        let now = if needs_time(r) { now() } else { Now::default() };
        let value = match r {
            // Write-only, but exists.
            reg::EOI => 0,
            r => self.read(r, now).unwrap_or_else(|| {
                self.error(ESR_ILLEGAL_REGISTER);
                0
            }),
        };
        let value = match offset & 15 {
            o @ 0..=3 => u64::from(value) >> (o * 8),
            _ => 0,
        };
        match len {
            0..=7 => value & ((1 << (len * 8)) - 1),
            _ => value,
        }
    }

    /// Writes the low `len` bytes of `value` at `offset` of the page. Only whole registers can be
    /// written (`len` at least 4, the excess being ignored), except TPR and EOI, whose bytes stand
    /// for the whole; other writes are dropped.
    pub fn mmio_write(
        &mut self,
        offset: u32,
        len: u8,
        value: u64,
        now: impl FnOnce() -> Now,
    ) -> Effect {
        let r = offset >> 4;
        if offset & 15 != 0 || len < 4 && !matches!(r, reg::TPR | reg::EOI) {
            return Effect::None;
        }
        let value = value as u32;
        match r {
            reg::LDR => {
                self.ldr = (value >> 24) as u8;
                Effect::Reconfigured
            }
            reg::DFR => {
                self.dfr = value | 0x0fff_ffff;
                Effect::Reconfigured
            }
            reg::ICR2 => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                Effect::None
            }
            reg::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & ICR_STORED);
                let dest =
                    Destination::from_xapic((self.icr >> 56) as u8, value & ICR_LOGICAL != 0);
                self.send(value, dest)
            }
            // Exist, but are read-only.
            reg::ID
            | reg::VERSION
            | reg::APR
            | reg::PPR
            | reg::ISR..=reg::IRR_LAST
            | reg::TMCCT => Effect::None,
            _ => {
                let now = if needs_time(r) { now() } else { Now::default() };
                self.write(r, value, now).unwrap_or_else(|| {
                    self.error(ESR_ILLEGAL_REGISTER);
                    Effect::None
                })
            }
        }
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        let bsp = if self.cfg.bsp { BASE_BSP } else { 0 };
        let mode = match self.mode {
            Mode::Disabled => 0,
            Mode::XApic => BASE_ENABLE,
            Mode::X2Apic => BASE_ENABLE | BASE_EXTEND,
        };
        MMIO_BASE | bsp | mode
    }

    /// Writes IA32_APIC_BASE (Intel SDM "x2APIC State Transitions"). Which processor is the
    /// bootstrap processor cannot be changed; that bit is ignored.
    fn write_apic_base(&mut self, v: u64) -> Result<Effect, Gp> {
        let to = base_mode(v, self.cfg.x2apic)?;
        match (self.mode, to) {
            (Mode::Disabled, Mode::X2Apic) | (Mode::X2Apic, Mode::XApic) => return Err(Gp),
            (from, to) if from == to => return Ok(Effect::None),
            (_, Mode::Disabled) => self.reset(),
            // What these held means nothing in the new mode.
            (_, Mode::X2Apic) => {
                self.icr &= 0xffff_ffff;
                self.ldr = 0;
                self.dfr = !0;
            }
            (_, Mode::XApic) => {}
        }
        self.mode = to;
        Ok(Effect::Reconfigured)
    }

    #[inline(never)]
    fn wrmsr_other(&mut self, msr: u32, value: u64, now: Now) -> Result<Effect, Gp> {
        match msr {
            MSR_APIC_BASE => return self.write_apic_base(value),
            MSR_TSC_DEADLINE if self.cfg.tsc_deadline => {
                return Ok(self.change_timer(now, |a| a.timer.set_tsc_deadline(value)));
            }
            MSR_X2APIC..=MSR_X2APIC_LAST if self.mode == Mode::X2Apic => {}
            _ => return Err(Gp),
        }
        let r = msr - MSR_X2APIC;
        let allowed = match r {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::SVR => SVR_WRITABLE,
            reg::LVT..=reg::LVT_LAST => {
                // Status bits are read-only rather than reserved.
                self.lvt_writable(r - reg::LVT) | LVT_STATUS | LVT_REMOTE_IRR
            }
            reg::TMICT => !0,
            reg::DCR => 0b1011,
            _ => return Err(Gp),
        };
        if value & !u64::from(allowed) != 0 {
            return Err(Gp);
        }
        let value = value as u32;
        if r == reg::SELF_IPI {
            self.post_self(value as u8);
            return Ok(Effect::None);
        }
        self.write(r, value, now).ok_or(Gp)
    }

    fn write_x2apic_icr(&mut self, value: u64) -> Result<Effect, Gp> {
        let low = value as u32;
        if low & ICR_RESERVED != 0 {
            return Err(Gp);
        }
        self.icr = value & !u64::from(ICR_BUSY);
        let dest = Destination {
            id: (value >> 32) as u32,
            logical: low & ICR_LOGICAL != 0,
        };
        Ok(self.send(low, dest))
    }

    /// The registers that both modes have, by number; `None` where there is none.
    fn read(&self, r: u32, now: Now) -> Option<u32> {
        Some(match r {
            reg::ID => match self.mode {
                Mode::X2Apic => self.cfg.id,
                _ => self.cfg.id << 24,
            },
            reg::VERSION => VERSION,
            reg::TPR => self.tpr.into(),
            reg::APR => self.apr().into(),
            reg::PPR => self.ppr.into(),
            reg::LDR => match self.mode {
                Mode::X2Apic => self.address().x2apic_ldr(),
                _ => u32::from(self.ldr) << 24,
            },
            reg::DFR => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..=reg::ISR_LAST => self.isr.word((r - reg::ISR) as u8),
            reg::TMR..=reg::TMR_LAST => self.tmr.word((r - reg::TMR) as u8),
            reg::IRR..=reg::IRR_LAST => self.irr.word((r - reg::IRR) as u8),
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR2 => (self.icr >> 32) as u32,
            reg::LVT..=reg::LVT_LAST => *self.lvt.get((r - reg::LVT) as usize)?,
            reg::TMICT => self.timer.initial,
            reg::TMCCT => self.timer.count(now),
            reg::DCR => self.timer.dcr,
            _ => return None,
        })
    }

    /// The registers that both modes can write, apart from the ICR; `None` for all others.
    fn write(&mut self, r: u32, value: u32, now: Now) -> Option<Effect> {
        Some(match r {
            reg::TPR => {
                self.tpr = value as u8;
                self.update_ppr();
                Effect::None
            }
            reg::EOI => self.eoi().map_or(Effect::None, Effect::Eoi),
            reg::SVR => {
                self.tick(now);
                self.svr = value & SVR_WRITABLE;
                if !self.software_enabled() {
                    self.lvt.iter_mut().for_each(|l| *l |= LVT_MASKED);
                }
                Effect::Reconfigured
            }
            reg::ESR => {
                self.esr = core::mem::take(&mut self.esr_pending);
                Effect::None
            }
            reg::LVT => self.change_timer(now, |a| {
                a.write_lvt(0, value);
                a.timer
                    .set_mode(timer::Mode::from_lvt(*a.lvt_entry(Lvt::Timer)));
            }),
            reg::LVT_OTHERS..=reg::LVT_LAST => {
                self.write_lvt(r - reg::LVT, value);
                Effect::None
            }
            reg::TMICT => self.change_timer(now, |a| a.timer.set_initial(value, now)),
            reg::DCR => self.change_timer(now, |a| a.timer.set_dcr(value, now)),
            _ => return None,
        })
    }

    fn write_lvt(&mut self, n: u32, value: u32) {
        let forced = if self.software_enabled() {
            0
        } else {
            LVT_MASKED
        };
        let writable = self.lvt_writable(n);
        if let Some(l) = self.lvt.get_mut(n as usize) {
            *l = value & writable | forced;
        }
    }

    fn lvt_writable(&self, n: u32) -> u32 {
        let common = 0xff | LVT_MASKED;
        match n {
            0 if self.cfg.tsc_deadline => common | 3 << 17,
            0 => common | 1 << 17,
            1 | 2 => common | LVT_MODE,
            3 | 4 => common | LVT_MODE | LVT_POLARITY | LVT_LEVEL,
            _ => common,
        }
    }

    fn lvt_entry(&self, source: Lvt) -> &u32 {
        let [timer, thermal, perf, lint0, lint1, error] = &self.lvt;
        match source {
            Lvt::Timer => timer,
            Lvt::Thermal => thermal,
            Lvt::Perf => perf,
            Lvt::Lint0 => lint0,
            Lvt::Lint1 => lint1,
            Lvt::Error => error,
        }
    }

    /// Makes a change to the timer at `now`: what was due before it still goes off.
    fn change_timer(&mut self, now: Now, change: impl FnOnce(&mut Self)) -> Effect {
        let before = self.timer_deadline();
        self.tick(now);
        change(self);
        if self.timer_deadline() == before {
            Effect::None
        } else {
            Effect::TimerChanged
        }
    }

    /// Carries out a write of the ICR's low half (Intel SDM "Interrupt Command Register (ICR)").
    /// IPIs are always edge-triggered, whatever the trigger-mode bit says.
    fn send(&mut self, low: u32, dest: Destination) -> Effect {
        let vector = low as u8;
        let mode = match DeliveryMode::decode(low >> 8) {
            None | Some(DeliveryMode::ExtInt) => return Effect::None,
            // The level de-assert of old; processors since the Pentium 4 ignore it.
            Some(DeliveryMode::Init) if low & (ICR_LEVEL | ICR_ASSERT) == ICR_LEVEL => {
                return Effect::None;
            }
            Some(m) => m,
        };
        if mode.is_vectored() && vector < FIRST_VECTOR {
            self.error(ESR_SEND_ILLEGAL);
            return Effect::None;
        }
        let shorthand = match low >> 18 & 3 {
            0 => Shorthand::None,
            1 => {
                // To oneself only a vector can be sent.
                if mode.is_vectored() {
                    self.post(vector, false);
                }
                return Effect::None;
            }
            2 => Shorthand::AllIncludingSelf,
            _ => Shorthand::AllExcludingSelf,
        };
        Effect::Ipi(Ipi {
            mode,
            vector,
            dest,
            shorthand,
        })
    }

    fn post_self(&mut self, vector: u8) {
        if vector < FIRST_VECTOR {
            self.error(ESR_SEND_ILLEGAL);
        } else {
            self.post(vector, false);
        }
    }

    /// Notes an error. The first since the guest's last write of ESR raises the error interrupt.
    fn error(&mut self, bit: u32) {
        let armed = self.esr_pending == 0;
        self.esr_pending |= bit;
        let lvt = *self.lvt_entry(Lvt::Error);
        if armed && lvt & LVT_MASKED == 0 {
            // An illegal vector in the entry itself is one more error, not one more interrupt.
            if lvt as u8 >= FIRST_VECTOR {
                self.post(lvt as u8, false);
            } else {
                self.esr_pending |= ESR_RECEIVE_ILLEGAL;
            }
        }
    }

    /// Arbitration priority, which only the xAPIC page shows.
    fn apr(&self) -> u8 {
        let class = |v: u8| v >> 4;
        if class(self.tpr) >= class(self.irrv) && class(self.tpr) > class(self.isrv) {
            self.tpr
        } else {
            (self.tpr & self.isrv).max(self.irrv) & 0xf0
        }
    }
}

/// The mode that a value of IA32_APIC_BASE selects; #GP if it is no valid value at all.
fn base_mode(v: u64, x2apic: bool) -> Result<Mode, Gp> {
    if v & !(BASE_BSP | BASE_EXTEND | BASE_ENABLE) != MMIO_BASE {
        return Err(Gp);
    }
    match (v & BASE_ENABLE != 0, v & BASE_EXTEND != 0) {
        (false, false) => Ok(Mode::Disabled),
        (true, false) => Ok(Mode::XApic),
        (true, true) if x2apic => Ok(Mode::X2Apic),
        _ => Err(Gp),
    }
}

/// The registers of [`Vlapic::registers`].
const SHOWN: [u32; 17] = [
    reg::ID,
    reg::VERSION,
    reg::EOI,
    reg::LDR,
    reg::DFR,
    reg::SVR,
    reg::ESR,
    reg::ICR,
    reg::ICR2,
    reg::LVT,
    reg::LVT_OTHERS,
    reg::LVT_OTHERS + 1,
    reg::LVT_OTHERS + 2,
    reg::LVT_OTHERS + 3,
    reg::LVT_LAST,
    reg::TMICT,
    reg::DCR,
];

/// Registers whose access depends on the time.
#[inline]
const fn needs_time(r: u32) -> bool {
    matches!(r, reg::SVR | reg::LVT | reg::TMICT | reg::TMCCT | reg::DCR)
}
