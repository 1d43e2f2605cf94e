//! What is particular to x86: the hypervisor's CPUID leaves and MSRs, feature sets, and the register
//! layouts that PV interfaces and debuggers use.
//!
//! C: `arch-x86/cpuid.h`, `arch-x86/xen.h`, `arch-x86/xen-x86_64.h`, `arch-x86/cpufeatureset.h`.

abi_consts! {
    u32 {
        /// The first leaf; with Viridian leaves there, Xen's move to [`XEN_CPUID_VIRIDIAN_SHIFT`] above.
        XEN_CPUID_FIRST_LEAF = 0x4000_0000,
        /// "XenV" in `ebx` of the first leaf.
        XEN_CPUID_SIGNATURE_EBX = 0x566e_6558,
        /// "MMXe" in `ecx` of the first leaf.
        XEN_CPUID_SIGNATURE_ECX = 0x6558_4d4d,
        /// "nVMM" in `edx` of the first leaf.
        XEN_CPUID_SIGNATURE_EDX = 0x4d4d_566e,
        /// Leaf 2 `ecx`: PV only.
        XEN_CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD = 1 << 0,
        /// Leaf 3 `eax`: RDTSC is emulated.
        XEN_CPUID_TSC_EMULATED = 1 << 0,
        /// Leaf 3 `eax`: the machine's TSC is reliable.
        XEN_CPUID_HOST_TSC_RELIABLE = 1 << 1,
        /// Leaf 3 `eax`: RDTSCP exists.
        XEN_CPUID_RDTSCP_INSTR_AVAIL = 1 << 2,
        /// Leaf 3 `ebx`, and domctl: emulate when needed.
        XEN_CPUID_TSC_MODE_DEFAULT = 0,
        /// Leaf 3 `ebx`, and domctl: always emulate.
        XEN_CPUID_TSC_MODE_ALWAYS_EMULATE = 1,
        /// Leaf 3 `ebx`, and domctl: never emulate.
        XEN_CPUID_TSC_MODE_NEVER_EMULATE = 2,
        /// Leaf 3 `ebx`, and domctl: historic.
        XEN_CPUID_TSC_MODE_PVRDTSCP = 3,
        /// Leaf 4 `eax`: accesses to the APIC page are virtualised by hardware.
        XEN_HVM_CPUID_APIC_ACCESS_VIRT = 1 << 0,
        /// Leaf 4 `eax`: so are x2APIC accesses.
        XEN_HVM_CPUID_X2APIC_VIRT = 1 << 1,
        /// Leaf 4 `eax`: grant and foreign mappings are in the IOMMU.
        XEN_HVM_CPUID_IOMMU_MAPPINGS = 1 << 2,
        /// Leaf 4 `eax`: `ebx` is the vCPU's number.
        XEN_HVM_CPUID_VCPU_ID_PRESENT = 1 << 3,
        /// Leaf 4 `eax`: `ecx` is the domain's id.
        XEN_HVM_CPUID_DOMID_PRESENT = 1 << 4,
        /// Leaf 4 `eax`: 15-bit APIC ids in MSIs and I/O APIC entries.
        XEN_HVM_CPUID_EXT_DEST_ID = 1 << 5,
        /// Leaf 4 `eax`: per-vCPU upcall vectors.
        XEN_HVM_CPUID_UPCALL_VECTOR = 1 << 6,
        /// Leaf 5 `eax`: width of machine addresses; PV only.
        XEN_CPUID_MACHINE_ADDRESS_WIDTH_MASK = 0xff,
        /// Leaves after the first.
        XEN_CPUID_MAX_NUM_LEAVES = 5,
    }
    u64 {
        /// `flags` of a vCPU context: FPU state is valid.
        VGCF_I387_VALID = 1 << 0,
        /// `flags` of a vCPU context: kernel mode.
        VGCF_IN_KERNEL = 1 << 2,
        /// `flags` of a vCPU context: online.
        VGCF_ONLINE = 1 << 5,
    }
    u32 {
        /// Distance of Xen's leaves from [`XEN_CPUID_FIRST_LEAF`] while Viridian occupies that.
        XEN_CPUID_VIRIDIAN_SHIFT = 0x100,
        /// The MSR that fills a hypercall page: leaf 2 `ebx` names it.
        XEN_HYPERCALL_PAGE_MSR = 0x4000_0000,
        /// The same while Viridian occupies 0x40000000.
        XEN_HYPERCALL_PAGE_MSR_VIRIDIAN = 0x4000_0200,
    }
    usize {
        /// Bytes of each entry of a hypercall page.
        HYPERCALL_PAGE_ENTRY_LEN = 32,
    }
}

