//! One virtual processor: a VMCS and what the processor does not keep in it.
//!
//! - The VMCS is current on the CPU from [`HwVcpu::load`] to unload, and on none in between (see
//!   [`crate::percpu`]). Fields go through the cache of [`GuestVmcs`].
//! - CR2, the MSRs of SYSCALL and SWAPGS and the extended state are in the processor while the vCPU
//!   is loaded.
//! - DR7 is in the VMCS. DR0 to DR3 and DR6 are the guest's only from its first access to a debug
//!   register, or from load if DR7 enables a breakpoint, until unload: an access before that exits,
//!   the registers are switched, and the guest executes the instruction again.
//! - Of CR0 the guest does not have NE, which VMX wants set, and CD and NW, which would be the
//!   machine's; of CR4 what [`Caps::cr4_valid`](crate::caps::Caps) lacks, MCE, and what CPUID shows. It
//!   reads what it wrote there, and a write that changes one of these exits and is done here.
//! - The pointers of PAE paging are registers, and are in the VMCS: after a change of state they are
//!   read through the second-stage tables.
//! - #DB and #AC exit, because a guest can arrange for their delivery to raise them again for
//!   ever, with no instruction boundary at which an interrupt would be taken. The policy injects
//!   them again.
//!
//! Where the processor can, it ends interrupts by itself while the guest's local APIC is in x2APIC mode, and
//! answers accesses to the APIC's page in xAPIC mode ([`apic`]): ISR is then in the virtual-APIC page, and whoever owns the local APIC lends and takes back what is in it. The
//! page is memory like any other, so it can be read wherever the VMCS is. Unless that is switched off
//! (`no=virtualintr`, for docs/emulators.md), IRR is there too, and nothing is injected: the processor delivers
//! what waits, and takes in what others post ([`crate::posted`]). (Intel SDM "APIC Virtualization and Virtual
//! Interrupts".)
//!
//! Translations are tagged by the tables' address and the VPID, which each vCPU has for itself. What
//! a CPU knows of a vCPU that comes from another is forgotten, that is everything under its tables:
//! so a VPID can be a number modulo 2^16.

use alloc::sync::Arc;
use core::cell::Cell;
use core::fmt;
use core::sync::atomic::Ordering::Relaxed;

use galvan_base::exit::Exit;
use galvan_base::fpu::{self, FpuArea};
use galvan_base::hw::{
    Exhausted, HwCounts, HwVcpu, Lent, Posting, Shown, VcpuConfig, VirtualApic, Window, next_rip,
};
use galvan_base::page::{Pages, Words};
use galvan_base::state::{
    ArchState, CR0_CD, CR0_ET, CR0_NW, CR0_PE, CR0_PG, CR0_VALID, CR4_LA57, CR4_PAE, EFER_LMA,
    EFER_LME, Event, Gprs, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF, Seg, Segment,
};
use galvan_base::{CpuId, Mpa};

use crate::caps::{Features, entry, exit as exit_control, primary, secondary};
use crate::exit::{self, Cause, reason};
use crate::insn::{Cpu, Entry, Real, Scope};
use crate::percpu::{LIVE_MSRS, PerCpu};
use crate::posted::Descriptor;
use crate::state::CR4_PCIDE;
use crate::vmcs::{Field, GuestVmcs, Part, field};
use crate::vmx::Vmx;
use crate::{inject, msr, state};

mod apic;
#[cfg(test)]
mod tests;

use apic::{Apic, IRR_WORD, ISR_WORD, differ};

/// DR7 bits that enable breakpoints.
const DR7_ENABLES: u64 = 0xff;
/// DR7.GD
const DR7_GD: u64 = 1 << 13;
/// DR6.BD
const DR6_BD: u64 = 1 << 13;
/// #DB, #AC and #MC.
const EXCEPTIONS: u64 = 1 << 1 | 1 << 17 | 1 << 18;
/// Ticks between two PAUSEs of one loop, and of a loop before it exits.
const PAUSE_GAP: u64 = 128;
const PAUSE_WINDOW: u64 = 16384;
/// CR0 bits of which the guest sees its own.
const CR0_SHADOWED: u64 = CR0_CD | CR0_NW;
/// CR4.MCE: machine checks are the host's.
const CR4_MCE: u64 = 1 << 6;
/// CR4.OSXSAVE and CR4.PKE, which CPUID shows. Guests set them once; by having each change exit they need not
/// be read for every CPUID.
const CR4_SHOWN: u64 = 1 << 18 | 1 << 22;
/// Access rights of CS: 64-bit code.
const CODE_LONG: u64 = 1 << 13;
/// CR4 bits with whose change the pointers of PAE paging are loaded: PSE, PAE, PGE, SMEP.
const CR4_LOADS_POINTERS: u64 = 1 << 4 | CR4_PAE | 1 << 7 | 1 << 20;
/// Interruptibility: the instruction before blocks interrupts, by STI or MOV SS.
const SHADOW: u64 = 0b11;
const SHADOW_STI: u64 = 1 << 0;
/// Interruptibility: NMIs are blocked.
const NMI_BLOCKED: u64 = 1 << 3;
/// Pending debug exceptions: single step.
const PENDING_BS: u64 = 1 << 14;
/// The part of the virtual-APIC page with the TPR, in words.
const TPR_WORD: usize = 0x80 / 8;
/// EPTP: write-back, four levels.
const EPTP_FLAGS: u64 = 6 | 3 << 3;

/// What the next entry must forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stale {
    Nothing,
    /// Translations of this vCPU's linear addresses.
    Linear,
    /// Everything under its tables.
    Tables,
}

/// A virtual processor on VT-x.
pub struct Vcpu<C: Cpu = Real> {
    vmx: &'static Vmx<C>,
    /// Tells this vCPU from all others that ever were.
    number: u64,
    hardware_domain: bool,
    root: Mpa,
    vmcs: GuestVmcs,
    /// The fields that never change have been written.
    configured: bool,
    /// Entered since it was last made current.
    launched: bool,
    host_rsp: u64,
    apic: Pages<Words<512>>,
    /// What the processor does for the guest's local APIC.
    mode: Apic,
    /// Where others post interrupts, if the processor takes them in by itself.
    posted: Option<Arc<Descriptor>>,
    /// IRR and ISR of the virtual-APIC page, while that is noted in `vmcs`.
    page: Cell<([u64; 4], [u64; 4])>,
    /// They are empty, whatever `page` says, while that is noted.
    page_empty: Cell<bool>,
    /// The interrupt status, as far as known then; nothing if it could not be read.
    status: Cell<Option<u16>>,
    /// Interrupts are in IRR of which the processor has not been told.
    withheld: bool,
    /// TMR of the virtual-APIC page.
    level: [u64; 4],
    /// The vectors whose EOI exits then.
    eoi_exits: [u64; 4],
    /// The CPU on which it is loaded.
    on: Option<&'static PerCpu>,
    /// The CPU on which it was loaded last.
    last: Option<CpuId>,
    stale: Stale,
    /// The pointers of PAE paging are to be read.
    pointers_stale: bool,
    /// What the next entry injects.
    event: u64,
    nmi_waits: bool,
    /// When the guest is to exit for an interrupt.
    window: Window,
    /// The guest is to exit when its TPR falls below this.
    threshold: u8,
    /// What the VMCS has of that.
    threshold_written: u8,
    cr2: u64,
    live: [u64; LIVE_MSRS.len()],
    /// DR0 to DR3, DR6.
    dr: [u64; 5],
    /// They are in the processor.
    dr_resident: bool,
    fpu: FpuArea,
    /// `fpu` is newer than the copy in the processor.
    fpu_changed: bool,
    xcr0: u64,
    tsc_aux: u32,
    /// Why the state or event that was set cannot be run.
    refused: Option<&'static str>,
    /// `on`, `launched`, `stale`, `pointers_stale`, `event`, `nmi_waits` or `refused` may be other
    /// than they mostly are at an entry.
    rare: bool,
    /// The check that failed at the last entry that did.
    failed_check: &'static str,
    counts: HwCounts,
}

