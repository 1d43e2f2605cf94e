//! Figures of the whole system, counted from outside by a plugin for QEMU (`bench/counter`), which needs
//! nothing of the hypervisor: from the loader's entry to dom0's first instruction, and from `xl create` to
//! the guest's first, with the hypervisor's share.

use std::borrow::Borrow;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::machine::{self, Line};
use super::{BOOT_TARGET, Both, Table, profile};
use crate::run::Hypervisor;
use crate::{paths, sh, toolstack};

/// The place that both ways end at.
const GUEST: &str = "guest";
/// The entry of the hypervisor's UEFI application.
const LOADER: &str = "loader";
/// The program that is run where a count begins or ends: [`marker`].
const MARKER: &str = "marker";
/// How many guests are made; the least counts.
const GUESTS: usize = 3;

/// A function for scripts in dom0: how often Galvan has flushed TLBs. Stock Xen has no counters for `xenperf`.
pub const FLUSHES: &str = r#"
flushes() {
  xenperf 2> /dev/null | sed -n 's/^TLB flushes.*T= *\([0-9]*\).*/\1/p'
}
"#;

/// What dom0 runs, behind [`FLUSHES`]. The micro-guest with an operation it has not ends at once.
const SCRIPT: &str = r#"
cat > /root/first.cfg <<X
type="pvh"
name="first"
kernel="/root/bench"
extra="only=nothing"
memory=128
on_poweroff="destroy"
on_reboot="destroy"
on_crash="destroy"
X
for n in 1 2 3; do
  echo "MICRO-BEGIN $n"
  before=$(flushes)
  /root/mark
  xl create -q /root/first.cfg
  after=$(flushes)
  [ -z "$after" ] || echo "MICRO-FLUSHES $((after - before))"
  for i in $(seq 60); do
    xl domid first > /dev/null 2>&1 || break
    sleep 0.5
  done
done
echo "MICRO-DONE"
"#;

/// Options of both hypervisors for a dom0 with the toolstack.
pub const OPTIONS: &str =
    "com1=115200,8n1 console=com1 dom0_mem=1024M dom0_max_vcpus=1 loglvl=warning guest_loglvl=all";
const MEMORY: u32 = 2048;
const SILENCE: Duration = Duration::from_secs(500);

/// Instructions of one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// All.
    pub all: u64,
    /// The hypervisor's.
    pub own: u64,
    /// Entries into guests.
    pub entries: u64,
}

/// Both ways.
#[derive(Debug, Clone, Copy)]
pub struct Ways {
    /// From the loader's entry to dom0's first instruction.
    to_dom0: Way,
    /// From `xl create` to the guest's first instruction.
    to_guest: Way,
    /// TLB flushes during `xl create`, where the hypervisor counts them.
    flushes: Option<u64>,
}

impl Ways {
    /// Measures them.
    pub fn measure(name: &str, hypervisor: &Hypervisor, guest: &Path) -> Result<Self> {
        let to_dom0 = to_dom0(name, hypervisor, guest)?;
        let (to_guest, flushes) = to_guest(name, hypervisor, guest)?;
        Ok(Self {
            to_dom0,
            to_guest,
            flushes,
        })
    }
}

/// The table's lines.
pub fn rows<W: Borrow<Ways>>(table: &mut Table, both: &Both<W>) {
    let mut row = |what, figure: fn(&Ways) -> u64, target, exits| {
        let both = both.each(|w| figure(w.borrow()));
        table.row(what, Some(both.galvan), both.xen, target, exits);
    };
    row(
        "loader's entry to dom0's first instruction, millions",
        |w| w.to_dom0.all / 1_000_000,
        Some(BOOT_TARGET),
        &[],
    );
    let galvan = both.galvan.borrow();
    let counts: Vec<u64> = [galvan.to_guest.entries]
        .into_iter()
        .chain(galvan.flushes)
        .collect();
    row(
        "`xl create` to the guest's first instruction, thousands",
        |w| w.to_guest.all / 1000,
        None,
        &counts,
    );
    row(
        "of these the hypervisor's, thousands",
        |w| w.to_guest.own / 1000,
        None,
        &[],
    );
}

