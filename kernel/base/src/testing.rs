//! A machine that lives in a host process: the fakes behind which policy is tested.
//!
//! [`FakeMachine`] is a [`Platform`], [`FakeVcpu`] an [`HwVcpu`] and [`FakeIommu`] an [`Iommu`]. They
//! behave like well-made hardware and remember what was done to them: every piece of state can be
//! set and inspected by a test through `&self`, so a machine can be shared by threads that stand for
//! CPUs. Calls that break the contract of a trait panic, since the caller is the code under test.
//!
//! [`HostPages`] is where the vendor crates' tests have the pages from that a processor would read.

use std::boxed::Box;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::string::String;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::thread::ThreadId;
use std::vec::Vec;

use crate::exit::Exit;
use crate::hw::{
    Access, EcamWindow, Exhausted, HostMem, HwVcpu, IoApicInfo, Iommu, Lent, MemFault, MsiTarget,
    Posting, Sbdf, Shown, Stage2Format, TscScale, VcpuConfig, VirtualApic, Window,
};
use crate::state::{ArchState, Event, Gprs, RFLAGS_IF, RFLAGS_RF, RFLAGS_TF, Seg, Segment};
use crate::{CpuId, Dfn, Mfn, Mpa, PAGE_SIZE, PageOrder, Platform};

pub use crate::page::host::HostPages;

/// [`Platform::apic_access_page`] of a fake that has one.
pub const APIC_ACCESS_PAGE: Mfn = Mfn::new_truncate(0xab_cdef);
/// What [`Platform::reset`] of the fake panics with.
pub const RESET: &str = "the fake machine was reset";
/// What [`Platform::power_off`] of the fake panics with.
pub const POWER_OFF: &str = "the fake machine was powered off";

const WORDS: usize = PAGE_SIZE / 8;

/// One frame of memory.
struct Page([AtomicU64; WORDS]);

impl Page {
    fn new() -> Self {
        Page([const { AtomicU64::new(0) }; WORDS])
    }

    /// Applies `f` to each 8-byte word that `off..off + len` touches, with the mask of the bytes
    /// touched and the position of the word's first byte relative to `off`.
    fn words(&self, off: usize, len: usize, mut f: impl FnMut(&AtomicU64, u64, isize)) {
        let mut at = off & !7;
        while at < off + len {
            let from = off.max(at) - at;
            let to = (off + len).min(at + 8) - at;
            let ones = if to - from == 8 {
                !0
            } else {
                ((1u64 << ((to - from) * 8)) - 1) << (from * 8)
            };
            f(&self.0[at / 8], ones, at as isize - off as isize);
            at += 8;
        }
    }

    fn read(&self, off: usize, buf: &mut [u8]) {
        self.words(off, buf.len(), |w, mask, pos| {
            let bytes = w.load(Ordering::Acquire).to_le_bytes();
            for (i, b) in bytes.iter().enumerate() {
                if mask >> (i * 8) & 1 != 0 {
                    buf[(pos + i as isize) as usize] = *b;
                }
            }
        });
    }

    fn write(&self, off: usize, buf: &[u8]) {
        self.words(off, buf.len(), |w, mask, pos| {
            let mut v = 0;
            for i in 0..8 {
                if mask >> (i * 8) & 1 != 0 {
                    v |= u64::from(buf[(pos + i as isize) as usize]) << (i * 8);
                }
            }
            update(w, |old| old & !mask | v);
        });
    }
}

fn update(w: &AtomicU64, f: impl Fn(u64) -> u64) -> u64 {
    match w.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |v| Some(f(v))) {
        Ok(v) | Err(v) => v,
    }
}

/// One access to the machine beneath, in the order made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineAccess {
    /// A port was read: port, size.
    PortIn(u16, u8),
    /// A port was written: port, size, value.
    PortOut(u16, u8, u32),
    /// Device memory was read: address, size.
    MmioRead(Mpa, u8),
    /// Device memory was written: address, size, value.
    MmioWrite(Mpa, u8, u64),
    /// Configuration space was written: function, register, size, value.
    PciWrite(Sbdf, u16, u8, u32),
}

/// How a pin of an IO-APIC is routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GsiRoute {
    /// Level-triggered.
    pub level: bool,
    /// Active low.
    pub active_low: bool,
    /// Where it arrives.
    pub cpu: CpuId,
    /// How often [`Platform::gsi_eoi`] was called since it was bound.
    pub eois: u32,
}

#[derive(Clone)]
struct PciFunction {
    value: Vec<u8>,
    writable: Vec<u8>,
}

type Hook = Arc<dyn Fn(&FakeMachine) + Send + Sync>;
/// What [`FakeMachine::on_store`] calls.
pub type StoreHook = Arc<dyn Fn(&FakeMachine, Mfn) + Send + Sync>;

#[derive(Default)]
struct Inner {
    cpu_of: HashMap<ThreadId, u32>,
    kicks: Vec<CpuId>,
    timers: BTreeMap<u32, u64>,
    cpuid: BTreeMap<(u32, u32), [u32; 4]>,
    ports: BTreeMap<u16, u8>,
    mmio: BTreeMap<u64, u8>,
    pci: BTreeMap<Sbdf, PciFunction>,
    accesses: Vec<MachineAccess>,
    /// By port number; empty while there are none.
    direct_ports: Vec<bool>,
    gsis: BTreeMap<u32, GsiRoute>,
    msis: BTreeMap<u32, CpuId>,
    console_out: Vec<u8>,
    console_in: VecDeque<u8>,
    vcpus: Vec<FakeVcpu>,
    wallclock: (u64, u32),
    on_interrupts: Option<Hook>,
    on_idle: Option<Hook>,
    on_relax: Option<Hook>,
    on_store: Option<StoreHook>,
    interrupt_windows: u64,
    idles: u64,
}

/// What the end of a machine unwinds with, if it is to end quietly ([`FakeMachine::end_quietly`]).
#[derive(Clone, Copy, Debug)]
pub struct MachineEnd;

/// A machine in a host process. Build it with [`FakeMachine::new`] and the `with_` methods, then
/// share it.
pub struct FakeMachine {
    ram: Vec<Range<u64>>,
    pages: RwLock<HashMap<u64, Arc<Page>>>,
    cpus: u32,
    tsc: AtomicU64,
    tsc_khz: u64,
    tsc_stable: bool,
    stage2: (Stage2Format, PageOrder),
    ecam: Vec<EcamWindow>,
    ioapics: Vec<IoApicInfo>,
    msi_limit: u32,
    iommu: FakeIommu,
    iommu_in_use: AtomicBool,
    stores_watched: AtomicBool,
    quiet_end: AtomicBool,
    virtual_apic: VirtualApic,
    shows_apic: bool,
    inner: Mutex<Inner>,
}

impl fmt::Debug for FakeMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeMachine")
            .field("ram", &self.ram)
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}

impl FakeMachine {
    /// A machine with `ram_mib` MiB of zeroed RAM from address 0, one CPU, a 1 GHz clock that stands
    /// at 0, one IO-APIC of 24 pins, no PCI functions, NPT with 1 GiB pages, and no IOMMU in use.
    pub fn new(ram_mib: u64) -> Self {
        Self::with_ram(core::iter::once(0..ram_mib << 8).collect())
    }

