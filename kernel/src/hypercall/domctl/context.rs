//! The HVM context of a domain: its save records, read and loaded.

use alloc::sync::Arc;

use galvan_dom0_proto::domctl::*;
use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::hvm_save::SaveCode;

use super::{Op, Step, alive, not_self};
use crate::domain::Domain;
use crate::guest_access::Cx;
use crate::hvm_context::{self, Sink, Source};
use crate::lifecycle::Paused;

/// Counts what would be written.
struct Counter(u64);

impl Sink for Counter {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        self.0 += bytes.len() as u64;
        Ok(())
    }
}

/// Writes to the caller's buffer.
struct Buffer<'a, 'b> {
    cx: &'a Cx<'b>,
    at: u64,
    left: u64,
    read: u64,
    written: u64,
}

impl Sink for Buffer<'_, '_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        let n = bytes.len() as u64;
        self.left = self.left.checked_sub(n).ok_or(Errno::ENOSPC)?;
        self.cx.write_bytes(self.at, bytes)?;
        self.at = self.at.wrapping_add(n);
        self.written += n;
        Ok(())
    }
}

impl Source for Buffer<'_, '_> {
    fn take(&mut self, bytes: &mut [u8]) -> Result<(), Errno> {
        let n = bytes.len() as u64;
        self.left = self.left.checked_sub(n).ok_or(Errno::ENODATA)?;
        self.cx.read_bytes(self.at, bytes)?;
        self.at = self.at.wrapping_add(n);
        self.read += n;
        Ok(())
    }

    fn rewind(&mut self) {
        self.at = self.at.wrapping_sub(self.read);
        self.left += core::mem::take(&mut self.read);
    }
}

/// All records; with a null buffer, the room that they may take.
pub(super) fn get(cx: &Cx<'_>, d: &Arc<Domain>, call: &mut XenDomctl) -> Op {
    let mut h: XenDomctlHvmcontext = call.payload();
    not_self(cx, d)?;
    let _paused = Paused::new(cx.hv, d);
    let size = if h.buffer.is_null() {
        let mut count = Counter(0);
        hvm_context::save(cx.hv, d, true, &mut count)?;
        count.0
    } else {
        let mut out = Buffer {
            cx,
            at: h.buffer.addr(),
            left: u64::from(h.size),
            read: 0,
            written: 0,
        };
        hvm_context::save(cx.hv, d, false, &mut out)?;
        out.written
    };
    h.size = u32::try_from(size).map_err(|_| Errno::ENOSPC)?;
    call.set_payload(&h);
    Ok(Step::Back)
}

/// Loads records.
pub(super) fn set(cx: &Cx<'_>, d: &Arc<Domain>, call: &XenDomctl) -> Op {
    let h: XenDomctlHvmcontext = call.payload();
    not_self(cx, d)?;
    alive(d)?;
    let _paused = Paused::new(cx.hv, d);
    let mut from = Buffer {
        cx,
        at: h.buffer.addr(),
        left: u64::from(h.size),
        read: 0,
        written: 0,
    };
    hvm_context::load(cx.hv, d, &mut from)?;
    Ok(Step::Done)
}

/// One record, without what precedes it.
pub(super) fn get_one(cx: &Cx<'_>, d: &Arc<Domain>, call: &mut XenDomctl) -> Op {
    let mut h: XenDomctlHvmcontextPartial = call.payload();
    not_self(cx, d)?;
    let kind = u16::try_from(h.kind).map_err(|_| Errno::EINVAL)?;
    let _paused = Paused::new(cx.hv, d);
    let room = if h.buffer.is_null() { 0 } else { h.bufsz };
    let mut out = Buffer {
        cx,
        at: h.buffer.addr(),
        left: room,
        read: 0,
        written: 0,
    };
    let mut count = Counter(0);
    let sink: &mut dyn Sink = if h.buffer.is_null() {
        &mut count
    } else {
        &mut out
    };
    hvm_context::save_one(cx.hv, d, SaveCode(kind), h.instance, sink)?;
    h.bufsz = if h.buffer.is_null() {
        count.0
    } else {
        out.written
    };
    call.set_payload(&h);
    Ok(Step::Back)
}
