//! Guest processor state in neutral form, and the values it has at reset, SIPI and PVH entry.
//!
//! (AMD APM "VMCB State Save Area", Intel SDM "Guest-State Area"; PVH: public `start_info.h`.)

/// General purpose registers, in the order of their encoding, but for RSP, which like RIP is where the
/// processor keeps it ([`crate::hw::HwVcpu::rsp`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Gprs {
    /// rax
    pub rax: u64,
    /// rcx
    pub rcx: u64,
    /// rdx
    pub rdx: u64,
    /// rbx
    pub rbx: u64,
    /// rbp
    pub rbp: u64,
    /// rsi
    pub rsi: u64,
    /// rdi
    pub rdi: u64,
    /// r8
    pub r8: u64,
    /// r9
    pub r9: u64,
    /// r10
    pub r10: u64,
    /// r11
    pub r11: u64,
    /// r12
    pub r12: u64,
    /// r13
    pub r13: u64,
    /// r14
    pub r14: u64,
    /// r15
    pub r15: u64,
}

impl Gprs {
    /// The register of an instruction's encoding 0..=15; `None` for RSP.
    pub fn get(&self, n: u8) -> Option<u64> {
        Some(match n & 15 {
            0 => self.rax,
            1 => self.rcx,
            2 => self.rdx,
            3 => self.rbx,
            4 => return None,
            5 => self.rbp,
            6 => self.rsi,
            7 => self.rdi,
            8 => self.r8,
            9 => self.r9,
            10 => self.r10,
            11 => self.r11,
            12 => self.r12,
            13 => self.r13,
            14 => self.r14,
            _ => self.r15,
        })
    }