impl<C: Cpu> Vcpu<C> {
    pub(crate) fn new(vmx: &'static Vmx<C>, cfg: &VcpuConfig) -> Result<Self, Exhausted> {
        let mut v = Vcpu {
            vmx,
            number: vmx.number_vcpu(),
            hardware_domain: cfg.hardware_domain,
            root: cfg.nested_root,
            vmcs: GuestVmcs::new(vmx.host, vmx.caps.revision)?,
            configured: false,
            launched: false,
            host_rsp: 0,
            apic: Pages::new(vmx.host)?,
            mode: Apic::Plain,
            level: [0; 4],
            withheld: false,
            status: Cell::new(Some(0)),
            page: Cell::default(),
            page_empty: Cell::default(),
            posted: if vmx.caps.features.contains(Features::POSTED) {
                Some(Arc::new(Descriptor::new(vmx.host)?))
            } else {
                None
            },
            eoi_exits: [0; 4],
            on: None,
            last: None,
            stale: Stale::Tables,
            pointers_stale: false,
            event: 0,
            nmi_waits: false,
            window: Window::Closed,
            threshold: 0,
            threshold_written: 0,
            cr2: 0,
            live: [0; LIVE_MSRS.len()],
            dr: [0; 5],
            dr_resident: false,
            fpu: FpuArea::new(vmx.caps.xsave),
            fpu_changed: true,
            xcr0: 1,
            tsc_aux: 0,
            refused: None,
            rare: true,
            failed_check: "",
            counts: HwCounts::default(),
        };
        v.vmcs
            .set(Field::PRIMARY, u64::from(vmx.caps.controls.primary));
        v.vmcs.set(Field::TSC_OFFSET, 0);
        // With that every field is known until the first entry, so that nobody reads a VMCS which the
        // processor has not seen.
        v.set_state(&ArchState::at_reset());
        Ok(v)
    }

    /// The VPID: not 0, which is the host's.
    fn vpid(&self) -> u64 {
        self.number % 0xffff + 1
    }

    fn eptp(&self) -> u64 {
        self.root.get() | EPTP_FLAGS
    }

    /// CR0 bits that are not the guest's.
    fn cr0_mask(&self) -> u64 {
        self.vmx.caps.cr0_one | CR0_SHADOWED
    }

    /// CR4 bits that are not the guest's.
    fn cr4_mask(&self) -> u64 {
        !self.vmx.caps.cr4_valid | CR4_MCE | CR4_SHOWN
    }

    /// The secondary controls for as long as the processor does not end interrupts.
    fn secondary(&self) -> u32 {
        let all = self.vmx.caps.controls.secondary;
        // The hardware domain's devices may not snoop caches; other domains need not slow down
        // their neighbours.
        if self.hardware_domain {
            all & !secondary::WBINVD
        } else {
            all
        }
    }

    #[cold]
    fn write_eoi_exits(&mut self, vectors: [u64; 4]) {
        for (f, v) in (field::EOI_EXITS..).step_by(2).zip(vectors) {
            self.vmx.cpu.vmwrite(f, v);
        }
        self.eoi_exits = vectors;
    }

    /// Writes the fields that never change, into a VMCS that the processor has not seen before.
    #[cold]
    fn configure(&mut self) {
        let c = self.vmx.cpu;
        let caps = &self.vmx.caps;
        let second = self.secondary();
        let ports = if self.hardware_domain {
            &self.vmx.hwdom_ports
        } else {
            &self.vmx.no_ports
        }
        .mpa()
        .get();
        let (host_pat, host_efer) = self.vmx.host.pat_efer();
        let fields = [
            (field::PIN, u64::from(caps.controls.pin)),
            (field::SECONDARY, u64::from(second)),
            (field::EXIT, u64::from(caps.controls.exit)),
            (field::EXCEPTIONS, EXCEPTIONS),
            (field::PF_MASK, 0),
            (field::PF_MATCH, 0),
            (field::CR3_TARGETS, 0),
            (field::EXIT_STORES, 0),
            (field::EXIT_LOADS, 0),
            (field::ENTRY_LOADS, 0),
            (field::INJECT, 0),
            (field::TPR_THRESHOLD, 0),
            (field::IO_BITMAP_A, ports),
            (field::IO_BITMAP_B, ports + 4096),
            (field::MSR_BITMAP, self.vmx.msrs.mpa().get()),
            (field::VIRTUAL_APIC, self.apic.mpa().get()),
            (field::EPTP, self.eptp()),
            (field::CR0_MASK, self.cr0_mask()),
            (field::CR4_MASK, self.cr4_mask()),
            (field::LINK, u64::MAX),
            (field::DEBUGCTL, 0),
            (field::ACTIVITY, 0),
            (field::SMBASE, 0),
            (field::HOST_PAT, host_pat),
            (field::HOST_EFER, host_efer),
            (field::HOST_SYSENTER_CS, 0),
            (field::HOST_SYSENTER_ESP, 0),
            (field::HOST_SYSENTER_EIP, 0),
        ];
        for (f, v) in fields {
            c.vmwrite(f, v);
        }
        if caps.features.contains(Features::VPID) {
            c.vmwrite(field::VPID, self.vpid());
        }
        if caps.virtual_eoi() != 0 {
            c.vmwrite(field::INTERRUPT_STATUS, 0);
        }
        if let Some(page) = &self.vmx.apic_access {
            c.vmwrite(field::APIC_ACCESS, page.mpa().get());
        }
        if let Some(d) = &self.posted {
            let vector = self.vmx.host.posted_vector();
            c.vmwrite(field::POSTED_VECTOR, vector.into());
            c.vmwrite(field::POSTED_DESCRIPTOR, d.mpa().get());
        }
        if caps.features.contains(Features::PAUSE_LOOP) {
            c.vmwrite(field::PAUSE_GAP, PAUSE_GAP);
            c.vmwrite(field::PAUSE_WINDOW, PAUSE_WINDOW);
        }
        if second & secondary::ENCLS != 0 {
            c.vmwrite(field::ENCLS_BITMAP, u64::MAX);
        }
        self.configured = true;
    }

    /// Writes the host state of this CPU.
    #[cold]
    fn write_host_state(&mut self) {
        let c = self.vmx.cpu;
        let h = c.host_state();
        for (n, s) in (0..).zip(h.selectors) {
            c.vmwrite(field::HOST_ES + 2 * n, s.into());
        }
        for (f, v) in [
            (field::HOST_CR0, h.cr0),
            (field::HOST_CR3, h.cr3),
            (field::HOST_CR4, h.cr4),
            (field::HOST_FS_BASE, h.fs_base),
            (field::HOST_GS_BASE, h.gs_base),
            (field::HOST_TR_BASE, h.tr_base),
            (field::HOST_GDTR_BASE, h.gdtr_base),
            (field::HOST_IDTR_BASE, h.idtr_base),
            (field::HOST_RIP, h.rip),
        ] {
            c.vmwrite(f, v);
        }
    }

