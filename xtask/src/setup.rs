//! `cargo xtask setup`: what has to be installed. Installs it where that is possible, else says
//! exactly what is missing and what to type.

use std::collections::BTreeSet;
use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

use crate::bare::{self, Toolchain};
use crate::tree::is_root;
use crate::{paths, sh};

/// Something the tasks need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A compiler for the bare machine.
    BareToolchain,
    /// mtools and all that makes root file systems.
    Images,
    /// QEMU and its firmware.
    Emulator,
    /// Bochs and its firmware.
    Bochs,
    /// GRUB's modules, and what puts them together.
    Grub,
    /// A C compiler, and what fetches and unpacks headers for it.
    Headers,
}

/// What `build` needs.
pub const FOR_BUILD: &[Need] = &[Need::BareToolchain];
/// What `image` needs.
pub const FOR_IMAGE: &[Need] = &[Need::BareToolchain, Need::Images];
/// What `image --grub` needs.
pub const FOR_GRUB: &[Need] = &[Need::BareToolchain, Need::Images, Need::Grub];
/// What `run` and `test` need.
pub const FOR_RUN: &[Need] = &[Need::BareToolchain, Need::Images, Need::Emulator];
/// What machines in Bochs need.
pub const FOR_BOCHS: &[Need] = &[Need::BareToolchain, Need::Images, Need::Bochs];

/// What `abi-check` needs.
pub const FOR_ABI_CHECK: &[Need] = &[Need::Headers];

/// The oldest compiler that the workspace builds with (`rust-version` in Cargo.toml).
const RUST: &str = env!("CARGO_PKG_RUST_VERSION");

/// Makes sure that all of `needs` is there.
pub fn ensure(needs: &[Need]) -> Result<()> {
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    install(&missing)?;
    let still = self::missing(needs);
    if !still.is_empty() {
        bail!("after installing, still missing: {}", words(&still));
    }
    Ok(())
}

/// A program or file, and the Debian package that has it.
const IMAGES: &[(&str, &str)] = &[
    ("mformat", "mtools"),
    ("mcopy", "mtools"),
    ("mmdebstrap", "mmdebstrap"),
    ("mke2fs", "e2fsprogs"),
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
    ("ssh-keygen", "openssh-client"),
    (
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
    ),
];

/// The same for GRUB; none of these packages touches the machine's own boot loader.
const GRUB: &[(&str, &str)] = &[
    ("grub-mkimage", "grub-common"),
    ("/usr/lib/grub/i386-pc/boot.img", "grub-pc-bin"),
    ("/usr/lib/grub/x86_64-efi/kernel.img", "grub-efi-amd64-bin"),
];

/// The same for the C headers of Xen.
const HEADERS: &[(&str, &str)] = &[
    ("cc", "gcc"),
    ("objcopy", "binutils"),
    (
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
    ),
];

fn missing(needs: &[Need]) -> Vec<String> {
    let mut packages = BTreeSet::new();
    for need in needs {
        match need {
            Need::BareToolchain => {
                if Toolchain::find().is_none() {
                    packages.extend(bare_packages());
                }
            }
            Need::Images => {
                let found = |what: &str| paths::which(what).is_some();
                packages.extend(IMAGES.iter().filter(|(w, _)| !found(w)).map(|(_, p)| *p));
                if !is_root() {
                    // mmdebstrap and mke2fs then work in a namespace, or as if they were root.
                    packages.extend((!found("newuidmap")).then_some("uidmap"));
                    packages.extend((!found("fakeroot")).then_some("fakeroot"));
                }
            }
            Need::Grub => {
                let found = |what: &str| paths::which(what).is_some();
                packages.extend(GRUB.iter().filter(|(w, _)| !found(w)).map(|(_, p)| *p));
            }
            Need::Headers => {
                let found = |what: &str| paths::which(what).is_some();
                packages.extend(HEADERS.iter().filter(|(w, _)| !found(w)).map(|(_, p)| *p));
            }
            Need::Emulator => {
                if env::var_os("QEMU").is_none() && paths::which("qemu-system-x86_64").is_none() {
                    packages.insert("qemu-system-x86");
                }
                if !crate::qemu::has_firmware() {
                    packages.insert("ovmf");
                }
            }
            Need::Bochs => packages.extend(crate::bochs::missing()),
        }
    }
    packages.into_iter().map(str::to_owned).collect()
}

/// The packages with a compiler new enough and the library source that belongs to it: Debian 12 has
/// a newer compiler for its browsers under a name of its own, later releases may not need to.
fn bare_packages() -> Vec<&'static str> {
    const WEB: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "lld"];
    const PLAIN: [&str; 4] = ["rustc", "cargo", "rust-src", "lld"];
    let new_enough = |package: &str| candidate(package).is_some_and(|v| at_least(&v, RUST));
    if new_enough("rustc") && !new_enough("rustc-web") {
        PLAIN.into()
    } else {
        WEB.into()
    }
}

