//! Compares every size, offset and constant of this crate with the C headers.
//!
//! The headers are those of `$XEN_HEADERS` (default `/usr/include/xen`, package `libxen-dev`). A C file
//! of static assertions is generated from the tables in `galvan_dom0_proto::layout` and given to `cc`,
//! once for 64-bit and once for 32-bit callers. Without compiler or headers the test says so and
//! passes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use galvan_dom0_proto::layout::{self, AbiConst, AbiStruct};

/// Headers to include, in order. Those that do not exist are left out.
const HEADERS: &[&str] = &[
    "xen.h",
    "errno.h",
    "features.h",
    "version.h",
    "memory.h",
    "event_channel.h",
    "grant_table.h",
    "sched.h",
    "vcpu.h",
    "physdev.h",
    "platform.h",
    "domctl.h",
    "sysctl.h",
    "vm_event.h",
    "elfnote.h",
    "hypfs.h",
    "arch-x86/cpuid.h",
    "arch-x86/hvm/start_info.h",
    "hvm/params.h",
    "hvm/hvm_op.h",
    "hvm/hvm_vcpu.h",
    "hvm/hvm_info_table.h",
    "hvm/dm_op.h",
    "hvm/ioreq.h",
    "hvm/save.h",
    "io/console.h",
    "io/xs_wire.h",
    "io/ring.h",
    "io/protocols.h",
    "io/xenbus.h",
];

fn headers() -> Option<PathBuf> {
    let dir = env::var_os("XEN_HEADERS").map_or_else(|| "/usr/include/xen".into(), PathBuf::from);
    if cfg!(not(target_arch = "x86_64")) {
        println!("skipped: the layouts are those of x86");
        return None;
    }
    if !dir.join("xen.h").is_file() {
        println!(
            "skipped: no Xen headers in {}; install libxen-dev or set XEN_HEADERS",
            dir.display()
        );
        return None;
    }
    if Command::new("cc").arg("--version").output().is_err() {
        println!("skipped: no C compiler (cc)");
        return None;
    }
    // The C side includes <xen/...>.
    Some(dir.canonicalize().expect("the directory was just found"))
}

/// Every name that the headers define as a constant, by its spelling in capitals.
fn c_names(dir: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut names: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for header in HEADERS.iter().chain(&[
        "arch-x86/xen.h",
        "arch-x86/hvm/save.h",
        "arch-x86/xen-x86_64.h",
    ]) {
        let Ok(text) = fs::read_to_string(dir.join(header)) else {
            continue;
        };
        let mut in_enum = false;
        for line in text.lines() {
            let line = line.trim();
            in_enum |= line.contains("enum ") && !line.contains(';');
            let define = line
                .strip_prefix('#')
                .and_then(|l| l.trim().strip_prefix("define "));
            let found = if let Some(rest) = define {
                let rest = rest.trim_start();
                let end = rest
                    .find(|c: char| !c.is_alphanumeric() && c != '_')
                    .unwrap_or(rest.len());
                // A macro with arguments, or an include guard, is no constant.
                (rest[end..].starts_with([' ', '\t'])).then(|| &rest[..end])
            } else if let Some(rest) = line.strip_prefix("XEN_ERRNO(") {
                let name = rest.split(',').next().unwrap_or("");
                names
                    .entry(format!("XEN_{name}"))
                    .or_default()
                    .insert(format!("XEN_{name}"));
                None
            } else if let Some(rest) = line.strip_prefix("XEN_CPUFEATURE(") {
                let name = rest.split(',').next().unwrap_or("");
                let name = format!("XEN_X86_FEATURE_{name}");
                names.entry(name.clone()).or_default().insert(name);
                None
            } else if in_enum {
                let end = line.find([',', ' ', '=']).unwrap_or(line.len());
                Some(&line[..end])
            } else {
                None
            };
            in_enum &= !line.contains('}');
            if let Some(name) = found.filter(|n| !n.is_empty()) {
                names
                    .entry(name.to_uppercase())
                    .or_default()
                    .insert(name.to_owned());
            }
        }
    }
    names
}

/// The value of a plain decimal or hexadecimal `#define`.
fn define(dir: &Path, header: &str, name: &str) -> Option<u32> {
    let text = fs::read_to_string(dir.join(header)).ok()?;
    let line = text
        .lines()
        .find(|l| l.starts_with(&format!("#define {name} ")))?;
    let value = line.split_whitespace().nth(2)?;
    match value.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => value.parse().ok(),
    }
}

