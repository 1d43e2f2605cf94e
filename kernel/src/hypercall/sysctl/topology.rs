//! Where the machine's processors sit: threads, cores and sockets, as their APIC ids tell.
//! (Intel SDM "Detecting Hardware Multi-Threading Support and Topology"; AMD APM "Multiple Core
//! Identification".)

use galvan_base::CpuId;
use galvan_base::hw::Platform;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::sysctl::*;

use super::Op;
use crate::guest_access::Cx;
use crate::hypercall::domctl::Step;

/// How an APIC id is made up: thread within a core in the lowest bits, then core within a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Topology {
    thread_bits: u32,
    /// Those of the thread included.
    socket_bits: u32,
}

impl Topology {
    pub(super) fn of(hw: &dyn Platform) -> Topology {
        let [max, ..] = hw.cpuid(0, 0);
        let [ext_max, ..] = hw.cpuid(0x8000_0000, 0);
        // Extended topology: subleaf 0 is the level of threads, 1 that of cores.
        if max >= 0xb {
            let [threads, n, ..] = hw.cpuid(0xb, 0);
            let [cores, ..] = hw.cpuid(0xb, 1);
            if n != 0 {
                let thread_bits = threads & 0x1f;
                return Topology {
                    thread_bits,
                    socket_bits: (cores & 0x1f).max(thread_bits),
                };
            }
        }
        if ext_max >= 0x8000_0008 {
            let [_, _, size, _] = hw.cpuid(0x8000_0008, 0);
            let bits = match size >> 12 & 0xf {
                0 => ceil_log2((size & 0xff) + 1),
                bits => bits,
            };
            let threads = if ext_max >= 0x8000_001e {
                let [_, ids, ..] = hw.cpuid(0x8000_001e, 0);
                (ids >> 8 & 0xff) + 1
            } else {
                1
            };
            if bits != 0 {
                return Topology {
                    thread_bits: ceil_log2(threads).min(bits),
                    socket_bits: bits,
                };
            }
        }
        // What leaf 1 says of a package with several logical processors.
        let [_, b, _, d] = hw.cpuid(1, 0);
        let logical = if d & 1 << 28 != 0 { b >> 16 & 0xff } else { 1 };
        Topology {
            thread_bits: 0,
            socket_bits: ceil_log2(logical.max(1)),
        }
    }

    pub(super) fn threads_per_core(self) -> u32 {
        1 << self.thread_bits
    }

    pub(super) fn cores_per_socket(self) -> u32 {
        1 << (self.socket_bits - self.thread_bits)
    }

    /// Core within its socket, and socket, of an APIC id.
    fn place(self, apic_id: u32) -> (u32, u32) {
        let within = apic_id & ((1 << self.socket_bits) - 1);
        (within >> self.thread_bits, apic_id >> self.socket_bits)
    }
}

fn ceil_log2(n: u32) -> u32 {
    n.max(1).next_power_of_two().trailing_zeros()
}

pub(super) fn cpus(cx: &Cx<'_>, call: &mut XenSysctl) -> Op {
    let mut c: XenSysctlCputopoinfo = call.payload();
    let n = cx.hv.hw.cpus();
    let room = c.num_cpus;
    c.num_cpus = n;
    call.set_payload(&c);
    if c.cputopo.is_null() {
        return Ok(Step::Back);
    }
    if room < n {
        return Err(Errno::ENOBUFS);
    }
    let topology = Topology::of(cx.hv.hw);
    for i in 0..n {
        let (core, socket) = topology.place(cx.hv.hw.apic_id(CpuId(i)));
        let t = XenSysctlCputopo {
            core,
            socket,
            node: 0,
        };
        cx.put_at(c.cputopo.addr(), u64::from(i), &t)?;
    }
    Ok(Step::Back)
}

#[cfg(test)]
mod tests {
    use super::*;
    use galvan_base::testing::FakeMachine;

    #[test]
    fn extended_topology_leaves_tell_threads_and_cores() {
        let m = FakeMachine::new(4);
        m.set_cpuid(0, 0, [0xb, 0, 0, 0]);
        m.set_cpuid(0xb, 0, [1, 2, 0x100, 0]);
        m.set_cpuid(0xb, 1, [4, 16, 0x201, 0]);
        let t = Topology::of(&m);
        assert_eq!((t.threads_per_core(), t.cores_per_socket()), (2, 8));
        assert_eq!(t.place(0x1b), (5, 1));
    }

    #[test]
    fn amd_core_counts_are_rounded_up_to_bits() {
        let m = FakeMachine::new(4);
        m.set_cpuid(0x8000_0000, 0, [0x8000_001e, 0, 0, 0]);
        m.set_cpuid(0x8000_0008, 0, [0, 0, 5, 0]);
        m.set_cpuid(0x8000_001e, 0, [0, 0x100, 0, 0]);
        let t = Topology::of(&m);
        assert_eq!((t.threads_per_core(), t.cores_per_socket()), (2, 4));
    }

    #[test]
    fn a_processor_that_says_nothing_is_a_socket() {
        let t = Topology::of(&FakeMachine::new(4));
        assert_eq!((t.threads_per_core(), t.cores_per_socket()), (1, 1));
        assert_eq!(t.place(3), (0, 3));
    }
}
