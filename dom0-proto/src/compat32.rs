//! Layouts for 32-bit callers where they differ: firmware (hvmloader, SeaBIOS) and 32-bit kernels.
//!
//! A 32-bit caller has 4-byte handles, 4-byte `unsigned long`, and 4-byte alignment of 64-bit
//! members. Structures not listed here are the same for both ([`Compat`] is then not needed): all
//! event-channel operations, `xen_hvm_param`, `gnttab_map_grant_ref`, `gnttab_unmap_grant_ref`,
//! `gnttab_query_size`, `xen_feature_info` and others without handles or 64-bit tails.
//!
//! [`Compat::widen`] turns what was copied in into the form handlers work on; [`Compat::narrow`] turns
//! a result back. Narrowing keeps the low 32 bits: the ABI has no room for more.

use zerocopy::little_endian::U64 as Le64;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::dm_op::XenDmOpBuf;
use crate::grant_table::{GnttabCopy, GnttabCopyPtr, GnttabSetupTable};
use crate::memory::{
    E820Entry, XenAddToPhysmap, XenAddToPhysmapBatch, XenForeignMemoryMap, XenMemAcquireResource,
    XenMemoryMap, XenMemoryReservation, XenPodTarget, XenRemoveFromPhysmap,
    XenReservedDeviceMemoryMap,
};
use crate::sched::SchedPoll;
use crate::vcpu::{VcpuRunstateInfo, VcpuSetSingleshotTimer};
use crate::xen::{MulticallEntry, VcpuTimeInfo};
use crate::{DomId, GntStatus, GuestHandle, GuestHandle32};

/// A 32-bit layout of a structure that handlers know by its 64-bit layout.
pub trait Compat: FromBytes + IntoBytes + Immutable {
    /// The 64-bit layout.
    type Native;

    /// The 64-bit form.
    fn widen(self) -> Self::Native;

    /// The 32-bit form of a result; values are cut to 32 bits.
    fn narrow(native: &Self::Native) -> Self;
}

/// A field that may be wider in the 64-bit layout.
trait Field<N> {
    fn widen_field(self) -> N;
    fn narrow_field(native: N) -> Self;
}

impl<T> Field<T> for T {
    fn widen_field(self) -> T {
        self
    }
    fn narrow_field(native: T) -> T {
        native
    }
}

impl Field<u64> for u32 {
    fn widen_field(self) -> u64 {
        self.into()
    }
    fn narrow_field(native: u64) -> Self {
        native as Self
    }
}

impl Field<u64> for Le64 {
    fn widen_field(self) -> u64 {
        self.get()
    }
    fn narrow_field(native: u64) -> Self {
        Self::new(native)
    }
}

impl<T, U> Field<GuestHandle<U>> for GuestHandle32<T> {
    fn widen_field(self) -> GuestHandle<U> {
        self.widen().cast()
    }
    fn narrow_field(native: GuestHandle<U>) -> Self {
        Self::new(native.addr() as u32)
    }
}

impl<const N: usize> Field<[u64; N]> for [u32; N] {
    fn widen_field(self) -> [u64; N] {
        self.map(u64::from)
    }
    fn narrow_field(native: [u64; N]) -> Self {
        native.map(|v| v as u32)
    }
}

impl<const N: usize> Field<[u64; N]> for [Le64; N] {
    fn widen_field(self) -> [u64; N] {
        self.map(Le64::get)
    }
    fn narrow_field(native: [u64; N]) -> Self {
        native.map(Le64::new)
    }
}

macro_rules! compat {
    ($( $c:ident => $n:ident { $($f:ident),* $(,)? } )*) => { $(
        impl Compat for $c {
            type Native = $n;

            fn widen(self) -> $n {
                let mut native: $n = zerocopy::FromZeros::new_zeroed();
                $( native.$f = self.$f.widen_field(); )*
                native
            }

            fn narrow(native: &$n) -> Self {
                let mut compat: Self = zerocopy::FromZeros::new_zeroed();
                $( compat.$f = Field::narrow_field(native.$f); )*
                compat
            }
        }
    )* };
}

impl Field<XenMemoryMap> for XenMemoryMap32 {
    fn widen_field(self) -> XenMemoryMap {
        self.widen()
    }
    fn narrow_field(native: XenMemoryMap) -> Self {
        Self::narrow(&native)
    }
}

impl Field<GnttabCopyPtr> for GnttabCopyPtr32 {
    fn widen_field(self) -> GnttabCopyPtr {
        self.widen()
    }
    fn narrow_field(native: GnttabCopyPtr) -> Self {
        Self::narrow(&native)
    }
}

