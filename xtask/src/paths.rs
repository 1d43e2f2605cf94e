//! Where things are: the source tree, the build directories and the cache.
//!
//! Everything that is fetched or takes long to make lives in `.cache/` and survives `cargo clean`;
//! everything that follows from the sources lives in cargo's target directory.

use std::env;
use std::path::{Path, PathBuf};

/// The root of the source tree.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the manifest directory of xtask lies in the tree")
}

/// Cargo's target directory for host builds.
pub fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root().join(dir),
        None => root().join("target"),
    }
}

/// The target directory of the bare-metal builds: another compiler may be at work there, and the
/// host's artefacts must not be rebuilt because of it.
pub fn bare_target() -> PathBuf {
    target().join("bare")
}

/// Disk images, firmware variables and other things made from the build's results.
pub fn out() -> PathBuf {
    target().join("galvan")
}

/// Serial logs of the whole-machine tests.
pub fn test_logs() -> PathBuf {
    target().join("test-logs")
}

/// What was fetched, and what is made from that alone.
pub fn cache() -> PathBuf {
    match env::var_os("GALVAN_CACHE") {
        Some(dir) => root().join(dir),
        None => root().join(".cache"),
    }
}

/// The path of a program, as the shell would find it; `sbin` directories are searched too, because
/// an ordinary user's PATH on Debian leaves them out.
pub fn which(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(|p| p.is_file());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|p| p.is_file())
}
