//! `vcpu_op`: bringing vCPUs up and down, run-state accounting, per-vCPU timers and areas.
//!
//! C: `vcpu.h`, `hvm/hvm_vcpu.h`.

abi_consts! {
    u32 {
        /// Set the start state: [`VcpuHvmContext`] for HVM guests.
        VCPUOP_INITIALISE = 0,
        /// Start; no argument.
        VCPUOP_UP = 1,
        /// Stop; no argument.
        VCPUOP_DOWN = 2,
        /// Returns 1 if up; no argument.
        VCPUOP_IS_UP = 3,
        /// Out: [`VcpuRunstateInfo`].
        VCPUOP_GET_RUNSTATE_INFO = 4,
        /// [`VcpuRegisterMemoryArea`] of a [`VcpuRunstateInfo`].
        VCPUOP_REGISTER_RUNSTATE_MEMORY_AREA = 5,
        /// [`VcpuSetPeriodicTimer`].
        VCPUOP_SET_PERIODIC_TIMER = 6,
        /// No argument.
        VCPUOP_STOP_PERIODIC_TIMER = 7,
        /// [`VcpuSetSingleshotTimer`].
        VCPUOP_SET_SINGLESHOT_TIMER = 8,
        /// No argument.
        VCPUOP_STOP_SINGLESHOT_TIMER = 9,
        /// [`VcpuRegisterVcpuInfo`].
        VCPUOP_REGISTER_VCPU_INFO = 10,
        /// No argument.
        VCPUOP_SEND_NMI = 11,
        /// Out: [`VcpuGetPhysid`]; pinned dom0 only.
        VCPUOP_GET_PHYSID = 12,
        /// [`VcpuRegisterMemoryArea`] of a [`crate::xen::VcpuTimeInfo`].
        VCPUOP_REGISTER_VCPU_TIME_MEMORY_AREA = 13,
        /// As 5 with a guest-physical address (4.18).
        VCPUOP_REGISTER_RUNSTATE_PHYS_AREA = 14,
        /// As 13 with a guest-physical address (4.18).
        VCPUOP_REGISTER_VCPU_TIME_PHYS_AREA = 15,

        /// Timer flag: fail with `ETIME` if the time is past.
        VCPU_SSHOTTMR_FUTURE = 1 << 0,

        /// [`VcpuHvmContext::mode`]: protected mode, paging at will.
        VCPU_HVM_MODE_32B = 0,
        /// [`VcpuHvmContext::mode`]: long mode.
        VCPU_HVM_MODE_64B = 1,
    }
    i32 {
        /// Run state: on a CPU.
        RUNSTATE_RUNNING = 0,
        /// Run state: ready, waiting for a CPU.
        RUNSTATE_RUNNABLE = 1,
        /// Run state: waiting for an event.
        RUNSTATE_BLOCKED = 2,
        /// Run state: down or paused.
        RUNSTATE_OFFLINE = 3,
    }
    u64 {
        /// Set in `state_entry_time` while the area is being updated, if the guest asked for it.
        XEN_RUNSTATE_UPDATE = 1 << 63,
    }
}

