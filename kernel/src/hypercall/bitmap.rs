//! Bitmaps of CPUs and nodes as the control interface passes them (public `xen.h`:
//! `xenctl_bitmap`): bit n is bit n % 8 of byte n / 8.

use galvan_base::CpuId;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen::XenctlBitmap;

use crate::guest_access::Cx;
use crate::sched::{CpuSet, MAX_CPUS};

/// Bytes of a bitmap of all CPUs there can be.
const BYTES: usize = MAX_CPUS as usize / 8;
/// The longest bitmap that is filled for a caller.
const MAX_BITS: u32 = 1 << 16;

/// Reads a set of CPUs. Bits beyond those that a CPU can have are ignored.
pub(super) fn get_cpus(cx: &Cx<'_>, b: &XenctlBitmap) -> Result<CpuSet, Errno> {
    let mut bytes = [0u8; BYTES];
    let n = b.nr_bits.div_ceil(8).min(BYTES as u32);
    let part = bytes.get_mut(..n as usize).ok_or(Errno::EINVAL)?;
    if b.bitmap.is_null() && n != 0 {
        return Err(Errno::EFAULT);
    }
    cx.read_bytes(b.bitmap.addr(), part)?;
    let all = CpuSet::from_bytes(&bytes);
    Ok(all.and(&CpuSet::first(b.nr_bits.min(MAX_CPUS))))
}

/// Writes a set of CPUs into the room that the caller has; the rest of that is cleared.
pub(super) fn put_cpus(cx: &Cx<'_>, b: &XenctlBitmap, set: &CpuSet) -> Result<(), Errno> {
    if b.bitmap.is_null() && b.nr_bits != 0 {
        return Err(Errno::EFAULT);
    }
    if b.nr_bits > MAX_BITS {
        return Err(Errno::E2BIG);
    }
    let known = set.and(&CpuSet::first(b.nr_bits.min(MAX_CPUS)));
    let mut at = b.bitmap.addr();
    let mut bytes = [0u8; BYTES];
    for (i, slot) in bytes.iter_mut().enumerate() {
        *slot = known.byte(i);
    }
    let mut left = b.nr_bits.div_ceil(8) as usize;
    while left != 0 {
        let part = bytes.get(..left.min(BYTES)).ok_or(Errno::EINVAL)?;
        cx.write_bytes(at, part)?;
        at = at.wrapping_add(part.len() as u64);
        left -= part.len();
        bytes = [0; BYTES];
    }
    Ok(())
}

/// Reads a set of nodes: whether it holds the only one there is.
pub(super) fn get_nodes(cx: &Cx<'_>, b: &XenctlBitmap) -> Result<bool, Errno> {
    Ok(get_cpus(cx, b)?.contains(CpuId(0)))
}

/// Writes the set of the only node there is.
pub(super) fn put_nodes(cx: &Cx<'_>, b: &XenctlBitmap) -> Result<(), Errno> {
    put_cpus(cx, b, &CpuSet::of(CpuId(0)))
}
