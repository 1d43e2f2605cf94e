//! Faults and load: guests by the hundred, killed programs, guests at the end of their disks' and
//! networks' speed, and processors that all want. They take minutes each: by `cargo xtask test --load`.

use anyhow::{Context, Result, ensure};

use super::guests::{Left, gone, left, log_in};
use super::{configure_abuse, leave, on_small, power_off, to_prompt};
use crate::{Console, Scenario, Start};

/// All of them.
pub const ALL: &[Scenario] = &[
    Scenario::new(
        "load-cycles",
        "200 guests one after the other; memory, event channels and xenstore are as before",
        Start::Toolstack,
        2400,
        cycles,
    )
    .with_micro_guests(),
    Scenario::new(
        "load-killed",
        "xl and xenconsoled killed in the middle; nothing is lost that can be destroyed",
        Start::Toolstack,
        1800,
        killed,
    )
    .with_micro_guests(),
    Scenario::new(
        "load-backend",
        "a guest's disk and its qemu are taken away while it writes; it can be destroyed",
        Start::Debian,
        1200,
        backend,
    ),
    Scenario::new(
        "load-destroy",
        "a guest destroyed while its disk and network are busy, again and again",
        Start::Toolstack,
        1800,
        destroy,
    ),
    Scenario::new(
        "load-crashes",
        "a guest that crashes and is restarted for a minute leaves everything else as it was",
        Start::Toolstack,
        900,
        crashes,
    )
    .with_micro_guests(),
    Scenario::new(
        "load-balloon",
        "dom0 gives away most of its memory, which guests get, and takes it back",
        Start::Toolstack,
        900,
        balloon,
    ),
    Scenario::new(
        "load-shares",
        "8 busy guests on 2 processors run by their weights and leave no processor idle",
        Start::Toolstack,
        900,
        shares,
    )
    .with_micro_guests(),
];

/// What xenstore knows: how many entries.
fn entries(c: &mut Console) -> Result<u64> {
    let lines = c.run("xenstore-ls | wc -l", 60)?;
    lines.trim().parse().with_context(|| lines.clone())
}

/// Waits until what is left is what was left before: the last event channels of a guest go with
/// dom0's own threads.
fn all_back(c: &mut Console, before: &Left) -> Result<()> {
    let mut after = left(c)?;
    for _ in 0..10 {
        if after == *before {
            return Ok(());
        }
        c.run("sleep 1", 30)?;
        after = left(c)?;
    }
    ensure!(after == *before, "{before:?} before, {after:?} after");
    Ok(())
}

/// From power-on to the shell, with one guest made and gone: dom0 has loaded and learned what it
/// keeps.
fn to_first(c: &mut Console) -> Result<()> {
    c.expect(r"root@galvan:~# ", 300)?;
    c.run("xl create -q /etc/xen/small.cfg", 240)?;
    c.run("sleep 5; xl destroy small", 120)?;
    gone(c, "small")?;
    c.run("sleep 2", 30).map(|_| ())
}

fn cycles(c: &mut Console) -> Result<()> {
    /// Guests that end by themselves, guests that are destroyed, and guests with a disk and a network.
    const BY_THEMSELVES: u32 = 90;
    const DESTROYED: u32 = 90;
    const WITH_DEVICES: u32 = 20;
    to_first(c)?;
    configure_abuse(c, "short", "timers", "")?;
    configure_abuse(c, "long", "asleep", "")?;
    let before = left(c)?;
    let known = entries(c)?;
    for (what, times, cycle) in [
        (
            "guests that end",
            BY_THEMSELVES,
            "xl create -q short.cfg && while xl domid short >/dev/null 2>&1; do usleep 100000; done",
        ),
        (
            "guests that are destroyed",
            DESTROYED,
            "xl create -q long.cfg && xl destroy long",
        ),
        (
            "guests with devices",
            WITH_DEVICES,
            "xl create -q /etc/xen/small.cfg && xl destroy small",
        ),
    ] {
        // In pieces, so that one that hangs is seen.
        let mut done = 0;
        while done < times {
            let now = 10.min(times - done);
            c.run(
                &format!("for i in $(seq {now}); do {cycle} || break; done; [ $i = {now} ]"),
                400,
            )
            .with_context(|| format!("{what}, after {done}"))?;
            done += now;
        }
        all_back(c, &before).with_context(|| what)?;
    }
    let after = entries(c)?;
    ensure!(
        known == after,
        "xenstore had {known} entries and has {after}"
    );
    let ids = c.run("xl create -q long.cfg; xl domid long; xl destroy long", 60)?;
    c.finding(&format!(
        "{} MiB, {} event channels and {known} entries in xenstore before and after {} guests",
        before.free_mib,
        before.event_channels,
        ids.trim(),
    ));
    let id: u32 = ids.trim().parse()?;
    ensure!(
        id > BY_THEMSELVES + DESTROYED + WITH_DEVICES,
        "the next guest's id is {id}"
    );
    Ok(())
}