    /// The register of an instruction's encoding 0..=15, to change; `None` for RSP.
    pub fn get_mut(&mut self, n: u8) -> Option<&mut u64> {
        Some(match n & 15 {
            0 => &mut self.rax,
            1 => &mut self.rcx,
            2 => &mut self.rdx,
            3 => &mut self.rbx,
            4 => return None,
            5 => &mut self.rbp,
            6 => &mut self.rsi,
            7 => &mut self.rdi,
            8 => &mut self.r8,
            9 => &mut self.r9,
            10 => &mut self.r10,
            11 => &mut self.r11,
            12 => &mut self.r12,
            13 => &mut self.r13,
            14 => &mut self.r14,
            _ => &mut self.r15,
        })
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub sel: u16,
    /// Attributes in the packed 12-bit form of the VMCB, which is also that of the public save
    /// records: type 0-3, S 4, DPL 5-6, P 7, AVL 8, L 9, D/B 10, G 11. An unusable segment has P
    /// clear.
    pub attr: u16,
    /// Limit in bytes, already scaled by the granularity.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

impl Segment {
    /// [`Segment::attr`] of code: 64-bit, in long mode.
    pub const LONG: u16 = 1 << 9;
    /// [`Segment::attr`] of code: operands and addresses have 32 bits.
    pub const DEFAULT_32: u16 = 1 << 10;
}

/// The segment registers and descriptor-table registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Seg {
    /// es
    Es = 0,
    /// cs
    Cs,
    /// ss
    Ss,
    /// ds
    Ds,
    /// fs
    Fs,
    /// gs
    Gs,
    /// GDTR (base and limit only)
    Gdtr,
    /// LDTR
    Ldtr,
    /// IDTR (base and limit only)
    Idtr,
    /// TR
    Tr,
}

/// Number of [`Seg`] values.
pub const SEGS: usize = 10;

/// CR0.PE
pub const CR0_PE: u64 = 1;
/// CR0.ET
pub const CR0_ET: u64 = 1 << 4;
/// CR0.WP
pub const CR0_WP: u64 = 1 << 16;
/// CR0.NW
pub const CR0_NW: u64 = 1 << 29;
/// CR0.CD
pub const CR0_CD: u64 = 1 << 30;
/// CR0.PG
pub const CR0_PG: u64 = 1 << 31;
/// CR0 bits that exist: PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG.
pub const CR0_VALID: u64 = 0xe005_003f;
/// CR4.PSE
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.LA57
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.OSXSAVE
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4.PKE
pub const CR4_PKE: u64 = 1 << 22;
/// EFER.SCE
pub const EFER_SCE: u64 = 1;
/// EFER.LME
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE
pub const EFER_NXE: u64 = 1 << 11;
/// EFER.SVME
pub const EFER_SVME: u64 = 1 << 12;
/// RFLAGS.IF
pub const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.TF
pub const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.RF
pub const RFLAGS_RF: u64 = 1 << 16;
/// RFLAGS.VM
pub const RFLAGS_VM: u64 = 1 << 17;
/// RFLAGS bits that exist; bit 1 is always set.
const RFLAGS_VALID: u64 = 0x3f_7fd5;

/// Whether an instruction pointer can be one: of 64-bit code on a processor whose linear addresses
/// have so many bits, else of 32 bits.
pub fn rip_fits(rip: u64, code_64: bool, bits: u32) -> bool {
    if code_64 {
        // The bit below may differ: it does just after the last instruction of the lower half.
        matches!((rip as i64) >> bits, 0 | -1)
    } else {
        rip >> 32 == 0
    }
}

/// CR4's bits for which a processor with these CPUID leaves 1 and 7 has the feature, but CET, VMX and SMX (AMD APM
/// "CR4 Register", Intel SDM "Control Registers").
pub fn cr4_of(leaf1: &[u32; 4], leaf7: &[u32; 4]) -> u64 {
    // (CR4 bits, CPUID word, its bit)
    let table: [(u64, u32, u32); 17] = [
        (0b11, leaf1[3], 1),   // VME, PVI: VME
        (1 << 2, leaf1[3], 4), // TSD: TSC
        (1 << 3, leaf1[3], 2), // DE
        (CR4_PSE, leaf1[3], 3),
        (CR4_PAE, leaf1[3], 6),
        (1 << 6, leaf1[3], 7),   // MCE
        (1 << 7, leaf1[3], 13),  // PGE
        (1 << 9, leaf1[3], 24),  // OSFXSR: FXSR
        (1 << 10, leaf1[3], 25), // OSXMMEXCPT: SSE
        (1 << 11, leaf7[2], 2),  // UMIP
        (CR4_LA57, leaf7[2], 16),
        (1 << 16, leaf7[1], 0),  // FSGSBASE
        (1 << 17, leaf1[2], 17), // PCIDE
        (CR4_OSXSAVE, leaf1[2], 26),
        (1 << 20, leaf7[1], 7),  // SMEP
        (1 << 21, leaf7[1], 20), // SMAP
        (CR4_PKE, leaf7[2], 3),
    ];
    // PCE is there on every processor with SVM or VMX.
    table
        .iter()
        .filter(|(_, word, bit)| word >> bit & 1 != 0)
        .fold(1 << 8, |all, (bits, ..)| all | bits)
}

/// How many bits of a linear address count.
pub fn linear_bits(cr4: u64) -> u32 {
    if cr4 & CR4_LA57 != 0 { 57 } else { 48 }
}

/// Whether the bits above the highest implemented one repeat it.
pub fn is_canonical(address: u64, bits: u32) -> bool {
    let unused = 64 - bits;
    ((address << unused) as i64 >> unused) as u64 == address
}

/// Whether each byte is a memory type that PAT knows.
pub fn pat_is_valid(pat: u64) -> bool {
    pat.to_le_bytes()
        .iter()
        .all(|t| matches!(t, 0 | 1 | 4 | 5 | 6 | 7))
}

/// RFLAGS with the bits that exist.
pub fn rflags(v: u64) -> u64 {
    v & RFLAGS_VALID | 2
}

/// EFER whose LMA follows from LME and paging, as the processor keeps it.
pub fn efer(v: u64, cr0: u64) -> u64 {
    if v & EFER_LME != 0 && cr0 & CR0_PG != 0 {
        v | EFER_LMA
    } else {
        v & !EFER_LMA
    }
}

/// Whether a change of CR0 or CR4 makes translations of the guest stale.
pub fn flushes(n: u8, old: u64, new: u64) -> bool {
    const CR0: u64 = CR0_PE | 1 << 16 | CR0_NW | CR0_CD | CR0_PG;
    // PSE, PAE, PGE, LA57, PCIDE, SMEP, SMAP, PKE
    const CR4: u64 = 1 << 4 | 1 << 5 | 1 << 7 | CR4_LA57 | 1 << 17 | 1 << 20 | 1 << 21 | 1 << 22;
    match n {
        0 => (old ^ new) & CR0 != 0,
        3 => true,
        4 => (old ^ new) & CR4 != 0,
        _ => false,
    }
}

/// Everything of a vCPU's architectural state that the processor holds for it, apart from the FPU
/// and the general purpose registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchState {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Flags.
    pub rflags: u64,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// EFER as the guest sees it (never with SVME).
    pub efer: u64,
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// Segments, indexed by [`Seg`].
    pub seg: [Segment; SEGS],
    /// SYSENTER_CS, _ESP, _EIP.
    pub sysenter: [u64; 3],
    /// STAR, LSTAR, CSTAR, SFMASK.
    pub syscall: [u64; 4],
    /// KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// PAT.
    pub pat: u64,
    /// The instruction before RIP blocks interrupts (STI, MOV SS).
    pub shadow: bool,
}