/// How the lines were made.
pub fn remark(both: &Both<&Ways>) -> String {
    let exits = both.each(|w| w.to_guest.entries.to_string());
    format!(
        "- the ways to dom0's and the guest's first instruction are counted from outside, by a plugin for QEMU\n  \
         (`bench/counter`) that tells the hypervisor's instructions from guests' by VMRUN and the instruction behind\n  \
         it; the way to dom0 starts at the entry of the hypervisor's UEFI application, that to the guest\n  \
         before `xl` is executed in dom0 (a ramdisk with Debian's toolstack; the micro-guest as PVH guest with\n  \
         128 MiB and no devices, the least of {GUESTS}) and has {} exits on Galvan, {} on Xen; the TLB flushes are those\n  \
         of the whole `xl create`, by Galvan's counters\n",
        exits.galvan,
        exits.xen.as_deref().unwrap_or("-")
    )
}

/// From the loader's entry to dom0's first instruction.
fn to_dom0(name: &str, hypervisor: &Hypervisor, guest: &Path) -> Result<Way> {
    let name = format!("boot-{name}");
    let loader = fs::read(&hypervisor.efi)
        .with_context(|| format!("cannot read {}", hypervisor.efi.display()))?;
    let loader = pe_entry(&loader).context("the UEFI application has no entry")?;
    let contents = hypervisor.contents(super::OPTIONS, "only=nothing", guest, None);
    let marks = [(LOADER, loader), (GUEST, entry_of(guest)?)];
    let hits = counted(&name, &contents, &marks, |line| line.contains("BENCH-END"))?;
    let ways = ways(&hits, LOADER);
    let way = ways.first().copied();
    way.with_context(|| format!("{name}: the counter has seen {hits:?}"))
}

/// From `xl create` to the guest's first instruction.
fn to_guest(name: &str, hypervisor: &Hypervisor, guest: &Path) -> Result<(Way, Option<u64>)> {
    let (text, flushes) = created(&format!("create-{name}"), hypervisor, guest, None)?;
    let hits: Vec<Hit> = text.lines().filter_map(Hit::parse).collect();
    let ways = ways(&hits, MARKER);
    ensure!(
        ways.len() == GUESTS,
        "{name}: the counter has seen {hits:?}"
    );
    let least = ways.into_iter().min_by_key(|way| way.all);
    Ok((least.context("no guest")?, flushes))
}

/// Prints in which of the hypervisor's functions the instructions of the last `xl create` are.
pub fn profile_create(hypervisor: &Hypervisor, guest: &Path) -> Result<()> {
    let symbols = profile::Symbols::of_hypervisor()?;
    let code = symbols.range().context("the hypervisor has no code")?;
    let (text, _) = created("create-profile", hypervisor, guest, Some(code))?;
    let lines: Vec<&str> = text.lines().collect();
    let start = lines.iter().rposition(|l| l.starts_with(MARKER));
    let steps = lines[start.context("the counter has seen no guest made")? + 1..]
        .iter()
        .map_while(|line| line.strip_prefix('@')?.split_once(' '))
        .filter_map(|(at, n)| Some((u64::from_str_radix(at, 16).ok()?, n.parse().ok()?)));
    symbols.print(steps, 1);
    Ok(())
}

/// What the counter writes while guests are created, and the TLB flushes of one.
fn created(
    name: &str,
    hypervisor: &Hypervisor,
    guest: &Path,
    code: Option<Range<u64>>,
) -> Result<(String, Option<u64>)> {
    let bench = fs::read(guest)?;
    let (program, place) = marker();
    let script = [FLUSHES, SCRIPT].concat();
    let dom0 = machine::ramdisk(
        "create",
        &[
            ("root/micro.sh", 0o755, script.as_bytes()),
            ("root/bench", 0o755, &bench),
            ("root/mark", 0o755, &program),
        ],
    )?;
    let cmdline = format!("{} micro=start", toolstack::CMDLINE);
    let contents = hypervisor.contents(OPTIONS, &cmdline, &dom0.kernel, Some(&dom0.initrd));
    let marks = [(MARKER, place), (GUEST, entry_of(guest)?)];
    let mut flushes = None;
    let text = counter(name, &contents, &marks, code, |line| {
        let counted = line.trim().strip_prefix("MICRO-FLUSHES ");
        if let Some(n) = counted.and_then(|n| n.parse().ok()) {
            flushes = Some(flushes.map_or(n, |least: u64| least.min(n)));
        }
        line.contains("MICRO-DONE")
    })?;
    Ok((text, flushes))
}

