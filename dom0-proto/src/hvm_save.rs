//! Save records of HVM and PVH guests: what `gethvmcontext`, `sethvmcontext` and migration carry.
//!
//! A context is a sequence of records, each a [`HvmSaveDescriptor`] followed by `length` bytes, from
//! [`HvmSaveHeader`] to [`SaveCode::END`]. Records of a type may be shorter than the type here (older
//! releases) and CPU_XSAVE and CPU_MSR are longer.
//!
//! C: `hvm/save.h`, `arch-x86/hvm/save.h`.

abi_newtype! {
    /// The type of a record.
    pub struct SaveCode(u16) {
        /// End of the context; no data.
        END = 0, "HVM_SAVE_CODE(END)";
        /// [`HvmSaveHeader`].
        HEADER = 1, "HVM_SAVE_CODE(HEADER)";
        /// [`HvmHwCpu`] per vCPU.
        CPU = 2, "HVM_SAVE_CODE(CPU)";
        /// [`HvmHwVpic`] for each of the two.
        PIC = 3, "HVM_SAVE_CODE(PIC)";
        /// [`HvmHwVioapic`].
        IOAPIC = 4, "HVM_SAVE_CODE(IOAPIC)";
        /// [`HvmHwLapic`] per vCPU.
        LAPIC = 5, "HVM_SAVE_CODE(LAPIC)";
        /// [`HvmHwLapicRegs`] per vCPU.
        LAPIC_REGS = 6, "HVM_SAVE_CODE(LAPIC_REGS)";
        /// [`HvmHwPciIrqs`].
        PCI_IRQ = 7, "HVM_SAVE_CODE(PCI_IRQ)";
        /// [`HvmHwIsaIrqs`].
        ISA_IRQ = 8, "HVM_SAVE_CODE(ISA_IRQ)";
        /// [`HvmHwPciLink`].
        PCI_LINK = 9, "HVM_SAVE_CODE(PCI_LINK)";
        /// [`HvmHwPit`].
        PIT = 10, "HVM_SAVE_CODE(PIT)";
        /// [`HvmHwRtc`].
        RTC = 11, "HVM_SAVE_CODE(RTC)";
        /// [`HvmHwHpet`].
        HPET = 12, "HVM_SAVE_CODE(HPET)";
        /// [`HvmHwPmtimer`].
        PMTIMER = 13, "HVM_SAVE_CODE(PMTIMER)";
        /// [`HvmHwMtrr`] per vCPU.
        MTRR = 14, "HVM_SAVE_CODE(MTRR)";
        /// [`HvmViridianDomainContext`].
        VIRIDIAN_DOMAIN = 15, "HVM_SAVE_CODE(VIRIDIAN_DOMAIN)";
        /// [`HvmHwCpuXsave`] and the rest of the area, per vCPU.
        CPU_XSAVE = 16, "CPU_XSAVE_CODE";
        /// [`HvmViridianVcpuContext`] per vCPU.
        VIRIDIAN_VCPU = 17, "HVM_SAVE_CODE(VIRIDIAN_VCPU)";
        /// [`HvmVmceVcpu`] per vCPU.
        VMCE_VCPU = 18, "HVM_SAVE_CODE(VMCE_VCPU)";
        /// [`HvmTscAdjust`] per vCPU.
        TSC_ADJUST = 19, "HVM_SAVE_CODE(TSC_ADJUST)";
        /// [`HvmMsr`] and its [`HvmOneMsr`]s, per vCPU.
        CPU_MSR = 20, "CPU_MSR_CODE";
    }
}

