//! Layout of the VMCB: control area at 0, state save area at 0x400.
//!
//! Fields are cells because the processor writes them, too. Who changes a field that the processor
//! may have cached goes through [`crate::clean::GuestVmcb`]. (AMD APM "Layout of VMCB".)

use core::cell::Cell;
use core::mem::offset_of;

use galvan_base::state::Segment;

use crate::page::Overlay;

/// One segment register of the save area.
#[derive(Debug)]
#[repr(C)]
pub struct SegmentCell {
    /// Selector.
    pub sel: Cell<u16>,
    /// Attributes, packed to 12 bits.
    pub attr: Cell<u16>,
    /// Limit in bytes.
    pub limit: Cell<u32>,
    /// Base.
    pub base: Cell<u64>,
}

impl SegmentCell {
    /// The value as the processor left it.
    pub fn get(&self) -> Segment {
        Segment {
            sel: self.sel.get(),
            attr: self.attr.get(),
            limit: self.limit.get(),
            base: self.base.get(),
        }
    }

    /// Replaces it.
    pub fn set(&self, s: &Segment) {
        self.sel.set(s.sel);
        self.attr.set(s.attr & 0xfff);
        self.limit.set(s.limit);
        self.base.set(s.base);
    }
}

/// A virtual machine control block.
#[repr(C, align(4096))]
pub struct Vmcb {
    /// CR reads in the low, writes in the high half.
    pub intercept_cr: Cell<u32>,
    /// DR reads in the low, writes in the high half.
    pub intercept_dr: Cell<u32>,
    /// Exceptions by vector.
    pub intercept_exceptions: Cell<u32>,
    /// See [`intercept1`].
    pub intercept1: Cell<u32>,
    /// See [`intercept2`].
    pub intercept2: Cell<u32>,
    /// See [`intercept3`].
    pub intercept3: Cell<u32>,
    _reserved_18: Cell<[u8; 0x24]>,
    /// Ticks between PAUSEs of one loop.
    pub pause_threshold: Cell<u16>,
    /// PAUSEs before an exit.
    pub pause_count: Cell<u16>,
    /// Physical address of the I/O permission map.
    pub iopm_base: Cell<u64>,
    /// Physical address of the MSR permission map.
    pub msrpm_base: Cell<u64>,
    /// Added to the TSC for the guest.
    pub tsc_offset: Cell<u64>,
    /// ASID; never 0.
    pub asid: Cell<u32>,
    /// See [`tlb_control`].
    pub tlb_control: Cell<u32>,
    /// See [`int_ctl`].
    pub int_ctl: Cell<u32>,
    /// Vector of the virtual interrupt.
    pub int_vector: Cell<u32>,
    /// Bit 0: the guest is in an interrupt shadow.
    pub int_state: Cell<u64>,
    /// See [`crate::exit`].
    pub exit_code: Cell<u64>,
    /// First information word.
    pub exit_info1: Cell<u64>,
    /// Second information word.
    pub exit_info2: Cell<u64>,
    /// The event whose delivery the exit interrupted; the form is that of `event_inj`.
    pub exit_int_info: Cell<u64>,
    /// Bit 0: nested paging.
    pub nested_ctl: Cell<u64>,
    _avic_bar: Cell<u64>,
    _ghcb: Cell<u64>,
    /// The event to inject; see [`crate::inject`].
    pub event_inj: Cell<u64>,
    /// Root of the nested page tables.
    pub nested_cr3: Cell<u64>,
    /// LBR and VMSAVE/VMLOAD virtualisation.
    pub virt_ext: Cell<u64>,
    /// See [`crate::clean`].
    pub clean: Cell<u32>,
    _reserved_c4: Cell<u32>,
    /// The next instruction, where the processor tells.
    pub next_rip: Cell<u64>,
    /// How many of `insn` are valid.
    pub insn_len: Cell<u8>,
    /// Instruction bytes, where the processor provides them.
    pub insn: Cell<[u8; 15]>,
    _reserved_e0: Cell<[u8; 0x320]>,