abi_structs! {
    /// 32-bit layout.
    pub struct XenMemoryReservation32("struct xen_memory_reservation", 20) {
        extent_start: GuestHandle32<u32> = 0,
        nr_extents: u32 = 4,
        extent_order: u32 = 8,
        mem_flags: u32 = 12,
        domid: DomId = 16,
        _pad: u16,
    }

    /// 32-bit layout.
    pub struct XenAddToPhysmap32("struct xen_add_to_physmap", 16) {
        domid: DomId = 0,
        size: u16 = 2,
        space: u32 = 4,
        idx: u32 = 8,
        gpfn: u32 = 12,
    }

    /// 32-bit layout. The arrays hold `u32` indices and gfns.
    pub struct XenAddToPhysmapBatch32("struct xen_add_to_physmap_batch", 20) {
        domid: DomId = 0,
        space: u16 = 2,
        size: u16 = 4,
        foreign_domid ["u.foreign_domid"]: DomId = 6,
        idxs: GuestHandle32<u32> = 8,
        gpfns: GuestHandle32<u32> = 12,
        errs: GuestHandle32<i32> = 16,
    }

    /// 32-bit layout.
    pub struct XenRemoveFromPhysmap32("struct xen_remove_from_physmap", 8) {
        domid: DomId = 0,
        _pad: u16,
        gpfn: u32 = 4,
    }

    /// 32-bit layout.
    pub struct XenMemoryMap32("struct xen_memory_map", 8) {
        nr_entries: u32 = 0,
        buffer: GuestHandle32<E820Entry> = 4,
    }

    /// 32-bit layout.
    pub struct XenForeignMemoryMap32("struct xen_foreign_memory_map", 12) {
        domid: DomId = 0,
        _pad: u16,
        map: XenMemoryMap32 = 4,
    }

    /// 32-bit layout.
    pub struct XenPodTarget32("struct xen_pod_target", 36) {
        target_pages: Le64 = 0,
        tot_pages: Le64 = 8,
        pod_cache_pages: Le64 = 16,
        pod_entries: Le64 = 24,
        domid: DomId = 32,
        _pad: u16,
    }

    /// 32-bit layout. The list holds `u32` gfns.
    pub struct XenMemAcquireResource32("struct xen_mem_acquire_resource", 28) {
        domid: DomId = 0,
        kind ["type"]: u16 = 2,
        id: u32 = 4,
        nr_frames: u32 = 8,
        _pad: u32,
        frame: Le64 = 16,
        frame_list: GuestHandle32<u32> = 24,
    }

    /// 32-bit layout. The buffer holds pairs of `u32`.
    pub struct XenReservedDeviceMemoryMap32("struct xen_reserved_device_memory_map", 16) {
        flags: u32 = 0,
        nr_entries: u32 = 4,
        buffer: GuestHandle32<[u32; 2]> = 8,
        seg ["dev.pci.seg"]: u16 = 12,
        bus ["dev.pci.bus"]: u8 = 14,
        devfn ["dev.pci.devfn"]: u8 = 15,
    }

    /// 32-bit layout.
    pub struct SchedPoll32("struct sched_poll", 16) {
        ports: GuestHandle32<u32> = 0,
        nr_ports: u32 = 4,
        timeout: Le64 = 8,
    }

    /// 32-bit layout.
    pub struct MulticallEntry32("struct multicall_entry", 32) {
        op: u32 = 0,
        result: u32 = 4,
        args: [u32; 6] = 8,
    }

    /// 32-bit layout.
    pub struct VcpuRunstateInfo32("struct vcpu_runstate_info", 44) {
        state: i32 = 0,
        state_entry_time: Le64 = 4,
        time: [Le64; 4] = 12,
    }

    /// 32-bit layout.
    pub struct VcpuSetSingleshotTimer32("struct vcpu_set_singleshot_timer", 12) {
        timeout_abs_ns: Le64 = 0,
        flags: u32 = 8,
    }

    /// 32-bit layout.
    pub struct GnttabSetupTable32("struct gnttab_setup_table", 16) {
        dom: DomId = 0,
        _pad0: u16,
        nr_frames: u32 = 4,
        status: GntStatus = 8,
        _pad1: u16,
        frame_list: GuestHandle32<u32> = 12,
    }

    /// 32-bit layout.
    pub struct GnttabCopyPtr32("struct gnttab_copy_ptr", 8) {
        gmfn ["u.gmfn"]: u32 = 0,
        domid: DomId = 4,
        offset: u16 = 6,
    }

    /// 32-bit layout.
    pub struct GnttabCopy32("struct gnttab_copy", 24) {
        source: GnttabCopyPtr32 = 0,
        dest: GnttabCopyPtr32 = 8,
        len: u16 = 16,
        flags: u16 = 18,
        status: GntStatus = 20,
        _pad: u16,
    }

    /// 32-bit layout.
    pub struct XenDmOpBuf32("struct xen_dm_op_buf", 8) {
        h: GuestHandle32<u8> = 0,
        size: u32 = 4,
    }

    /// 32-bit layout of the result of `XENVER_platform_parameters`.
    pub struct XenPlatformParameters32("struct xen_platform_parameters", 4) {
        virt_start: u32 = 0,
    }

    /// 32-bit layout.
    pub struct ArchVcpuInfo32("struct arch_vcpu_info", 24) {
        cr2: u32 = 0,
        _pad: [u32; 5],
    }

    /// 32-bit layout: the same size and the same place of the clock as the 64-bit one.
    pub struct VcpuInfo32("struct vcpu_info", 64) {
        evtchn_upcall_pending: u8 = 0,
        evtchn_upcall_mask: u8 = 1,
        _pad: u16,
        evtchn_pending_sel: u32 = 4,
        arch: ArchVcpuInfo32 = 8,
        time: VcpuTimeInfo = 32,
    }

    /// 32-bit layout.
    pub struct ArchSharedInfo32("struct arch_shared_info", 28) {
        max_pfn: u32,
        pfn_to_mfn_frame_list_list: u32,
        nmi_reason: u32 = 8,
        p2m_cr3: u32,
        p2m_vaddr: u32,
        p2m_generation: u32,
        /// Seconds of the wall clock, high half.
        wc_sec_hi: u32 = 24,
    }

    /// 32-bit layout.
    pub struct SharedInfo32("struct shared_info", 2344) {
        vcpu_info: [VcpuInfo32; 32] = 0,
        evtchn_pending: [u32; 32] = 2048,
        evtchn_mask: [u32; 32] = 2176,
        wc_version: u32 = 2304,
        wc_sec: u32 = 2308,
        wc_nsec: u32 = 2312,
        arch: ArchSharedInfo32 = 2316,
    }
}