abi_consts! {
    u32 {
        /// The highest record type.
        HVM_SAVE_CODE_MAX = 20,
        /// [`HvmSaveHeader::magic`].
        HVM_FILE_MAGIC = 0x5438_1286,
        /// [`HvmSaveHeader::version`].
        HVM_FILE_VERSION = 1,
        /// [`HvmHwCpu::flags`]: `fpu_regs` is valid.
        XEN_X86_FPU_INITIALISED = 1 << 0,
        /// Pins of the I/O APIC in its record.
        VIOAPIC_NUM_PINS = 48,
        /// Bytes of the clock's RAM in its record.
        RTC_CMOS_SIZE = 14,
        /// HPET timers.
        HPET_TIMER_NUM = 3,
        /// Variable MTRRs.
        MTRR_VCNT = 8,
        /// Fixed MTRRs.
        NUM_FIXED_MSR = 11,
    }
}

abi_structs! {
    /// What precedes each record.
    pub struct HvmSaveDescriptor("struct hvm_save_descriptor", 8) {
        typecode: SaveCode = 0,
        /// The vCPU, or which of several devices.
        instance: u16 = 2,
        /// Bytes that follow.
        length: u32 = 4,
    }

    /// The first record.
    pub struct HvmSaveHeader("struct hvm_save_header", 24) {
        magic: u32 = 0,
        version: u32 = 4,
        /// Of the hypervisor that saved.
        changeset: u64 = 8,
        /// CPUID.1:EAX of the machine.
        cpuid: u32 = 16,
        /// TSC of the guest.
        gtsc_khz: u32 = 20,
    }

    /// Registers of a vCPU. Attribute words (`arbytes`) are packed as in a VMCB (AMD APM, "Segment
    /// State in the VMCB"): access byte in 7:0, AVL, L, D/B and G in 11:8. Flat 32-bit code is 0xc9b.
    pub struct HvmHwCpu("struct hvm_hw_cpu", 1032) {
        /// FXSAVE area.
        fpu_regs: [u8; 512] = 0,
        rax: u64 = 512,
        rbx: u64,
        rcx: u64,
        rdx: u64,
        rbp: u64,
        rsi: u64,
        rdi: u64,
        rsp: u64,
        r8: u64 = 576,
        r9: u64,
        r10: u64,
        r11: u64,
        r12: u64,
        r13: u64,
        r14: u64,
        r15: u64,
        rip: u64 = 640,
        rflags: u64,
        cr0: u64 = 656,
        cr2: u64,
        cr3: u64,
        cr4: u64,
        dr0: u64 = 688,
        dr1: u64,
        dr2: u64,
        dr3: u64,
        dr6: u64,
        dr7: u64,
        cs_sel: u32 = 736,
        ds_sel: u32,
        es_sel: u32,
        fs_sel: u32,
        gs_sel: u32,
        ss_sel: u32,
        tr_sel: u32,
        ldtr_sel: u32,
        cs_limit: u32 = 768,
        ds_limit: u32,
        es_limit: u32,
        fs_limit: u32,
        gs_limit: u32,
        ss_limit: u32,
        tr_limit: u32,
        ldtr_limit: u32,
        idtr_limit: u32,
        gdtr_limit: u32,
        cs_base: u64 = 808,
        ds_base: u64,
        es_base: u64,
        fs_base: u64,
        gs_base: u64,
        ss_base: u64,
        tr_base: u64,
        ldtr_base: u64,
        idtr_base: u64,
        gdtr_base: u64,
        cs_arbytes: u32 = 888,
        ds_arbytes: u32,
        es_arbytes: u32,
        fs_arbytes: u32,
        gs_arbytes: u32,
        ss_arbytes: u32,
        tr_arbytes: u32,
        ldtr_arbytes: u32,
        sysenter_cs: u64 = 920,
        sysenter_esp: u64,
        sysenter_eip: u64,
        /// Kernel GS base.
        shadow_gs: u64 = 944,
        /// Obsolete, zero.
        msr_flags: u64,
        msr_lstar: u64 = 960,
        msr_star: u64,
        msr_cstar: u64,
        msr_syscall_mask: u64,
        msr_efer: u64 = 992,
        msr_tsc_aux: u64,
        /// The guest's TSC when saved.
        tsc: u64 = 1008,
        /// Event being injected: vector 7:0, type 10:8, error code valid 11, valid 31.
        pending_event: u32 = 1016,
        error_code: u32 = 1020,
        /// [`XEN_X86_FPU_INITIALISED`].
        flags: u32 = 1024,
        _pad: u32,
    }

    /// An 8259.
    pub struct HvmHwVpic("struct hvm_hw_vpic", 8) {
        irr: u8 = 0,
        imr: u8 = 1,
        isr: u8 = 2,
        irq_base: u8 = 3,
        /// State of initialisation (3:0), lowest priority plus one (7:4).
        init_prio [""]: u8 = 4,
        /// Read ISR, poll, auto EOI, rotate on auto EOI, special fully nested, special mask, master.
        mode [""]: u8 = 5,
        elcr: u8 = 6,
        int_output: u8 = 7,
    }

    /// The I/O APIC.
    pub struct HvmHwVioapic("struct hvm_hw_vioapic", 400) {
        base_address: u64 = 0,
        ioregsel: u32 = 8,
        id: u32 = 12,
        redirtbl: [u64; 48] = 16,
    }

    /// A local APIC, its hidden state, as 4.17 to 4.19 write it.
    pub struct HvmHwLapicV15("struct hvm_hw_lapic", 24, 0x15..=0x16) {
        apic_base_msr: u64 = 0,
        disabled: u32 = 8,
        timer_divisor: u32 = 12,
        tdt_msr: u64 = 16,
    }

    /// A local APIC, its hidden state, as 4.20 writes it.
    pub struct HvmHwLapic("struct hvm_hw_lapic", 32, 0x17..=0xff) {
        apic_base_msr: u64 = 0,
        /// 1 disabled in the spurious-vector register, 2 in the APIC base MSR.
        disabled: u32 = 8,
        timer_divisor: u32 = 12,
        /// TSC deadline.
        tdt_msr: u64 = 16,
        pending_esr: u32 = 24,
        _pad: u32,
    }

    /// A local APIC, its register page.
    pub struct HvmHwLapicRegs("struct hvm_hw_lapic_regs", 1024) {
        data: [u8; 1024] = 0,
    }

    /// PCI lines that are asserted: bit `device * 4 + pin`.
    pub struct HvmHwPciIrqs("struct hvm_hw_pci_irqs", 16) {
        lines ["pad"]: [u64; 2] = 0,
    }

    /// ISA lines that are asserted.
    pub struct HvmHwIsaIrqs("struct hvm_hw_isa_irqs", 8) {
        lines ["pad"]: [u64; 1] = 0,
    }

    /// Routes of the PCI links to ISA interrupts; 0 is none.
    pub struct HvmHwPciLink("struct hvm_hw_pci_link", 8) {
        route: [u8; 4] = 0,
        _pad: [u8; 4],
    }

    /// One counter of the 8254.
    pub struct HvmHwPitChannel("struct hvm_hw_pit_channel", 16) {
        count: u32 = 0,
        latched_count: u16 = 4,
        count_latched: u8 = 6,
        status_latched: u8,
        status: u8,
        read_state: u8,
        write_state: u8,
        write_latch: u8,
        rw_mode: u8 = 12,
        mode: u8,
        bcd: u8,
        gate: u8,
    }

    /// The 8254.
    pub struct HvmHwPit("struct hvm_hw_pit", 56) {
        channels: [HvmHwPitChannel; 3] = 0,
        speaker_data_on: u32 = 48,
        _pad: u32,
    }

    /// The real-time clock.
    pub struct HvmHwRtc("struct hvm_hw_rtc", 24) {
        cmos_data: [u8; 14] = 0,
        cmos_index: u8 = 14,
        _pad: u8,
        /// Seconds.
        rtc_offset: i64 = 16,
    }

    /// One timer of the HPET.
    pub struct HvmHwHpetTimer("__typeof__(((struct hvm_hw_hpet *)0)->timers[0])", 32) {
        config: u64 = 0,
        cmp: u64 = 8,
        fsb: u64 = 16,
        _pad: u64,
    }

    /// The HPET.
    pub struct HvmHwHpet("struct hvm_hw_hpet", 1048) {
        capability: u64 = 0,
        _pad0: u64,
        config: u64 = 16,
        _pad1: u64,
        isr: u64 = 32,
        _pad2: [u64; 25],
        mc64: u64 = 240,
        _pad3: u64,
        timers: [HvmHwHpetTimer; 3] = 256,
        _pad4: [u64; 84],
        period: [u64; 3] = 1024,
    }

    /// ACPI power management.
    pub struct HvmHwPmtimer("struct hvm_hw_pmtimer", 8) {
        tmr_val: u32 = 0,
        pm1a_sts: u16 = 4,
        pm1a_en: u16 = 6,
    }

    /// Memory types.
    pub struct HvmHwMtrr("struct hvm_hw_mtrr", 240) {
        msr_pat_cr: u64 = 0,
        /// Base and mask by turns.
        msr_mtrr_var: [u64; 16] = 8,
        msr_mtrr_fixed: [u64; 11] = 136,
        msr_mtrr_cap: u64 = 224,
        msr_mtrr_def_type: u64 = 232,
    }

    /// Extended state: the fixed part; the rest of the XSAVE area follows.
    pub struct HvmHwCpuXsave("struct hvm_hw_cpu_xsave", 600) {
        xfeature_mask: u64 = 0,
        xcr0: u64 = 8,
        xcr0_accum: u64 = 16,
        /// Legacy region of the XSAVE area.
        fpu_sse ["save_area.fpu_sse"]: [u8; 512] = 24,
        xstate_bv ["save_area.xsave_hdr.xstate_bv"]: u64 = 536,
        xcomp_bv ["save_area.xsave_hdr.xcomp_bv"]: u64 = 544,
        _pad: [u64; 6],
    }

    /// Hyper-V state of the domain.
    pub struct HvmViridianDomainContext("struct hvm_viridian_domain_context", 32) {
        hypercall_gpa: u64 = 0,
        guest_os_id: u64 = 8,
        time_ref_count: u64 = 16,
        reference_tsc: u64 = 24,
    }

    /// Hyper-V state of a vCPU.
    pub struct HvmViridianVcpuContext("struct hvm_viridian_vcpu_context", 216) {
        vp_assist_msr: u64 = 0,
        apic_assist_pending: u8 = 8,
        _pad: [u8; 7],
        simp_msr: u64 = 16,
        sint_msr: [u64; 16] = 24,
        stimer_config_msr: [u64; 4] = 152,
        stimer_count_msr: [u64; 4] = 184,
    }

    /// Machine-check state.
    pub struct HvmVmceVcpu("struct hvm_vmce_vcpu", 32) {
        caps: u64 = 0,
        mci_ctl2_bank0: u64 = 8,
        mci_ctl2_bank1: u64 = 16,
        mcg_ext_ctl: u64 = 24,
    }

    /// IA32_TSC_ADJUST.
    pub struct HvmTscAdjust("struct hvm_tsc_adjust", 8) {
        tsc_adjust: u64 = 0,
    }

    /// Other MSRs: `count` of [`HvmOneMsr`] follow.
    pub struct HvmMsr("struct hvm_msr", 8) {
        count: u32 = 0,
        _pad: u32,
    }

    /// One MSR.
    pub struct HvmOneMsr("struct hvm_one_msr", 16) {
        index: u32 = 0,
        _pad ["_rsvd"]: u32,
        val: u64 = 8,
    }
}

impl From<HvmHwLapicV15> for HvmHwLapic {
    fn from(old: HvmHwLapicV15) -> Self {
        Self {
            apic_base_msr: old.apic_base_msr,
            disabled: old.disabled,
            timer_divisor: old.timer_divisor,
            tdt_msr: old.tdt_msr,
            pending_esr: 0,
            _pad: 0,
        }
    }
}
