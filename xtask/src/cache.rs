//! The cache: things made once and kept under a name that changes when what they are made from does.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::paths;

/// A fingerprint of inputs: FNV-1a, fed in order. It tells inputs apart; it withstands no adversary.
#[derive(Debug, Clone, Copy)]
pub struct Key(u64);

impl Key {
    /// The fingerprint of nothing.
    pub fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    /// Adds one input.
    pub fn add(mut self, input: impl AsRef<[u8]>) -> Self {
        let input = input.as_ref();
        // The length keeps ("ab", "c") and ("a", "bc") apart.
        for &byte in (input.len() as u64).to_le_bytes().iter().chain(input) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        self
    }

    /// Adds a file by its name, length and time of change.
    pub fn add_file(self, path: &Path) -> Result<Self> {
        let data = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        let changed = data
            .modified()?
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        Ok(self
            .add(path.to_string_lossy().as_bytes())
            .add(data.len().to_le_bytes())
            .add(changed.as_nanos().to_le_bytes()))
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The cached file or directory `name` + key + `suffix`, made by `make` when it is not there.
///
/// `make` gets a path to write to, which becomes the cached one only when it succeeds. Older
/// versions of the same name are removed.
pub fn cached(
    name: &str,
    key: Key,
    suffix: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let dir = paths::cache();
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join(format!("{name}-{key}{suffix}"));
    if path.exists() {
        return Ok(path);
    }
    let part = dir.join(format!("{name}-{key}.part{}{suffix}", std::process::id()));
    remove(&part)?;
    make(&part)?;
    for entry in fs::read_dir(&dir)?.flatten() {
        let old = entry.file_name();
        let old = old.to_string_lossy();
        let is_ours = old
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix('-'))
            .and_then(|rest| rest.strip_suffix(suffix))
            .is_some_and(|rest| rest.len() == 16 && rest.bytes().all(|b| b.is_ascii_hexdigit()));
        if is_ours {
            remove(&entry.path())?;
        }
    }
    fs::rename(&part, &path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Removes a file or a directory with all it has, if it is there.
pub fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    result.with_context(|| format!("cannot remove {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_tells_apart_where_one_input_ends() {
        let a = Key::new().add("ab").add("c");
        let b = Key::new().add("a").add("bc");
        assert_ne!(a.to_string(), b.to_string());
        assert_eq!(a.to_string(), Key::new().add("ab").add("c").to_string());
    }
}
