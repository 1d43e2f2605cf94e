//! The machine as the policy sees it: [`Machine`] implements `galvan_base::hw::Platform` over the
//! other modules of this crate, and the one [`Hypervisor`] of the machine is kept here.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use galvan_base::hw::{
    EcamWindow, Exhausted, HostIrq, HostMem, HwVcpu, IoApicInfo, Iommu, MemFault, MsiTarget, Sbdf,
    Stage2Format, TscScale, VcpuConfig,
};
use galvan_base::page::{PageSource, PhysPage};
use galvan_base::{CpuId, Mfn, Mpa, PageOrder, Platform};
use galvan_kernel::hv::{Hv, Hypervisor};
use galvan_kernel::mm::Owner;
use spin::Once;

/// The machine.
pub struct Machine;

/// The machine, as a value that lives for ever.
pub static MACHINE: Machine = Machine;

static HV: Once<Hypervisor> = Once::new();
static FACTS: Once<Facts> = Once::new();

/// What start-up has found out for good.
#[derive(Debug, Default)]
pub struct Facts {
    /// PCI functions that Galvan uses itself.
    pub private_pci: Vec<Sbdf>,
    /// Ports that Galvan uses itself.
    pub private_ports: Vec<(u16, u16)>,
    /// Device memory that no domain gets.
    pub private_mmio: Vec<(Mpa, u64)>,
    /// ACPI's reset register: port and value.
    pub reset: Option<(u16, u8)>,
}

/// Remembers what start-up has found out.
pub fn set_facts(f: Facts) {
    FACTS.call_once(|| f);
}

fn facts() -> Option<&'static Facts> {
    FACTS.get()
}

/// Makes the hypervisor known; once.
pub fn set_hypervisor(hv: Hypervisor) -> Hv {
    HV.call_once(|| hv)
}

/// The hypervisor, once it exists.
pub fn hypervisor() -> Option<Hv> {
    HV.get()
}

/// Whether frames come from the frame table.
pub fn frames_ready() -> bool {
    HV.is_completed()
}

/// A zeroed frame for the hypervisor's own page tables.
pub fn table_frame() -> Option<Mpa> {
    HV.get()?
        .frames
        .alloc_zeroed(Owner::Galvan)
        .ok()
        .map(Mfn::addr)
}

/// The domain this CPU is running, for the last words of a panic.
pub fn running() -> RunningDomain {
    let tag = HV
        .get()
        .and_then(|hv| hv.cpus.get(crate::smp::cpu_or_zero() as usize));
    RunningDomain(tag.map_or(0, |c| c.last_domain.load(Ordering::Relaxed)))
}

/// Domain id + 1, or 0 for none.
pub struct RunningDomain(u32);

impl fmt::Display for RunningDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.checked_sub(1) {
            Some(d) => write!(f, "domain {d}"),
            None => f.write_str("no domain"),
        }
    }
}

/// Resets the machine: ACPI's register, then the chipset's, then the keyboard controller, then a
/// triple fault.
pub fn reset() -> ! {
    // SAFETY: nothing is to survive.
    unsafe {
        if let Some((port, value)) = facts().and_then(|f| f.reset) {
            crate::cpu::port_out(port, 1, u32::from(value));
            crate::clock::spin_ns(50_000_000);
        }
        crate::cpu::port_out(0xcf9, 1, 0x02);
        crate::cpu::port_out(0xcf9, 1, 0x06);
        crate::clock::spin_ns(50_000_000);
        crate::cpu::port_out(0x64, 1, 0xfe);
        crate::clock::spin_ns(50_000_000);
        let none = x86_64::structures::DescriptorTablePointer {
            limit: 0,
            base: x86_64::VirtAddr::zero(),
        };
        x86_64::instructions::tables::lidt(&none);
        core::arch::asm!("ud2", options(noreturn));
    }
}

/// An interrupt of the machine arrived for a domain.
pub fn host_interrupt(irq: HostIrq) {
    if let Some(hv) = HV.get() {
        galvan_kernel::irq::host_interrupt(hv, irq);
    }
}

/// What every CPU does once it is up.
pub fn cpu_main() -> ! {
    let Some(hv) = HV.get() else {
        panic!("a CPU is released before there is a hypervisor")
    };
    crate::virt::enable();
    galvan_kernel::run::cpu_loop(hv)
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Machine")
    }
}

/// Contiguous pages for the vendor crates.
// SAFETY: frames of the table are RAM mapped write-back in the direct map; the table gives out each
// only once, and `alloc` zeroes them.
unsafe impl PageSource for Machine {
    fn alloc(&self, pages: usize) -> Option<PhysPage> {
        let order = PageOrder::new(pages.next_power_of_two().trailing_zeros())?;
        let m = HV.get()?.frames.alloc(order, Owner::Galvan).ok()?;
        for i in 0..order.frames() {
            crate::hostmem::zero(m.checked_add(i)?).ok()?;
        }
        Some(PhysPage {
            virt: NonNull::new(crate::paging::direct_ptr(m.addr()))?,
            mpa: m.addr(),
        })
    }