    /// ES
    pub es: SegmentCell,
    /// CS
    pub cs: SegmentCell,
    /// SS
    pub ss: SegmentCell,
    /// DS
    pub ds: SegmentCell,
    /// FS; switched by VMLOAD and VMSAVE.
    pub fs: SegmentCell,
    /// GS; switched by VMLOAD and VMSAVE.
    pub gs: SegmentCell,
    /// GDTR
    pub gdtr: SegmentCell,
    /// LDTR; switched by VMLOAD and VMSAVE.
    pub ldtr: SegmentCell,
    /// IDTR
    pub idtr: SegmentCell,
    /// TR; switched by VMLOAD and VMSAVE.
    pub tr: SegmentCell,
    _reserved_4a0: Cell<[u8; 0x2b]>,
    /// Privilege level.
    pub cpl: Cell<u8>,
    _reserved_4cc: Cell<u32>,
    /// EFER, with SVME set.
    pub efer: Cell<u64>,
    _reserved_4d8: Cell<[u8; 0x70]>,
    /// CR4
    pub cr4: Cell<u64>,
    /// CR3
    pub cr3: Cell<u64>,
    /// CR0
    pub cr0: Cell<u64>,
    /// DR7
    pub dr7: Cell<u64>,
    /// DR6
    pub dr6: Cell<u64>,
    /// RFLAGS
    pub rflags: Cell<u64>,
    /// RIP
    pub rip: Cell<u64>,
    _reserved_580: Cell<[u8; 0x58]>,
    /// RSP
    pub rsp: Cell<u64>,
    _cet: Cell<[u64; 3]>,
    /// RAX
    pub rax: Cell<u64>,
    /// STAR; this and all to SYSENTER_EIP are switched by VMLOAD and VMSAVE.
    pub star: Cell<u64>,
    /// LSTAR
    pub lstar: Cell<u64>,
    /// CSTAR
    pub cstar: Cell<u64>,
    /// SFMASK
    pub sfmask: Cell<u64>,
    /// KERNEL_GS_BASE
    pub kernel_gs_base: Cell<u64>,
    /// SYSENTER_CS
    pub sysenter_cs: Cell<u64>,
    /// SYSENTER_ESP
    pub sysenter_esp: Cell<u64>,
    /// SYSENTER_EIP
    pub sysenter_eip: Cell<u64>,
    /// CR2
    pub cr2: Cell<u64>,
    _reserved_648: Cell<[u8; 0x20]>,
    /// The guest's PAT under nested paging.
    pub g_pat: Cell<u64>,
    _rest: Cell<[u8; 0x990]>,
}

// SAFETY: cells of integers and arrays of them throughout, one page long (asserted below); the
// compiler puts no padding between them that the offsets below would not show.
unsafe impl Overlay for Vmcb {}

impl core::fmt::Debug for Vmcb {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Vmcb")
            .field("exit_code", &format_args!("{:#x}", self.exit_code.get()))
            .field("exit_info1", &format_args!("{:#x}", self.exit_info1.get()))
            .field("exit_info2", &format_args!("{:#x}", self.exit_info2.get()))
            .field(
                "exit_int_info",
                &format_args!("{:#x}", self.exit_int_info.get()),
            )
            .field("event_inj", &format_args!("{:#x}", self.event_inj.get()))
            .field("int_ctl", &format_args!("{:#x}", self.int_ctl.get()))
            .field("int_state", &format_args!("{:#x}", self.int_state.get()))
            .field("asid", &self.asid.get())
            .field("rip", &format_args!("{:#x}", self.rip.get()))
            .field("rsp", &format_args!("{:#x}", self.rsp.get()))
            .field("rflags", &format_args!("{:#x}", self.rflags.get()))
            .field("cpl", &self.cpl.get())
            .field("cr0", &format_args!("{:#x}", self.cr0.get()))
            .field("cr2", &format_args!("{:#x}", self.cr2.get()))
            .field("cr3", &format_args!("{:#x}", self.cr3.get()))
            .field("cr4", &format_args!("{:#x}", self.cr4.get()))
            .field("efer", &format_args!("{:#x}", self.efer.get()))
            .field("cs", &self.cs.get())
            .field("ss", &self.ss.get())
            .finish_non_exhaustive()
    }
}

macro_rules! at {
    ($($field:ident = $offset:literal),* $(,)?) => {
        const _: () = { $(assert!(offset_of!(Vmcb, $field) == $offset, stringify!($field));)* };
    };
}

const _: () = assert!(size_of::<Vmcb>() == 0x1000 && size_of::<SegmentCell>() == 16);
at! {
    intercept_cr = 0x000, intercept_dr = 0x004, intercept_exceptions = 0x008, intercept1 = 0x00c,
    intercept2 = 0x010, intercept3 = 0x014, pause_threshold = 0x03c, pause_count = 0x03e,
    iopm_base = 0x040, msrpm_base = 0x048, tsc_offset = 0x050, asid = 0x058, tlb_control = 0x05c,
    int_ctl = 0x060, int_vector = 0x064, int_state = 0x068, exit_code = 0x070, exit_info1 = 0x078,
    exit_info2 = 0x080, exit_int_info = 0x088, nested_ctl = 0x090, event_inj = 0x0a8,
    nested_cr3 = 0x0b0, virt_ext = 0x0b8, clean = 0x0c0, next_rip = 0x0c8, insn_len = 0x0d0,
    insn = 0x0d1, es = 0x400, cs = 0x410, ss = 0x420, ds = 0x430, fs = 0x440, gs = 0x450,
    gdtr = 0x460, ldtr = 0x470, idtr = 0x480, tr = 0x490, cpl = 0x4cb, efer = 0x4d0, cr4 = 0x548,
    cr3 = 0x550, cr0 = 0x558, dr7 = 0x560, dr6 = 0x568, rflags = 0x570, rip = 0x578, rsp = 0x5d8,
    rax = 0x5f8, star = 0x600, lstar = 0x608, cstar = 0x610, sfmask = 0x618,
    kernel_gs_base = 0x620, sysenter_cs = 0x628, sysenter_esp = 0x630, sysenter_eip = 0x638,
    cr2 = 0x640, g_pat = 0x668,
}