    /// A field's value.
    #[inline]
    fn get(&self, f: Field) -> u64 {
        match self.vmcs.cached(f) {
            Some(v) => v,
            None if self.on.is_some() => self.vmcs.read(self.vmx.cpu, f),
            None => self.get_from_memory(f),
        }
    }

    /// The same where the VMCS is not current. What is asked for next is read along with it.
    #[cold]
    fn get_from_memory(&self, f: Field) -> u64 {
        self.fetch_all();
        self.vmcs.cached(f).unwrap_or(0)
    }

    /// Reads all fields, loaded or not.
    fn fetch_all(&self) {
        let c = self.vmx.cpu;
        if self.vmcs.complete() {
            return;
        }
        if self.on.is_some() {
            self.vmcs.read_all(c);
        } else {
            let (_, cpu) = self.vmx.this_cpu();
            cpu.with_current(c, self.vmcs.mpa(), || self.vmcs.read_all(c));
        }
    }

    fn controls(&mut self, which: u32, wanted: bool) {
        let old = self.get(Field::PRIMARY);
        let bit = u64::from(which);
        let new = if wanted { old | bit } else { old & !bit };
        self.vmcs.set(Field::PRIMARY, new);
    }

    fn forget_translations(&mut self, how: Stale) {
        self.stale = self.stale.max(how);
        self.rare = true;
    }

    #[cold]
    fn settle_translations(&mut self) {
        let caps = &self.vmx.caps;
        let c = self.vmx.cpu;
        self.counts.tlb_flushes += 1;
        match core::mem::replace(&mut self.stale, Stale::Nothing) {
            Stale::Nothing => {}
            Stale::Tables if caps.invept_single => c.invept(Scope::Single(self.eptp())),
            Stale::Tables => c.invept(Scope::All),
            // Without VPIDs every entry forgets them.
            Stale::Linear if !caps.features.contains(Features::VPID) => {}
            Stale::Linear if caps.invvpid_single => c.invvpid(Scope::Single(self.vpid())),
            Stale::Linear => c.invvpid(Scope::All),
        }
    }

    /// Makes DR0 to DR3 and DR6 the guest's until unload.
    fn take_debug_registers(&mut self) {
        if !self.dr_resident {
            self.vmx.cpu.set_dr(&self.dr);
            self.dr_resident = true;
            self.controls(primary::MOV_DR, false);
        }
    }

    fn give_debug_registers_back(&mut self) {
        if self.dr_resident {
            self.dr = self.vmx.cpu.dr();
            self.dr_resident = false;
            self.controls(primary::MOV_DR, true);
        }
    }

    fn dr6(&self) -> u64 {
        if self.dr_resident {
            self.vmx.cpu.dr()[4]
        } else {
            self.dr[4]
        }
    }

    fn set_dr6(&mut self, v: u64) {
        if self.dr_resident {
            self.dr = self.vmx.cpu.dr();
            self.dr[4] = v;
            self.vmx.cpu.set_dr(&self.dr);
        } else {
            self.dr[4] = v;
        }
    }

    /// Writes the TPR threshold, unless the VMCS is not current: then [`HwVcpu::load`] does. Entry insists
    /// that it is not above the TPR.
    #[inline]
    fn settle_threshold(&mut self) {
        if self.threshold == self.threshold_written && self.threshold == 0 {
            return;
        }
        let wanted = if self.tpr() < self.threshold {
            0
        } else {
            self.threshold
        };
        if self.on.is_some() && wanted != self.threshold_written {
            self.vmx.cpu.vmwrite(field::TPR_THRESHOLD, wanted.into());
            self.threshold_written = wanted;
        }
    }

    /// Lets a waiting NMI in if it can come in now; else asks for an exit when it can.
    #[cold]
    fn settle_nmi(&mut self) {
        let blocked = self.get(Field::INTERRUPTIBILITY) & (SHADOW | NMI_BLOCKED) != 0;
        if !blocked && !self.event_pending() {
            self.event = inject::encode(Event::Nmi, || true).unwrap_or(0);
            self.nmi_waits = false;
        }
        let waits = self.nmi_waits;
        self.controls(primary::NMI_WINDOW, waits);
    }

    /// Reads a word of the guest's memory through its second-stage tables.
    fn read_guest(&self, gpa: u64) -> Option<u64> {
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        const READABLE: u64 = 1;
        const LARGE: u64 = 1 << 7;
        let mut table = self.root.get();
        for level in (0..4).rev() {
            let shift = 12 + 9 * level;
            let at = table + (gpa >> shift & 0x1ff) * 8;
            let e = self.vmx.host.load_u64(Mpa::new(at)?)?;
            if e & READABLE == 0 {
                return None;
            }
            if level > 0 && e & LARGE == 0 {
                table = e & ADDRESS;
                continue;
            }
            let offset = (1u64 << shift) - 1;
            let at = e & ADDRESS & !offset | gpa & offset;
            if self
                .vmx
                .apic_access
                .as_ref()
                .is_some_and(|p| p.mpa().get() == at & !0xfff)
            {
                // A local APIC, and no memory.
                return None;
            }
            return self.vmx.host.load_u64(Mpa::new(at)?);
        }
        None
    }

    /// Reads the pointers of PAE paging. False if the guest's table is not there or has reserved
    /// bits set, where a processor would raise #GP; the pointers are then not present.
    fn load_pointers(&mut self, cr3: u64) -> bool {
        const PRESENT: u64 = 1;
        let reserved = 0x1e6 | u64::MAX << self.vmx.caps.phys_bits.min(63);
        let table = cr3 & 0xffff_ffe0;
        let mut all = true;
        for (n, f) in (0..).zip([Field::PDPTE0, Field::PDPTE1, Field::PDPTE2, Field::PDPTE3]) {
            let e = self.read_guest(table + 8 * n);
            let good = e.filter(|e| e & PRESENT == 0 || e & reserved == 0);
            all &= good.is_some();
            self.vmcs.set(f, good.unwrap_or(0));
        }
        self.pointers_stale = false;
        all
    }

    /// Reads them before an entry after a change of state.
    #[cold]
    fn settle_pointers(&mut self) {
        self.pointers_stale = false;
        if state::pae_paging(self.cr(0), self.cr(4), self.efer()) {
            let cr3 = self.get(Field::CR3);
            self.load_pointers(cr3);
        }
    }

    /// Whether 64-bit code is executing.
    fn code_64(&self) -> bool {
        self.efer() & EFER_LMA != 0
            && self.get(Field::segment(Seg::Cs, Part::Rights)) & CODE_LONG != 0
    }

    /// Executes MOV to CR0 or CR4 of a value that changes a bit the guest does not have for itself.
    /// False for #GP. (Intel SDM "MOV—Move to/from Control Registers".)
    #[cold]
    fn move_to_control(&mut self, number: u8, v: u64) -> bool {
        let code_64 = self.code_64();
        let v = if code_64 { v } else { v & 0xffff_ffff };
        let (cr0, cr4, efer) = (self.cr(0), self.cr(4), self.efer());
        let long = efer & EFER_LMA != 0;
        let legal = match number {
            0 => {
                let sets_pg = v & !cr0 & CR0_PG != 0;
                let clears_pg = cr0 & !v & CR0_PG != 0;
                v >> 32 == 0
                    && (v & CR0_NW == 0 || v & CR0_CD != 0)
                    && (v & CR0_PG == 0 || v & CR0_PE != 0)
                    && !(sets_pg && efer & EFER_LME != 0 && (cr4 & CR4_PAE == 0 || self.cs_long()))
                    && !(clears_pg && (cr4 & CR4_PCIDE != 0 || code_64))
            }
            4 => {
                let sets_pcid = v & !cr4 & CR4_PCIDE != 0;
                v & !self.vmx.caps.cr4_valid == 0
                    && !(long && (v & CR4_PAE == 0 || (v ^ cr4) & CR4_LA57 != 0))
                    && !(sets_pcid && (!long || self.cr(3) & 0xfff != 0))
            }
            _ => false,
        };
        if !legal {
            return false;
        }
        let (new0, new4) = if number == 0 {
            (v & CR0_VALID | CR0_ET, cr4)
        } else {
            (cr0, v)
        };
        let new_efer = galvan_base::state::efer(efer, new0);
        let loads = number == 0 || (new4 ^ cr4) & CR4_LOADS_POINTERS != 0;
        if loads && state::pae_paging(new0, new4, new_efer) {
            let cr3 = self.get(Field::CR3);
            if !self.load_pointers(cr3) {
                return false;
            }
        }
        if number == 0 {
            self.set_cr(0, new0);
        } else {
            self.set_cr(4, new4);
        }
        self.pointers_stale = false;
        true
    }

