//! GRUB on a disk image: a BIOS and a UEFI machine start from the same one, into the multiboot
//! image of the hypervisor. Debian's GRUB modules, put together by its `grub-mkimage`; what
//! `grub-install` would do to the disk is done here, so that it works on a file and without root.
//!
//! A BIOS loads sector 0 (`boot.img`), which loads the first sector of the BIOS boot partition
//! (`core.img`), which loads the rest of it. The sectors in both are filled in as GRUB's manual
//! describes ("BIOS installation", "Images"). A UEFI machine loads `EFI/BOOT/BOOTX64.EFI`.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::esp::{Contents, DIRECTORY};
use crate::{paths, sh};

/// Where Debian's packages have the modules.
pub const BIOS_MODULES: &str = "/usr/lib/grub/i386-pc";
/// Those for UEFI.
pub const EFI_MODULES: &str = "/usr/lib/grub/x86_64-efi";

/// First sector of the BIOS boot partition, behind the partition table.
pub const BIOS_BOOT: u64 = 34;
/// Its sectors: up to the first MiB.
pub const BIOS_BOOT_SECTORS: u64 = 2048 - BIOS_BOOT;

const SECTOR: usize = 512;

/// Disks and file systems, the menu and its words, the loaders.
const COMMON: &[&str] = &[
    "part_gpt",
    "part_msdos",
    "fat",
    "ext2",
    "search",
    "search_label",
    "normal",
    "configfile",
    "test",
    "echo",
    "ls",
    "cat",
    "serial",
    "terminal",
    "gzio",
    "boot",
    "multiboot2",
    "linux",
    "reboot",
    "halt",
];

/// What goes on the EFI system partition for GRUB to start the hypervisor `multiboot` (compressed)
/// with a kernel and an initrd.
pub fn contents(
    multiboot: &Path,
    options: &str,
    cmdline: &str,
    kernel: &Path,
    initrd: Option<&Path>,
) -> Result<Contents> {
    let efi = paths::out().join("grubx64.efi");
    fs::create_dir_all(paths::out())?;
    mkimage(
        "x86_64-efi",
        EFI_MODULES,
        &efi,
        &format!("/{DIRECTORY}"),
        &["efi_gop"],
    )?;
    Ok(Contents {
        efi,
        config: config(options, cmdline, initrd.is_some()),
        config_name: "grub.cfg".to_owned(),
        kernel: kernel.to_owned(),
        initrd: initrd.map(Path::to_owned),
        more: vec![(multiboot.with_extension("gz"), "galvan.gz")],
    })
}

/// Has the menu start its entry by multiboot 1 at once, which needs a BIOS.
pub fn by_multiboot1(contents: &mut Contents) {
    contents.config = contents
        .config
        .replace("set timeout=2\n", "set timeout=0\nset default=1\n");
}

/// The text of a `grub.cfg` with one entry; on a BIOS's machine a second one, by multiboot 1.
fn config(options: &str, cmdline: &str, initrd: bool) -> String {
    let entry = |title: &str, suffix: &str| {
        let mut text = format!(
            "menuentry '{title}' {{\n\
             \x20   multiboot{suffix} /{DIRECTORY}/galvan.gz {options}\n\
             \x20   module{suffix} --nounzip /{DIRECTORY}/vmlinuz {cmdline}\n"
        );
        if initrd {
            text.push_str(&format!(
                "    module{suffix} --nounzip /{DIRECTORY}/initrd.img\n"
            ));
        }
        text.push_str("}\n");
        text
    };
    format!(
        "serial --unit=0 --speed=115200\n\
         terminal_input console serial\n\
         terminal_output console serial\n\
         set timeout=2\n\n\
         {}\nif [ \"$grub_platform\" = pc ]; then\n{}fi\n",
        entry("Debian 13 on Galvan", "2"),
        entry("Debian 13 on Galvan, by multiboot 1", "")
    )
}

/// Makes the image at `out` start on a BIOS: it has a GPT with a BIOS boot partition at
/// [`BIOS_BOOT`], and [`contents`] in its first partition.
pub fn install_bios(out: &Path) -> Result<()> {
    let core = sh::scratch("core.img")?;
    let prefix = format!("(,gpt1)/{DIRECTORY}");
    mkimage(
        "i386-pc",
        BIOS_MODULES,
        &core,
        &prefix,
        &["biosdisk", "multiboot"],
    )?;
    let mut image = fs::read(&core)?;
    fs::remove_file(&core)?;
    let boot = fs::read(Path::new(BIOS_MODULES).join("boot.img"))
        .with_context(|| format!("cannot read boot.img in {BIOS_MODULES}"))?;
    image.resize(image.len().next_multiple_of(SECTOR), 0);
    patch_core(&mut image)?;

    let mut disk = OpenOptions::new().read(true).write(true).open(out)?;
    let mut mbr = [0; SECTOR];
    disk.read_exact(&mut mbr)?;
    patch_mbr(&mut mbr, &boot)?;
    disk.seek(SeekFrom::Start(0))?;
    disk.write_all(&mbr)?;
    disk.seek(SeekFrom::Start(BIOS_BOOT * SECTOR as u64))?;
    disk.write_all(&image)?;
    Ok(())
}

