//! `cargo xtask image`: one bootable disk image with a GPT, an EFI system partition and dom0's root.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache::Key;
use crate::dom0::{self, Dom0};
use crate::run::Hypervisor;
use crate::{esp, grub, paths, setup, sh};

/// Size of the image unless another is asked for, MiB.
pub const DEFAULT_MIB: u64 = 4096;
const ESP_MIB: u64 = 256;
/// The partitions begin and end on multiples of this, MiB.
const ALIGN_MIB: u64 = 1;
const SECTOR: u64 = 512;

/// Galvan's options on the image: its messages on the serial port and the screen.
pub const OPTIONS: &str =
    "com1=115200,8n1 console=com1,vga dom0_mem=1024M dom0_max_vcpus=2 loglvl=all guest_loglvl=all";

/// Build one bootable disk image: EFI system partition, Debian 13 as dom0, and a guest.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file to write.
    #[arg(long)]
    out: PathBuf,
    /// Size of the image, MiB.
    #[arg(long, default_value_t = DEFAULT_MIB)]
    size: u64,
    /// Galvan's options in galvan.cfg.
    #[arg(long, default_value = OPTIONS)]
    options: String,
    /// dom0's kernel command line in galvan.cfg.
    #[arg(long, default_value = dom0::CMDLINE)]
    cmdline: String,
    /// GRUB as boot loader, for BIOS and for UEFI machines; options and command line are then in
    /// grub.cfg.
    #[arg(long)]
    grub: bool,
}

/// Builds everything and writes the image where it was asked for.
pub fn image(args: &Args) -> Result<()> {
    setup::ensure(if args.grub {
        setup::FOR_GRUB
    } else {
        setup::FOR_IMAGE
    })?;
    let root = root_mib(args.size)?;
    let hypervisor = Hypervisor::galvan()?;
    let dom0 = dom0::make(root)?;
    let contents = if args.grub {
        hypervisor.grub_contents(
            &args.options,
            &args.cmdline,
            &dom0.kernel,
            Some(&dom0.initrd),
        )?
    } else {
        hypervisor.contents(
            &args.options,
            &args.cmdline,
            &dom0.kernel,
            Some(&dom0.initrd),
        )
    };
    if args.out.exists() && !fs::metadata(&args.out)?.is_file() {
        bail!(
            "{} is not a file; write the image to one, and that to the disk",
            args.out.display()
        );
    }
    write_whole(&args.out, args.size << 20, &dom0, &contents, args.grub)?;
    eprintln!(
        "{}: write it to a USB stick or a disk (dd, bs=4M) and start a {} machine from it",
        args.out.display(),
        if args.grub { "BIOS or UEFI" } else { "UEFI" }
    );
    Ok(())
}

/// The image for the emulator, kept in the target directory: made when the Debian in it changed,
/// else only its EFI system partition is brought up to date.
pub fn for_emulator(contents: &esp::Contents, dom0: &Dom0) -> Result<PathBuf> {
    let out = paths::out().join("galvan.img");
    let stamp = paths::out().join("galvan.img.from");
    let from = Key::new().add_file(&dom0.root)?.to_string();
    if !out.exists() || fs::read_to_string(&stamp).ok().as_deref() != Some(&from) {
        let _ = fs::remove_file(&stamp);
        fs::create_dir_all(paths::out())?;
        write_disk(&out, DEFAULT_MIB << 20, dom0, false)?;
        fs::write(&stamp, from)?;
    }
    esp::fill(&out, ALIGN_MIB << 20, contents)?;
    Ok(out)
}

/// A new image that GRUB starts from, of the usual size.
pub fn write_grub(out: &Path, dom0: &Dom0, contents: &esp::Contents) -> Result<()> {
    write_whole(out, DEFAULT_MIB << 20, dom0, contents, true)
}

fn write_whole(
    out: &Path,
    size: u64,
    dom0: &Dom0,
    contents: &esp::Contents,
    grub: bool,
) -> Result<()> {
    write_disk(out, size, dom0, grub)?;
    esp::fill(out, ALIGN_MIB << 20, contents)?;
    if grub {
        grub::install_bios(out)?;
    }
    Ok(())
}

/// Writes a disk that GRUB starts from on BIOS and UEFI machines, with an EFI system partition that
/// holds `contents` and nothing else.
pub fn write_small_grub(out: &Path, contents: &esp::Contents) -> Result<()> {
    let size = (ESP_MIB + 2 * ALIGN_MIB) << 20;
    File::create(out)
        .and_then(|file| file.set_len(size))
        .with_context(|| format!("cannot write {}", out.display()))?;
    partition(out, size, None, true)?;
    esp::format(out, ALIGN_MIB << 20, ESP_MIB << 20)?;
    esp::fill(out, ALIGN_MIB << 20, contents)?;
    grub::install_bios(out)
}

/// Such an image as a file of its own.
pub fn copy_for_emulator(contents: &esp::Contents, dom0: &Dom0, out: &Path) -> Result<()> {
    let image = for_emulator(contents, dom0)?;
    sh::quiet(
        std::process::Command::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .args([&*image, out]),
    )
}

/// Makes what [`for_emulator`] wants, with the size that goes with it.
pub fn default_dom0() -> Result<Dom0> {
    dom0::make(root_mib(DEFAULT_MIB)?)
}