    fn cs_long(&self) -> bool {
        self.get(Field::segment(Seg::Cs, Part::Rights)) >> 13 & 1 != 0
    }

    /// Finishes a MOV to a control register.
    #[cold]
    fn control_register(&mut self, regs: &Gprs, number: u8, from: u8) {
        let value = regs.get(from).unwrap_or_else(|| self.rsp());
        if !self.move_to_control(number, value) {
            self.inject(Event::GP);
            return;
        }
        let len = self.vmx.cpu.vmread(field::LENGTH);
        let next = self.get(Field::RIP).wrapping_add(len);
        let next = if self.code_64() {
            next
        } else {
            next & 0xffff_ffff
        };
        self.set_rip(next);
        let flags = self.get(Field::RFLAGS);
        self.vmcs.set(Field::RFLAGS, flags & !RFLAGS_RF);
        if flags & RFLAGS_TF != 0 {
            let pending = self.get(Field::PENDING_DEBUG);
            self.vmcs.set(Field::PENDING_DEBUG, pending | PENDING_BS);
        }
    }

    /// Puts the event into the VMCS. An INT n whose length nobody knows, and which the processor
    /// does not take without one, gets RIP moved back by its length of one byte.
    #[cold]
    fn write_event(&mut self) {
        let c = self.vmx.cpu;
        c.vmwrite(field::INJECT, self.event & 0xffff_ffff);
        if inject::has_code(self.event) {
            c.vmwrite(field::INJECT_ERROR, self.event >> 32);
        }
        if inject::is_soft(self.event) {
            let length = u64::from(!self.vmx.caps.length_0);
            c.vmwrite(field::INJECT_LENGTH, length);
            let rip = self.get(Field::RIP);
            self.vmcs.set(Field::RIP, rip.wrapping_sub(length));
        }
    }

    /// What an entry needs that is not as most are.
    fn settle(&mut self) {
        if self.nmi_waits {
            self.settle_nmi();
        }
        if self.pointers_stale {
            self.settle_pointers();
        }
        if self.stale != Stale::Nothing {
            self.settle_translations();
        }
        if self.event != 0 {
            self.write_event();
        }
    }

    /// One entry and exit, whatever is to be settled before and whatever the exit is.
    fn run(&mut self, regs: &mut Gprs) -> Cause {
        self.settle();
        let injected = self.event;
        // Only a soft event's matters afterwards, which has had it read.
        let rip_before = self.vmcs.cached(Field::RIP).unwrap_or(0);
        self.vmcs.write_back(self.vmx.cpu);
        match self.switch(regs, self.launched) {
            Ok(raw) => {
                self.launched = true;
                self.event = 0;
                self.cause(raw, injected, rip_before)
            }
            Err(cause) => cause,
        }
    }

    /// Enters the guest; gives the reason of the exit. Nothing is to be settled or written any more.
    #[inline(always)]
    fn switch(&mut self, regs: &mut Gprs, launched: bool) -> Result<u32, Cause> {
        let c = self.vmx.cpu;
        let how = c.run(regs, launched, &mut self.host_rsp);
        if how != Entry::Exited {
            return Err(self.not_entered(how));
        }
        let raw = c.vmread(field::REASON) as u32;
        if raw & reason::ENTRY_FAILED != 0 {
            return Err(self.entry_failed(raw));
        }
        self.vmcs.forget();
        Ok(raw)
    }

    fn cause(&mut self, raw: u32, injected: u64, rip_before: u64) -> Cause {
        let c = self.vmx.cpu;
        exit::decode(
            raw,
            |f| c.vmread(f),
            || self.after_possible_delivery(raw & 0xffff, injected, rip_before),
        )
    }

    /// Steps over an instruction, where nothing but RIP changes by that and nothing else is to be written before
    /// an entry; else does nothing, and says so. Nothing is to be settled.
    #[inline(always)]
    fn step_before_entry(&mut self, len: u8) -> bool {
        // What is in the VMCS is then true, whether it is known or not.
        if self.vmcs.is_dirty() {
            return false;
        }
        let c = self.vmx.cpu;
        let read = |f: Field| c.vmread(f.encoding());
        let rip = self.vmcs.cached(Field::RIP);
        let rip = rip.unwrap_or_else(|| read(Field::RIP));
        let next = rip.wrapping_add(len.into());
        // Where RIP does not leave its 64 KiB, the width of the code does not matter.
        if (rip ^ next) >> 16 != 0
            || read(Field::RFLAGS) & (RFLAGS_TF | RFLAGS_RF) != 0
            || read(Field::INTERRUPTIBILITY) & SHADOW != 0
        {
            return false;
        }
        c.vmwrite(Field::RIP.encoding(), next);
        true
    }

    /// [`HwVcpu::enter_behind`] where something is to be settled, or the step is out of the ordinary.
    #[inline(never)]
    fn enter_rarely(&mut self, regs: &mut Gprs, len: u8) -> Exit {
        if len != 0 {
            if self.rflags() & (RFLAGS_TF | RFLAGS_RF) != 0 {
                return Exit::StepFirst;
            }
            self.step_over(len);
        }
        if self.has_only_an_interrupt() {
            self.write_event();
            self.vmcs.write_back(self.vmx.cpu);
            return match self.launched {
                true => self.enter_now(regs, true, true),
                false => self.enter_now(regs, true, false),
            };
        }
        self.enter_as_it_is(regs)
    }

    /// Nothing but the injection of an interrupt makes the entry rare.
    #[inline(always)]
    fn has_only_an_interrupt(&self) -> bool {
        inject::is_interrupt(self.event)
            && self.stale == Stale::Nothing
            && !self.pointers_stale
            && !self.nmi_waits
            && self.refused.is_none()
            && self.on.is_some()
    }

    /// Enters where all is settled and written; whether that `injects` the only thing that was rare. The
    /// frequent exits that are no more than the length of an instruction do not go through
    /// [`exit::decode`], which has the same of them.
    #[inline(always)]
    fn enter_now(&mut self, regs: &mut Gprs, injects: bool, launched: bool) -> Exit {
        let raw = match self.switch(regs, launched) {
            Ok(raw) => raw,
            Err(cause) => return self.failed(cause, regs),
        };
        if injects {
            (self.event, self.rare) = (0, false);
        }
        if !launched {
            self.launched = true;
        }
        let c = self.vmx.cpu;
        let len = || c.vmread(field::LENGTH) as u8;
        match raw {
            reason::CPUID => Exit::Cpuid(len()),
            reason::VMCALL => Exit::Hypercall(len()),
            reason::RDMSR => Exit::MsrRead(len()),
            reason::WRMSR => Exit::MsrWrite(len()),
            reason::HLT => Exit::Hlt(len()),
            _ => self.other_exit(regs, raw),
        }
    }