fn killed(c: &mut Console) -> Result<()> {
    to_first(c)?;
    let before = left(c)?;
    // xl, at moments that are spread over all of its work.
    for tenths in (1..=24).step_by(2) {
        c.run(
            &format!(
                "xl create -q /etc/xen/small.cfg >/dev/null 2>&1 & p=$!; usleep {}; kill -9 $p; wait $p 2>/dev/null; true",
                tenths * 100_000
            ),
            60,
        )?;
        // The scripts it had started come to their end.
        c.run("sleep 1; killall -9 xl 2>/dev/null; true", 30)?;
        c.run(
            "for i in $(seq 20); do id=$(xl list | awk 'NR > 2 { n = NF; print $(n - 4) }'); [ \"$id\" ] || break; for d in $id; do xl destroy $d 2>/dev/null; done; sleep 0.2; done; true",
            120,
        )?;
        let list = c.run("xl list | tail -n +3", 30)?;
        ensure!(
            list.trim().is_empty(),
            "killed after {tenths}/10 s, this stays:\n{list}"
        );
        all_back(c, &before).with_context(|| format!("xl killed after {tenths}/10 s"))?;
    }
    // A guest that is made as if nothing had been.
    c.run("xl create -q /etc/xen/small.cfg", 240)?;
    on_small(c)?;
    leave(c)?;

    // xenconsoled, while the guest says more than its ring holds.
    c.send("xl console small\n")?;
    c.send("for i in $(seq 20000); do echo line-$i; done\n")?;
    c.expect(r"line-100\n", 120)?;
    leave(c)?;
    c.run("kill -9 $(cat /run/xenconsoled.pid); sleep 2", 30)?;
    c.run(
        "xenconsoled --pid-file=/run/xenconsoled.pid --log=guest --log-dir=/var/log/xen; sleep 2",
        30,
    )?;
    c.send("xl console small\n")?;
    // The prompt comes by itself.
    c.expect(r"line-20000\n", 400)?;
    c.expect(r"root@small:~# ", 60)?;
    leave(c)?;
    c.run("xl destroy small", 120)?;
    gone(c, "small")?;
    // The new one holds an event channel of its own as the old one did.
    all_back(c, &before).context("xenconsoled killed")?;
    Ok(())
}

fn backend(c: &mut Console) -> Result<()> {
    to_prompt(c)?;
    c.run("xl destroy demo", 120)?;
    gone(c, "demo")?;
    c.run("qemu-img create -q -f qcow2 /root/b.qcow2 256M", 60)?;
    c.run(
        r#"sed 's,^disk.*,disk = [ "format=raw\,vdev=xvda\,access=rw\,target=/var/lib/galvan/demo.img"\, "format=qcow2\,vdev=xvdb\,access=rw\,target=/root/b.qcow2" ],' /etc/xen/demo.cfg > /root/q.cfg; grep qcow2 /root/q.cfg"#,
        30,
    )?;
    // dom0 has met qemu.
    c.run(
        "xl create -q /root/q.cfg && sleep 2 && xl destroy demo",
        120,
    )?;
    gone(c, "demo")?;
    let before = left(c)?;
    for kill in [
        // dom0 has one of its own.
        "pkill -9 -f -- \"-xen-domid $(xl domid demo) \"",
        "echo $(ls /sys/bus/xen-backend/drivers/vbd | grep ^vbd-) > /sys/bus/xen-backend/drivers/vbd/unbind",
    ] {
        c.run("xl create -q /root/q.cfg", 120)?;
        log_in(c, "demo")?;
        c.send("for d in /root/x /dev/xvdb; do (while dd if=/dev/zero of=$d bs=64k count=1500 oflag=direct 2>/dev/null; do :; done) & done; echo dd-'runs'\n")?;
        c.expect(r"dd-runs\n", 60)?;
        leave(c)?;
        c.run(&format!("sleep 3; {kill}"), 60)?;
        c.run("sleep 3; xl list", 60)?;
        c.run("xl destroy demo", 120)?;
        gone(c, "demo")?;
        all_back(c, &before).with_context(|| kill.to_owned())?;
    }
    power_off(c)
}

