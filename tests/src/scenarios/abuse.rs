//! Hostile guests: the micro-guest `abuse` of `tests/guests`, started by stock `xl`.

use anyhow::{Result, ensure};

use super::configure_abuse;
use super::guests::{gone, left};
use crate::Console;

/// What ends a guest, and what the hypervisor says of it.
const ENDS: &[(&str, &str)] = &[
    ("triple", "crashed: triple fault"),
    // Where the processor takes what it should refuse, its next entry refuses the guest.
    (
        "reserved",
        "(ABUSE reserved ok|crashed: the processor refused the guest state)",
    ),
    ("tables", "crashed: page tables where there is no memory"),
    ("nowhere", "crashed: execution where there is no memory"),
];
/// What leaves a guest there that will not end by itself.
const HANGS: &[&str] = &["asleep", "runaway"];
/// Guests made and destroyed one after the other.
const CYCLES: u32 = 10;

/// Starts the guest with `only=what`, and waits for a line of the log.
fn start(c: &mut Console, what: &str, line: &str) -> Result<String> {
    configure_abuse(c, "abuse", what, "")?;
    c.send("xl create -q /root/abuse.cfg\n")?;
    let found = c.expect(line, 180)?;
    Ok(found.last().cloned().unwrap_or_default())
}

/// A guest that asks for all that it must not get, guests that end badly, and one after the other;
/// dom0 is there afterwards, and all is free.
pub(super) fn guests(c: &mut Console) -> Result<()> {
    c.expect(r"root@galvan:~# ", 300)?;
    // QEMU's TCG has no exit for it.
    all(c, "(at once|with the next exit)")
}

/// The same on VT-x.
pub(super) fn guests_on_vtx(c: &mut Console) -> Result<()> {
    super::vtx::to_prompt(c)?;
    all(c, "(at once)")
}

/// `cr8` is when an interrupt comes that CR8 has held back.
fn all(c: &mut Console, cr8: &str) -> Result<()> {
    // The first guests make dom0 load and learn what it keeps; the comparison begins after them.
    for what in ["xapic", ""] {
        let failures = start(c, what, r"ABUSE-END (\d+)")?;
        gone(c, "abuse")?;
        ensure!(failures == "0", "the guest {what} had {failures} surprises");
    }
    c.run("sleep 2", 30)?;
    let before = left(c)?;
    let when = start(c, "priority", &format!("ABUSE priority: {cr8}"))?;
    gone(c, "abuse")?;
    for (what, line) in ENDS {
        start(c, what, line)?;
        gone(c, "abuse")?;
    }
    for what in HANGS {
        start(c, what, &format!(r"ABUSE {what}"))?;
        let list = c.run("sleep 2; xl list", 60)?;
        ensure!(list.contains("abuse"), "{what}: it is not there:\n{list}");
        c.run("xl destroy abuse", 60)?;
        gone(c, "abuse")?;
    }
    for _ in 0..CYCLES {
        start(c, "timers", r"ABUSE timers ok")?;
        gone(c, "abuse")?;
    }
    c.run("sleep 2", 30)?;
    let after = left(c)?;
    ensure!(
        before == after,
        "{before:?} before the guests, {after:?} after"
    );
    let list = c.run("xl list | tail -n +2 | wc -l", 60)?;
    ensure!(list.trim() == "1", "{list} domains are left");
    c.finding(&format!(
        "an interrupt held back by CR8 comes {when}; {} MiB and {} event channels before and after {} guests",
        after.free_mib,
        after.event_channels,
        2 + ENDS.len() + HANGS.len() + CYCLES as usize
    ));
    Ok(())
}
