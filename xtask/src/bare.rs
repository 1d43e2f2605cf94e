//! Building for the bare machine: the hypervisor's ELF image and the UEFI application around it.
//!
//! Two toolchain situations: rustup has the bare targets' `core` installed and its cargo does it
//! all; or it has not (and perhaps cannot fetch it), and Debian's compiler builds `core` from the
//! library source that Debian ships with it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{paths, sh};

/// The hypervisor's target.
pub const HYPERVISOR_TARGET: &str = "x86_64-unknown-none";
/// The boot loader's target.
pub const UEFI_TARGET: &str = "x86_64-unknown-uefi";

/// What a build leaves behind.
#[derive(Debug, Clone)]
pub struct Built {
    /// The hypervisor as an ELF image with its symbols.
    pub hypervisor: PathBuf,
    /// The UEFI application that carries it.
    pub efi: PathBuf,
    /// The multiboot image that carries it, for GRUB.
    pub multiboot: PathBuf,
}

/// Which hypervisor is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// The one to use.
    Release,
    /// Without optimisation.
    Debug,
    /// With counters of VMREAD and VMWRITE.
    CountVmcs,
}

impl Variant {
    /// What its files are called.
    fn name(self) -> &'static str {
        match self {
            Self::Release | Self::Debug => "galvan",
            Self::CountVmcs => "galvan-count-vmcs",
        }
    }
}

/// Who compiles for the bare machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toolchain {
    /// The cargo that runs this, with the prebuilt library of the target.
    Prebuilt,
    /// `/usr/bin/cargo`, with the library built from Debian's source package.
    Debian,
}

impl Toolchain {
    /// Looks at what is installed. `None`: neither is complete.
    pub fn find() -> Option<Self> {
        if [HYPERVISOR_TARGET, UEFI_TARGET].into_iter().all(prebuilt) {
            Some(Self::Prebuilt)
        } else if debian_complete() {
            Some(Self::Debian)
        } else {
            None
        }
    }
}

fn prebuilt(target: &str) -> bool {
    sh::output(Command::new("rustc").args(["--print", "target-libdir", "--target", target]))
        .is_ok_and(|dir| {
            std::fs::read_dir(dir.trim()).is_ok_and(|entries| {
                entries
                    .flatten()
                    .any(|e| e.file_name().to_string_lossy().starts_with("libcore-"))
            })
        })
}

fn debian_complete() -> bool {
    let sysroot = sh::output(Command::new("/usr/bin/rustc").args(["--print", "sysroot"]));
    sysroot.is_ok_and(|dir| {
        Path::new(dir.trim())
            .join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .exists()
    }) && Path::new("/usr/bin/cargo").exists()
        && paths::which("ld.lld").is_some()
        && paths::which("lld-link").is_some()
}