    #[inline(never)]
    fn inject_other(&mut self, e: Event) {
        match inject::encode(e, || self.get(Field::CR0) & CR0_PE != 0) {
            Some(word) => self.event = word,
            None => self.refused = Some("event that the processor refuses"),
        }
    }

    /// [`HwVcpu::is_kernel_64`] in all cases.
    #[inline(never)]
    fn is_known_kernel_64(&self) -> bool {
        self.caller() == (true, 0)
    }

    /// [`HwVcpu::step_over`] in all cases.
    #[inline(never)]
    fn step_anyhow(&mut self, len: u8) -> u64 {
        let rip = self.get(Field::RIP);
        let next = rip.wrapping_add(len.into());
        if (rip ^ next) >> 16 == 0 {
            self.set_rip(next);
        } else {
            let cs = self.code_attributes();
            self.set_rip(next_rip(cs, rip, len));
        }
        self.rflags()
    }

    /// What is to be done about an exit that is not one of the most frequent.
    #[inline(never)]
    fn other_exit(&mut self, regs: &mut Gprs, raw: u32) -> Exit {
        let cause = self.cause(raw, 0, 0);
        self.settle_cause(cause, regs)
    }

    /// The guest goes on until there is something for the policy.
    fn settle_cause(&mut self, cause: Cause, regs: &mut Gprs) -> Exit {
        match self.take_care(cause, regs) {
            Some(exit) => exit,
            None => self.enter_as_it_is(regs),
        }
    }

    /// The entry has failed where nothing was rare.
    #[cold]
    fn failed(&mut self, cause: Cause, regs: &mut Gprs) -> Exit {
        self.settle_cause(cause, regs)
    }

    /// Has the host deal with the interrupt that was an exit, if the processor has acknowledged it.
    fn host_interrupt(&self) {
        if self.vmx.caps.controls.exit & exit_control::ACKNOWLEDGE != 0 {
            let event = self.vmx.cpu.vmread(field::EVENT);
            if event & inject::VALID != 0 {
                self.vmx.host.interrupt(event as u8);
            }
        }
    }

    /// Keeps an event whose delivery the exit has interrupted.
    #[inline(never)]
    fn after_possible_delivery(&mut self, basic: u32, injected: u64, rip_before: u64) {
        let c = self.vmx.cpu;
        let word = c.vmread(field::VECTORING);
        let word = word | c.vmread(field::VECTORING_ERROR) << 32;
        if word & inject::VALID != 0 {
            let rip = self.get(Field::RIP);
            self.event = inject::after_exit(word, injected, rip_before, rip);
            self.rare = true;
            if inject::is_soft(self.event) {
                // `write_event` has moved it.
                let length = u64::from(!self.vmx.caps.length_0);
                self.vmcs.set(Field::RIP, rip.wrapping_add(length));
            }
        }
        // The delivery of an NMI begins with blocking others, and so it will again.
        let again = inject::is_nmi(self.event);
        if again || exit::iret_again(basic, word, |f| c.vmread(f)) {
            let old = self.get(Field::INTERRUPTIBILITY);
            let new = if again {
                old & !NMI_BLOCKED
            } else {
                old | NMI_BLOCKED
            };
            self.vmcs.set(Field::INTERRUPTIBILITY, new);
        }
    }

    #[cold]
    fn not_entered(&mut self, how: Entry) -> Cause {
        let c = self.vmx.cpu;
        let (code, check) = match how {
            Entry::Refused => match c.vmread(field::ERROR) {
                n @ 7 => (n, "control fields"),
                n @ 8 => (n, "host state"),
                n => (n, "VMX instruction"),
            },
            _ => (0, "no current VMCS"),
        };
        c.vmwrite(field::INJECT, 0);
        self.vmcs.forget();
        self.failed_check = check;
        Cause::Policy(Exit::EntryFailed { vendor_code: code })
    }

    /// The processor did not like the guest's state: finds out what.
    #[cold]
    fn entry_failed(&mut self, raw: u32) -> Cause {
        let c = self.vmx.cpu;
        c.vmwrite(field::INJECT, 0);
        self.vmcs.forget();
        let mut check = match raw & 0xffff {
            reason::GUEST_STATE => "guest state, by a check that is not known",
            reason::ENTRY_MACHINE_CHECK => "machine check",
            _ => "MSRs to load",
        };
        if raw & 0xffff == reason::GUEST_STATE {
            if inject::is_interrupt(self.event) && self.rflags() & RFLAGS_IF == 0 {
                check = "interrupt injected with RFLAGS.IF clear";
            }
            if let Err(why) = state::validate(&self.state(), &self.vmx.caps) {
                check = why;
            }
        }
        self.failed_check = check;
        Cause::Policy(Exit::EntryFailed {
            vendor_code: u64::from(raw) | c.vmread(field::QUALIFICATION) << 32,
        })
    }

    /// [`HwVcpu::enter`] in all cases.
    #[inline(never)]
    fn enter_as_it_is(&mut self, regs: &mut Gprs) -> Exit {
        if self.on.is_none() {
            debug_assert!(false, "vCPU entered without being loaded");
            self.failed_check = "vCPU not loaded";
            return Exit::EntryFailed { vendor_code: 0 };
        }
        if let Some(check) = self.refused {
            self.failed_check = check;
            return Exit::EntryFailed { vendor_code: 0 };
        }
        // Ends: after an exit by a debug register or a window that exit is off until the policy or
        // `unload` comes in between, and moves to control registers are the guest's progress, from
        // which an interrupt takes it.
        let exit = loop {
            match self.run(regs) {
                Cause::Policy(exit) => break exit,
                cause => {
                    if let Some(exit) = self.take_care(cause, regs) {
                        break exit;
                    }
                }
            }
        };
        self.rare = !self.launched
            || self.stale != Stale::Nothing
            || self.pointers_stale
            || self.event != 0
            || self.nmi_waits
            || self.refused.is_some();
        exit
    }

    /// Deals with an exit that is not the policy's, or not as it comes from the processor. `None`: the guest
    /// goes on.
    #[inline(never)]
    fn take_care(&mut self, cause: Cause, regs: &Gprs) -> Option<Exit> {
        match cause {
            Cause::Policy(exit) => return Some(exit),
            Cause::DebugRegister => self.take_debug_registers(),
            Cause::ControlRegister { number, from } => {
                self.control_register(regs, number, from);
            }
            // The next entry looks whether it waits still.
            Cause::NmiWindow => self.controls(primary::NMI_WINDOW, false),
            Cause::HostInterrupt => {
                self.host_interrupt();
                return Some(Exit::Interrupt);
            }
            Cause::HostNmi => {
                self.vmx.cpu.handle_nmi();
                return Some(Exit::Nmi);
            }
            Cause::MachineCheck => {
                self.vmx.cpu.handle_machine_check();
                return Some(Exit::Interrupt);
            }
            Cause::Debug { dr6 } => {
                let old = self.dr6();
                self.set_dr6(old & !0xf | dr6);
                if dr6 & DR6_BD != 0 {
                    let dr7 = self.get(Field::DR7);
                    self.vmcs.set(Field::DR7, dr7 & !DR7_GD);
                }
                return Some(Exit::Exception {
                    vector: 1,
                    error: 0,
                });
            }
        }
        self.counts.hidden_exits += 1;
        None
    }

    fn segment_field(&self, s: Seg, part: Part) -> u64 {
        self.get(Field::segment(s, part))
    }

