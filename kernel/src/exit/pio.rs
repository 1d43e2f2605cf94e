//! I/O ports.
//!
//! The processor has checked the guest's right to the port. Nobody stands behind most ports: reads
//! give all ones, writes are lost (abi.md 0.2).

use galvan_base::exit::Pio;

use super::insn::{self, stopped};
use super::{Next, mmio};
use crate::emulate::{DecodeError, Op, Rep, decode, execute, mask};
use crate::guest_access::Cx;

/// Text for the log, a byte at a time.
const DEBUG_PORT: u16 = 0xe9;

/// IN, OUT, INS or OUTS.
pub fn pio(cx: &mut Cx<'_>, p: Pio) -> Next {
    if p.string {
        return string(cx, &p);
    }
    let Some(len) = insn::length(cx, p.len, insn::Kind::Io) else {
        return Next::Resume;
    };
    if p.input {
        let v = u64::from(port_read(cx, p.port, p.size));
        let rax = &mut cx.st.regs.rax;
        *rax = match p.size {
            4 => v,
            n => *rax & !mask(n) | v & mask(n),
        };
    } else {
        let v = (cx.st.regs.rax & mask(p.size)) as u32;
        port_write(cx, p.port, p.size, v);
    }
    Next::Quiet(len)
}

/// INS and OUTS: their segment and the width of their addresses are only in the instruction.
fn string(cx: &mut Cx<'_>, p: &Pio) -> Next {
    let bits = insn::bits(cx);
    let insn = match insn::with_code(cx, |code| decode(code, bits)) {
        Ok(Ok(i)) => i,
        // Another CPU has changed it: whatever it is now, the guest executes it.
        Ok(Err(
            DecodeError::Invalid
            | DecodeError::Unsupported
            | DecodeError::TooLong
            | DecodeError::Short,
        )) => {
            return Next::Resume;
        }
        Err(stop) => return stopped(cx, stop),
    };
    let op = if p.input { Op::Ins } else { Op::Outs };
    if insn.op != op || insn.size != p.size || (insn.rep != Rep::No) != p.rep {
        return Next::Resume;
    }
    // The right was checked for the port that the processor saw.
    if cx.st.regs.rdx as u16 != p.port {
        return Next::Resume;
    }
    let limit = mmio::iterations(cx);
    let r = execute(&mut mmio::Guest::new(cx, bits), &insn, limit);
    mmio::finish(cx, &insn, r)
}

/// Reads a port; all ones where nobody is home.
pub(super) fn port_read(cx: &mut Cx<'_>, port: u16, size: u8) -> u32 {
    cx.dom
        .hardware
        .as_ref()
        .and_then(|h| h.port_read(cx.hv, cx.dom, port, size))
        .unwrap_or(!0)
}

/// Writes a port.
pub(super) fn port_write(cx: &mut Cx<'_>, port: u16, size: u8, v: u32) {
    if port == DEBUG_PORT {
        for b in v.to_le_bytes().into_iter().take(size.into()) {
            cx.dom.debug_byte(cx.hv, b);
        }
        return;
    }
    if let Some(h) = &cx.dom.hardware {
        h.port_write(cx.hv, cx.dom, port, size, v);
    }
}
