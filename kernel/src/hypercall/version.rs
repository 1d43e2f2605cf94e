//! `xen_version`: who the hypervisor is and what it offers.

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::version::*;
use zerocopy::FromZeros;

use super::{After, End, OK, Outcome, Ret, log_unknown};
use crate::guest_access::Cx;

/// Guest types that can be built, as `xl` reads them.
const CAPABILITIES: &str = "hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 ";

/// `HYPERVISOR_xen_version(cmd, arg)`, as an entry of the table.
pub fn xen_version(cx: &mut Cx<'_>, cmd: u64, arg: u64, _: u64, _: u64, _: u64) -> End {
    // What Linux asks to have pending events delivered: nothing is called for it.
    match cmd as u32 {
        XENVER_VERSION => End {
            after: After::Quiet,
            value: cx.hv.identity.abi.into(),
        },
        cmd => others(cx, cmd, arg),
    }
}

#[inline(never)]
fn others(cx: &mut Cx<'_>, cmd: u32, arg: u64) -> End {
    let result = answer(cx, cmd, arg);
    End::new(cx, result, After::Quiet)
}

fn answer(cx: &mut Cx<'_>, cmd: u32, arg: u64) -> Ret {
    let id = &cx.hv.identity;
    match cmd {
        XENVER_PAGESIZE => return Ok(Outcome::Done(galvan_base::PAGE_SIZE as u64)),
        XENVER_EXTRAVERSION => put_text::<XEN_EXTRAVERSION_LEN>(cx, arg, &id.extraversion)?,
        XENVER_CAPABILITIES => put_text::<XEN_CAPABILITIES_INFO_LEN>(cx, arg, CAPABILITIES)?,
        XENVER_CHANGESET => put_text::<XEN_CHANGESET_INFO_LEN>(cx, arg, env!("CARGO_PKG_VERSION"))?,
        XENVER_COMMANDLINE => {
            // Only the control domain learns how the machine was started.
            let text = if cx.dom.is_control() {
                &*id.cmdline
            } else {
                "<denied>"
            };
            put_text::<XEN_COMMANDLINE_LEN>(cx, arg, text)?;
        }
        XENVER_COMPILE_INFO => {
            let mut i = XenCompileInfo::new_zeroed();
            copy_text(&mut i.compiler, id.compiler);
            copy_text(&mut i.compile_by, "galvan");
            copy_text(&mut i.compile_domain, "");
            copy_text(&mut i.compile_date, id.build_date);
            cx.put(arg, &i)?;
        }
        XENVER_PLATFORM_PARAMETERS => cx.put(arg, &XenPlatformParameters::new_zeroed())?,
        XENVER_GET_FEATURES => {
            let mut f: XenFeatureInfo = cx.get(arg)?;
            f.submap = match f.submap_idx {
                0 => features(cx),
                _ => return Err(Errno::EINVAL),
            };
            cx.put(arg, &f)?;
        }
        XENVER_GUEST_HANDLE => cx.put(arg, &crate::lifecycle::handle(cx.dom))?,
        XENVER_BUILD_ID => return Err(Errno::ENODATA),
        XENVER_EXTRAVERSION2 => return put_varbuf(cx, arg, &id.extraversion),
        XENVER_CAPABILITIES2 => return put_varbuf(cx, arg, CAPABILITIES),
        XENVER_CHANGESET2 => return put_varbuf(cx, arg, env!("CARGO_PKG_VERSION")),
        XENVER_COMMANDLINE2 => {
            let text = if cx.dom.is_control() {
                &*id.cmdline
            } else {
                "<denied>"
            };
            return put_varbuf(cx, arg, text);
        }
        other => {
            log_unknown(cx, "xen_version", u64::from(other), 0);
            return Err(Errno::ENOSYS);
        }
    }
    Ok(OK)
}

/// The feature bits of the caller.
fn features(cx: &Cx<'_>) -> u32 {
    let mut bits = 1 << XENFEAT_WRITABLE_PAGE_TABLES
        | 1 << XENFEAT_AUTO_TRANSLATED_PHYSMAP
        | 1 << XENFEAT_HVM_CALLBACK_VECTOR
        | 1 << XENFEAT_HVM_SAFE_PVCLOCK
        | 1 << XENFEAT_MEMORY_OP_VNODE_SUPPORTED;
    if cx.dom.config.hardware_domain {
        // dom0's RAM is at its own machine addresses.
        bits |= 1 << XENFEAT_DOM0 | 1 << XENFEAT_DIRECT_MAPPED;
    } else {
        bits |= 1 << XENFEAT_NOT_DIRECT_MAPPED;
    }
    bits
}

/// Copies text into a field, cut where it is too long, with at least one NUL behind it.
fn copy_text(to: &mut [u8], text: &str) {
    let room = to.len().saturating_sub(1);
    for (slot, b) in to.iter_mut().zip(text.bytes().take(room)) {
        *slot = b;
    }
}

fn put_text<const N: usize>(cx: &Cx<'_>, at: u64, text: &str) -> Result<(), Errno> {
    let mut field = [0u8; N];
    copy_text(&mut field, text);
    cx.put(at, &field)
}

/// The form with a length: with a null buffer the length is asked for.
fn put_varbuf(cx: &Cx<'_>, arg: u64, text: &str) -> Ret {
    let len = text.len() as u64;
    if arg != 0 {
        let head: XenVarbuf = cx.get(arg)?;
        if u64::from(head.len) == 0 {
            return Err(Errno::EINVAL);
        }
        if u64::from(head.len) < len {
            return Err(Errno::ENOBUFS);
        }
        cx.write_bytes(
            arg.wrapping_add(size_of::<XenVarbuf>() as u64),
            text.as_bytes(),
        )?;
    }
    Ok(Outcome::Done(len))
}
