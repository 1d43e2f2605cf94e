//! `multicall`: a list of hypercalls in one.
//!
//! Between two entries the list can be interrupted: the call is then made again for the rest. An
//! entry that is not finished has its progress written back into its arguments.

use galvan_dom0_proto::errno::Errno;
use galvan_dom0_proto::xen::{HYPERVISOR_MULTICALL, MulticallEntry};

use super::{Args, OK, Outcome, Ret, dispatch};
use crate::guest_access::Cx;

/// Entries served before others get their turn.
const BATCH: u64 = 32;

/// `HYPERVISOR_multicall(list, count)`.
pub fn multicall(cx: &mut Cx<'_>, [list, count, ..]: Args) -> Ret {
    let count = u64::from(count as u32);
    for i in 0..count.min(BATCH) {
        let mut e: MulticallEntry = cx.get_at(list, i)?;
        let [a0, a1, a2, a3, a4, _] = e.args;
        let result = if e.op == u64::from(HYPERVISOR_MULTICALL) {
            // A list in a list would recurse.
            Err(Errno::EINVAL)
        } else {
            dispatch(cx, e.op, [a0, a1, a2, a3, a4])
        };
        let rest = |done: u64| {
            Outcome::Again([
                list.wrapping_add((i + done) * 64),
                count - i - done,
                0,
                0,
                0,
            ])
        };
        e.result = match result {
            Ok(Outcome::Done(v)) => v,
            Ok(Outcome::Yield(v) | Outcome::Block(v)) => {
                e.result = v;
                cx.put_at(list, i, &e)?;
                // The turn ends here; the rest of the list follows in the next.
                if i + 1 < count {
                    return Ok(rest(1));
                }
                return Ok(Outcome::Yield(0));
            }
            Ok(Outcome::Again(args)) => {
                let [b0, b1, b2, b3, b4] = args;
                e.args = [b0, b1, b2, b3, b4, e.args[5]];
                cx.put_at(list, i, &e)?;
                return Ok(rest(0));
            }
            Err(err) => err.as_ret(),
        };
        // Only the result is the caller's to see changed.
        let at = list.wrapping_add(i * 64 + 8);
        cx.put(at, &e.result)?;
    }
    if count > BATCH {
        return Ok(Outcome::Again([
            list.wrapping_add(BATCH * 64),
            count - BATCH,
            0,
            0,
            0,
        ]));
    }
    Ok(OK)
}