    /// Like [`FakeMachine::new`], with RAM in these ranges of frame numbers.
    pub fn with_ram(ram: Vec<Range<u64>>) -> Self {
        FakeMachine {
            ram,
            pages: RwLock::default(),
            cpus: 1,
            tsc: AtomicU64::new(0),
            tsc_khz: 1_000_000,
            tsc_stable: true,
            stage2: (Stage2Format::Npt, PageOrder::P1G),
            ecam: Vec::new(),
            ioapics: std::vec![IoApicInfo {
                id: 0,
                base: Mpa::new_truncate(0xfec0_0000),
                gsi_base: 0,
                pins: 24,
            }],
            msi_limit: u32::MAX,
            iommu: FakeIommu::default(),
            iommu_in_use: AtomicBool::new(false),
            stores_watched: AtomicBool::new(false),
            quiet_end: AtomicBool::new(false),
            virtual_apic: VirtualApic::None,
            shows_apic: false,
            inner: Mutex::default(),
        }
    }

    /// With so many CPUs.
    pub fn with_cpus(mut self, n: u32) -> Self {
        self.cpus = n;
        self
    }
    /// With processors that do this for their guests' local APICs.
    pub fn with_virtual_apic(mut self, what: VirtualApic) -> Self {
        self.virtual_apic = what;
        self
    }
    /// With processors that answer accesses to their guests' local APICs in xAPIC mode.
    pub fn with_shown_apic(mut self) -> Self {
        self.shows_apic = true;
        self
    }
    /// With a clock of this frequency.
    pub fn with_tsc(mut self, khz: u64, stable: bool) -> Self {
        self.tsc_khz = khz;
        self.tsc_stable = stable;
        self
    }
    /// With this format of second-stage tables.
    pub fn with_stage2(mut self, format: Stage2Format, max: PageOrder) -> Self {
        self.stage2 = (format, max);
        self
    }
    /// With these memory-mapped configuration windows.
    pub fn with_ecam(mut self, windows: Vec<EcamWindow>) -> Self {
        self.ecam = windows;
        self
    }
    /// With these IO-APICs, by ascending GSI base.
    pub fn with_ioapics(mut self, ioapics: Vec<IoApicInfo>) -> Self {
        self.ioapics = ioapics;
        self
    }
    /// With so many message-signalled interrupts at most.
    pub fn with_msi_limit(mut self, n: u32) -> Self {
        self.msi_limit = n;
        self
    }
    /// With the IOMMU in use.
    pub fn with_iommu(self) -> Self {
        self.iommu_in_use.store(true, Ordering::SeqCst);
        self
    }

    /// Has its reset and power-off unwind with a [`MachineEnd`], which no panic hook sees, instead of
    /// panicking.
    pub fn end_quietly(&self) {
        self.quiet_end.store(true, Ordering::SeqCst);
    }

