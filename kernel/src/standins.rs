//! Shapes of modules that have not landed yet, so that those that have can be compiled and tested.
//! Each goes when its module comes.
#![allow(missing_docs, unused, missing_debug_implementations, clippy::all)]

pub mod sched {
    use crate::hv::Hv;
    use crate::vcpu::Vcpu;
    use alloc::sync::Arc;
    use galvan_base::CpuId;
    #[derive(Debug, Default)]
    pub struct SchedUnit;
    impl SchedUnit {
        pub fn running_on(&self) -> Option<CpuId> {
            None
        }
        pub fn woken_at(&self) -> u64 {
            0
        }
        pub fn cpu_time(&self) -> u64 {
            0
        }
    }
    #[derive(Debug)]
    pub struct Scheduler;
    impl Scheduler {
        pub fn new(_: u32) -> Self {
            Scheduler
        }
        pub fn wake(&self, _: Hv, _: &Arc<Vcpu>) {}
        pub fn sleep(&self, _: Hv, _: &Arc<Vcpu>) {}
        pub fn wait_not_running(&self, _: Hv, _: &Arc<Vcpu>) {}
        pub fn pick(&self, _: Hv, _: CpuId) -> Option<Arc<Vcpu>> {
            None
        }
        pub fn put_back(&self, _: Hv, _: CpuId, _: &Arc<Vcpu>) {}
        pub fn has_work(&self, _: CpuId) -> bool {
            false
        }
        pub fn must_yield(&self, _: Hv, _: CpuId) -> bool {
            false
        }
        pub fn turn_ends(&self, _: Hv, _: CpuId) -> Option<u64> {
            None
        }
        pub fn yield_turn(&self, _: Hv, _: CpuId) {}
    }
}

pub mod timer {
    use crate::hv::Hv;
    use crate::vcpu::Vcpu;
    use alloc::sync::Arc;
    use galvan_base::CpuId;
    #[derive(Debug)]
    pub struct TimerQueues;
    impl TimerQueues {
        pub fn new(_: u32) -> Self {
            TimerQueues
        }
        pub fn insert(&self, _: Hv, _: CpuId, _: &Arc<Vcpu>, _: u64) {}
        pub fn cancel(&self, _: CpuId, _: &Arc<Vcpu>) {}
        pub fn expire(&self, _: Hv, _: CpuId) {}
        pub fn next_deadline(&self, _: CpuId) -> Option<u64> {
            None
        }
        pub fn arm(&self, _: Hv, _: CpuId, _: Option<u64>) {}
    }
}

pub mod evtchn {
    use crate::domain::{Domain, DomainConfig};
    use crate::guest_access::Cx;
    use crate::hv::{Hv, Hypervisor};
    use crate::vcpu::Vcpu;
    use alloc::sync::Arc;
    use galvan_dom0_proto::errno::Errno;
    #[derive(Debug)]
    pub struct EventChannels;
    impl EventChannels {
        pub fn new(_: &DomainConfig) -> Self {
            EventChannels
        }
    }
    pub fn raise_global_virq(_: Hv, _: &Arc<Domain>, _: u32) {}
    pub fn raise_vcpu_virq(_: Hv, _: &Arc<Domain>, _: &Arc<Vcpu>, _: u32) {}
    pub fn poll_wait(_: &mut Cx<'_>, _: &[u32]) -> Result<bool, Errno> {
        Err(Errno::ENOSYS)
    }
}

pub mod gnttab {
    use crate::domain::DomainConfig;
    #[derive(Debug)]
    pub struct GrantTable;
    impl GrantTable {
        pub fn new(_: &DomainConfig) -> Self {
            GrantTable
        }
    }
}

pub mod cpu_policy {
    #[derive(Debug)]
    pub struct HostPolicy;
    impl HostPolicy {
        pub fn default_for(&self, _: bool) -> CpuPolicy {
            CpuPolicy
        }
    }
    #[derive(Debug)]
    pub struct CpuPolicy;
}

pub mod msr {
    #[derive(Debug, Default)]
    pub struct StoredMsrs;
}

pub mod insn {
    use crate::guest_access::Cx;
    #[derive(Debug, Default)]
    pub struct InsnCache;
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Kind {
        Hypercall,
        Cpuid,
        Hlt,
        Pause,
        Wbinvd,
    }
    pub fn length(_: &mut Cx<'_>, given: u8, _: Kind) -> Option<u8> {
        Some(given)
    }
    pub fn advance(_: &mut Cx<'_>, _: u8) {}
}

pub mod exits {
    pub mod cpuid {
        use crate::{exit::Next, guest_access::Cx};
        pub fn cpuid(_: &mut Cx<'_>, _: u8) -> Next {
            Next::Resume
        }
    }
    pub mod msr {
        use crate::{exit::Next, guest_access::Cx};
        pub fn read(_: &mut Cx<'_>, _: u8) -> Next {
            Next::Resume
        }
        pub fn write(_: &mut Cx<'_>, _: u8) -> Next {
            Next::Resume
        }
        pub fn xsetbv(_: &mut Cx<'_>, _: u8) -> Next {
            Next::Resume
        }
    }
    pub mod pio {
        use crate::{exit::Next, guest_access::Cx};
        pub fn pio(_: &mut Cx<'_>, _: galvan_base::exit::Pio) -> Next {
            Next::Resume
        }
    }
    pub mod mmio {
        use crate::{exit::Next, guest_access::Cx};
        pub fn nested_fault(_: &mut Cx<'_>, _: galvan_base::exit::NestedFault) -> Next {
            Next::Resume
        }
    }
    pub mod apic {
        use crate::{guest_access::Cx, hv::Hv, vcpu::VcpuState};
        pub fn tick(_: &mut Cx<'_>, _: u64) {}
        pub fn deadline(_: &VcpuState, _: Hv) -> Option<u64> {
            None
        }
    }
}

pub mod calls {
    use crate::guest_access::Cx;
    use crate::hypercall::{Args, Ret};
    use galvan_dom0_proto::errno::Errno;
    macro_rules! absent { ($($m:ident $f:ident),*) => { $(pub mod $m { use super::*; pub fn $f(_: &mut Cx<'_>, _: Args) -> Ret { Err(Errno::ENOSYS) } })* } }
    absent!(event_channel event_channel_op, grant_table grant_table_op, memory memory_op, domctl domctl, sysctl sysctl);
}