    /// The parts of a segment register, read: base, limit, selector, access rights.
    fn read_segment(&self, s: Seg) -> [u64; 4] {
        let part = |p| self.segment_field(s, p);
        let table = matches!(s, Seg::Gdtr | Seg::Idtr);
        [
            part(Part::Base),
            part(Part::Limit),
            if table { 0 } else { part(Part::Selector) },
            if table { 0 } else { part(Part::Rights) },
        ]
    }

    /// Sets CR0 as the guest sees it.
    fn write_cr0(&mut self, v: u64) {
        let real = v & !CR0_SHADOWED | self.vmx.caps.cr0_one;
        self.vmcs.set(Field::CR0, real);
        self.vmcs.set(Field::CR0_SHADOW, v);
    }

    /// Sets CR4 as the guest sees it.
    fn write_cr4(&mut self, v: u64) {
        let caps = &self.vmx.caps;
        // Machine checks shut the processor down where they are not enabled.
        let mce = caps.cr4_valid & CR4_MCE;
        let real = v & caps.cr4_valid | caps.cr4_one | mce;
        self.vmcs.set(Field::CR4, real);
        self.vmcs.set(Field::CR4_SHADOW, v);
    }

    /// Sets EFER and, with it, whether entry goes to long mode.
    fn write_efer(&mut self, v: u64) {
        let mut controls = self.vmx.caps.controls.entry;
        if v & EFER_LMA != 0 {
            controls |= entry::LONG_MODE;
        }
        self.vmcs.set(Field::EFER, v);
        self.vmcs.set(Field::ENTRY, controls.into());
    }

    fn live_index(index: u32) -> Option<usize> {
        LIVE_MSRS.iter().position(|&m| m == index)
    }

    /// A field that holds an MSR of the guest's.
    fn msr_field(index: u32) -> Option<Field> {
        Some(match index {
            msr::FS_BASE => Field::segment(Seg::Fs, Part::Base),
            msr::GS_BASE => Field::segment(Seg::Gs, Part::Base),
            msr::SYSENTER_CS => Field::SYSENTER_CS,
            msr::SYSENTER_ESP => Field::SYSENTER_ESP,
            msr::SYSENTER_EIP => Field::SYSENTER_EIP,
            msr::PAT => Field::PAT,
            _ => return None,
        })
    }

    fn live(&self) -> [u64; LIVE_MSRS.len()] {
        match self.on {
            Some(cpu) => cpu.save_msrs(self.vmx.cpu),
            None => self.live,
        }
    }

    fn set_live(&mut self, values: [u64; LIVE_MSRS.len()]) {
        match self.on {
            Some(cpu) => cpu.load_msrs(self.vmx.cpu, &values),
            None => self.live = values,
        }
    }
}

impl<C: Cpu> HwVcpu for Vcpu<C> {
    fn load(&mut self) {
        if self.on.is_some() {
            return;
        }
        let c = self.vmx.cpu;
        let (id, cpu) = self.vmx.this_cpu();
        let moved = self.last != Some(id);
        if !self.configured {
            c.vmclear(self.vmcs.mpa());
        }
        cpu.acquire(c, self.vmcs.mpa());
        self.on = Some(cpu);
        if !self.configured {
            self.configure();
        }
        if moved {
            self.write_host_state();
            self.forget_translations(Stale::Tables);
            self.last = Some(id);
        }

        let other_guest = cpu.last_root.swap(self.root.get(), Relaxed) != self.root.get();
        if other_guest && self.vmx.caps.ibpb {
            c.wrmsr(msr::PRED_CMD, msr::PRED_CMD_IBPB);
        }
        c.set_cr2(self.cr2);
        cpu.load_msrs(c, &self.live);
        let other_fpu = cpu.fpu_owner.swap(self.number, Relaxed) != self.number;
        if moved || other_fpu || self.fpu_changed {
            if let Some(all) = self.fpu.mask() {
                cpu.set_xcr0(c, all);
            }
            c.restore_fpu(&self.fpu);
            self.fpu_changed = false;
        }
        if self.fpu.mask().is_some() {
            cpu.set_xcr0(c, self.xcr0);
        }
        if self.vmx.caps.tsc_aux {
            cpu.set_tsc_aux(c, self.tsc_aux);
        }
        if self.get(Field::DR7) & DR7_ENABLES != 0 {
            self.take_debug_registers();
        }
        self.settle_threshold();
    }

    fn unload(&mut self) {
        let Some(cpu) = self.on else {
            return;
        };
        let c = self.vmx.cpu;
        self.give_debug_registers_back();
        self.cr2 = c.cr2();
        self.live = cpu.save_msrs(c);
        // A part that the guest has disabled in XCR0 keeps its contents, so all parts are saved.
        if let Some(all) = self.fpu.mask() {
            cpu.set_xcr0(c, all);
        }
        c.save_fpu(&mut self.fpu);
        cpu.release(c, self.vmcs.mpa());
        self.launched = false;
        self.on = None;
        self.rare = true;
    }

    fn enter_behind(&mut self, regs: &mut Gprs, len: u8) -> Exit {
        if self.rare {
            return self.enter_rarely(regs, len);
        }
        if len == 0 {
            self.vmcs.write_back(self.vmx.cpu);
        } else if !self.step_before_entry(len) {
            return self.enter_rarely(regs, len);
        }
        self.enter_now(regs, false, true)
    }