    fn end(&self, how: &'static str) -> ! {
        if self.quiet_end.load(Ordering::SeqCst) {
            std::panic::resume_unwind(Box::new(MachineEnd));
        }
        panic!("{how}");
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A test that panicked on purpose must not hide what it left behind.
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    // --- memory ---

    /// Whether the frame is RAM.
    pub fn is_ram(&self, m: Mfn) -> bool {
        self.ram.iter().any(|r| r.contains(&m.get()))
    }
    /// The ranges of frame numbers that are RAM.
    pub fn ram(&self) -> &[Range<u64>] {
        &self.ram
    }
    /// Fills a frame with one byte, as a tenant before might have left it.
    pub fn fill(&self, m: Mfn, byte: u8) {
        self.write(m, 0, &[byte; PAGE_SIZE])
            .expect("the frame is RAM");
    }
    /// Whether every byte of a frame is zero.
    pub fn is_zero(&self, m: Mfn) -> bool {
        self.if_present(m)
            .is_none_or(|p| p.0.iter().all(|w| w.load(Ordering::Acquire) == 0))
    }

    /// Calls `f` with the frame after each `store_u64` and `cmpxchg_u64`: what another CPU or a
    /// device could see at that moment. `None` ends it.
    pub fn on_store(&self, f: Option<StoreHook>) {
        self.stores_watched.store(f.is_some(), Ordering::SeqCst);
        self.inner().on_store = f;
    }

    fn stored(&self, m: Mfn) {
        if self.stores_watched.load(Ordering::SeqCst) {
            let hook = self.inner().on_store.clone();
            if let Some(hook) = hook {
                hook(self, m);
            }
        }
    }

    fn if_present(&self, m: Mfn) -> Option<Arc<Page>> {
        let pages = self.pages.read().unwrap_or_else(|e| e.into_inner());
        pages.get(&m.get()).cloned()
    }

    fn check(&self, m: Mfn, off: usize, len: usize, align: usize) -> Result<(), MemFault> {
        crate::sync::step();
        let inside = off.checked_add(len).is_some_and(|end| end <= PAGE_SIZE);
        if inside && off.is_multiple_of(align) && self.is_ram(m) {
            Ok(())
        } else {
            Err(MemFault)
        }
    }

    fn page(&self, m: Mfn) -> Arc<Page> {
        if let Some(p) = self.if_present(m) {
            return p;
        }
        let mut pages = self.pages.write().unwrap_or_else(|e| e.into_inner());
        pages
            .entry(m.get())
            .or_insert_with(|| Arc::new(Page::new()))
            .clone()
    }

    fn update64(&self, m: Mfn, off: usize, f: impl Fn(u64) -> u64) -> Result<u64, MemFault> {
        self.check(m, off, 8, 8)?;
        Ok(update(&self.page(m).0[off / 8], f))
    }

    fn update32(&self, m: Mfn, off: usize, f: impl Fn(u32) -> u32) -> Result<u32, MemFault> {
        self.check(m, off, 4, 4)?;
        let shift = (off & 4) * 8;
        let old = update(&self.page(m).0[off / 8], |v| {
            let new = u64::from(f((v >> shift) as u32));
            v & !(0xffff_ffff << shift) | new << shift
        });
        Ok((old >> shift) as u32)
    }

    // --- CPUs, interrupts and time ---

    /// Makes the calling thread stand for `cpu`; threads stand for CPU 0 otherwise.
    pub fn set_cpu(&self, cpu: CpuId) {
        assert!(cpu.0 < self.cpus, "{cpu:?} of {}", self.cpus);
        self.inner()
            .cpu_of
            .insert(std::thread::current().id(), cpu.0);
    }
    /// Takes the list of CPUs that were kicked, in order.
    pub fn take_kicks(&self) -> Vec<CpuId> {
        core::mem::take(&mut self.inner().kicks)
    }
    /// The time for which `cpu` has a timer interrupt requested.
    pub fn timer(&self, cpu: CpuId) -> Option<u64> {
        self.inner().timers.get(&cpu.0).copied()
    }
    /// Sets the clock; nanoseconds since the hypervisor started.
    pub fn set_now_ns(&self, ns: u64) {
        self.tsc
            .store(self.tsc_scale().ns_to_ticks(ns), Ordering::SeqCst);
    }
    /// Moves the clock on.
    pub fn advance_ns(&self, ns: u64) {
        self.tsc
            .fetch_add(self.tsc_scale().ns_to_ticks(ns), Ordering::SeqCst);
    }
    /// Sets what [`Platform::wallclock_base`] gives.
    pub fn set_wallclock(&self, seconds: u64, ns: u32) {
        self.inner().wallclock = (seconds, ns);
    }
    /// Called inside every [`Platform::take_interrupts`] and [`Platform::idle`]: physical interrupts
    /// arrive here.
    pub fn on_interrupts(&self, f: impl Fn(&FakeMachine) + Send + Sync + 'static) {
        self.inner().on_interrupts = Some(Arc::new(f));
    }
    /// Called inside every [`Platform::idle`] that waits, after the clock has moved to the CPU's
    /// timer.
    pub fn on_idle(&self, f: impl Fn(&FakeMachine) + Send + Sync + 'static) {
        self.inner().on_idle = Some(Arc::new(f));
    }
    /// Called by every [`Platform::relax`]: what other CPUs do while this one spins.
    pub fn on_relax(&self, f: impl Fn(&FakeMachine) + Send + Sync + 'static) {
        self.inner().on_relax = Some(Arc::new(f));
    }
    /// How often interrupts were let in by [`Platform::take_interrupts`].
    pub fn interrupt_windows(&self) -> u64 {
        self.inner().interrupt_windows
    }
    /// How often a CPU waited in [`Platform::idle`].
    pub fn idles(&self) -> u64 {
        self.inner().idles
    }

    fn run_hook(&self, pick: impl Fn(&Inner) -> Option<Hook>) {
        let hook = pick(&self.inner());
        if let Some(hook) = hook {
            hook(self);
        }
    }

    // --- processor ---

    /// Sets the answer of CPUID for a leaf and subleaf; all others are zeroes.
    pub fn set_cpuid(&self, leaf: u32, subleaf: u32, v: [u32; 4]) {
        self.inner().cpuid.insert((leaf, subleaf), v);
    }
    /// The virtual processors made so far, in order. Each is the same processor that the kernel got.
    pub fn vcpus(&self) -> Vec<FakeVcpu> {
        self.inner().vcpus.clone()
    }
    /// Whether the hardware domain may use a port directly.
    pub fn port_is_direct(&self, port: u16) -> bool {
        self.inner().direct_ports.get(usize::from(port)) == Some(&true)
    }

    // --- devices ---

    /// Sets what a read of `size` bytes at a port gives.
    pub fn set_port(&self, port: u16, size: u8, v: u32) {
        let mut inner = self.inner();
        for (i, b) in v.to_le_bytes().iter().take(size.into()).enumerate() {
            inner.ports.insert(port.wrapping_add(i as u16), *b);
        }
    }
    /// Sets the value of device memory; what is not set reads as ones.
    pub fn set_mmio(&self, a: Mpa, size: u8, v: u64) {
        let mut inner = self.inner();
        for (i, b) in v.to_le_bytes().iter().take(size.into()).enumerate() {
            inner.mmio.insert(a.get() + i as u64, *b);
        }
    }
    /// Takes the list of accesses to ports, device memory and configuration space.
    pub fn take_accesses(&self) -> Vec<MachineAccess> {
        core::mem::take(&mut self.inner().accesses)
    }
    /// Adds a PCI function with 4 KiB of configuration space that starts with `config` and is
    /// writable throughout except in its first 4 bytes and its header type.
    pub fn add_pci(&self, dev: Sbdf, config: &[u8]) {
        let mut value = std::vec![0; PAGE_SIZE];
        value[..config.len()].copy_from_slice(config);
        let mut writable = std::vec![0xff; PAGE_SIZE];
        for i in [0, 1, 2, 3, 8, 9, 10, 11, 14] {
            writable[i] = 0;
        }
        self.inner()
            .pci
            .insert(dev, PciFunction { value, writable });
    }
    /// Sets a register of a function, whatever is writable in it.
    pub fn set_pci(&self, dev: Sbdf, reg: u16, size: u8, v: u32) {
        let mut inner = self.inner();
        let f = inner.pci.get_mut(&dev).expect("a function added before");
        let at = usize::from(reg);
        f.value[at..at + usize::from(size)].copy_from_slice(&v.to_le_bytes()[..size.into()]);
    }
    /// Sets which bits of a register software can change.
    pub fn set_pci_writable(&self, dev: Sbdf, reg: u16, size: u8, mask: u32) {
        let mut inner = self.inner();
        let f = inner.pci.get_mut(&dev).expect("a function added before");
        let at = usize::from(reg);
        f.writable[at..at + usize::from(size)].copy_from_slice(&mask.to_le_bytes()[..size.into()]);
    }
    /// Makes base address register `index` a BAR of `size` bytes, a power of two, with these low
    /// `flags` (bit 0 I/O, bits 1-2 type, bit 3 prefetchable). A 64-bit one takes `index + 1` too.
    pub fn set_pci_bar(&self, dev: Sbdf, index: u16, base: u64, size: u64, flags: u32) {
        let reg = 0x10 + index * 4;
        let mask = !(size - 1);
        self.set_pci(dev, reg, 4, base as u32 | flags);
        self.set_pci_writable(dev, reg, 4, mask as u32 & !0xf);
        if flags & 7 == 4 {
            self.set_pci(dev, reg + 4, 4, (base >> 32) as u32);
            self.set_pci_writable(dev, reg + 4, 4, (mask >> 32) as u32);
        }
    }
    /// How a GSI is routed, if it is bound.
    pub fn gsi(&self, gsi: u32) -> Option<GsiRoute> {
        self.inner().gsis.get(&gsi).copied()
    }
    /// The message-signalled interrupts in use, with the CPU on which each arrives.
    pub fn msis(&self) -> BTreeMap<u32, CpuId> {
        self.inner().msis.clone()
    }
    /// The IOMMU, in use or not.
    pub fn fake_iommu(&self) -> &FakeIommu {
        &self.iommu
    }
    /// What was written to the physical console.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.inner().console_out).into_owned()
    }
    /// Types on the physical console.
    pub fn type_console(&self, text: &[u8]) {
        self.inner().console_in.extend(text);
    }
}

impl HostMem for FakeMachine {
    fn read(&self, m: Mfn, off: usize, buf: &mut [u8]) -> Result<(), MemFault> {
        self.check(m, off, buf.len(), 1)?;
        match self.if_present(m) {
            Some(p) => p.read(off, buf),
            None => buf.fill(0),
        }
        Ok(())
    }

    fn write(&self, m: Mfn, off: usize, buf: &[u8]) -> Result<(), MemFault> {
        self.check(m, off, buf.len(), 1)?;
        self.page(m).write(off, buf);
        Ok(())
    }

    fn copy(
        &self,
        dst: Mfn,
        dst_off: usize,
        src: Mfn,
        src_off: usize,
        len: usize,
    ) -> Result<(), MemFault> {
        self.check(dst, dst_off, len, 1)?;
        self.check(src, src_off, len, 1)?;
        let mut buf = std::vec![0; len];
        self.read(src, src_off, &mut buf)?;
        self.write(dst, dst_off, &buf)
    }

    fn zero(&self, m: Mfn) -> Result<(), MemFault> {
        self.check(m, 0, PAGE_SIZE, 1)?;
        if let Some(p) = self.if_present(m) {
            p.0.iter().for_each(|w| w.store(0, Ordering::Release));
        }
        Ok(())
    }

    fn load_u64(&self, m: Mfn, off: usize) -> Result<u64, MemFault> {
        self.check(m, off, 8, 8)?;
        Ok(self
            .if_present(m)
            .map_or(0, |p| p.0[off / 8].load(Ordering::Acquire)))
    }