abi_structs! {
    /// General registers as PV interfaces give them.
    pub struct CpuUserRegs("struct cpu_user_regs", 200) {
        r15: u64 = 0,
        r14: u64,
        r13: u64,
        r12: u64,
        rbp: u64 = 32,
        rbx: u64,
        r11: u64 = 48,
        r10: u64,
        r9: u64,
        r8: u64,
        rax: u64 = 80,
        rcx: u64,
        rdx: u64,
        rsi: u64,
        rdi: u64 = 112,
        error_code: u32 = 120,
        entry_vector: u32 = 124,
        rip: u64 = 128,
        cs: u16 = 136,
        _pad0: u16,
        saved_upcall_mask: u8 = 140,
        _pad1: [u8; 3],
        rflags: u64 = 144,
        rsp: u64 = 152,
        ss: u16 = 160,
        _pad2: [u16; 3],
        es: u16 = 168,
        _pad3: [u16; 3],
        ds: u16 = 176,
        _pad4: [u16; 3],
        fs: u16 = 184,
        _pad5: [u16; 3],
        gs: u16 = 192,
        _pad6: [u16; 3],
    }

    /// One entry of a PV trap table.
    pub struct TrapInfo("struct trap_info", 16) {
        vector: u8 = 0,
        flags: u8 = 1,
        cs: u16 = 2,
        _pad: u32,
        address: u64 = 8,
    }

    /// The state of a vCPU in PV form. For HVM guests only registers, `ctrlreg` and `flags` matter
    /// (core dumps).
    pub struct VcpuGuestContext("struct vcpu_guest_context", 5168) {
        fpu_ctxt: [u8; 512] = 0,
        /// `VGCF_*`.
        flags: u64 = 512,
        user_regs: CpuUserRegs = 520,
        trap_ctxt: [TrapInfo; 256] = 720,
        ldt_base: u64 = 4816,
        ldt_ents: u64,
        gdt_frames: [u64; 16] = 4832,
        gdt_ents: u64,
        kernel_ss: u64 = 4968,
        kernel_sp: u64,
        ctrlreg: [u64; 8] = 4984,
        debugreg: [u64; 8] = 5048,
        event_callback_eip: u64 = 5112,
        failsafe_callback_eip: u64,
        syscall_callback_eip: u64,
        vm_assist: u64 = 5136,
        fs_base: u64,
        gs_base_kernel: u64,
        gs_base_user: u64 = 5160,
    }
}

/// Where the bits of one word of a feature set come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureWord {
    /// A register of a CPUID leaf: leaf, subleaf, register (0 = eax to 3 = edx).
    Cpuid(u32, u32, u8),
    /// Half of an MSR: number, whether the high half.
    Msr(u32, bool),
}

/// The words of a feature set (`XEN_SYSCTL_get_cpu_featureset`), in order.
pub const FEATURESET_WORDS: [FeatureWord; 19] = {
    use FeatureWord::{Cpuid, Msr};
    const EAX: u8 = 0;
    const EBX: u8 = 1;
    const ECX: u8 = 2;
    const EDX: u8 = 3;
    [
        Cpuid(0x1, 0, EDX),
        Cpuid(0x1, 0, ECX),
        Cpuid(0x8000_0001, 0, EDX),
        Cpuid(0x8000_0001, 0, ECX),
        Cpuid(0xd, 1, EAX),
        Cpuid(0x7, 0, EBX),
        Cpuid(0x7, 0, ECX),
        Cpuid(0x8000_0007, 0, EDX),
        Cpuid(0x8000_0008, 0, EBX),
        Cpuid(0x7, 0, EDX),
        Cpuid(0x7, 1, EAX),
        Cpuid(0x8000_0021, 0, EAX),
        Cpuid(0x7, 1, EBX),
        Cpuid(0x7, 2, EDX),
        Cpuid(0x7, 1, ECX),
        Cpuid(0x7, 1, EDX),
        // IA32_ARCH_CAPABILITIES.
        Msr(0x10a, false),
        Msr(0x10a, true),
        Cpuid(0x8000_0021, 0, ECX),
    ]
};