abi_structs! {
    /// Where a vCPU has spent its time.
    pub struct VcpuRunstateInfo("struct vcpu_runstate_info", 48) {
        /// `RUNSTATE_*`.
        state: i32 = 0,
        _pad: u32,
        /// System time in ns at which the state was entered.
        state_entry_time: u64 = 8,
        /// Nanoseconds in each state.
        time: [u64; 4] = 16,
    }

    /// Arguments of the operations that register an area. The address is linear, or guest-physical
    /// for the `PHYS_AREA` ones.
    pub struct VcpuRegisterMemoryArea("struct vcpu_register_runstate_memory_area", 8) {
        addr ["addr.p"]: u64 = 0,
    }

    /// Argument of [`VCPUOP_SET_PERIODIC_TIMER`].
    pub struct VcpuSetPeriodicTimer("struct vcpu_set_periodic_timer", 8) {
        period_ns: u64 = 0,
    }

    /// Arguments of [`VCPUOP_SET_SINGLESHOT_TIMER`].
    pub struct VcpuSetSingleshotTimer("struct vcpu_set_singleshot_timer", 16) {
        /// Absolute system time.
        timeout_abs_ns: u64 = 0,
        /// [`VCPU_SSHOTTMR_FUTURE`].
        flags: u32 = 8,
        _pad: u32,
    }

    /// Arguments of [`VCPUOP_REGISTER_VCPU_INFO`].
    pub struct VcpuRegisterVcpuInfo("struct vcpu_register_vcpu_info", 16) {
        /// A gfn, for translated guests.
        mfn: u64 = 0,
        /// Byte offset there; the structure must not cross the page.
        offset: u32 = 8,
        _pad ["rsvd"]: u32,
    }

    /// Result of [`VCPUOP_GET_PHYSID`]: APIC id in the low half, ACPI id in the high.
    pub struct VcpuGetPhysid("struct vcpu_get_physid", 8) {
        phys_id: u64 = 0,
    }

    /// The registers of [`VCPU_HVM_MODE_32B`]. Attributes (`ar`) are packed: access byte in 7:0, AVL, L,
    /// D/B and G in 11:8, the rest zero.
    pub struct VcpuHvmX86_32("struct vcpu_hvm_x86_32", 120) {
        eax: u32 = 0,
        ecx: u32,
        edx: u32,
        ebx: u32,
        esp: u32,
        ebp: u32,
        esi: u32,
        edi: u32,
        eip: u32 = 32,
        eflags: u32,
        cr0: u32 = 40,
        cr3: u32,
        cr4: u32,
        _pad1: u32,
        efer: u64 = 56,
        cs_base: u32 = 64,
        ds_base: u32,
        ss_base: u32,
        es_base: u32,
        tr_base: u32,
        cs_limit: u32 = 84,
        ds_limit: u32,
        ss_limit: u32,
        es_limit: u32,
        tr_limit: u32,
        cs_ar: u16 = 104,
        ds_ar: u16,
        ss_ar: u16,
        es_ar: u16,
        tr_ar: u16,
        _pad2: [u16; 3],
    }

    /// The registers of [`VCPU_HVM_MODE_64B`]; segments are flat.
    pub struct VcpuHvmX86_64("struct vcpu_hvm_x86_64", 112) {
        rax: u64 = 0,
        rcx: u64,
        rdx: u64,
        rbx: u64,
        rsp: u64,
        rbp: u64,
        rsi: u64,
        rdi: u64,
        rip: u64 = 64,
        rflags: u64,
        cr0: u64 = 80,
        cr3: u64,
        cr4: u64,
        efer: u64,
    }

    /// Argument of [`VCPUOP_INITIALISE`] for HVM guests.
    pub struct VcpuHvmContext("struct vcpu_hvm_context", 128) {
        /// `VCPU_HVM_MODE_*`.
        mode: u32 = 0,
        _pad: u32,
        /// The registers: [`VcpuHvmContext::x86_32`] or [`VcpuHvmContext::x86_64`].
        cpu_regs: [u8; 120] = 8,
    }
}

impl VcpuHvmContext {
    /// Sets the registers as those of 64-bit mode.
    pub fn set_x86_64(&mut self, r: &VcpuHvmX86_64) {
        let regs: [u8; 112] = zerocopy::transmute!(*r);
        for (to, from) in self.cpu_regs.iter_mut().zip(regs) {
            *to = from;
        }
    }

    /// The registers as those of 32-bit mode.
    #[must_use]
    pub fn x86_32(&self) -> VcpuHvmX86_32 {
        zerocopy::transmute!(self.cpu_regs)
    }

    /// The registers as those of 64-bit mode.
    #[must_use]
    pub fn x86_64(&self) -> VcpuHvmX86_64 {
        let (regs, _rest): ([u8; 112], [u8; 8]) = zerocopy::transmute!(self.cpu_regs);
        zerocopy::transmute!(regs)
    }
}