/// Bits of the first word of miscellaneous intercepts.
pub mod intercept1 {
    /// Physical interrupt.
    pub const INTR: u32 = 1 << 0;
    /// Physical NMI.
    pub const NMI: u32 = 1 << 1;
    /// Physical INIT.
    pub const INIT: u32 = 1 << 3;
    /// The virtual interrupt can be taken.
    pub const VINTR: u32 = 1 << 4;
    /// RDPMC.
    pub const RDPMC: u32 = 1 << 15;
    /// CPUID.
    pub const CPUID: u32 = 1 << 18;
    /// RSM.
    pub const RSM: u32 = 1 << 19;
    /// IRET.
    pub const IRET: u32 = 1 << 20;
    /// INVD.
    pub const INVD: u32 = 1 << 22;
    /// PAUSE.
    pub const PAUSE: u32 = 1 << 23;
    /// HLT.
    pub const HLT: u32 = 1 << 24;
    /// INVLPGA.
    pub const INVLPGA: u32 = 1 << 26;
    /// Ports, by the I/O permission map.
    pub const IOIO: u32 = 1 << 27;
    /// MSRs, by the MSR permission map.
    pub const MSR: u32 = 1 << 28;
    /// Hardware task switch.
    pub const TASK_SWITCH: u32 = 1 << 29;
    /// Processor frozen by a legacy FPU error.
    pub const FERR_FREEZE: u32 = 1 << 30;
    /// Shutdown.
    pub const SHUTDOWN: u32 = 1 << 31;
}

/// Bits of the second word of miscellaneous intercepts.
pub mod intercept2 {
    /// VMRUN; the processor insists.
    pub const VMRUN: u32 = 1 << 0;
    /// VMMCALL.
    pub const VMMCALL: u32 = 1 << 1;
    /// VMLOAD.
    pub const VMLOAD: u32 = 1 << 2;
    /// VMSAVE.
    pub const VMSAVE: u32 = 1 << 3;
    /// STGI.
    pub const STGI: u32 = 1 << 4;
    /// CLGI.
    pub const CLGI: u32 = 1 << 5;
    /// SKINIT.
    pub const SKINIT: u32 = 1 << 6;
    /// WBINVD and WBNOINVD.
    pub const WBINVD: u32 = 1 << 9;
    /// MONITOR.
    pub const MONITOR: u32 = 1 << 10;
    /// MWAIT.
    pub const MWAIT: u32 = 1 << 11;
    /// XSETBV.
    pub const XSETBV: u32 = 1 << 13;
    /// RDPRU.
    pub const RDPRU: u32 = 1 << 14;
}

/// Bits of the third word of miscellaneous intercepts.
pub mod intercept3 {
    /// INVLPGB.
    pub const INVLPGB: u32 = 1 << 0;
    /// MCOMMIT.
    pub const MCOMMIT: u32 = 1 << 3;
    /// TLBSYNC.
    pub const TLBSYNC: u32 = 1 << 4;
}

/// Values of TLB_CONTROL.
pub mod tlb_control {
    /// Leave the TLB alone.
    pub const NOTHING: u32 = 0;
    /// Flush the whole TLB.
    pub const FLUSH_ALL: u32 = 1;
    /// Flush the entries of this ASID; needs flush-by-ASID.
    pub const FLUSH_ASID: u32 = 3;
}

/// Fields of the virtual interrupt control.
pub mod int_ctl {
    /// CR8 of the guest.
    pub const V_TPR: u32 = 0xf;
    /// A virtual interrupt is pending.
    pub const V_IRQ: u32 = 1 << 8;
    /// Its priority: what CR8 must be below.
    pub const V_INTR_PRIO: u32 = 0xf << 16;
    /// It ignores the TPR.
    pub const V_IGN_TPR: u32 = 1 << 20;
    /// EFLAGS.IF and CR8 of the guest hold virtual interrupts only.
    pub const V_INTR_MASKING: u32 = 1 << 24;
}

/// Bit 0 of `int_state`.
pub const INT_SHADOW: u64 = 1;