    fn store_u64(&self, m: Mfn, off: usize, v: u64) -> Result<(), MemFault> {
        self.check(m, off, 8, 8)?;
        self.page(m).0[off / 8].store(v, Ordering::Release);
        self.stored(m);
        Ok(())
    }

    fn load_u32(&self, m: Mfn, off: usize) -> Result<u32, MemFault> {
        self.check(m, off, 4, 4)?;
        Ok((self.load_u64(m, off & !7)? >> ((off & 4) * 8)) as u32)
    }

    fn store_u32(&self, m: Mfn, off: usize, v: u32) -> Result<(), MemFault> {
        self.update32(m, off, |_| v).map(|_| ())
    }

    fn cmpxchg_u64(&self, m: Mfn, off: usize, old: u64, new: u64) -> Result<u64, MemFault> {
        let found = self.update64(m, off, |v| if v == old { new } else { v })?;
        self.stored(m);
        Ok(found)
    }

    fn cmpxchg_u32(&self, m: Mfn, off: usize, old: u32, new: u32) -> Result<u32, MemFault> {
        self.update32(m, off, |v| if v == old { new } else { v })
    }

    fn or_u64(&self, m: Mfn, off: usize, bits: u64) -> Result<u64, MemFault> {
        self.update64(m, off, |v| v | bits)
    }

    fn and_u64(&self, m: Mfn, off: usize, mask: u64) -> Result<u64, MemFault> {
        self.update64(m, off, |v| v & mask)
    }

    fn or_u32(&self, m: Mfn, off: usize, bits: u32) -> Result<u32, MemFault> {
        self.update32(m, off, |v| v | bits)
    }

    fn and_u32(&self, m: Mfn, off: usize, mask: u32) -> Result<u32, MemFault> {
        self.update32(m, off, |v| v & mask)
    }

    fn swap_u8(&self, m: Mfn, off: usize, v: u8) -> Result<u8, MemFault> {
        self.check(m, off, 1, 1)?;
        let shift = (off & 7) * 8;
        let old = self.update64(m, off & !7, |w| {
            w & !(0xff << shift) | u64::from(v) << shift
        })?;
        Ok((old >> shift) as u8)
    }
}

impl Platform for FakeMachine {
    fn cpu(&self) -> CpuId {
        let id = std::thread::current().id();
        CpuId(self.inner().cpu_of.get(&id).copied().unwrap_or(0))
    }

    fn cpus(&self) -> u32 {
        self.cpus
    }

    /// Not the CPU's number, so that taking one for the other shows.
    fn apic_id(&self, cpu: CpuId) -> u32 {
        cpu.0 * 2
    }

    fn kick(&self, cpu: CpuId) {
        if cpu != self.cpu() {
            self.inner().kicks.push(cpu);
        }
    }

    fn relax(&self) {
        crate::sync::step();
        self.run_hook(|i| i.on_relax.clone());
        std::thread::yield_now();
    }

    fn take_interrupts(&self) {
        self.inner().interrupt_windows += 1;
        self.run_hook(|i| i.on_interrupts.clone());
    }

    fn idle(&self, stay_awake: &dyn Fn() -> bool) {
        if stay_awake() {
            return;
        }
        let cpu = self.cpu();
        let deadline = {
            let mut inner = self.inner();
            inner.idles += 1;
            inner.timers.remove(&cpu.0)
        };
        if let Some(t) = deadline.filter(|t| *t > self.now_ns()) {
            self.set_now_ns(t);
        }
        self.run_hook(|i| i.on_idle.clone());
        self.run_hook(|i| i.on_interrupts.clone());
    }

    fn tsc(&self) -> u64 {
        self.tsc.load(Ordering::SeqCst)
    }

    fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    fn tsc_scale(&self) -> TscScale {
        TscScale::from_khz(self.tsc_khz)
    }

    fn tsc_base(&self) -> u64 {
        0
    }

    fn tsc_stable(&self) -> bool {
        self.tsc_stable
    }

    fn wallclock_base(&self) -> (u64, u32) {
        self.inner().wallclock
    }

    fn set_timer(&self, deadline_ns: Option<u64>) {
        let cpu = self.cpu();
        let mut inner = self.inner();
        match deadline_ns {
            Some(t) => inner.timers.insert(cpu.0, t),
            None => inner.timers.remove(&cpu.0),
        };
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.inner()
            .cpuid
            .get(&(leaf, subleaf))
            .copied()
            .unwrap_or_default()
    }

    fn stage2(&self) -> (Stage2Format, PageOrder) {
        self.stage2
    }

    fn apic_access_page(&self) -> Option<Mfn> {
        self.shows_apic.then_some(APIC_ACCESS_PAGE)
    }

    fn new_vcpu(&self, cfg: &VcpuConfig) -> Result<Box<dyn HwVcpu>, Exhausted> {
        let v = FakeVcpu::new(*cfg);
        v.inner().virtual_apic = self.virtual_apic;
        v.inner().shows_apic = self.shows_apic;
        self.inner().vcpus.push(v.clone());
        Ok(Box::new(v))
    }

    fn hwdom_ports(&self, first: u16, last: u16, direct: bool) {
        let mut inner = self.inner();
        inner.direct_ports.resize(0x1_0000, false);
        inner.direct_ports[first.into()..=last.into()].fill(direct);
    }

    fn port_in(&self, port: u16, size: u8) -> u32 {
        assert!(matches!(size, 1 | 2 | 4), "port access of {size} bytes");
        let mut inner = self.inner();
        inner.accesses.push(MachineAccess::PortIn(port, size));
        (0..u16::from(size)).fold(0, |v, i| {
            let b = inner.ports.get(&port.wrapping_add(i)).unwrap_or(&0xff);
            v | u32::from(*b) << (i * 8)
        })
    }

    fn port_out(&self, port: u16, size: u8, v: u32) {
        assert!(matches!(size, 1 | 2 | 4), "port access of {size} bytes");
        self.inner()
            .accesses
            .push(MachineAccess::PortOut(port, size, v));
    }

    fn mmio_read(&self, a: Mpa, size: u8) -> u64 {
        assert!(
            matches!(size, 1 | 2 | 4 | 8) && a.get().is_multiple_of(size.into()),
            "device memory access of {size} bytes at {a:?}"
        );
        let mut inner = self.inner();
        inner.accesses.push(MachineAccess::MmioRead(a, size));
        (0..u64::from(size)).fold(0, |v, i| {
            let b = inner.mmio.get(&(a.get() + i)).unwrap_or(&0xff);
            v | u64::from(*b) << (i * 8)
        })
    }

    fn mmio_write(&self, a: Mpa, size: u8, v: u64) {
        assert!(
            matches!(size, 1 | 2 | 4 | 8) && a.get().is_multiple_of(size.into()),
            "device memory access of {size} bytes at {a:?}"
        );
        self.set_mmio(a, size, v);
        self.inner()
            .accesses
            .push(MachineAccess::MmioWrite(a, size, v));
    }

    fn pci_read(&self, dev: Sbdf, reg: u16, size: u8) -> u32 {
        assert!(
            matches!(size, 1 | 2 | 4) && reg.is_multiple_of(size.into()) && reg < 4096,
            "configuration access of {size} bytes at {reg:#x}"
        );
        let inner = self.inner();
        let Some(f) = inner.pci.get(&dev) else {
            return ((1u64 << (u32::from(size) * 8)) - 1) as u32;
        };
        (0..usize::from(size)).fold(0, |v, i| {
            v | u32::from(f.value[usize::from(reg) + i]) << (i * 8)
        })
    }

