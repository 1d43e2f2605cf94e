//! Arrays of policies on their way to the toolstack.

use galvan_dom0_proto::GuestHandle;
use galvan_dom0_proto::errno::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::guest_access::Cx;

/// Writes all of `items` into an array with room for `room`, and gives their number. ENOBUFS if that
/// is too little.
pub(super) fn put_all<T: IntoBytes + Immutable>(
    cx: &Cx<'_>,
    to: GuestHandle<T>,
    room: u32,
    items: &[T],
) -> Result<u32, Errno> {
    let n = u32::try_from(items.len()).map_err(|_| Errno::ENOBUFS)?;
    if n > room {
        return Err(Errno::ENOBUFS);
    }
    cx.write_bytes(to.addr(), items.as_bytes())?;
    Ok(n)
}
