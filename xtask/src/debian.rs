//! Debian's packages: where the mirror is, fetching single packages, making root file systems.
//!
//! The host's own apt does the work with configuration and lists of its own below the cache, so
//! that a Debian 12 host fetches Debian 13's packages and its own state stays as it is.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Key};
use crate::sh;

/// The release that dom0 and the guest are.
const SUITE: &str = "trixie";
/// The one before it.
const OLD_SUITE: &str = "bookworm";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const FALLBACK_MIRROR: &str = "http://deb.debian.org/debian";

/// A mirror of the Debian archive, with apt set up to read it.
#[derive(Debug)]
pub struct Archive {
    suite: &'static str,
    dir: PathBuf,
    mirror: String,
}

impl Archive {
    /// The machine's own mirror (or the one that `GALVAN_MIRROR` names), its lists fetched once.
    pub fn open() -> Result<Self> {
        Self::open_suite(SUITE)
    }

    /// The release before the one that dom0 and the guest are.
    pub fn open_old() -> Result<Self> {
        Self::open_suite(OLD_SUITE)
    }

    fn open_suite(suite: &'static str) -> Result<Self> {
        let mirror = mirror();
        let key = Key::new().add(suite).add(&mirror);
        let dir = cache::cached(&name(suite, "apt"), key, "", |dir| {
            fs::create_dir_all(dir.join("lists/partial"))?;
            fs::create_dir_all(dir.join("cache/archives/partial"))?;
            let archive = Self {
                suite,
                dir: dir.to_owned(),
                mirror: mirror.clone(),
            };
            fs::write(archive.sources(), archive.sources_text())?;
            sh::step(
                &format!("package lists of Debian {suite} from {mirror}"),
                archive.apt("apt-get").args(["-qq", "update"]),
            )
        })?;
        Ok(Self { suite, dir, mirror })
    }

    fn sources(&self) -> PathBuf {
        self.dir.join("debian.sources")
    }