    fn free(&self, page: PhysPage, pages: usize) {
        let n = pages.next_power_of_two() as u64;
        if let Some(hv) = HV.get()
            && hv
                .frames
                .release(page.mpa.frame(), n, Owner::Galvan)
                .is_err()
        {
            log::error!("pages at {} given back that were not taken", page.mpa);
        }
    }
}

impl HostMem for Machine {
    fn read(&self, m: Mfn, off: usize, buf: &mut [u8]) -> Result<(), MemFault> {
        crate::hostmem::read(m, off, buf)
    }
    fn write(&self, m: Mfn, off: usize, buf: &[u8]) -> Result<(), MemFault> {
        crate::hostmem::write(m, off, buf)
    }
    fn copy(
        &self,
        dst: Mfn,
        dst_off: usize,
        src: Mfn,
        src_off: usize,
        len: usize,
    ) -> Result<(), MemFault> {
        crate::hostmem::copy(dst, dst_off, src, src_off, len)
    }
    fn zero(&self, m: Mfn) -> Result<(), MemFault> {
        crate::hostmem::zero(m)
    }
    fn load_u64(&self, m: Mfn, off: usize) -> Result<u64, MemFault> {
        crate::hostmem::load_u64(m, off)
    }
    fn store_u64(&self, m: Mfn, off: usize, v: u64) -> Result<(), MemFault> {
        crate::hostmem::store_u64(m, off, v)
    }
    fn load_u32(&self, m: Mfn, off: usize) -> Result<u32, MemFault> {
        crate::hostmem::load_u32(m, off)
    }
    fn store_u32(&self, m: Mfn, off: usize, v: u32) -> Result<(), MemFault> {
        crate::hostmem::store_u32(m, off, v)
    }
    fn cmpxchg_u64(&self, m: Mfn, off: usize, old: u64, new: u64) -> Result<u64, MemFault> {
        crate::hostmem::cmpxchg_u64(m, off, old, new)
    }
    fn cmpxchg_u32(&self, m: Mfn, off: usize, old: u32, new: u32) -> Result<u32, MemFault> {
        crate::hostmem::cmpxchg_u32(m, off, old, new)
    }
    fn or_u64(&self, m: Mfn, off: usize, bits: u64) -> Result<u64, MemFault> {
        crate::hostmem::or_u64(m, off, bits)
    }
    fn and_u64(&self, m: Mfn, off: usize, mask: u64) -> Result<u64, MemFault> {
        crate::hostmem::and_u64(m, off, mask)
    }
    fn or_u32(&self, m: Mfn, off: usize, bits: u32) -> Result<u32, MemFault> {
        crate::hostmem::or_u32(m, off, bits)
    }
    fn and_u32(&self, m: Mfn, off: usize, mask: u32) -> Result<u32, MemFault> {
        crate::hostmem::and_u32(m, off, mask)
    }
    fn swap_u8(&self, m: Mfn, off: usize, v: u8) -> Result<u8, MemFault> {
        crate::hostmem::swap_u8(m, off, v)
    }
}

/// The address of device memory, mapped if it was not.
fn device(a: Mpa, size: u8) -> *mut u8 {
    if crate::paging::is_mapped(a) {
        crate::paging::direct_ptr(a)
    } else {
        crate::paging::map_device(a, usize::from(size))
    }
}

impl Platform for Machine {
    fn cpu(&self) -> CpuId {
        crate::percpu::this().id
    }
    fn cpus(&self) -> u32 {
        crate::smp::count()
    }
    fn apic_id(&self, cpu: CpuId) -> u32 {
        crate::smp::apic_id(cpu).unwrap_or(u32::MAX)
    }
    fn kick(&self, cpu: CpuId) {
        if cpu != self.cpu()
            && let Some(id) = crate::smp::apic_id(cpu)
        {
            crate::apic::kick(id);
        }
    }
    fn notify_posted(&self, cpu: CpuId) {
        if let Some(id) = crate::smp::apic_id(cpu) {
            crate::apic::notify_posted(id);
        }
    }
    fn relax(&self) {
        core::hint::spin_loop();
    }
    fn take_interrupts(&self) {
        crate::iommu::poll();
        crate::virt::take_interrupts();
    }
    fn idle(&self, stay_awake: &dyn Fn() -> bool) {
        if crate::cpu::is_tcg() {
            // VMRUN with a virtual interrupt changes the emulator's word of pending requests without
            // its lock, which can lose a request; the local APIC makes it again when asked.
            crate::apic::look_again();
        }
        crate::iommu::poll();
        crate::virt::idle(stay_awake);
    }