/// The version that apt would install.
fn candidate(package: &str) -> Option<String> {
    let text = sh::output(
        Command::new("apt-cache")
            .args(["policy", package])
            .env("LC_ALL", "C"),
    )
    .ok()?;
    candidate_in(&text)
}

fn candidate_in(policy: &str) -> Option<String> {
    let version = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate:"))?
        .trim();
    (version != "(none)").then(|| version.to_owned())
}

/// Compares the leading numbers of two versions.
fn at_least(version: &str, least: &str) -> bool {
    let numbers = |text: &str| -> Vec<u32> {
        text.split(|c: char| !c.is_ascii_digit())
            .take(2)
            .map(|n| n.parse().unwrap_or(0))
            .collect()
    };
    numbers(version) >= numbers(least)
}

fn install(packages: &[String]) -> Result<()> {
    let command = format!(
        "apt-get install --no-install-recommends {}",
        packages.join(" ")
    );
    let Some(prefix) = privileged() else {
        bail!("{}", advice(packages, &command));
    };
    eprintln!("missing: {}", packages.join(" "));
    let apt = |args: &[&str]| {
        let mut words =
            prefix
                .iter()
                .copied()
                .chain(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        let mut apt = Command::new(words.next().unwrap_or("env"));
        apt.args(words).args(args);
        apt
    };
    let names: Vec<&str> = packages.iter().map(String::as_str).collect();
    let mut args = vec!["install", "-y", "-q", "--no-install-recommends"];
    args.extend(&names);
    let known = names.iter().all(|p| candidate(p).is_some());
    if !known || sh::step(&command, &mut apt(&args)).is_err() {
        sh::step("apt-get update", &mut apt(&["update", "-q"]))?;
        // With the lists at hand another choice of compiler may be the right one.
        let compiler: Vec<&str> = if names.iter().any(|n| n.contains("rust")) {
            bare_packages()
        } else {
            Vec::new()
        };
        let rest = names
            .iter()
            .copied()
            .filter(|n| !n.contains("rust") && !n.contains("cargo"));
        let mut args = vec!["install", "-y", "-q", "--no-install-recommends"];
        args.extend(rest.chain(compiler));
        sh::step(&command, &mut apt(&args))
            .map_err(|error| error.context(advice(packages, &command)))?;
    }
    Ok(())
}

/// How to become root: nothing to do, sudo, or not at all.
fn privileged() -> Option<Vec<&'static str>> {
    paths::which("apt-get")?;
    if is_root() {
        return Some(vec![]);
    }
    paths::which("sudo")?;
    use std::io::IsTerminal;
    let asks_nothing = Command::new("sudo")
        .args(["-n", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if asks_nothing {
        return Some(vec!["sudo", "-n"]);
    }
    if std::io::stdin().is_terminal() {
        eprintln!("sudo is asked for, to install packages");
        let granted = Command::new("sudo")
            .arg("-v")
            .status()
            .is_ok_and(|s| s.success());
        return granted.then(|| vec!["sudo"]);
    }
    None
}

fn advice(packages: &[String], command: &str) -> String {
    let mut text = format!("missing: {}\n", packages.join(" "));
    if paths::which("apt-get").is_some() {
        text.push_str(&format!("as root:  {command}\n"));
    } else {
        text.push_str("these are the names of Debian's packages; this machine has no apt-get\n");
    }
    if packages.iter().any(|p| p.contains("rust"))
        && Path::new(&cargo_home()).join("bin/rustup").exists()
    {
        text.push_str(&format!(
            "or, instead of Debian's compiler:  rustup target add {} {}\n",
            bare::HYPERVISOR_TARGET,
            bare::UEFI_TARGET
        ));
    }
    text
}

fn cargo_home() -> String {
    env::var("CARGO_HOME")
        .unwrap_or_else(|_| format!("{}/.cargo", env::var("HOME").unwrap_or_default()))
}

fn words(packages: &[String]) -> String {
    packages.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidate_is_read_from_policy() {
        let text = "rustc:\n  Installed: (none)\n  Candidate: 1.85.0+dfsg3-1\n  Version table:\n";
        assert_eq!(candidate_in(text).as_deref(), Some("1.85.0+dfsg3-1"));
        assert_eq!(candidate_in("x:\n  Candidate: (none)\n"), None);
        assert_eq!(candidate_in(""), None);
    }

    #[test]
    fn versions_compare_as_numbers() {
        assert!(at_least("1.96.0+dfsg1-1~deb12u2", "1.88"));
        assert!(!at_least("1.85.0+dfsg3-1", "1.88"));
        assert!(at_least("1.100.0", "1.88"));
    }

    #[test]
    fn advice_names_the_packages_and_the_command() {
        let text = advice(
            &["mtools".into(), "ovmf".into()],
            "apt-get install mtools ovmf",
        );
        assert!(text.starts_with("missing: mtools ovmf\n"), "{text}");
    }
}