    fn pci_write(&self, dev: Sbdf, reg: u16, size: u8, v: u32) {
        assert!(
            matches!(size, 1 | 2 | 4) && reg.is_multiple_of(size.into()) && reg < 4096,
            "configuration access of {size} bytes at {reg:#x}"
        );
        let mut inner = self.inner();
        inner
            .accesses
            .push(MachineAccess::PciWrite(dev, reg, size, v));
        if let Some(f) = inner.pci.get_mut(&dev) {
            for (i, b) in v.to_le_bytes().iter().take(size.into()).enumerate() {
                let at = usize::from(reg) + i;
                let mask = f.writable[at];
                f.value[at] = f.value[at] & !mask | b & mask;
            }
        }
    }

    fn ecam(&self) -> &[EcamWindow] {
        &self.ecam
    }

    fn ioapics(&self) -> &[IoApicInfo] {
        &self.ioapics
    }

    fn gsi_bind(
        &self,
        gsi: u32,
        level: bool,
        active_low: bool,
        cpu: CpuId,
    ) -> Result<(), Exhausted> {
        let exists = |i: &IoApicInfo| (i.gsi_base..i.gsi_base + i.pins).contains(&gsi);
        if !self.ioapics.iter().any(exists) {
            return Err(Exhausted);
        }
        let route = GsiRoute {
            level,
            active_low,
            cpu,
            eois: 0,
        };
        self.inner().gsis.insert(gsi, route);
        Ok(())
    }

    fn gsi_unbind(&self, gsi: u32) {
        self.inner().gsis.remove(&gsi);
    }

    fn gsi_eoi(&self, gsi: u32) {
        if let Some(r) = self.inner().gsis.get_mut(&gsi) {
            r.eois += 1;
        }
    }

    fn msi_alloc(&self, cpu: CpuId) -> Result<MsiTarget, Exhausted> {
        let dest = self.apic_id(cpu);
        let mut inner = self.inner();
        let index = (0..self.msi_limit)
            .find(|i| !inner.msis.contains_key(i))
            .ok_or(Exhausted)?;
        inner.msis.insert(index, cpu);
        Ok(MsiTarget {
            index,
            address: 0xfee0_0000 | u64::from(dest) << 12,
            data: 0x30 + index,
        })
    }

    fn msi_free(&self, index: u32) {
        let had = self.inner().msis.remove(&index);
        assert!(
            had.is_some(),
            "message-signalled interrupt {index} freed twice"
        );
    }

    fn iommu(&self) -> Option<&dyn Iommu> {
        self.iommu_in_use
            .load(Ordering::SeqCst)
            .then_some(&self.iommu as &dyn Iommu)
    }

    fn console_write(&self, text: &[u8]) {
        self.inner().console_out.extend_from_slice(text);
    }

    fn console_read(&self) -> Option<u8> {
        self.inner().console_in.pop_front()
    }

    fn reset(&self) -> ! {
        self.end(RESET)
    }

    fn power_off(&self) -> ! {
        self.end(POWER_OFF)
    }
}

/// What the guest of a [`FakeVcpu`] does in one stay in guest mode.
type Step = Box<dyn FnOnce(&FakeVcpu, &mut Gprs) -> Exit + Send>;

struct VcpuInner {
    state: ArchState,
    script: VecDeque<Step>,
    loaded: bool,
    entries: u64,
    waiting: Option<Event>,
    delivered: Vec<Event>,
    window: Window,
    virtual_apic: VirtualApic,
    posting: Arc<FakePosting>,
    lent: Option<Lent>,
    shows_apic: bool,
    shown: Option<VirtualApic>,
    page: BTreeMap<u16, u32>,
    tpr: u8,
    tsc_offset: u64,
    flush_pending: bool,
    flushes: u64,
    xcr0: u64,
    insn: ([u8; 15], u8),
    fpu: Vec<u8>,
}

impl VcpuInner {
    /// Whether what a window waits for is there, given that the guest can take interrupts.
    fn window_is_open(&self) -> bool {
        let able = self.state.rflags & RFLAGS_IF != 0 && !self.state.shadow;
        match self.window {
            Window::Closed => false,
            Window::Open => able,
            Window::Below(class) => able && self.tpr < class,
        }
    }
}

fn highest(bits: &[u64; 4]) -> Option<u8> {
    (0..=255u8)
        .rev()
        .find(|v| bits[usize::from(v >> 6)] >> (v & 63) & 1 != 0)
}

/// Delivers the highest interrupt that waits, if its class is above that of CR8 and of what is in service.
fn deliver(lent: &mut Lent, tpr: u8) -> Option<u8> {
    let v = highest(&lent.waiting)?;
    let busy = highest(&lent.in_service).map_or(0, |v| v >> 4);
    if v >> 4 <= tpr.max(busy) {
        return None;
    }
    let (word, bit) = (usize::from(v >> 6), 1 << (v & 63));
    lent.waiting[word] &= !bit;
    lent.in_service[word] |= bit;
    Some(v)
}

/// Where interrupts are posted for a [`FakeVcpu`], which never takes them in by itself: a test does.
#[derive(Debug, Default)]
pub struct FakePosting {
    vectors: [AtomicU64; 4],
    told: AtomicBool,
}

impl Posting for FakePosting {
    fn post(&self, vector: u8) -> bool {
        crate::sync::step();
        self.vectors[usize::from(vector >> 6)].fetch_or(1 << (vector & 63), Ordering::SeqCst);
        crate::sync::step();
        !self.told.swap(true, Ordering::SeqCst)
    }
    fn any(&self) -> bool {
        crate::sync::step();
        self.told.load(Ordering::SeqCst)
    }
    fn take(&self) -> [u64; 4] {
        crate::sync::step();
        self.told.store(false, Ordering::SeqCst);
        crate::sync::step();
        core::array::from_fn(|n| self.vectors[n].swap(0, Ordering::SeqCst))
    }
}

/// A virtual processor whose guest is a script. Clones are the same processor, so a test keeps one
/// ([`FakeMachine::vcpus`]) while the kernel runs it.
///
/// Entering delivers the event that waits for injection; then, if an interrupt window was asked for,
/// no event was delivered and the guest can take interrupts, the exit is
/// [`Exit::InterruptWindow`]; else the next step of the script decides. A guest at the end of its
/// script halts.
#[derive(Clone)]
pub struct FakeVcpu {
    /// What it was made for.
    pub config: VcpuConfig,
    inner: Arc<Mutex<VcpuInner>>,
}