    fn failed_check(&self) -> &'static str {
        self.failed_check
    }

    fn take_counts(&mut self) -> HwCounts {
        #[cfg(feature = "count-vmcs")]
        {
            self.counts.vmcs = crate::accesses::take();
        }
        core::mem::take(&mut self.counts)
    }

    fn state(&self) -> ArchState {
        self.fetch_all();
        let live = self.live();
        let [star, lstar, cstar, sfmask, kernel_gs_base] = live;
        ArchState {
            rip: self.get(Field::RIP),
            rsp: self.get(Field::RSP),
            rflags: self.get(Field::RFLAGS),
            cr0: self.cr(0),
            cr2: self.cr(2),
            cr3: self.get(Field::CR3),
            cr4: self.cr(4),
            efer: self.get(Field::EFER),
            dr6: self.dr6(),
            dr7: self.get(Field::DR7),
            seg: state::ALL_SEGMENTS.map(|s| self.segment(s)),
            sysenter: [
                self.get(Field::SYSENTER_CS),
                self.get(Field::SYSENTER_ESP),
                self.get(Field::SYSENTER_EIP),
            ],
            syscall: [star, lstar, cstar, sfmask],
            kernel_gs_base,
            pat: self.get(Field::PAT),
            shadow: self.shadow(),
        }
    }

    fn check_state(&self, s: &ArchState) -> Result<(), &'static str> {
        state::validate(s, &self.vmx.caps)
    }

    fn set_state(&mut self, s: &ArchState) {
        self.refused = state::validate(s, &self.vmx.caps).err();
        self.rare = true;
        self.vmcs.set(Field::RIP, s.rip);
        self.vmcs.set(Field::RSP, s.rsp);
        let rflags = galvan_base::state::rflags(s.rflags);
        self.vmcs.set(Field::RFLAGS, rflags);
        self.write_cr0(s.cr0);
        self.set_cr(2, s.cr2);
        self.vmcs.set(Field::CR3, s.cr3);
        self.write_cr4(s.cr4);
        self.write_efer(s.efer);
        self.vmcs.set(Field::DR7, s.dr7);
        self.set_dr6(s.dr6);
        for (which, segment) in state::ALL_SEGMENTS.into_iter().zip(&s.seg) {
            let g = state::complete(which, *segment);
            self.vmcs.set(Field::segment(which, Part::Base), g.base);
            self.vmcs
                .set(Field::segment(which, Part::Limit), g.limit.into());
            if !matches!(which, Seg::Gdtr | Seg::Idtr) {
                self.vmcs
                    .set(Field::segment(which, Part::Selector), g.sel.into());
                self.vmcs
                    .set(Field::segment(which, Part::Rights), state::rights(g));
            }
        }
        let [cs, esp, eip] = s.sysenter;
        self.vmcs.set(Field::SYSENTER_CS, cs);
        self.vmcs.set(Field::SYSENTER_ESP, esp);
        self.vmcs.set(Field::SYSENTER_EIP, eip);
        let [star, lstar, cstar, sfmask] = s.syscall;
        self.set_live([star, lstar, cstar, sfmask, s.kernel_gs_base]);
        self.vmcs.set(Field::PAT, s.pat);
        let shadow = if s.shadow && rflags & RFLAGS_IF != 0 {
            SHADOW_STI
        } else {
            0
        };
        self.vmcs.set(Field::INTERRUPTIBILITY, shadow);
        // Entry insists that a single step is pending behind a shadow, and nowhere else.
        let step = shadow != 0 && rflags & RFLAGS_TF != 0;
        self.vmcs
            .set(Field::PENDING_DEBUG, if step { PENDING_BS } else { 0 });
        for f in [Field::PDPTE0, Field::PDPTE1, Field::PDPTE2, Field::PDPTE3] {
            self.vmcs.set(f, 0);
        }
        self.pointers_stale = true;
        self.event = 0;
        self.nmi_waits = false;
        self.controls(primary::NMI_WINDOW, false);
        self.forget_translations(Stale::Linear);
        if self.on.is_some() && s.dr7 & DR7_ENABLES != 0 {
            self.take_debug_registers();
        }
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.get(Field::RIP)
    }

    #[inline]
    fn set_rip(&mut self, rip: u64) {
        self.vmcs.set(Field::RIP, rip);
        let blocked = self.get(Field::INTERRUPTIBILITY);
        if blocked & SHADOW != 0 {
            self.vmcs.set(Field::INTERRUPTIBILITY, blocked & !SHADOW);
            self.vmcs.set(Field::PENDING_DEBUG, 0);
        }
    }

    /// Where RIP does not leave its 64 KiB, the width of the code does not matter.
    fn step_over(&mut self, len: u8) -> u64 {
        const TWO: u64 = Field::RFLAGS.bit() | Field::INTERRUPTIBILITY.bit();
        if self.on.is_none() || self.vmcs.knows_any(TWO) {
            return self.step_anyhow(len);
        }
        let rip = self.get(Field::RIP);
        let next = rip.wrapping_add(len.into());
        let rflags = self.vmcs.fetch(self.vmx.cpu, Field::RFLAGS);
        let blocked = self.vmcs.fetch(self.vmx.cpu, Field::INTERRUPTIBILITY);
        self.vmcs.know(TWO);
        if (rip ^ next) >> 16 != 0 || blocked & SHADOW != 0 {
            return self.step_anyhow(len);
        }
        self.vmcs.set(Field::RIP, next);
        rflags
    }

    /// Only 64-bit code has an instruction pointer beyond 4 GiB (Intel SDM "Checks on Guest RIP, RFLAGS,
    /// and SSP").
    #[inline]
    fn runs_long(&self) -> bool {
        self.get(Field::RIP) >> 32 != 0 || self.code_64()
    }

    fn rsp(&self) -> u64 {
        self.get(Field::RSP)
    }

    fn set_rsp(&mut self, v: u64) {
        self.vmcs.set(Field::RSP, v);
    }

    /// Mostly nothing that the guest can change is known.
    fn is_kernel_64(&self) -> bool {
        const CS: Field = Field::segment(Seg::Cs, Part::Rights);
        const SS: Field = Field::segment(Seg::Ss, Part::Rights);
        if !self.vmcs.knows_its_own_alone() || self.on.is_none() {
            return self.is_known_kernel_64();
        }
        let read = |f| self.vmcs.fetch(self.vmx.cpu, f);
        if read(Field::RIP) >> 32 != 0 {
            self.vmcs.know(Field::RIP.bit());
        } else {
            let long = read(Field::EFER) & EFER_LMA != 0;
            // CS remains unknown: it is of no use to anybody else.
            self.vmcs.know(Field::RIP.bit() | Field::EFER.bit());
            if !long || read(CS) & CODE_LONG == 0 {
                return false;
            }
        }
        state::dpl(read(SS)) == 0
    }

    #[inline]
    fn rflags(&self) -> u64 {
        self.get(Field::RFLAGS)
    }

    fn set_rflags(&mut self, v: u64) {
        let v = galvan_base::state::rflags(v);
        self.vmcs.set(Field::RFLAGS, v);
        let blocked = self.get(Field::INTERRUPTIBILITY);
        if blocked & SHADOW != 0 {
            // STI's shadow needs IF; either one and TF need a pending single step.
            if v & RFLAGS_IF == 0 {
                self.vmcs
                    .set(Field::INTERRUPTIBILITY, blocked & !SHADOW_STI);
            }
            let step = if v & RFLAGS_TF != 0 { PENDING_BS } else { 0 };
            self.vmcs.set(Field::PENDING_DEBUG, step);
        }
    }

    #[inline]
    fn cr(&self, n: u8) -> u64 {
        let merge = |real: u64, shadow: u64, mask: u64| real & !mask | shadow & mask;
        match n {
            0 => merge(
                self.get(Field::CR0),
                self.get(Field::CR0_SHADOW),
                self.cr0_mask(),
            ),
            2 if self.on.is_some() => self.vmx.cpu.cr2(),
            2 => self.cr2,
            3 => self.get(Field::CR3),
            4 => merge(
                self.get(Field::CR4),
                self.get(Field::CR4_SHADOW),
                self.cr4_mask(),
            ),
            _ => 0,
        }
    }

    #[inline]
    fn cr4_shown(&self) -> u64 {
        self.vmcs.own(Field::CR4_SHADOW)
    }

    fn set_cr(&mut self, n: u8, v: u64) {
        if galvan_base::state::flushes(n, self.cr(n), v) {
            self.forget_translations(Stale::Linear);
        }
        if n != 2 {
            (self.pointers_stale, self.rare) = (true, true);
        }
        match n {
            0 => {
                let efer = galvan_base::state::efer(self.efer(), v);
                self.write_cr0(v);
                self.write_efer(efer);
            }
            2 if self.on.is_some() => self.vmx.cpu.set_cr2(v),
            2 => self.cr2 = v,
            3 => self.vmcs.set(Field::CR3, v),
            4 => self.write_cr4(v),
            _ => {}
        }
    }

    #[inline]
    fn efer(&self) -> u64 {
        self.get(Field::EFER)
    }

    fn set_efer(&mut self, v: u64) {
        let new = galvan_base::state::efer(v, self.cr(0));
        if new != self.efer() {
            self.write_efer(new);
            self.forget_translations(Stale::Linear);
        }
    }

    #[inline]
    fn segment(&self, s: Seg) -> Segment {
        let [base, limit, sel, rights] = match self.vmcs.cached_segment(s) {
            Some(parts) => parts,
            None => self.read_segment(s),
        };
        Segment {
            sel: sel as u16,
            attr: state::attributes(s, rights),
            limit: limit as u32,
            base,
        }
    }

    #[inline]
    fn code_attributes(&self) -> u16 {
        state::attributes(Seg::Cs, self.segment_field(Seg::Cs, Part::Rights))
    }

    #[inline]
    fn cpl(&self) -> u8 {
        state::dpl(self.segment_field(Seg::Ss, Part::Rights))
    }

    fn msr(&self, index: u32) -> Option<u64> {
        if let Some(f) = Self::msr_field(index) {
            return Some(self.get(f));
        }
        if let Some(n) = Self::live_index(index) {
            return self.live().get(n).copied();
        }
        (index == msr::TSC_AUX && self.vmx.caps.tsc_aux).then_some(self.tsc_aux.into())
    }

    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let canonical = || {
            let bits = galvan_base::state::linear_bits(self.cr(4));
            galvan_base::state::is_canonical(value, bits)
        };
        let fits = match index {
            msr::PAT => galvan_base::state::pat_is_valid(value),
            msr::STAR => true,
            msr::SFMASK | msr::SYSENTER_CS => value >> 32 == 0,
            msr::TSC_AUX => value >> 32 == 0 && self.vmx.caps.tsc_aux,
            _ => canonical(),
        };
        if !fits {
            return false;
        }
        if let Some(f) = Self::msr_field(index) {
            self.vmcs.set(f, value);
            if index == msr::PAT {
                self.forget_translations(Stale::Linear);
            }
            true
        } else if let Some(n) = Self::live_index(index) {
            let mut all = self.live();
            if let Some(v) = all.get_mut(n) {
                *v = value;
            }
            self.set_live(all);
            true
        } else if index == msr::TSC_AUX {
            self.tsc_aux = value as u32;
            if let Some(cpu) = self.on {
                cpu.set_tsc_aux(self.vmx.cpu, self.tsc_aux);
            }
            true
        } else {
            false
        }
    }

    #[inline]
    fn shadow(&self) -> bool {
        self.get(Field::INTERRUPTIBILITY) & SHADOW != 0
    }

    #[inline]
    fn event_pending(&self) -> bool {
        self.event & inject::VALID != 0
    }

    fn waiting_event(&self) -> Option<Event> {
        inject::decode(self.event)
    }

    /// An NMI waits if it cannot come in at once; a second one that waits is the same one.
    fn inject(&mut self, e: Event) {
        self.rare = true;
        match e {
            Event::Interrupt(v) => self.event = inject::interrupt(v),
            Event::Nmi => self.nmi_waits = true,
            e => self.inject_other(e),
        }
    }

    fn set_interrupt_window(&mut self, w: Window) {
        if (w, self.window) == (Window::Closed, Window::Closed) {
            return;
        }
        self.window = w;
        self.controls(primary::INTERRUPT_WINDOW, w == Window::Open);
        self.threshold = match w {
            Window::Below(class) => class & 15,
            Window::Closed | Window::Open => 0,
        };
        self.settle_threshold();
    }

    fn virtual_apic(&self) -> VirtualApic {
        let features = self.vmx.caps.features;
        if features.contains(Features::VIRTUAL_INTERRUPTS) {
            VirtualApic::Delivers
        } else if features.contains(Features::VIRTUAL_EOI) {
            VirtualApic::Ends
        } else {
            VirtualApic::None
        }
    }

    fn lend_interrupts(&mut self, lent: Option<&Lent>) {
        let useless = lent.is_some() && self.virtual_apic() == VirtualApic::None;
        if self.on.is_none() || useless {
            debug_assert!(
                false,
                "interrupts lent to a processor that has no use for them"
            );
            return;
        }
        let mode = if lent.is_some() {
            Apic::X2
        } else {
            Apic::Plain
        };
        if mode != self.mode {
            self.switch_apic(mode);
        }
        let Some(lent) = lent else { return };
        if differ(&lent.exits, &self.eoi_exits) {
            self.write_eoi_exits(lent.exits);
        }
        self.write_interrupts(lent, true);
    }

    fn shows_apic(&self) -> bool {
        self.vmx.apic_access.is_some()
    }

    fn show_apic(&mut self, s: &Shown<'_>) {
        self.write_apic(s);
    }

    fn shown_apic(&self) -> (u8, u64) {
        self.tpr_and_icr()
    }

    fn take_written(&mut self, offset: u16) -> u32 {
        self.take_register(offset)
    }

    fn lend_few(&mut self, waiting: u8, in_service: u8) {
        let exits = self.eoi_exits.iter().fold(0, |all, word| all | word);
        if self.on.is_none() || self.mode != Apic::X2 || exits != 0 || !self.lent_is_empty() {
            self.lend_interrupts(Some(&Lent::few(waiting, in_service)));
            return;
        }
        if waiting | in_service == 0 {
            return;
        }
        for (v, at) in [(waiting, IRR_WORD), (in_service, ISR_WORD)] {
            if v != 0
                && let Some(w) = self.apic.get(at + usize::from(v >> 5) * 2)
            {
                w.store(1 << (v & 31), Relaxed);
            }
        }
        self.vmcs.forget_note();
        self.withheld = false;
        let status = u16::from(in_service) << 8 | u16::from(waiting);
        self.vmx.cpu.vmwrite(field::INTERRUPT_STATUS, status.into());
        self.status.set(Some(status));
    }

    #[inline]
    fn lent_interrupts(&self) -> ([u64; 4], [u64; 4]) {
        if !self.vmcs.noted() {
            self.read_page();
        }
        if self.page_empty.get() {
            Default::default()
        } else {
            self.page.get()
        }
    }

    #[inline]
    fn lent_is_empty(&self) -> bool {
        if !self.vmcs.noted() {
            self.read_page();
        }
        self.page_empty.get()
    }

    fn posting(&self) -> Option<Arc<dyn Posting>> {
        let d: Arc<dyn Posting> = self.posted.clone()?;
        Some(d)
    }

    #[inline]
    fn tpr(&self) -> u8 {
        self.apic
            .get(TPR_WORD)
            .map_or(0, |w| (w.load(Relaxed) >> 4) as u8 & 15)
    }

    #[inline]
    fn set_tpr(&mut self, v: u8) {
        if let Some(w) = self.apic.get(TPR_WORD) {
            w.store(u64::from(v & 15) << 4, Relaxed);
        }
        self.settle_threshold();
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.vmcs.set(Field::TSC_OFFSET, offset);
    }

    fn flush_tlb(&mut self) {
        self.forget_translations(Stale::Tables);
    }

    fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Bits that the processor does not have, or would refuse in this combination, are dropped.
    fn set_xcr0(&mut self, v: u64) {
        self.xcr0 = fpu::legal_xcr0(v, self.fpu.mask().unwrap_or(1));
        if let (Some(cpu), true) = (self.on, self.fpu.mask().is_some()) {
            cpu.set_xcr0(self.vmx.cpu, self.xcr0);
        }
    }

    fn fpu(&self, buf: &mut [u8]) -> usize {
        self.fpu.get(buf)
    }

    fn set_fpu(&mut self, buf: &[u8]) {
        self.fpu.set(buf);
        self.fpu_changed = true;
    }
}

impl<C: Cpu> Drop for Vcpu<C> {
    fn drop(&mut self) {
        // Its VMCS must not stay in a processor.
        self.unload();
    }
}

impl<C: Cpu> fmt::Debug for Vcpu<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("number", &self.number)
            .field("vmcs", &self.vmcs)
            .field("last", &self.last)
            .field("loaded", &self.on.is_some())
            .field("event", &self.event)
            .field("xcr0", &self.xcr0)
            .field("nmi_waits", &self.nmi_waits)
            .field("refused", &self.refused)
            .finish_non_exhaustive()
    }
}