/// Puts GRUB's code into sector 0, around the partition table, and tells it where to go on.
fn patch_mbr(mbr: &mut [u8; SECTOR], boot: &[u8]) -> Result<()> {
    /// Code up to here; then the disk's signature and the partition table.
    const CODE: usize = 440;
    /// Where the parameters of a FAT would be, which a disk has not; code jumps over them.
    const NEXT_SECTOR: usize = 0x5c;
    /// A jump that hard disks have without: it skips a check of the drive number in DL.
    const DRIVE_CHECK: usize = 0x66;
    if boot.len() != SECTOR || mbr[510..] != [0x55, 0xaa] {
        bail!("boot.img or the disk's first sector is not what it should be");
    }
    mbr[..CODE].copy_from_slice(&boot[..CODE]);
    mbr[NEXT_SECTOR..NEXT_SECTOR + 8].copy_from_slice(&BIOS_BOOT.to_le_bytes());
    mbr[DRIVE_CHECK..DRIVE_CHECK + 2].fill(0x90);
    Ok(())
}

/// Tells the first sector of `core.img` where the others are: right behind it.
fn patch_core(core: &mut [u8]) -> Result<()> {
    /// First sector, how many, and the segment they are loaded to: the last bytes of the sector.
    const LIST: usize = SECTOR - 12;
    const SEGMENT: u16 = 0x820;
    let sectors = core.len() / SECTOR;
    if sectors < 2 || sectors as u64 > BIOS_BOOT_SECTORS {
        bail!("core.img has {sectors} sectors, the BIOS boot partition {BIOS_BOOT_SECTORS}");
    }
    core[LIST..LIST + 8].copy_from_slice(&(BIOS_BOOT + 1).to_le_bytes());
    core[LIST + 8..LIST + 10].copy_from_slice(&(sectors as u16 - 1).to_le_bytes());
    core[LIST + 10..LIST + 12].copy_from_slice(&SEGMENT.to_le_bytes());
    Ok(())
}

fn mkimage(format: &str, modules: &str, out: &Path, prefix: &str, more: &[&str]) -> Result<()> {
    File::create(out).with_context(|| format!("cannot write {}", out.display()))?;
    sh::quiet(
        Command::new("grub-mkimage")
            .args(["-O", format, "-d", modules, "-p", prefix, "-o"])
            .arg(out)
            .args(COMMON)
            .args(more),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_starts_the_hypervisor_with_kernel_and_initrd_as_modules() {
        let text = config("com1=115200,8n1", "console=hvc0 quiet", true);
        assert!(text.contains("    multiboot2 /EFI/BOOT/galvan.gz com1=115200,8n1\n    module2 --nounzip /EFI/BOOT/vmlinuz console=hvc0 quiet\n    module2 --nounzip /EFI/BOOT/initrd.img\n}\n"), "{text}");
        assert!(text.contains("    multiboot /EFI/BOOT/galvan.gz com1"));
        assert!(!config("", "", false).contains("initrd"));
        let mut contents = Contents {
            efi: "".into(),
            config: text,
            config_name: String::new(),
            kernel: "".into(),
            initrd: None,
            more: Vec::new(),
        };
        by_multiboot1(&mut contents);
        assert!(contents.config.contains("\nset timeout=0\nset default=1\n"));
    }

    #[test]
    fn the_partition_table_stays_and_the_next_sector_is_filled_in() {
        let mut mbr = [0xee; SECTOR];
        mbr[510..].copy_from_slice(&[0x55, 0xaa]);
        let boot = [0x11; SECTOR];
        patch_mbr(&mut mbr, &boot).unwrap();
        assert!(mbr[440..510].iter().all(|&b| b == 0xee));
        assert_eq!(mbr[0x5c..0x64], 34u64.to_le_bytes());
        assert_eq!(
            (mbr[0x5b], mbr[0x66], mbr[0x67], mbr[0x68]),
            (0x11, 0x90, 0x90, 0x11)
        );
        assert!(patch_mbr(&mut [0; SECTOR], &boot).is_err());
    }

    #[test]
    fn the_rest_of_core_img_is_behind_its_first_sector() {
        let mut core = vec![0; 5 * SECTOR];
        patch_core(&mut core).unwrap();
        assert_eq!(core[500..512], [35, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0x20, 0x08]);
        assert!(patch_core(&mut vec![0; 2015 * SECTOR]).is_err());
        assert!(patch_core(&mut vec![0; SECTOR]).is_err());
    }
}