impl fmt::Debug for FakeVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeVcpu")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl FakeVcpu {
    /// A processor in its reset state with an empty script.
    pub fn new(config: VcpuConfig) -> Self {
        FakeVcpu {
            config,
            inner: Arc::new(Mutex::new(VcpuInner {
                state: ArchState::at_reset(),
                script: VecDeque::new(),
                loaded: false,
                entries: 0,
                waiting: None,
                delivered: Vec::new(),
                window: Window::Closed,
                virtual_apic: VirtualApic::None,
                posting: Arc::default(),
                lent: None,
                shows_apic: false,
                shown: None,
                page: BTreeMap::new(),
                tpr: 0,
                tsc_offset: 0,
                flush_pending: false,
                flushes: 0,
                xcr0: 1,
                insn: ([0; 15], 0),
                fpu: std::vec![0; 576],
            })),
        }
    }

    fn inner(&self) -> MutexGuard<'_, VcpuInner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Appends a stay in guest mode that ends with `exit`.
    pub fn push_exit(&self, exit: Exit) {
        self.push(move |_, _| exit);
    }
    /// Appends a stay in guest mode: `step` plays the guest and says why it ends.
    pub fn push(&self, step: impl FnOnce(&FakeVcpu, &mut Gprs) -> Exit + Send + 'static) {
        self.inner().script.push_back(Box::new(step));
    }
    /// Steps of the script not yet played.
    pub fn steps_left(&self) -> usize {
        self.inner().script.len()
    }
    /// Whether it is loaded on a CPU.
    pub fn is_loaded(&self) -> bool {
        self.inner().loaded
    }
    /// How often it entered guest mode.
    pub fn entries(&self) -> u64 {
        self.inner().entries
    }
    /// The event that waits for injection.
    pub fn waiting(&self) -> Option<Event> {
        self.inner().waiting
    }
    /// Takes the list of events that the guest received.
    pub fn take_delivered(&self) -> Vec<Event> {
        core::mem::take(&mut self.inner().delivered)
    }
    /// The interrupts that the processor has.
    pub fn lent(&self) -> Option<Lent> {
        self.inner().lent
    }
    /// What the processor does with interrupts while it shows the APIC.
    pub fn shown(&self) -> Option<VirtualApic> {
        self.inner().shown
    }
    /// A register of the APIC that is shown, as the guest reads it.
    pub fn page(&self, offset: u16) -> Option<u32> {
        let inner = self.inner();
        inner.shown.and_then(|_| inner.page.get(&offset).copied())
    }
    /// The guest writes one. Most such writes are to be followed by an exit.
    pub fn set_page(&self, offset: u16, v: u32) {
        let mut inner = self.inner();
        if offset == 0x80 {
            inner.tpr = (v >> 4) as u8 & 15;
        }
        inner.page.insert(offset, v);
    }
    /// The guest sends itself an interrupt, which the processor notes.
    pub fn send_to_self(&self, vector: u8) {
        let mut inner = self.inner();
        inner.page.insert(0x300, 1 << 18 | u32::from(vector));
        if let Some(lent) = inner.lent.as_mut() {
            lent.waiting[usize::from(vector >> 6)] |= 1 << (vector & 63);
        }
    }
    /// Ends the highest of them, as the guest does. Gives its vector if that is an exit.
    pub fn end_interrupt(&self) -> Option<u8> {
        let mut inner = self.inner();
        let lent = inner.lent.as_mut()?;
        let has = |bits: &[u64; 4], v: u8| bits[usize::from(v >> 6)] >> (v & 63) & 1 != 0;
        let v = (0..=255u8).rev().find(|&v| has(&lent.in_service, v))?;
        lent.in_service[usize::from(v >> 6)] &= !(1 << (v & 63));
        has(&lent.exits, v).then_some(v)
    }
    /// The interrupt window that is asked for.
    pub fn window(&self) -> Window {
        self.inner().window
    }
    /// What is added to the host's TSC.
    pub fn tsc_offset(&self) -> u64 {
        self.inner().tsc_offset
    }
    /// How many entries began with all translations forgotten.
    pub fn tlb_flushes(&self) -> u64 {
        self.inner().flushes
    }
    /// Whether the next entry will forget all translations.
    pub fn flush_pending(&self) -> bool {
        self.inner().flush_pending
    }
    /// What the processor says of the instruction at nested faults.
    pub fn set_fault_insn(&self, bytes: &[u8]) {
        let mut insn = [0; 15];
        insn[..bytes.len()].copy_from_slice(bytes);
        self.inner().insn = (insn, bytes.len() as u8);
    }
    /// Changes the guest's state, as the guest itself would.
    pub fn with_state<R>(&self, f: impl FnOnce(&mut ArchState) -> R) -> R {
        f(&mut self.inner().state)
    }
}

fn canonical(a: u64) -> bool {
    ((a as i64) << 16 >> 16) as u64 == a
}

impl HwVcpu for FakeVcpu {
    fn fault_insn(&self) -> ([u8; 15], u8) {
        self.inner().insn
    }

    fn load(&mut self) {
        let mut inner = self.inner();
        assert!(!inner.loaded, "a loaded vCPU was loaded");
        inner.loaded = true;
    }

    fn unload(&mut self) {
        let mut inner = self.inner();
        assert!(inner.loaded, "an unloaded vCPU was unloaded");
        inner.loaded = false;
    }

    fn enter_behind(&mut self, regs: &mut Gprs, len: u8) -> Exit {
        if len != 0 {
            if self.rflags() & (RFLAGS_TF | RFLAGS_RF) != 0 || self.shadow() {
                return Exit::StepFirst;
            }
            self.step_over(len);
        }
        let step = {
            let mut inner = self.inner();
            assert!(inner.loaded, "an unloaded vCPU was entered");
            inner.entries += 1;
            if core::mem::take(&mut inner.flush_pending) {
                inner.flushes += 1;
            }
            let open = inner.state.rflags & RFLAGS_IF != 0 && !inner.state.shadow;
            match inner.waiting.take() {
                Some(e) => {
                    assert!(
                        open || !matches!(e, Event::Interrupt(_)),
                        "{e:?} injected into a guest that cannot take it"
                    );
                    inner.delivered.push(e);
                }
                None if open
                    && inner.virtual_apic == VirtualApic::Delivers
                    && inner.shown.is_none_or(|does| does == VirtualApic::Delivers) =>
                {
                    let inner = &mut *inner;
                    if let Some(v) = inner.lent.as_mut().and_then(|l| deliver(l, inner.tpr)) {
                        inner.delivered.push(Event::Interrupt(v));
                    }
                }
                None if inner.window_is_open() => return Exit::InterruptWindow,
                None => {}
            }
            inner.script.pop_front()
        };
        match step {
            Some(step) => step(self, regs),
            None => Exit::Hlt(1),
        }
    }

    fn state(&self) -> ArchState {
        self.inner().state.clone()
    }