/// Gives a translation unit to the C compiler; `Err` is what it printed.
fn compile(dir: &Path, tag: &str, body: &str, extra: &[&str]) -> Result<(), String> {
    let mut text = String::from(
        "#include <stddef.h>\n#include <stdint.h>\n#define __XEN_TOOLS__ 1\n\
         #define memcpy __builtin_memcpy\n#define xen_mb() ((void)0)\n",
    );
    for header in HEADERS.iter().filter(|h| dir.join(h).is_file()) {
        writeln!(text, "#include \"{}\"", dir.join(header).display()).unwrap();
    }
    // The ring macros make types only when used; entries of no size leave the head.
    text.push_str("struct none {};\nDEFINE_RING_TYPES(galvan, struct none, struct none);\n");
    text.push_str(body);
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("abi_check_{tag}.c"));
    fs::write(&file, text).unwrap();
    let out = Command::new("cc")
        .args([
            "-std=gnu11",
            "-fsyntax-only",
            "-ffreestanding",
            "-w",
            "-fmax-errors=0",
        ])
        .args(extra)
        .arg(&file)
        .output()
        .expect("cc was there a moment ago");
    if out.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&out.stderr).into_owned())
}

/// Padding by either language's name for it.
fn is_padding(name: &str) -> bool {
    [
        "_pad", "pad0", "pad1", "reserved", "padding", "rsvd", "_rsvd",
    ]
    .iter()
    .any(|p| name.starts_with(p))
}

fn assertions(structs: &[&[AbiStruct]], version: u32, body: &mut String) -> usize {
    let mut count = 0;
    for s in structs.iter().flat_map(|t| t.iter()) {
        if s.c_type.is_empty() || !(s.versions.0..=s.versions.1).contains(&version) {
            continue;
        }
        count += 1;
        let (c, rust) = (s.c_type, s.name);
        writeln!(
            body,
            "_Static_assert(sizeof({c}) == {}, \"size of {rust}\");",
            s.size
        )
        .unwrap();
        for f in s
            .fields
            .iter()
            .filter(|f| !f.name.is_empty() && !is_padding(f.name))
        {
            count += 1;
            writeln!(
                body,
                "_Static_assert(offsetof({c}, {n}) == {}, \"offset of {rust}.{n}\");\n\
                 _Static_assert(sizeof((({c} *)0)->{n}) == {}, \"size of {rust}.{n}\");",
                f.offset,
                f.size,
                n = f.name
            )
            .unwrap();
        }
    }
    count
}

/// Constants that only one of the two generations of headers has.
fn may_be_absent(name: &str) -> bool {
    const NAMES: &[&str] = &[
        // Since 4.18.
        "VCPUOP_REGISTER_RUNSTATE_PHYS_AREA",
        "VCPUOP_REGISTER_VCPU_TIME_PHYS_AREA",
        "XENVER_EXTRAVERSION2",
        "XENVER_CAPABILITIES2",
        "XENVER_CHANGESET2",
        "XENVER_COMMANDLINE2",
        "XENFEAT_RUNSTATE_PHYS_AREA",
        "XENFEAT_VCPU_TIME_PHYS_AREA",
        "XENPF_GET_DOM0_CONSOLE",
        "XENPF_GET_UCODE_REVISION",
        "SET_CPUFREQ_CPPC",
        "XEN_SYSCTL_DT_OVERLAY",
        // Since 4.20.
        "XENFEAT_DM_MSIX_ALL_WRITES",
        "PHYSDEVOP_PCI_DEVICE_RESET",
        "PCI_DEVICE_RESET_COLD",
        "PCI_DEVICE_RESET_WARM",
        "PCI_DEVICE_RESET_HOT",
        "PCI_DEVICE_RESET_FLR",
        "PCI_DEVICE_RESET_MASK",
        "XENPF_MICROCODE_UPDATE2",
        "XENPF_UCODE_FORCE",
        "XEN_DOMCTL_DT_OVERLAY",
        "XEN_DOMCTL_GSI_PERMISSION",
        "XEN_DOMCTL_GSI_REVOKE",
        "XEN_DOMCTL_GSI_GRANT",
        "XEN_DOMCTL_GSI_ACTION_MASK",
        "XEN_DOMCTL_SET_LLC_COLORS",
        "XEN_DOMCTL_ALTP2M_MIXED",
        "XEN_DOMCTL_ALTP2M_EXTERNAL",
        "XEN_DOMCTL_ALTP2M_LIMITED",
        "XEN_DOMCTL_ALTP2M_MODE_MASK",
        "XEN_ELFNOTE_PHYS32_RELOC",
        "XEN_CPUID_TSC_EMULATED",
        "XEN_CPUID_HOST_TSC_RELIABLE",
        "XEN_CPUID_RDTSCP_INSTR_AVAIL",
        "XEN_CPUID_TSC_MODE_DEFAULT",
        "XEN_CPUID_TSC_MODE_ALWAYS_EMULATE",
        "XEN_CPUID_TSC_MODE_NEVER_EMULATE",
        "XEN_CPUID_TSC_MODE_PVRDTSCP",
    ];
    NAMES.contains(&name)
}