/// Boots `contents` with the counter until a line is the `last`: what it has written.
fn counter(
    name: &str,
    contents: &crate::esp::Contents,
    marks: &[(&str, Place)],
    code: Option<Range<u64>>,
    mut last: impl FnMut(&str) -> bool,
) -> Result<String> {
    let step = sh::Step::start(format!("counting instructions: {name}"));
    let out = paths::out().join(format!("bench-{name}.count"));
    let mut plugin = format!("file={},out={}", plugin()?.display(), out.display());
    for (name, place) in marks {
        plugin.push_str(&format!(",mark={name}:{place}"));
    }
    if let Some(code) = code {
        plugin.push_str(&format!(",code={:x}:{:x}", code.start, code.end));
    }
    let extra = ["-plugin".to_owned(), plugin];
    let line = |line: &str| match last(line) {
        true => Line::Last,
        false => Line::More,
    };
    machine::run(name, contents, MEMORY, SILENCE, &extra, line)?;
    let text = fs::read_to_string(&out)
        .with_context(|| format!("the counter has not written {}", out.display()))?;
    step.done();
    Ok(text)
}

/// The same, and the places that it has seen.
fn counted(
    name: &str,
    contents: &crate::esp::Contents,
    marks: &[(&str, Place)],
    last: impl FnMut(&str) -> bool,
) -> Result<Vec<Hit>> {
    let text = counter(name, contents, marks, None, last)?;
    Ok(text.lines().filter_map(Hit::parse).collect())
}

/// Boots `contents`, in which [`marker`] is executed before and after what is to be counted, until a line is
/// the `last`: what each was.
pub fn between_markers(
    name: &str,
    contents: &crate::esp::Contents,
    last: impl FnMut(&str) -> bool,
) -> Result<Vec<Way>> {
    let hits = counted(name, contents, &[(MARKER, marker().1)], last)?;
    Ok(hits.chunks_exact(2).map(|two| two[0].to(&two[1])).collect())
}

/// Builds the plugin.
fn plugin() -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(paths::root()).args([
        "build",
        "--quiet",
        "--release",
        "-p",
        "galvan-counter",
    ]);
    sh::through(&mut cargo).context("the counter for QEMU does not build")?;
    Ok(paths::target().join("release/libgalvan_counter.so"))
}

/// A place in the code, as the counter has it: the offset in its page, and the bytes there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    offset: u64,
    bytes: Vec<u8>,
}

impl Place {
    /// So many bytes are compared.
    const LENGTH: usize = 16;

    /// The place at an address, of a file that is loaded in whole pages.
    fn new(address: u64, bytes: &[u8]) -> Self {
        Self {
            offset: address & 0xfff,
            bytes: bytes.iter().copied().take(Self::LENGTH).collect(),
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}:", self.offset)?;
        self.bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// A place that was reached, and what had been executed till then.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hit {
    name: String,
    at: Way,
}

impl Hit {
    /// Reads a line of the counter.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let name = words.next()?.to_owned();
        let mut number = || words.next()?.parse().ok();
        let at = Way {
            all: number()?,
            own: number()?,
            entries: number()?,
        };
        Some(Self { name, at })
    }

    /// The way from here.
    fn to(&self, end: &Self) -> Way {
        Way {
            all: end.at.all - self.at.all,
            own: end.at.own - self.at.own,
            entries: end.at.entries - self.at.entries,
        }
    }
}

/// The ways from `start` to the next guest's first instruction.
fn ways(hits: &[Hit], start: &str) -> Vec<Way> {
    hits.windows(2)
        .filter(|two| two[0].name == start && two[1].name == GUEST)
        .map(|two| two[0].to(&two[1]))
        .collect()
}

fn entry_of(guest: &Path) -> Result<Place> {
    let file = fs::read(guest).with_context(|| format!("cannot read {}", guest.display()))?;
    elf_entry(&file).context("the micro-guest has no entry")
}