    fn sources_text(&self) -> String {
        format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nSigned-By: {KEYRING}\n",
            self.mirror, self.suite
        )
    }

    fn apt(&self, program: &str) -> Command {
        let mut apt = Command::new(program);
        for (name, value) in [
            ("Dir::Etc::sourcelist", self.sources()),
            ("Dir::Etc::sourceparts", "-".into()),
            ("Dir::State::Lists", self.dir.join("lists")),
            // What is installed here, perhaps of another release, is no candidate.
            ("Dir::State::Status", "/dev/null".into()),
            ("Dir::Cache", self.dir.join("cache")),
            ("APT::Architecture", "amd64".into()),
            ("APT::Architectures", "amd64".into()),
            // The sandbox user need not be able to reach this directory.
            ("APT::Sandbox::User", "".into()),
        ] {
            apt.arg("-o").arg(format!("{name}={}", value.display()));
        }
        apt.env("LC_ALL", "C");
        apt
    }

    /// The package that a metapackage stands for: its first dependency that begins with `prefix`.
    pub fn first_dependency(&self, package: &str, prefix: &str) -> Result<String> {
        let text = sh::output(self.apt("apt-cache").args(["show", package]))?;
        text.lines()
            .filter_map(|line| line.strip_prefix("Depends:"))
            .flat_map(|list| list.split(','))
            .filter_map(|item| item.split_whitespace().next())
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .with_context(|| format!("{package} depends on no {prefix}..."))
    }

    /// The version of `package`.
    pub fn version(&self, package: &str) -> Result<String> {
        let text = sh::output(self.apt("apt-cache").args(["show", package]))?;
        text.lines()
            .find_map(|line| line.strip_prefix("Version:"))
            .map(|version| version.trim().to_owned())
            .with_context(|| format!("{package} has no version"))
    }

    /// The contents of `package`, unpacked below a directory of the cache; nothing of it is run.
    pub fn unpacked(&self, package: &str) -> Result<PathBuf> {
        let key = Key::new().add(self.suite).add(&self.mirror);
        cache::cached(&name(self.suite, package), key, "", |dir| {
            let debs = sh::scratch("debs")?;
            fs::create_dir_all(&debs)?;
            sh::step(
                &format!("package {package}"),
                self.apt("apt-get")
                    .args(["-qq", "download", package])
                    .current_dir(&debs),
            )?;
            let deb = fs::read_dir(&debs)?
                .flatten()
                .map(|e| e.path())
                .find(|p| p.extension().is_some_and(|e| e == "deb"))
                .with_context(|| format!("apt-get downloaded no file for {package}"))?;
            sh::quiet(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(dir))?;
            cache::remove(&debs)
        })
    }

    /// A minimal installation with `packages` as a tar archive; `hooks` are shell commands run at
    /// the end, with the new root as `$1`.
    pub fn root(&self, name: &str, packages: &[&str], hooks: &[&str]) -> Result<PathBuf> {
        // Translations and manuals are most of what would have to be unpacked twice.
        const DPKG: [&str; 6] = [
            "path-exclude=/usr/share/locale/*",
            "path-exclude=/usr/share/man/*",
            "path-exclude=/usr/share/doc/*",
            "path-include=/usr/share/doc/*/copyright",
            "path-exclude=/usr/share/info/*",
            "path-exclude=/usr/share/qemu/*.dtb",
        ];
        let mut key = Key::new().add(self.suite).add(&self.mirror);
        for input in packages.iter().chain(hooks).chain(&DPKG) {
            key = key.add(input);
        }
        cache::cached(&format!("root-{name}"), key, ".tar", |tar| {
            let mut mmdebstrap = Command::new("mmdebstrap");
            mmdebstrap.args(["--variant=minbase", "--architectures=amd64"]);
            mmdebstrap.arg(format!("--include={}", packages.join(",")));
            for option in DPKG {
                mmdebstrap.arg(format!("--dpkgopt={option}"));
            }
            for hook in hooks {
                mmdebstrap.arg(format!("--customize-hook={hook}"));
            }
            mmdebstrap
                .arg(self.suite)
                .arg(tar)
                .arg(self.sources())
                // What the caller's session says about locales and temporary files is not for it.
                .env("LC_ALL", "C.UTF-8")
                .env_remove("TMPDIR");
            sh::step(
                &format!(
                    "Debian {} root for {name} ({} packages and what they need)",
                    self.suite,
                    packages.len()
                ),
                &mut mmdebstrap,
            )
        })
    }
}

/// The name of something in the cache, where the things of both releases are kept side by side.
fn name(suite: &str, what: &str) -> String {
    match suite {
        SUITE => what.to_owned(),
        _ => format!("{what}-{suite}"),
    }
}

/// The Debian kernel: one version, unpacked, with its module dependencies worked out.
#[derive(Debug, Clone)]
pub struct Linux {
    /// The package's contents; `usr/lib/modules/VERSION` below it.
    pub dir: PathBuf,
    /// `uname -r`.
    pub version: String,
}

impl Linux {
    /// Fetches the kernel that Debian's `linux-image-amd64` stands for.
    pub fn fetch(archive: &Archive) -> Result<Self> {
        let package = archive.first_dependency("linux-image-amd64", "linux-image-")?;
        let version = package.trim_start_matches("linux-image-").to_owned();
        let dir = archive.unpacked(&package)?;
        let linux = Self { dir, version };
        if !linux.modules().join("modules.dep").exists() {
            if !linux.dir.join("lib").exists() {
                std::os::unix::fs::symlink("usr/lib", linux.dir.join("lib"))?;
            }
            let depmod = crate::paths::which("depmod").context("depmod is not there (kmod)")?;
            sh::step(
                "module dependencies",
                Command::new(depmod)
                    .arg("-b")
                    .arg(&linux.dir)
                    .arg(&linux.version),
            )?;
        }
        Ok(linux)
    }

    /// The kernel image.
    pub fn image(&self) -> PathBuf {
        self.dir.join(format!("boot/vmlinuz-{}", self.version))
    }

    /// The directory of its modules.
    pub fn modules(&self) -> PathBuf {
        // Debian 12's package still has them in /lib.
        ["usr/lib/modules", "lib/modules"]
            .into_iter()
            .map(|dir| self.dir.join(dir).join(&self.version))
            .find(|dir| dir.is_dir())
            .unwrap_or_else(|| self.dir.join("usr/lib/modules").join(&self.version))
    }
}