    fn tsc(&self) -> u64 {
        crate::cpu::rdtsc()
    }
    fn tsc_khz(&self) -> u64 {
        crate::clock::tsc_khz()
    }
    fn tsc_scale(&self) -> TscScale {
        crate::clock::scale()
    }
    fn tsc_base(&self) -> u64 {
        crate::clock::tsc_base()
    }
    fn tsc_stable(&self) -> bool {
        crate::clock::stable()
    }
    fn wallclock_base(&self) -> (u64, u32) {
        (crate::clock::wallclock_base(), 0)
    }
    fn set_timer(&self, deadline_ns: Option<u64>) {
        let armed = &crate::percpu::this().timer_armed;
        let wanted = deadline_ns.unwrap_or(u64::MAX);
        if armed.swap(wanted, Ordering::Relaxed) == wanted {
            return;
        }
        match deadline_ns {
            None => crate::apic::stop_timer(),
            Some(at) => {
                let now = self.now_ns();
                let tsc = self
                    .tsc_base()
                    .saturating_add(self.tsc_scale().ns_to_ticks(at));
                crate::apic::arm_timer(at.saturating_sub(now), tsc);
            }
        }
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        crate::cpu::cpuid(leaf, subleaf)
    }
    fn stage2(&self) -> (Stage2Format, PageOrder) {
        crate::virt::stage2()
    }
    fn apic_access_page(&self) -> Option<Mfn> {
        crate::virt::apic_access_page()
    }
    fn new_vcpu(&self, cfg: &VcpuConfig) -> Result<Box<dyn HwVcpu>, Exhausted> {
        crate::virt::new_vcpu(cfg)
    }
    fn hwdom_ports(&self, first: u16, last: u16, direct: bool) {
        crate::virt::hwdom_ports(first, last, direct);
    }

    fn port_in(&self, port: u16, size: u8) -> u32 {
        // SAFETY: the policy forwards only ports that the hardware domain may use.
        unsafe { crate::cpu::port_in(port, size) }
    }
    fn port_out(&self, port: u16, size: u8, v: u32) {
        // SAFETY: as above.
        unsafe { crate::cpu::port_out(port, size, v) }
    }
    fn mmio_read(&self, a: Mpa, size: u8) -> u64 {
        let p = device(a, size);
        // SAFETY: mapped above; naturally aligned by contract. The policy passes only addresses
        // that are device memory of the hardware domain.
        unsafe {
            match size {
                1 => u64::from(p.read_volatile()),
                2 => u64::from(p.cast::<u16>().read_volatile()),
                4 => u64::from(p.cast::<u32>().read_volatile()),
                _ => p.cast::<u64>().read_volatile(),
            }
        }
    }
    fn mmio_write(&self, a: Mpa, size: u8, v: u64) {
        let p = device(a, size);
        // SAFETY: as in `mmio_read`.
        unsafe {
            match size {
                1 => p.write_volatile(v as u8),
                2 => p.cast::<u16>().write_volatile(v as u16),
                4 => p.cast::<u32>().write_volatile(v as u32),
                _ => p.cast::<u64>().write_volatile(v),
            }
        }
    }
    fn pci_read(&self, dev: Sbdf, reg: u16, size: u8) -> u32 {
        crate::pci::read(dev, reg, size)
    }
    fn pci_write(&self, dev: Sbdf, reg: u16, size: u8, v: u32) {
        crate::pci::write(dev, reg, size, v)
    }
    fn ecam(&self) -> &[EcamWindow] {
        crate::pci::windows()
    }
    fn private_pci(&self) -> &[Sbdf] {
        facts().map_or(&[], |f| &f.private_pci)
    }
    fn private_ports(&self) -> &[(u16, u16)] {
        facts().map_or(&[], |f| &f.private_ports)
    }
    fn private_mmio(&self) -> &[(Mpa, u64)] {
        facts().map_or(&[], |f| &f.private_mmio)
    }

    fn ioapics(&self) -> &[IoApicInfo] {
        crate::irq::ioapics()
    }
    fn gsi_bind(
        &self,
        gsi: u32,
        level: bool,
        active_low: bool,
        cpu: CpuId,
    ) -> Result<(), Exhausted> {
        crate::irq::gsi_bind(gsi, level, active_low, cpu)
    }
    fn gsi_unbind(&self, gsi: u32) {
        crate::irq::gsi_unbind(gsi)
    }
    fn gsi_eoi(&self, gsi: u32) {
        crate::irq::gsi_eoi(gsi)
    }
    fn msi_alloc(&self, cpu: CpuId) -> Result<MsiTarget, Exhausted> {
        crate::irq::msi_alloc(cpu)
    }
    fn msi_free(&self, index: u32) {
        crate::irq::msi_free(index)
    }
    fn iommu(&self) -> Option<&dyn Iommu> {
        crate::iommu::get()
    }

    fn console_write(&self, text: &[u8]) {
        crate::serial::write(text)
    }
    fn console_read(&self) -> Option<u8> {
        crate::serial::read()
    }
    fn reset(&self) -> ! {
        reset()
    }
    fn power_off(&self) -> ! {
        // dom0 owns ACPI and switches the machine off itself; what comes here is its halt.
        log::info!("the machine is halted");
        crate::apic::stop_others();
        crate::cpu::halt_forever()
    }
}
