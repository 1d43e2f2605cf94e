//! Our own files on top of a Debian root file system, and the ext4 file system made of both.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::sh;

#[derive(Debug, Clone)]
enum Entry {
    Text { mode: u32, text: String },
    Link(String),
    Copy(PathBuf),
}

/// Files, links and copies to put on top of a root file system. All belong to root.
#[derive(Debug, Clone, Default)]
pub struct Overlay {
    entries: Vec<(String, Entry)>,
}

impl Overlay {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file with this text. `path` has no leading slash, here and below.
    pub fn text(mut self, path: &str, text: impl Into<String>) -> Self {
        let (mode, text) = (0o644, text.into());
        self.entries
            .push((path.to_owned(), Entry::Text { mode, text }));
        self
    }

    /// A file with this text and these permissions.
    pub fn text_mode(mut self, path: &str, mode: u32, text: impl Into<String>) -> Self {
        let text = text.into();
        self.entries
            .push((path.to_owned(), Entry::Text { mode, text }));
        self
    }

    /// A symbolic link.
    pub fn link(mut self, path: &str, target: &str) -> Self {
        self.entries
            .push((path.to_owned(), Entry::Link(target.to_owned())));
        self
    }

    /// A copy of a file or directory of this machine.
    pub fn copy(mut self, path: &str, from: &Path) -> Self {
        self.entries
            .push((path.to_owned(), Entry::Copy(from.to_owned())));
        self
    }

    fn key(&self, mut key: Key) -> Result<Key> {
        for (path, entry) in &self.entries {
            key = key.add(path);
            key = match entry {
                Entry::Text { mode, text } => key.add(mode.to_le_bytes()).add(text),
                Entry::Link(target) => key.add(target),
                Entry::Copy(from) => key.add_file(from)?,
            };
        }
        Ok(key)
    }

    fn write(&self, dir: &Path) -> Result<()> {
        for (path, entry) in &self.entries {
            let path = dir.join(path);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match entry {
                Entry::Text { mode, text } => {
                    fs::write(&path, text)?;
                    fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
                }
                Entry::Link(target) => symlink(target, &path)?,
                Entry::Copy(from) => sh::quiet(
                    Command::new("cp")
                        .args(["-a", "--sparse=always", "--reflink=auto"])
                        .arg(from)
                        .arg(&path),
                )?,
            }
        }
        Ok(())
    }
}

/// An ext4 file system of `mib` MiB with `label`: the root file system `base` (a tar archive) under
/// `overlay`. Cached; `name` is what it is the root of.
pub fn ext4(name: &str, base: &Path, overlay: &Overlay, label: &str, mib: u64) -> Result<PathBuf> {
    let key = Key::new()
        .add_file(base)?
        .add(label)
        .add(mib.to_le_bytes())
        .add(SCRIPT);
    let key = overlay.key(key)?;
    cache::cached(&format!("disk-{name}"), key, ".ext4", |image| {
        let work = sh::scratch("tree")?;
        let ours = work.join("overlay");
        fs::create_dir_all(&ours)?;
        overlay
            .write(&ours)
            .context("cannot lay out our own files")?;
        fs::File::create(image)?.set_len(mib << 20)?;
        let result = sh::step(
            &format!("file system of {name}"),
            as_root("sh")
                .args(["-euc", SCRIPT, "sh"])
                .arg(&work)
                .arg(base)
                .arg(image)
                .arg(label),
        );
        cache::remove(&work)?;
        result
    })
}

/// `$1` work directory, `$2` base archive, `$3` image, `$4` label.
const SCRIPT: &str = r#"
export PATH="$PATH:/usr/sbin:/sbin"
mkdir "$1/root"
tar -C "$1/root" --numeric-owner -xpf "$2"
tar -C "$1/overlay" --owner=0 --group=0 --numeric-owner --sparse -cf - . |
    tar -C "$1/root" --numeric-owner --keep-directory-symlink --no-overwrite-dir -xpf -
mke2fs -q -F -t ext4 -m 1 -L "$4" -d "$1/root" "$3"
"#;

/// Runs a program as root or as something that passes for it where only ownership matters.
fn as_root(program: &str) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("fakeroot");
    command.arg(program);
    command
}

/// Whether this process is root.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0)
}