#[test]
fn constants_equal_those_of_the_headers() {
    let Some(dir) = headers() else { return };
    let names = c_names(&dir);
    let mut body = String::new();
    let (mut count, mut absent, mut unknown) = (0, Vec::new(), Vec::new());
    for AbiConst { name, value, bits } in layout::CONSTS.iter().flat_map(|t| t.iter()) {
        if name.is_empty() {
            continue;
        }
        if name.contains('(') {
            // Not a name but an expression.
            count += 1;
            writeln!(body, "_Static_assert({name} == {value}, \"{name}\");").unwrap();
            continue;
        }
        let upper = name.to_uppercase();
        let found = [upper.clone(), format!("__{upper}")]
            .into_iter()
            .find_map(|n| names.get(&n));
        let Some(found) = found else {
            if may_be_absent(name) {
                &mut absent
            } else {
                &mut unknown
            }
            .push(*name);
            continue;
        };
        // Of several spellings (old names in capitals), those count that this interface version
        // still defines, at least one of them.
        let defined: Vec<_> = found.iter().map(|c| format!("defined({c})")).collect();
        if found.len() > 1 {
            writeln!(
                body,
                "#if !({})\n#error {name}\n#endif",
                defined.join(" || ")
            )
            .unwrap();
        }
        for c in found {
            count += 1;
            let (ty, value) = if *bits == 64 {
                ("uint64_t", *value as u64)
            } else {
                ("uint32_t", u64::from(*value as u32))
            };
            let check = format!("_Static_assert(({ty})({c}) == {value:#x}ull, \"{name}\");");
            if found.len() > 1 {
                writeln!(body, "#ifdef {c}\n{check}\n#endif").unwrap();
            } else {
                writeln!(body, "{check}").unwrap();
            }
        }
    }
    assert!(unknown.is_empty(), "not in the headers: {unknown:?}");
    compile(&dir, "consts", &body, &[]).unwrap_or_else(|e| panic!("{e}"));
    println!(
        "{count} constants agree with {}; not in these headers: {absent:?}",
        dir.display()
    );
}

#[test]
fn layouts_equal_those_of_the_headers() {
    let Some(dir) = headers() else { return };
    let version = define(&dir, "domctl.h", "XEN_DOMCTL_INTERFACE_VERSION").expect("domctl version");
    let mut body = String::new();
    let count = assertions(layout::STRUCTS, version, &mut body);
    compile(&dir, "structs", &body, &[]).unwrap_or_else(|e| panic!("{e}"));
    println!(
        "{count} sizes and offsets agree with {} (domctl {version:#x})",
        dir.display()
    );
}

#[test]
fn layouts_of_32_bit_callers_equal_those_of_the_headers() {
    let Some(dir) = headers() else { return };
    let version = define(&dir, "domctl.h", "XEN_DOMCTL_INTERFACE_VERSION").expect("domctl version");
    if compile(&dir, "probe32", "", &["-m32"]).is_err() {
        println!("skipped: this C compiler has no -m32");
        return;
    }
    let mut body = String::new();
    let count = assertions(layout::STRUCTS32, version, &mut body);
    compile(&dir, "structs32", &body, &["-m32"]).unwrap_or_else(|e| panic!("{e}"));
    println!(
        "{count} 32-bit sizes and offsets agree with {}",
        dir.display()
    );
}