compat! {
    XenMemoryReservation32 => XenMemoryReservation {
        extent_start, nr_extents, extent_order, mem_flags, domid,
    }
    XenAddToPhysmap32 => XenAddToPhysmap { domid, size, space, idx, gpfn }
    XenAddToPhysmapBatch32 => XenAddToPhysmapBatch {
        domid, space, size, foreign_domid, idxs, gpfns, errs,
    }
    XenRemoveFromPhysmap32 => XenRemoveFromPhysmap { domid, gpfn }
    XenMemoryMap32 => XenMemoryMap { nr_entries, buffer }
    XenForeignMemoryMap32 => XenForeignMemoryMap { domid, map }
    XenPodTarget32 => XenPodTarget { target_pages, tot_pages, pod_cache_pages, pod_entries, domid }
    XenMemAcquireResource32 => XenMemAcquireResource { domid, kind, id, nr_frames, frame, frame_list }
    XenReservedDeviceMemoryMap32 => XenReservedDeviceMemoryMap {
        flags, nr_entries, buffer, seg, bus, devfn,
    }
    SchedPoll32 => SchedPoll { ports, nr_ports, timeout }
    MulticallEntry32 => MulticallEntry { op, result, args }
    VcpuRunstateInfo32 => VcpuRunstateInfo { state, state_entry_time, time }
    VcpuSetSingleshotTimer32 => VcpuSetSingleshotTimer { timeout_abs_ns, flags }
    GnttabSetupTable32 => GnttabSetupTable { dom, nr_frames, status, frame_list }
    GnttabCopyPtr32 => GnttabCopyPtr { gmfn, domid, offset }
    GnttabCopy32 => GnttabCopy { source, dest, len, flags, status }
    XenDmOpBuf32 => XenDmOpBuf { h, size }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn firmware_calls_widen_to_what_handlers_know() {
        let mut bytes = [0u8; 16];
        bytes[0..2].copy_from_slice(&0x7ff0u16.to_le_bytes());
        bytes[12..16].copy_from_slice(&0xf_dfffu32.to_le_bytes());
        let wide = XenAddToPhysmap32::read_from_bytes(&bytes).unwrap().widen();
        assert_eq!(
            (wide.domid, wide.space, wide.gpfn),
            (DomId::SELF, 0, 0xf_dfff)
        );

        let mut poll = SchedPoll32::new_zeroed();
        poll.ports = GuestHandle32::new(0xffff_fff0);
        poll.timeout = Le64::new(u64::MAX);
        let wide = poll.widen();
        assert_eq!((wide.ports.addr(), wide.timeout), (0xffff_fff0, u64::MAX));
        assert_eq!(SchedPoll32::narrow(&wide), poll);
    }

    #[test]
    fn a_result_narrows_into_the_callers_layout() {
        let mut entry = MulticallEntry::new_zeroed();
        entry.result = crate::Errno::ENOSYS.as_ret();
        assert_eq!(MulticallEntry32::narrow(&entry).result as i32, -38);
    }
}