fn destroy(c: &mut Console) -> Result<()> {
    const TIMES: u32 = 10;
    to_first(c)?;
    c.run(
        "dd if=/dev/urandom of=/srv/f bs=1M count=16 2>/dev/null; httpd -p 10.9.0.1:80 -h /srv",
        60,
    )?;
    let before = left(c)?;
    for n in 0..TIMES {
        c.run("xl create -q /etc/xen/small.cfg", 240)?;
        on_small(c)?;
        c.send("(while :; do wget -q -O - http://10.9.0.1/f > /dev/null; done) & (while :; do dd if=/dev/zero of=/dev/xvda bs=256k count=200 conv=fsync 2>/dev/null; done) & (while :; do dd if=/dev/xvda of=/dev/null bs=64k iflag=direct 2>/dev/null; done) & echo load-'runs'\n")?;
        c.expect(r"load-runs\n", 60)?;
        leave(c)?;
        c.run(&format!("sleep {}.{n}; xl destroy small", 1 + n % 3), 120)?;
        gone(c, "small")?;
        all_back(c, &before).with_context(|| format!("destroyed the {}. time", n + 1))?;
    }
    c.finding(&format!(
        "{} MiB free before and after {TIMES} times",
        before.free_mib
    ));
    Ok(())
}

fn crashes(c: &mut Console) -> Result<()> {
    to_first(c)?;
    configure_abuse(c, "falls", "triple", "'on_crash=\"restart\"'")?;
    let before = left(c)?;
    c.run("xl create -q /root/falls.cfg", 60)?;
    let first = c.run("sleep 60; xl dmesg | grep -c 'triple fault'", 120)?;
    // Its xl, which would make the next one, and then what there is of it.
    c.run("killall -9 xl; sleep 1; for i in $(seq 20); do xl list | awk 'NR > 2 { print $(NF - 4) }' | xargs -r -n 1 xl destroy 2>/dev/null; [ $(xl list | wc -l) = 2 ] && break; sleep 0.5; done; [ $(xl list | wc -l) = 2 ]", 60)?;
    let crashes: u32 = first.trim().parse().with_context(|| first.clone())?;
    ensure!(crashes >= 5, "{crashes} crashes in a minute");
    all_back(c, &before)?;
    c.run("xl create -q /etc/xen/small.cfg", 240)?;
    on_small(c)?;
    c.finding(&format!(
        "{crashes} crashes in a minute, each with its line in xl dmesg"
    ));
    Ok(())
}

