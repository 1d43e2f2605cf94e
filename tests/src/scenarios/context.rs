//! States that no processor runs: the micro-guest `context` of `tests/guests`, started as dom0.

use anyhow::{Result, ensure};

use crate::Console;

/// Each context that cannot be is refused, and the log says why; the guest sees nothing amiss.
pub(super) fn refusals(c: &mut Console) -> Result<()> {
    c.expect(r"CONTEXT-BEGIN", 240)?;
    let all = c.expect(r"(?s)(.*)CONTEXT refused (\d+)\n", 120)?;
    let (log, count) = (&all[1], all[2].parse::<usize>()?);
    let named: Vec<&str> = log
        .lines()
        .filter(|l| l.contains("save record"))
        .filter_map(|l| l.split_once("refused: "))
        .map(|(_, why)| why.trim())
        .collect();
    ensure!(
        named.len() == count && count > 50,
        "{count} contexts were refused, and {} reasons are in the log",
        named.len()
    );
    for check in [
        "CR0.PG without CR0.PE",
        "CR3 reserved bits",
        "EFER.LMA against EFER.LME and CR0.PG",
        "RFLAGS reserved bits",
        "RFLAGS.VM outside protected mode",
        "address not canonical",
        "CS.L and CS.D",
        "RIP",
        "PAT",
    ] {
        ensure!(named.contains(&check), "nothing was refused for {check}");
    }
    let end = c.expect(r"CONTEXT-END (\d+)\n", 60)?;
    ensure!(end[1] == "0", "the guest had {} surprises", end[1]);
    let mut kinds = named.clone();
    kinds.sort_unstable();
    kinds.dedup();
    c.finding(&format!(
        "{count} contexts refused by {} checks",
        kinds.len()
    ));
    c.expect(r"dom0 has shut down: powering off", 30)?;
    Ok(())
}