/// Builds the micro-guests; returns the path of one of them (`bench`, `abuse`).
pub fn guest(name: &str) -> Result<PathBuf> {
    let toolchain = Toolchain::find().context(
        "no compiler for the bare machine; `cargo xtask setup` says what to install for it",
    )?;
    let script = paths::root().join("tests/guests/link.ld");
    let flags = [
        "-C".to_owned(),
        "relocation-model=static".to_owned(),
        "-C".to_owned(),
        "code-model=small".to_owned(),
        "-C".to_owned(),
        format!("link-arg=-T{}", script.display()),
    ];
    let mut cargo = cargo(toolchain, HYPERVISOR_TARGET, false);
    cargo.args(["-p", "galvan-guests", "--bins"]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    sh::through(&mut cargo).context("the micro-guests do not build")?;
    artefact(HYPERVISOR_TARGET, false, name)
}

/// The image that the last build of [`Variant::Release`] has left, with its symbols.
pub fn hypervisor_image() -> Result<PathBuf> {
    artefact(HYPERVISOR_TARGET, false, "galvan")
}

/// Builds the hypervisor and its two loaders, the UEFI application and the multiboot image.
pub fn build(variant: Variant) -> Result<Built> {
    let debug = variant == Variant::Debug;
    let toolchain = Toolchain::find().context(
        "no compiler for the bare machine; `cargo xtask setup` says what to install for it",
    )?;
    let script = paths::root().join("kernel/bare/link.ld");
    let mut flags = vec![
        "-C".to_owned(),
        "relocation-model=static".to_owned(),
        "-C".to_owned(),
        "code-model=kernel".to_owned(),
    ];
    if !script.exists() {
        bail!("{} is missing", script.display());
    }
    flags.push("-C".to_owned());
    flags.push(format!("link-arg=-T{}", script.display()));

    let mut cargo = cargo(toolchain, HYPERVISOR_TARGET, debug);
    cargo.args(["-p", "galvan-bare", "--bin", "galvan"]);
    if variant == Variant::CountVmcs {
        cargo.args(["--features", "count-vmcs"]);
    }
    // Unit-separated, so that a tree below a directory with a blank in its name builds too.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    sh::through(&mut cargo).context("the hypervisor does not build")?;
    let mut hypervisor = artefact(HYPERVISOR_TARGET, debug, "galvan")?;
    std::fs::create_dir_all(paths::out())?;
    if variant == Variant::CountVmcs {
        // Cargo puts each of the two in the other's place without a newer date: by its name the loaders
        // around it are told what they have to hold.
        let own = paths::out().join(format!("{}.elf", variant.name()));
        std::fs::copy(&hypervisor, &own)
            .with_context(|| format!("cannot write {}", own.display()))?;
        hypervisor = own;
    }

    let mut cargo = self::cargo(toolchain, UEFI_TARGET, debug);
    cargo.args([
        "-p",
        "galvan-boot",
        "--features",
        "efi",
        "--bin",
        "galvan-efi",
    ]);
    cargo.env("GALVAN_IMAGE", &hypervisor);
    sh::through(&mut cargo).context("galvan.efi does not build")?;
    let built = artefact(UEFI_TARGET, debug, "galvan-efi.efi")?;
    let efi = paths::out().join(format!("{}.efi", variant.name()));
    std::fs::copy(&built, &efi).with_context(|| format!("cannot write {}", efi.display()))?;

    let multiboot = multiboot(toolchain, variant, &hypervisor)?;
    Ok(Built {
        hypervisor,
        efi,
        multiboot,
    })
}

/// The multiboot image: as GRUB and QEMU load it, and as `galvan.gz` beside it for `/boot`.
fn multiboot(toolchain: Toolchain, variant: Variant, hypervisor: &Path) -> Result<PathBuf> {
    let debug = variant == Variant::Debug;
    let script = paths::root().join("boot/src/multiboot/link.ld");
    let flags = [
        "-C".to_owned(),
        "relocation-model=pic".to_owned(),
        "-C".to_owned(),
        "code-model=small".to_owned(),
        // Of this loader alone; the hypervisor inside keeps its own.
        "-C".to_owned(),
        "strip=symbols".to_owned(),
        "-C".to_owned(),
        format!("link-arg=-T{}", script.display()),
    ];
    let mut cargo = cargo(toolchain, HYPERVISOR_TARGET, debug);
    cargo.args([
        "-p",
        "galvan-boot",
        "--features",
        "multiboot",
        "--bin",
        "galvan-multiboot",
    ]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    cargo.env("GALVAN_IMAGE", hypervisor);
    sh::through(&mut cargo).context("the multiboot image does not build")?;
    let built = artefact(HYPERVISOR_TARGET, debug, "galvan-multiboot")?;
    let multiboot = paths::out().join(variant.name());
    std::fs::copy(&built, &multiboot)
        .with_context(|| format!("cannot write {}", multiboot.display()))?;
    // -n: the same bytes from the same sources.
    sh::quiet(
        Command::new("gzip")
            .args(["-9", "-n", "-k", "-f"])
            .arg(&multiboot),
    )?;
    Ok(multiboot)
}

fn cargo(toolchain: Toolchain, target: &str, debug: bool) -> Command {
    let mut cargo = match toolchain {
        Toolchain::Prebuilt => Command::new("cargo"),
        Toolchain::Debian => {
            let mut cargo = Command::new("/usr/bin/cargo");
            let path = std::env::var("PATH").unwrap_or_default();
            cargo
                .env("PATH", format!("/usr/bin:{path}"))
                .env("RUSTC", "/usr/bin/rustc")
                // Building `core` from source is an unstable option of a stable compiler.
                .env("RUSTC_BOOTSTRAP", "1")
                .env("CARGO_TARGET_X86_64_UNKNOWN_NONE_LINKER", "ld.lld")
                .env("CARGO_TARGET_X86_64_UNKNOWN_UEFI_LINKER", "lld-link");
            cargo
        }
    };
    // What the outer cargo set for this program is not meant for the inner one.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_")
            || name.starts_with("CARGO_MANIFEST")
            || ["CARGO", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"].contains(&&*name)
        {
            cargo.env_remove(&*name);
        }
    }
    cargo
        .current_dir(paths::root())
        .args(["build", "--target", target])
        .arg("--target-dir")
        .arg(paths::bare_target());
    if toolchain == Toolchain::Debian {
        cargo.args([
            "-Zbuild-std=core,alloc,compiler_builtins",
            "-Zbuild-std-features=compiler-builtins-mem",
        ]);
    }
    if !debug {
        cargo.arg("--release");
    }
    cargo.stdout(std::io::stderr());
    cargo
}

fn artefact(target: &str, debug: bool, name: &str) -> Result<PathBuf> {
    let profile = if debug { "debug" } else { "release" };
    let path = paths::bare_target().join(target).join(profile).join(name);
    if !path.exists() {
        bail!("cargo succeeded, but {} is not there", path.display());
    }
    Ok(path)
}