fn balloon(c: &mut Console) -> Result<()> {
    to_first(c)?;
    let memory = "xl list 0 | awk 'END { print $3 }'";
    let at_first: u64 = c.run(memory, 30)?.trim().parse()?;
    let before = left(c)?;
    // Little less, and its kernel kills the toolstack: the ramdisk takes 200 MiB.
    c.run("xl mem-set 0 480", 60)?;
    c.run(
        &format!("for i in $(seq 60); do [ $({memory}) -le 480 ] && break; sleep 1; done; [ $({memory}) -le 480 ]"),
        120,
    )?;
    let low = left(c)?;
    ensure!(
        low.free_mib + 2 >= before.free_mib + at_first - 480,
        "{before:?} before, {low:?} after {} MiB were given away",
        at_first - 480
    );
    c.run("xl create -q /etc/xen/small.cfg", 240)?;
    on_small(c)?;
    c.run("dd if=/dev/urandom of=f bs=1M count=16 2>/dev/null; dd if=f of=/dev/xvda conv=fsync 2>/dev/null; cmp -n 16777216 f /dev/xvda 2>&1; sha256sum < f", 120)?;
    leave(c)?;
    c.run("xl destroy small", 120)?;
    gone(c, "small")?;
    all_back(c, &low).context("a guest while dom0 is small")?;
    c.run(&format!("xl mem-set 0 {at_first}"), 60)?;
    c.run(
        &format!("for i in $(seq 60); do [ $({memory}) -ge {at_first} ] && break; sleep 1; done; [ $({memory}) -ge {at_first} ]"),
        120,
    )?;
    // All but the tables of small pages that have taken the place of large ones: 4 KiB for 2 MiB.
    let after = left(c)?;
    ensure!(
        after.event_channels == before.event_channels
            && after.free_mib + (at_first - 480) / 512 + 1 >= before.free_mib,
        "{before:?} before, {after:?} after"
    );
    c.finding(&format!(
        "dom0 from {at_first} to 480 MiB and back; {} MiB free before and {} after",
        before.free_mib, after.free_mib
    ));
    Ok(())
}

/// Seconds that each of the guests `a1` to `a8` has run.
fn times(c: &mut Console) -> Result<Vec<f64>> {
    let list = c.run("xl list | awk '/^a[1-8] / { print $1, $NF }' | sort", 60)?;
    list.lines()
        .map(|line| {
            let time = line.split_whitespace().nth(1).context("no time")?;
            Ok(time.parse::<f64>()?)
        })
        .collect::<Result<Vec<f64>>>()
        .with_context(|| list.clone())
}

fn shares(c: &mut Console) -> Result<()> {
    /// Half of the guests have the usual weight, the others twice that.
    const WEIGHT: u32 = 512;
    const SECONDS: u32 = 60;
    to_first(c)?;
    let before = left(c)?;
    for n in 1..=8 {
        configure_abuse(c, &format!("a{n}"), "runaway", "")?;
        c.run(&format!("xl create -q /root/a{n}.cfg"), 120)?;
        if n % 2 == 0 {
            c.run(&format!("xl sched-credit2 -d a{n} -w {WEIGHT}"), 60)?;
        }
    }
    let weights = c.run("xl sched-credit2 | grep -c ' 512 '", 60)?;
    ensure!(weights.trim() == "4", "{weights} guests have their weight");
    c.run("sleep 5", 60)?;
    let first = times(c)?;
    c.run(&format!("sleep {SECONDS}"), 300)?;
    let last = times(c)?;
    ensure!(first.len() == 8 && last.len() == 8, "{first:?} {last:?}");
    let ran: Vec<f64> = first.iter().zip(&last).map(|(f, l)| l - f).collect();
    let sum: f64 = ran.iter().sum();
    // dom0 asks, sleeps and asks again, which takes it longer than it sleeps.
    ensure!(
        sum >= f64::from(2 * SECONDS) * 0.95,
        "the guests ran {sum:.1} s in {SECONDS} s on two processors: {ran:?}"
    );
    // A share of (256 or 512) / (4 * 256 + 4 * 512).
    for (n, ran) in ran.iter().enumerate() {
        let part = if n % 2 == 1 { 2.0 } else { 1.0 } / 12.0;
        let share = ran / sum;
        ensure!(
            (share / part - 1.0).abs() < 0.1,
            "a{} had {:.1}% instead of {:.1}%",
            n + 1,
            share * 100.0,
            part * 100.0
        );
    }
    c.finding(&format!(
        "of {sum:.1} s, in %: {}",
        ran.iter()
            .map(|r| format!("{:.1}", r / sum * 100.0))
            .collect::<Vec<_>>()
            .join(" ")
    ));
    for n in 1..=8 {
        c.run(&format!("xl destroy a{n}"), 120)?;
    }
    gone(c, "a8")?;
    all_back(c, &before)
}
