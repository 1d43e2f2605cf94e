//! The EFI system partition: a FAT file system, written with mtools (no mount, no root).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh;

/// Where the firmware looks on a removable disk.
pub const DIRECTORY: &str = "EFI/BOOT";

/// What is put on the partition, all beside each other.
#[derive(Debug, Clone)]
pub struct Contents {
    /// The UEFI application.
    pub efi: PathBuf,
    /// The text of `galvan.cfg`.
    pub config: String,
    /// Name of the configuration file: `galvan.cfg`; a stock hypervisor looks for its own name.
    pub config_name: String,
    /// dom0's kernel.
    pub kernel: PathBuf,
    /// dom0's initrd.
    pub initrd: Option<PathBuf>,
    /// More files and their names.
    pub more: Vec<(PathBuf, &'static str)>,
}

/// The text of a `galvan.cfg` with one entry.
pub fn config(options: &str, dom0_cmdline: &str, initrd: bool) -> String {
    let mut text = format!(
        "[global]\ndefault=debian\n\n[debian]\noptions={options}\nkernel=vmlinuz {dom0_cmdline}\n"
    );
    if initrd {
        text.push_str("ramdisk=initrd.img\n");
    }
    text
}

impl Contents {
    /// Bytes that the files take.
    fn bytes(&self) -> Result<u64> {
        let mut sum = self.config.len() as u64;
        let more = self.more.iter().map(|(file, _)| file);
        for file in [&self.efi, &self.kernel]
            .into_iter()
            .chain(&self.initrd)
            .chain(more)
        {
            sum += std::fs::metadata(file)
                .with_context(|| format!("cannot read {}", file.display()))?
                .len();
        }
        Ok(sum)
    }
}

/// Writes a file that is one FAT file system and nothing else: the firmware boots that as well.
pub fn write_image(image: &Path, contents: &Contents) -> Result<()> {
    let size = (contents.bytes()? + (8 << 20))
        .next_multiple_of(1 << 20)
        .max(40 << 20);
    let file = File::create(image).with_context(|| format!("cannot write {}", image.display()))?;
    file.set_len(size)?;
    format(image, 0, size)?;
    fill(image, 0, contents)
}

/// Makes a FAT file system of `size` bytes at `offset` (bytes) of `image`.
pub fn format(image: &Path, offset: u64, size: u64) -> Result<()> {
    sh::quiet(
        Command::new("mformat")
            .args(["-i", &at(image, offset), "-v", "GALVAN-ESP", "-F", "-T"])
            .arg((size / 512).to_string())
            .args(["-h", "255", "-s", "63", "-H"])
            .arg((offset / 512).to_string())
            .arg("::"),
    )
}

/// Puts the files into the FAT file system at `offset` of `image`, over older ones.
pub fn fill(image: &Path, offset: u64, contents: &Contents) -> Result<()> {
    let drive = at(image, offset);
    for dir in ["EFI", DIRECTORY] {
        // Fails where it exists already, which is as good.
        let _ = sh::quiet(Command::new("mmd").args(["-i", &drive, &format!("::{dir}")]));
    }
    let config = sh::scratch("cfg")?;
    std::fs::write(&config, &contents.config)?;
    let mut files: Vec<(&Path, &str)> = vec![
        (&contents.efi, "BOOTX64.EFI"),
        (&config, &contents.config_name),
        (&contents.kernel, "vmlinuz"),
    ];
    if let Some(initrd) = &contents.initrd {
        files.push((initrd, "initrd.img"));
    }
    files.extend(contents.more.iter().map(|(file, name)| (&**file, *name)));
    for (from, name) in files {
        sh::quiet(
            Command::new("mcopy")
                .args(["-o", "-i", &drive])
                .arg(from)
                .arg(format!("::{DIRECTORY}/{name}")),
        )?;
    }
    std::fs::remove_file(&config)?;
    Ok(())
}

/// A file system inside a file, in mtools' words.
fn at(image: &Path, offset: u64) -> String {
    format!("{}@@{offset}", image.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_names_kernel_line_and_ramdisk() {
        let text = config("com1=115200,8n1", "console=hvc0 quiet", true);
        assert!(text.contains("\noptions=com1=115200,8n1\n"));
        assert!(text.contains("\nkernel=vmlinuz console=hvc0 quiet\n"));
        assert!(text.ends_with("\nramdisk=initrd.img\n"));
        assert!(!config("", "", false).contains("ramdisk"));
    }
}