impl ArchState {
    /// The state after power-on (Intel SDM "Processor State After Reset", AMD APM "Processor
    /// Initialization State"), except that execution starts nowhere: a vCPU leaves reset only by
    /// SIPI or by a context from the toolstack.
    pub fn at_reset() -> Self {
        let data = Segment {
            sel: 0,
            attr: 0x93,
            limit: 0xffff,
            base: 0,
        };
        let table = Segment {
            sel: 0,
            attr: 0,
            limit: 0xffff,
            base: 0,
        };
        let mut seg = [data; SEGS];
        seg[Seg::Cs as usize] = Segment {
            sel: 0xf000,
            attr: 0x9b,
            limit: 0xffff,
            base: 0xffff_0000,
        };
        seg[Seg::Gdtr as usize] = table;
        seg[Seg::Idtr as usize] = table;
        seg[Seg::Ldtr as usize] = Segment {
            attr: 0x82,
            ..table
        };
        seg[Seg::Tr as usize] = Segment {
            attr: 0x8b,
            ..table
        };
        ArchState {
            rip: 0xfff0,
            rsp: 0,
            rflags: 2,
            cr0: CR0_ET | CR0_CD | CR0_NW,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            seg,
            sysenter: [0; 3],
            syscall: [0; 4],
            kernel_gs_base: 0,
            pat: 0x0007_0406_0007_0406,
            shadow: false,
        }
    }

    /// The state after a start-up IPI with `vector`: real mode at `vector << 12` (Intel SDM
    /// "MP Initialization Protocol Algorithm").
    pub fn at_sipi(vector: u8) -> Self {
        let mut s = Self::at_reset();
        s.rip = 0;
        s.seg[Seg::Cs as usize] = Segment {
            sel: u16::from(vector) << 8,
            attr: 0x9b,
            limit: 0xffff,
            base: u64::from(vector) << 12,
        };
        s
    }

    /// The state in which a PVH kernel is entered: 32-bit flat, paging off. EBX, a general purpose
    /// register, holds the address of `hvm_start_info` and is set by the caller (public
    /// `arch-x86/hvm/start_info.h`).
    pub fn at_pvh_entry(entry: u32) -> Self {
        let data = Segment {
            sel: 0,
            attr: 0xc93,
            limit: !0,
            base: 0,
        };
        let mut s = Self::at_reset();
        s.cr0 = CR0_PE | CR0_ET;
        s.rip = u64::from(entry);
        for seg in [Seg::Es, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
            s.seg[seg as usize] = data;
        }
        s.seg[Seg::Cs as usize] = Segment {
            attr: 0xc9b,
            ..data
        };
        s.seg[Seg::Tr as usize] = Segment {
            sel: 0,
            attr: 0x8b,
            limit: 0x67,
            base: 0,
        };
        s
    }

    /// Whether 64-bit code is executing.
    pub fn long_mode(&self) -> bool {
        self.efer & EFER_LMA != 0 && self.seg[Seg::Cs as usize].attr & (1 << 9) != 0
    }
}

/// An event to inject into, or that was being delivered to, a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// A hardware exception, with an error code where the vector has one.
    Exception(u8, Option<u32>),
    /// INT n, INT3 or INTO that was being delivered when the exit happened.
    Software(u8),
}

impl Event {
    /// #UD
    pub const UD: Event = Event::Exception(6, None);
    /// #GP(0)
    pub const GP: Event = Event::Exception(13, Some(0));

    /// #PF with this error code; CR2 is set by the caller.
    pub fn page_fault(error: u32) -> Event {
        Event::Exception(14, Some(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sipi_starts_in_real_mode_at_the_vectors_page() {
        let s = ArchState::at_sipi(0x9a);
        assert_eq!(s.seg[Seg::Cs as usize].base + s.rip, 0x9a000);
        assert_eq!(s.seg[Seg::Cs as usize].sel, 0x9a00);
        assert_eq!(s.cr0 & (CR0_PE | CR0_PG), 0);
    }

    #[test]
    fn instruction_pointers_fit_their_code() {
        assert!(rip_fits(0xffff_ffff, false, 48) && !rip_fits(1 << 32, false, 48));
        assert!(rip_fits(1 << 47, true, 48), "just after the lower half");
        assert!(!rip_fits(1 << 48, true, 48) && rip_fits(1 << 48, true, 57));
        assert!(rip_fits(0xffff_8000_0000_0000, true, 48));
        assert!(!rip_fits(0xfffe_8000_0000_0000, true, 48));
    }

    #[test]
    fn pvh_entry_is_flat_32_bit_without_paging() {
        let s = ArchState::at_pvh_entry(0x100_0000);
        assert_eq!(s.cr0 & (CR0_PE | CR0_PG), CR0_PE);
        assert_eq!(
            s.seg[Seg::Cs as usize],
            Segment {
                sel: 0,
                attr: 0xc9b,
                limit: !0,
                base: 0
            }
        );
        assert!(!s.long_mode());
    }
}