    fn check_state(&self, s: &ArchState) -> Result<(), &'static str> {
        if s.cr0 >> 32 != 0 {
            return Err("CR0 has bits above 31");
        }
        Ok(())
    }

    fn set_state(&mut self, s: &ArchState) {
        let mut inner = self.inner();
        inner.state = s.clone();
        inner.waiting = None;
    }

    fn rip(&self) -> u64 {
        self.inner().state.rip
    }

    fn set_rip(&mut self, rip: u64) {
        let mut inner = self.inner();
        inner.state.rip = rip;
        inner.state.shadow = false;
    }

    fn rsp(&self) -> u64 {
        self.inner().state.rsp
    }

    fn set_rsp(&mut self, v: u64) {
        self.inner().state.rsp = v;
    }

    fn rflags(&self) -> u64 {
        self.inner().state.rflags
    }

    fn set_rflags(&mut self, v: u64) {
        self.inner().state.rflags = v;
    }

    fn virtual_apic(&self) -> VirtualApic {
        self.inner().virtual_apic
    }

    fn lend_interrupts(&mut self, i: Option<&Lent>) {
        let mut inner = self.inner();
        assert!(
            inner.virtual_apic != VirtualApic::None || inner.shows_apic && i.is_none(),
            "lent to a processor that has no use for them"
        );
        inner.lent = i.copied();
        inner.shown = None;
    }

    fn shows_apic(&self) -> bool {
        self.inner().shows_apic
    }

    fn show_apic(&mut self, s: &Shown<'_>) {
        let mut inner = self.inner();
        assert!(
            inner.shows_apic,
            "shown to a processor that has no use for it"
        );
        assert!(s.does <= inner.virtual_apic, "{:?} is asked of it", s.does);
        inner.lent = Some(s.interrupts);
        inner.shown = Some(s.does);
        inner.tpr = s.tpr >> 4;
        inner.page.insert(0x80, s.tpr.into());
        inner.page.extend(s.registers.iter().copied());
        for (at, bits) in [
            (0x100, s.interrupts.in_service),
            (0x180, s.level),
            (0x200, s.interrupts.waiting),
        ] {
            for n in 0..8u16 {
                let half = bits[usize::from(n / 2)] >> (n % 2 * 32);
                inner.page.insert(at + n * 16, half as u32);
            }
        }
    }

    fn shown_apic(&self) -> (u8, u64) {
        let inner = self.inner();
        let get = |at| inner.page.get(&at).copied().unwrap_or(0);
        (
            get(0x80) as u8,
            u64::from(get(0x310)) << 32 | u64::from(get(0x300)),
        )
    }

    fn take_written(&mut self, offset: u16) -> u32 {
        self.inner().page.insert(offset & 0xff0, 0).unwrap_or(0)
    }

    fn lent_interrupts(&self) -> ([u64; 4], [u64; 4]) {
        let lent = self.inner().lent.unwrap_or_default();
        (lent.waiting, lent.in_service)
    }

    fn lent_is_empty(&self) -> bool {
        self.lent_interrupts() == Default::default()
    }

    fn posting(&self) -> Option<Arc<dyn Posting>> {
        let inner = self.inner();
        let posting: Arc<dyn Posting> = inner.posting.clone();
        (inner.virtual_apic == VirtualApic::Delivers).then_some(posting)
    }

    fn cr(&self, n: u8) -> u64 {
        let inner = self.inner();
        match n {
            0 => inner.state.cr0,
            2 => inner.state.cr2,
            3 => inner.state.cr3,
            4 => inner.state.cr4,
            _ => 0,
        }
    }

    fn set_cr(&mut self, n: u8, v: u64) {
        let mut inner = self.inner();
        match n {
            0 => inner.state.cr0 = v,
            2 => inner.state.cr2 = v,
            3 => inner.state.cr3 = v,
            4 => inner.state.cr4 = v,
            _ => {}
        }
    }

    fn efer(&self) -> u64 {
        self.inner().state.efer
    }

    fn set_efer(&mut self, v: u64) {
        self.inner().state.efer = v;
    }

    fn segment(&self, s: Seg) -> Segment {
        self.inner().state.seg[s as usize]
    }

    fn cpl(&self) -> u8 {
        (self.inner().state.seg[Seg::Ss as usize].attr >> 5 & 3) as u8
    }

    fn msr(&self, index: u32) -> Option<u64> {
        let s = &self.inner().state;
        Some(match index {
            0x174..=0x176 => s.sysenter[(index - 0x174) as usize],
            0x277 => s.pat,
            0xc000_0081..=0xc000_0084 => s.syscall[(index - 0xc000_0081) as usize],
            0xc000_0100 => s.seg[Seg::Fs as usize].base,
            0xc000_0101 => s.seg[Seg::Gs as usize].base,
            0xc000_0102 => s.kernel_gs_base,
            _ => return None,
        })
    }

    fn set_msr(&mut self, index: u32, v: u64) -> bool {
        let s = &mut self.inner().state;
        match index {
            0x277 => {
                let valid = |b: u8| matches!(b, 0 | 1 | 4..=7);
                if !v.to_le_bytes().into_iter().all(valid) {
                    return false;
                }
                s.pat = v;
            }
            0x175 | 0x176 | 0xc000_0082 | 0xc000_0083 | 0xc000_0100..=0xc000_0102
                if !canonical(v) =>
            {
                return false;
            }
            0x174..=0x176 => s.sysenter[(index - 0x174) as usize] = v,
            0xc000_0081..=0xc000_0084 => s.syscall[(index - 0xc000_0081) as usize] = v,
            0xc000_0100 => s.seg[Seg::Fs as usize].base = v,
            0xc000_0101 => s.seg[Seg::Gs as usize].base = v,
            0xc000_0102 => s.kernel_gs_base = v,
            _ => return false,
        }
        true
    }

    fn shadow(&self) -> bool {
        self.inner().state.shadow
    }

    fn event_pending(&self) -> bool {
        self.inner().waiting.is_some()
    }

    fn waiting_event(&self) -> Option<Event> {
        self.inner().waiting
    }

    fn inject(&mut self, e: Event) {
        self.inner().waiting = Some(e);
    }

    fn set_interrupt_window(&mut self, w: Window) {
        self.inner().window = w;
    }

    fn tpr(&self) -> u8 {
        self.inner().tpr
    }

    fn set_tpr(&mut self, v: u8) {
        let mut inner = self.inner();
        inner.tpr = v;
        inner.page.insert(0x80, u32::from(v) << 4);
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.inner().tsc_offset = offset;
    }

    fn flush_tlb(&mut self) {
        self.inner().flush_pending = true;
    }

    fn xcr0(&self) -> u64 {
        self.inner().xcr0
    }

    fn set_xcr0(&mut self, v: u64) {
        self.inner().xcr0 = v;
    }

    fn fpu(&self, buf: &mut [u8]) -> usize {
        let inner = self.inner();
        assert!(!inner.loaded, "FPU state of a loaded vCPU");
        let n = buf.len().min(inner.fpu.len());
        buf[..n].copy_from_slice(&inner.fpu[..n]);
        n
    }

    fn set_fpu(&mut self, buf: &[u8]) {
        let mut inner = self.inner();
        assert!(!inner.loaded, "FPU state of a loaded vCPU");
        inner.fpu = buf.to_vec();
    }
}

#[derive(Default)]
struct IommuInner {
    map: BTreeMap<(u16, u64), (Mfn, Access)>,
    /// Translations removed or replaced and not flushed: devices may still use them.
    stale: BTreeSet<(u16, u64, Mfn)>,
    attached: BTreeMap<Sbdf, u16>,
    flushes: BTreeMap<u16, u64>,
    room: Option<usize>,
}

/// An IOMMU that remembers its mappings, and those that a device may still use because they were
/// not flushed.
#[derive(Default)]
pub struct FakeIommu(Mutex<IommuInner>);

impl fmt::Debug for FakeIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeIommu")
            .field("mappings", &self.inner().map.len())
            .finish_non_exhaustive()
    }
}

impl FakeIommu {
    fn inner(&self) -> MutexGuard<'_, IommuInner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What the devices of `domid` see at `d`.
    pub fn translate(&self, domid: u16, d: Dfn) -> Option<(Mfn, Access)> {
        self.inner().map.get(&(domid, d.get())).copied()
    }
    /// How many small pages are mapped for `domid`.
    pub fn mapped(&self, domid: u16) -> usize {
        self.inner()
            .map
            .range((domid, 0)..=(domid, u64::MAX))
            .count()
    }
    /// Whether any device could reach a frame: it is mapped, or was and is not flushed.
    pub fn reaches(&self, m: Mfn) -> bool {
        let inner = self.inner();
        inner.map.values().any(|(x, _)| *x == m) || inner.stale.iter().any(|(_, _, x)| *x == m)
    }
    /// How often the translations of `domid` were flushed.
    pub fn flushes(&self, domid: u16) -> u64 {
        self.inner().flushes.get(&domid).copied().unwrap_or(0)
    }
    /// Who has a function.
    pub fn owner(&self, dev: Sbdf) -> Option<u16> {
        self.inner().attached.get(&dev).copied()
    }
    /// Lets `map` fail once so many small pages are mapped in all.
    pub fn set_room(&self, pages: Option<usize>) {
        self.inner().room = pages;
    }
}