/// The number of so many bytes at an offset.
fn number(file: &[u8], at: usize, size: usize) -> Option<u64> {
    let bytes = file.get(at..at.checked_add(size)?)?;
    Some(bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
}

/// The entry of a 64-bit ELF file (System V ABI, "Object Files").
fn elf_entry(file: &[u8]) -> Option<Place> {
    let entry = number(file, 24, 8)?;
    let headers = number(file, 32, 8)? as usize;
    let (size, count) = (number(file, 54, 2)? as usize, number(file, 56, 2)? as usize);
    (0..count).find_map(|n| {
        let header = headers + n * size;
        let is_load = number(file, header, 4)? == 1;
        let [offset, address] = [8, 16].map(|at| number(file, header + at, 8));
        let into = entry.checked_sub(address?)?;
        let inside = is_load && into < number(file, header + 32, 8)?;
        let from = usize::try_from(offset? + into).ok()?;
        inside.then(|| Place::new(entry, file.get(from..).unwrap_or_default()))
    })
}

/// The entry of a PE file (Microsoft's "PE Format").
fn pe_entry(file: &[u8]) -> Option<Place> {
    let header = number(file, 0x3c, 4)? as usize;
    let sections = number(file, header + 6, 2)? as usize;
    let optional = header + 24;
    let first = optional + number(file, header + 20, 2)? as usize;
    let entry = number(file, optional + 16, 4)?;
    (0..sections).find_map(|n| {
        let section = first + n * 40;
        let [address, size, offset] = [12, 16, 20].map(|at| number(file, section + at, 4));
        let into = entry.checked_sub(address?)?;
        let from = usize::try_from(offset? + into).ok()?;
        (into < size?).then(|| Place::new(entry, file.get(from..).unwrap_or_default()))
    })
}

/// A program for Linux that does nothing but be told from others, and the place to watch for.
pub fn marker() -> (Vec<u8>, Place) {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    // movabs rax, imm64; xor edi, edi; mov eax, 60 (exit); syscall
    let code = b"\x48\xb8galvan\x27s\x31\xff\xb8\x3c\0\0\0\x0f\x05";
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [BASE + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    // Flags; sizes of the headers: one of the program, none of sections.
    file.extend([0; 4]);
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // To be loaded, read and executed.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let size = HEADERS + code.len() as u64;
    for word in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    (file, Place::new(BASE + HEADERS, code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_is_an_elf_file_whose_entry_is_its_place() {
        let (program, place) = marker();
        assert_eq!(program.len(), 120 + 19);
        assert_eq!(elf_entry(&program), Some(place.clone()));
        assert_eq!(place.to_string(), "78:48b867616c76616e277331ffb83c0000");
    }

    #[test]
    fn a_files_entry_is_found_in_its_section() {
        let mut pe = vec![0; 0x400];
        pe[0x3c] = 0x80;
        pe[0x86] = 2;
        pe[0x94] = 0x40;
        // The entry, and two sections, the second of which has it.
        pe[0xa8..0xac].copy_from_slice(&0x2010u32.to_le_bytes());
        for (at, address, offset) in [(0xd8, 0x1000u32, 0x200u32), (0x100, 0x2000, 0x300)] {
            pe[at + 12..at + 16].copy_from_slice(&address.to_le_bytes());
            pe[at + 16..at + 20].copy_from_slice(&0x100u32.to_le_bytes());
            pe[at + 20..at + 24].copy_from_slice(&offset.to_le_bytes());
        }
        pe[0x310] = 0xfc;
        let place = pe_entry(&pe).unwrap();
        assert_eq!((place.offset, place.bytes[0]), (0x10, 0xfc));
        assert_eq!(pe_entry(&pe[..0x100]), None);
        assert_eq!(elf_entry(b"\x7fELF"), None);
    }

    #[test]
    fn a_way_goes_from_its_start_to_the_next_guest() {
        let text = "guest 5 5 0\nmarker 10 4 1\nmarker 20 5 2\nguest 90 30 9\nbad\nguest 95 31 9\n";
        let hits: Vec<Hit> = text.lines().filter_map(Hit::parse).collect();
        assert_eq!(hits.len(), 5);
        let way = Way {
            all: 70,
            own: 25,
            entries: 7,
        };
        assert_eq!(ways(&hits, MARKER), [way]);
    }
}
