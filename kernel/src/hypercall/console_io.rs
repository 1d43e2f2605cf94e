//! `console_io`: text between a guest and the hypervisor's console.
//!
//! The control domain writes as it likes; others' text goes to the log by lines, marked with their
//! id, and within their log budget. Reading what is typed is for the control domain.

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen::{CONSOLEIO_READ, CONSOLEIO_WRITE};

use super::{Args, Outcome, Ret};
use crate::guest_access::Cx;
use crate::stretch::units;

/// Text copied in one go; longer writes are continued.
const CHUNK: u64 = 256;

/// `HYPERVISOR_console_io(cmd, count, buffer)`.
pub fn console_io(cx: &mut Cx<'_>, [cmd, count, buffer, ..]: Args) -> Ret {
    // The command and count are C `int`s.
    let count = u64::from(u32::try_from(count as u32 as i32).map_err(|_| Errno::EINVAL)?);
    match cmd as u32 {
        CONSOLEIO_WRITE => write(cx, count, buffer),
        CONSOLEIO_READ => read(cx, count, buffer),
        _ => Err(Errno::ENOSYS),
    }
}

fn write(cx: &mut Cx<'_>, count: u64, buffer: u64) -> Ret {
    let mut text = [0u8; CHUNK as usize];
    let n = count.min(units(CHUNK as u32).into());
    let text = text.get_mut(..n as usize).ok_or(Errno::EINVAL)?;
    cx.read_bytes(buffer, text)?;
    if cx.dom.is_control() {
        cx.hv.console.write(text);
        cx.hv.hw.console_write(text);
    } else {
        for &b in text.iter() {
            cx.dom.debug_byte(cx.hv, b);
        }
    }
    if count > n {
        let next = [
            u64::from(CONSOLEIO_WRITE),
            count - n,
            buffer.wrapping_add(n),
            0,
            0,
        ];
        return Ok(Outcome::Again(next));
    }
    Ok(Outcome::Done(0))
}

fn read(cx: &mut Cx<'_>, count: u64, buffer: u64) -> Ret {
    if !cx.dom.is_control() {
        return Err(Errno::EPERM);
    }
    let mut text = [0u8; 128];
    let wanted = (count as usize).min(text.len());
    let text = text.get_mut(..wanted).ok_or(Errno::EINVAL)?;
    // A buffer that cannot be written must not cost what was typed.
    cx.write_bytes(buffer, text)?;
    let n = cx.hv.input.read(text);
    if let Some(t) = text.get(..n) {
        cx.write_bytes(buffer, t)?;
    }
    Ok(Outcome::Done(n as u64))
}