fn root_mib(size: u64) -> Result<u64> {
    let rest = size.saturating_sub(ESP_MIB + 2 * ALIGN_MIB);
    if rest < 1536 {
        bail!("an image of {size} MiB is too small; Debian and the guest want 2048 MiB");
    }
    Ok(rest)
}

/// Writes a disk of `size` bytes: partition table, empty EFI system partition, dom0's root.
fn write_disk(out: &Path, size: u64, dom0: &Dom0, grub: bool) -> Result<()> {
    let step = sh::Step::start(format!("disk image {}", out.display()));
    let file = File::create(out).with_context(|| format!("cannot write {}", out.display()))?;
    file.set_len(size)?;
    drop(file);
    partition(out, size, Some(fs::metadata(&dom0.root)?.len()), grub)?;
    esp::format(out, ALIGN_MIB << 20, ESP_MIB << 20)?;
    write_sparse(&dom0.root, out, (ALIGN_MIB + ESP_MIB) << 20)?;
    step.done();
    Ok(())
}

/// Writes a GPT with an EFI system partition, a root partition of `root` bytes, and for GRUB a BIOS
/// boot partition in front of both, which comes last in the table.
fn partition(image: &Path, size: u64, root: Option<u64>, grub: bool) -> Result<()> {
    let sectors = size / SECTOR;
    let mut device = OpenOptions::new().read(true).write(true).open(image)?;
    let mbr = gpt::mbr::ProtectiveMBR::with_lb_size(u32::try_from(sectors - 1).unwrap_or(u32::MAX));
    mbr.overwrite_lba0(&mut device)
        .context("cannot write the protective MBR")?;
    let mut disk = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(gpt::disk::LogicalBlockSize::Lb512)
        .create_from_device(device, None)
        .context("cannot create the partition table")?;
    let first = (ALIGN_MIB << 20) / SECTOR;
    let esp = (ESP_MIB << 20) / SECTOR;
    disk.add_partition_at(
        "EFI system partition",
        1,
        first,
        esp,
        gpt::partition_types::EFI,
        0,
    )
    .context("cannot add the EFI system partition")?;
    if let Some(root) = root {
        disk.add_partition_at(
            dom0::ROOT_LABEL,
            2,
            first + esp,
            root / SECTOR,
            gpt::partition_types::LINUX_ROOT_X64,
            0,
        )
        .context("cannot add the root partition")?;
    }
    if grub {
        disk.add_partition_at(
            "BIOS boot partition",
            3,
            grub::BIOS_BOOT,
            grub::BIOS_BOOT_SECTORS,
            gpt::partition_types::BIOS,
            0,
        )
        .context("cannot add the BIOS boot partition")?;
    }
    disk.write().context("cannot write the partition table")?;
    Ok(())
}

/// Writes `from` into `to` at `offset`, leaving out blocks of zeros: `to` is zero there.
fn write_sparse(from: &Path, to: &Path, offset: u64) -> Result<()> {
    const BLOCK: usize = 1 << 16;
    let mut from = File::open(from)?;
    let mut to = OpenOptions::new().write(true).open(to)?;
    let zeros = vec![0; BLOCK];
    let mut block = vec![0; BLOCK];
    let mut at = offset;
    loop {
        let mut have = 0;
        while have < BLOCK {
            match from.read(&mut block[have..])? {
                0 => break,
                n => have += n,
            }
        }
        if have == 0 {
            return Ok(());
        }
        if block[..have] != zeros[..have] {
            to.seek(SeekFrom::Start(at))?;
            to.write_all(&block[..have])?;
        }
        at += have as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_writing_keeps_every_byte_and_skips_zeros() {
        let from = sh::scratch("from").unwrap();
        let to = sh::scratch("to").unwrap();
        let mut data = vec![0u8; 300_000];
        data[0] = 1;
        data[200_000] = 2;
        data[299_999] = 3;
        fs::write(&from, &data).unwrap();
        File::create(&to).unwrap().set_len(400_000).unwrap();
        write_sparse(&from, &to, 1000).unwrap();
        let back = fs::read(&to).unwrap();
        assert_eq!(&back[1000..301_000], &data[..]);
        assert!(back[301_000..].iter().all(|&b| b == 0));
        fs::remove_file(from).unwrap();
        fs::remove_file(to).unwrap();
    }

    #[test]
    fn partition_table_is_read_back_with_all_partitions() {
        let image = sh::scratch("img").unwrap();
        let size = 2048 << 20;
        let root = root_mib(2048).unwrap() << 20;
        File::create(&image).unwrap().set_len(size).unwrap();
        partition(&image, size, Some(root), true).unwrap();
        let disk = gpt::GptConfig::new().open(&image).unwrap();
        let found: Vec<_> = disk
            .partitions()
            .values()
            .map(|p| (p.first_lba, p.last_lba))
            .collect();
        fs::remove_file(&image).unwrap();
        let esp_end = ((ALIGN_MIB + ESP_MIB) << 20) / SECTOR;
        assert_eq!(
            found,
            [
                (2048, esp_end - 1),
                (esp_end, esp_end + root / SECTOR - 1),
                (34, 2047)
            ]
        );
    }

    #[test]
    fn an_image_too_small_is_refused_with_the_size_it_needs() {
        assert!(root_mib(1024).unwrap_err().to_string().contains("2048 MiB"));
    }
}