/// A statically linked busybox, from Debian.
pub fn busybox(archive: &Archive) -> Result<PathBuf> {
    let dir = archive.unpacked("busybox-static")?;
    ["usr/bin/busybox", "bin/busybox"]
        .into_iter()
        .map(|p| dir.join(p))
        .find(|p| p.is_file())
        .context("busybox-static holds no busybox")
}

/// The package with stock Xen.
fn stock_xen_package(archive: &Archive) -> Result<String> {
    archive.first_dependency("xen-system-amd64", "xen-hypervisor-")
}

/// The version of stock Xen's package.
pub fn stock_xen_version(archive: &Archive) -> Result<String> {
    archive.version(&stock_xen_package(archive)?)
}

/// Stock Xen as a UEFI application, to compare with.
pub fn stock_xen(archive: &Archive) -> Result<PathBuf> {
    let package = stock_xen_package(archive)?;
    let boot = archive.unpacked(&package)?.join("boot");
    for entry in fs::read_dir(&boot)?.flatten() {
        if entry.path().extension().is_some_and(|e| e == "efi") {
            return Ok(entry.path());
        }
    }
    bail!("{package} holds no UEFI application")
}

/// `GALVAN_MIRROR`, else the mirror that this machine's apt uses, else Debian's own.
fn mirror() -> String {
    if let Ok(mirror) = env::var("GALVAN_MIRROR") {
        return mirror;
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        more.sort();
        files.extend(more);
    }
    files
        .iter()
        .filter_map(|file| Some((file.as_path(), fs::read_to_string(file).ok()?)))
        .find_map(|(file, text)| mirror_in(file, &text))
        .unwrap_or_else(|| FALLBACK_MIRROR.to_owned())
}

/// The first archive of Debian itself in one of apt's files: not its security updates, which hold
/// no complete release, and not some other vendor's repository.
fn mirror_in(file: &Path, text: &str) -> Option<String> {
    let wanted = |uri: &str, suites: &str, components: &str| {
        let uri = uri.trim_end_matches('/');
        (components.split_whitespace().any(|c| c == "main")
            && uri.contains("://")
            && uri.ends_with("debian")
            && !suites.contains("security"))
        .then(|| uri.to_owned())
    };
    if file.extension().is_some_and(|e| e == "sources") {
        return text.split("\n\n").find_map(|stanza| {
            let field = |name: &str| {
                stanza.lines().find_map(|line| {
                    let (key, value) = line.split_once(':')?;
                    key.trim().eq_ignore_ascii_case(name).then(|| value.trim())
                })
            };
            field("URIs")?
                .split_whitespace()
                .find_map(|uri| wanted(uri, field("Suites").unwrap_or(""), field("Components")?))
        });
    }
    text.lines().find_map(|line| {
        let line = line.trim().strip_prefix("deb ")?.trim_start();
        let line = match line.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1.trim_start(),
            None => line,
        };
        let (uri, rest) = line.split_once(' ')?;
        let (suite, components) = rest.trim_start().split_once(' ')?;
        wanted(uri, suite, components)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_is_found_in_deb822_after_security_and_comments() {
        let text = "Types: deb\nURIs: http://a.example/debian-security\nSuites: x-security\n\
                    Components: main\n\nTypes: deb\n# a comment\nURIs: http://a.example/debian/\n\
                    Suites: bookworm bookworm-updates\nComponents: main\n";
        let found = mirror_in(Path::new("debian.sources"), text);
        assert_eq!(found.as_deref(), Some("http://a.example/debian"));
    }

    #[test]
    fn mirror_is_found_in_one_line_format() {
        let text = "# deb http://no.example/debian bookworm main\n\
                    deb https://deb.example.com/node nodistro main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://b.example/debian bookworm main contrib\n";
        let found = mirror_in(Path::new("sources.list"), text);
        assert_eq!(found.as_deref(), Some("http://b.example/debian"));
    }

    #[test]
    fn other_vendors_are_no_mirror() {
        let text = "deb https://packages.example.com/apt cloud-sdk-bookworm main\n";
        assert_eq!(mirror_in(Path::new("x.list"), text), None);
    }
}