impl Iommu for FakeIommu {
    fn map(
        &self,
        domid: u16,
        d: Dfn,
        m: Mfn,
        order: PageOrder,
        a: Access,
    ) -> Result<(), Exhausted> {
        assert!(
            d.is_aligned(order) && m.is_aligned(order),
            "{d:?} to {m:?}, {order:?}"
        );
        let mut inner = self.inner();
        for i in 0..order.frames() {
            if inner.room.is_some_and(|room| inner.map.len() >= room) {
                return Err(Exhausted);
            }
            let key = (domid, d.get() + i);
            let new = Mfn::new_truncate(m.get() + i);
            if let Some((old, acc)) = inner.map.insert(key, (new, a))
                && (old != new || (acc.write && !a.write))
            {
                inner.stale.insert((key.0, key.1, old));
            }
        }
        Ok(())
    }

    fn unmap(&self, domid: u16, d: Dfn, order: PageOrder) -> Result<(), Exhausted> {
        assert!(d.is_aligned(order), "{d:?}, {order:?}");
        let mut inner = self.inner();
        for i in 0..order.frames() {
            let key = (domid, d.get() + i);
            if let Some((m, _)) = inner.map.remove(&key) {
                inner.stale.insert((key.0, key.1, m));
            }
        }
        Ok(())
    }

    fn flush(&self, domid: u16) {
        let mut inner = self.inner();
        inner.stale.retain(|s| s.0 != domid);
        *inner.flushes.entry(domid).or_default() += 1;
    }

    fn attach(&self, dev: Sbdf, domid: Option<u16>) -> Result<(), Exhausted> {
        let mut inner = self.inner();
        match domid {
            Some(d) => inner.attached.insert(dev, d),
            None => inner.attached.remove(&dev),
        };
        Ok(())
    }

    fn destroy(&self, domid: u16) {
        let mut inner = self.inner();
        assert!(
            inner.attached.values().all(|d| *d != domid),
            "context of domain {domid}, which has devices, was freed"
        );
        inner.map.retain(|k, _| k.0 != domid);
        inner.stale.retain(|s| s.0 != domid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mfn(n: u64) -> Mfn {
        Mfn::new(n).unwrap()
    }

    #[test]
    fn bytes_and_atomics_see_the_same_memory() {
        let m = FakeMachine::new(1);
        m.write(mfn(3), 4093, &[1, 2, 3]).unwrap();
        assert_eq!(m.load_u32(mfn(3), 4092), Ok(0x0302_0100));
        assert_eq!(m.swap_u8(mfn(3), 4094, 9), Ok(2));
        assert_eq!(m.or_u32(mfn(3), 4092, 0x80), Ok(0x0309_0100));
        assert_eq!(m.load_u64(mfn(3), 4088), Ok(0x0309_0180_0000_0000));
        m.copy(mfn(4), 1, mfn(3), 4091, 5).unwrap();
        let mut b = [0; 7];
        m.read(mfn(4), 0, &mut b).unwrap();
        assert_eq!(b, [0, 0, 0x80, 1, 9, 3, 0]);
        assert_eq!(m.cmpxchg_u64(mfn(4), 8, 1, 2), Ok(0));
        assert_eq!(m.load_u64(mfn(4), 8), Ok(0));
        m.zero(mfn(4)).unwrap();
        assert!(m.is_zero(mfn(4)));
    }

    #[test]
    fn accesses_outside_ram_or_a_frame_fault() {
        let m = FakeMachine::with_ram(std::vec![0..16, 32..48]);
        assert_eq!(m.load_u64(mfn(16), 0), Err(MemFault));
        assert_eq!(m.load_u64(mfn(32), 4), Err(MemFault));
        assert_eq!(m.read(mfn(0), 4090, &mut [0; 7]), Err(MemFault));
        assert_eq!(m.write(mfn(0), usize::MAX, &[0; 2]), Err(MemFault));
        assert_eq!(m.zero(mfn(31)), Err(MemFault));
    }

    #[test]
    fn idle_moves_the_clock_to_the_timer() {
        let m = FakeMachine::new(1).with_cpus(2);
        m.set_cpu(CpuId(1));
        m.set_timer(Some(5_000));
        m.idle(&|| true);
        assert_eq!(m.now_ns(), 0);
        m.idle(&|| false);
        assert_eq!(m.now_ns(), 5_000);
        assert_eq!(m.timer(CpuId(1)), None);
    }

    #[test]
    fn bars_answer_sizing() {
        let m = FakeMachine::new(1);
        let dev = Sbdf::new(0, 0, 8);
        m.add_pci(dev, &[0x86, 0x80, 0x0e, 0x10]);
        m.set_pci_bar(dev, 0, 0xfeb0_0000, 0x2_0000, 0);
        m.pci_write(dev, 0, 4, 0);
        assert_eq!(m.pci_read(dev, 0, 2), 0x8086);
        m.pci_write(dev, 0x10, 4, !0);
        assert_eq!(m.pci_read(dev, 0x10, 4), 0xfffe_0000);
        assert_eq!(m.pci_read(Sbdf::new(0, 1, 0), 0, 4), !0);
    }

    #[test]
    fn a_scripted_vcpu_delivers_events_and_opens_windows() {
        let m = FakeMachine::new(1);
        let mut v = m
            .new_vcpu(&VcpuConfig {
                nested_root: Mpa::new_truncate(0),
                hardware_domain: false,
            })
            .unwrap();
        let guest = m.vcpus().remove(0);
        guest.push(|_, r| {
            r.rax = 7;
            Exit::Hypercall(3)
        });
        let mut regs = Gprs::default();
        v.load();
        v.inject(Event::UD);
        assert_eq!(v.enter(&mut regs), Exit::Hypercall(3));
        assert_eq!((regs.rax, guest.take_delivered()), (7, [Event::UD].into()));
        v.set_interrupt_window(Window::Open);
        assert_eq!(v.enter(&mut regs), Exit::Hlt(1));
        guest.with_state(|s| s.rflags |= RFLAGS_IF);
        assert_eq!(v.enter(&mut regs), Exit::InterruptWindow);
    }

    #[test]
    fn the_iommu_knows_what_devices_still_reach() {
        let i = FakeIommu::default();
        let rw = Access {
            read: true,
            write: true,
        };
        let d = Dfn::new(8).unwrap();
        i.map(1, d, mfn(64), PageOrder::new(3).unwrap(), rw)
            .unwrap();
        i.unmap(1, d, PageOrder::P4K).unwrap();
        assert!(i.reaches(mfn(64)));
        i.flush(1);
        assert!(!i.reaches(mfn(64)));
        assert_eq!(
            i.translate(1, Dfn::new(15).unwrap()).unwrap().0.get(),
            64 + 7
        );
    }
}
