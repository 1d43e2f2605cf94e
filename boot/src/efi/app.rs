//! From the entry point to the hand-over, step by step.

use alloc::string::{String, ToString};
use core::panic::PanicInfo;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use galvan_boot::config::{self, Config, Entry, Lookup};
use galvan_boot::cpu;
use galvan_boot::elf_load::Plan;
use galvan_boot::info::{BootInfo, Image, LoaderKind, MemoryKind, Module};
use galvan_boot::memory_map;
use galvan_boot::options::{LoadOptions, USAGE};
use galvan_boot::paging::Layout;
use uefi::boot::{self, MemoryType};
use uefi::mem::memory_map::MemoryMap;
use uefi::proto::loaded_image::LoadedImage;
use uefi::runtime::{self, ResetType};
use uefi::{Status, println};

use crate::edge;
use crate::edge::enter::{GDT, State};
use crate::edge::processor::ThisProcessor;
use crate::failure::Failure;
use crate::files::{Loaded, Origin};
use crate::firmware::{self, Tables};
use crate::handover::{self, Jump};
use crate::memory::{Arena, Pages, TableFrames};

/// The hypervisor: the ELF executable `galvan`, symbols included.
static IMAGE: &[u8] = include_bytes!(env!(
    "GALVAN_IMAGE",
    "GALVAN_IMAGE has to be the absolute path of the hypervisor's ELF image (`cargo xtask build` sets it)"
));

/// Bytes of stack the hypervisor is entered on.
const STACK: usize = 64 << 10;

/// The time stamp counter when this program was entered.
static ENTRY_TSC: AtomicU64 = AtomicU64::new(0);

/// Starts the hypervisor, or says why not.
pub fn main() -> Status {
    ENTRY_TSC.store(edge::tsc(), Ordering::Relaxed);
    match run() {
        Ok(()) => Status::SUCCESS,
        Err(failure) => {
            println!("galvan.efi: {failure}");
            firmware::wait_for_reader();
            failure.status
        }
    }
}

/// A bug of this application, or firmware that breaks its promises. The boot manager goes on.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if !handover::BEGUN.load(Ordering::Relaxed) {
        println!("galvan.efi: {info}");
        firmware::wait_for_reader();
        // SAFETY: this is the image that runs; what it has allocated and opened stays behind, and
        // nothing of it refers to the application's code.
        unsafe { boot::exit(boot::image_handle(), Status::ABORTED, 0, ptr::null_mut()) }
    }
    runtime::reset(ResetType::COLD, Status::ABORTED, None)
}

/// Returns only if nothing was to be started (`-help`).
fn run() -> Result<(), Failure> {
    // Loading from a slow stick may take longer than the five minutes of the boot manager's
    // watchdog. Firmware without a watchdog says it cannot; that is as good.
    let _ = boot::set_watchdog_timer(0, 0x1_0000, None);
    println!("Galvan {}", env!("CARGO_PKG_VERSION"));

    // SAFETY: the image's own description of itself; it is only read.
    let image = unsafe { firmware::get_protocol::<LoadedImage>(boot::image_handle()) }
        .map_err(|error| Failure::new(error.status(), "firmware does not say what it loaded"))?;
    let mut origin = Origin::find(&image)?;
    let text = firmware::load_options(&image);
    if text.is_none() {
        println!("galvan.efi: ignoring load options that are no text");
    }
    let text = text.unwrap_or_default();
    let options = LoadOptions::parse(&text, &origin.file_name)
        .map_err(|error| Failure::new(Status::INVALID_PARAMETER, error))?;
    if options.help {
        println!("{USAGE}");
        return Ok(());
    }

    let virtualisation =
        cpu::check(&ThisProcessor).map_err(|unfit| Failure::new(Status::UNSUPPORTED, unfit))?;
    if firmware::has_five_levels() {
        return Err(Failure::new(
            Status::UNSUPPORTED,
            "firmware runs on 5-level page tables: switch them (LA57) off in the setup",
        ));
    }
    println!("galvan.efi: {}", virtualisation.name());

    let choice = choose(&mut origin, &options)?;
    start(&mut origin, &options, &choice)
}

/// What the configuration says, on its own.
struct Choice {
    /// The file it says so in.
    config: String,
    /// The hypervisor's command line.
    options: String,
    kernel: File,
    ramdisk: Option<File>,
}

/// A file that is to be loaded for dom0.
struct File {
    name: String,
    cmdline: String,
    line: usize,
}

impl File {
    fn new(entry: &Entry<'_>) -> Self {
        let (name, cmdline) = entry.file_and_cmdline();
        Self {
            name: name.to_string(),
            cmdline: cmdline.to_string(),
            line: entry.line,
        }
    }
}

/// Finds the configuration, and in it what to boot.
fn choose(origin: &mut Origin, options: &LoadOptions<'_>) -> Result<Choice, Failure> {
    let (mut name, mut bytes) = first_config(origin, options.config)?;
    let mut section = options.section.map(str::to_string);
    for _ in 0..config::MAX_CHAIN {
        let config = Config::parse(&bytes).map_err(|error| Failure::of_config(&name, &error))?;
        let lookup = config
            .select(section.as_deref())
            .map_err(|error| Failure::of_config(&name, &error))?;
        let (next, next_section) = match lookup {
            Lookup::Found(selection) => {
                match selection.section {
                    Some(section) => println!("galvan.efi: {name}: section [{section}]"),
                    None => println!("galvan.efi: {name}"),
                }
                for entry in selection.ignored.into_iter().flatten() {
                    println!(
                        "galvan.efi: {name}:{}: {}= is not supported, ignored",
                        entry.line,
                        entry.key.name()
                    );
                }
                let own = selection.options.map_or("", |entry| entry.value);
                return Ok(Choice {
                    options: alloc::format!("{own} {}", options.hypervisor)
                        .trim()
                        .to_string(),
                    kernel: File::new(&selection.kernel),
                    ramdisk: selection.ramdisk.as_ref().map(File::new),
                    config: name,
                });
            }
            Lookup::Chain { file, section } => (
                read_config(origin, file.value).map_err(|f| f.at(&name, Some(file.line)))?,
                section.map(str::to_string),
            ),
        };
        (bytes, name) = next;
        section = next_section;
    }
    Err(Failure::new(
        Status::LOAD_ERROR,
        "chain= leads on and on: the section is in none of the files",
    )
    .at(&name, None))
}

/// The configuration file to begin with: the one that was asked for, or the first there is of
/// those that go with the application's own name.
fn first_config(
    origin: &mut Origin,
    asked: Option<&str>,
) -> Result<(String, alloc::vec::Vec<u8>), Failure> {
    if let Some(name) = asked {
        return read_config(origin, name).map(|(bytes, name)| (name, bytes));
    }
    let own_name = origin.file_name.clone();
    for stem in config::stems(&own_name) {
        let name = alloc::format!("{stem}.cfg");
        if let Some(bytes) = origin.read(&name)? {
            return Ok((name, bytes));
        }
    }
    Err(Failure::new(
        Status::NOT_FOUND,
        "galvan.cfg: there is no configuration file beside the application",
    ))
}

fn read_config(origin: &mut Origin, name: &str) -> Result<(alloc::vec::Vec<u8>, String), Failure> {
    let bytes = origin.read(name)?.ok_or_else(|| {
        Failure::new(
            Status::NOT_FOUND,
            alloc::format!("{name}: there is no such configuration file"),
        )
    })?;
    Ok((bytes, name.to_string()))
}

/// Loads everything and hands over.
fn start(origin: &mut Origin, options: &LoadOptions<'_>, choice: &Choice) -> Result<(), Failure> {
    let bad_image = |error| {
        Failure::new(
            Status::LOAD_ERROR,
            alloc::format!("hypervisor image: {error}"),
        )
    };
    let plan = Plan::new(IMAGE).map_err(bad_image)?;

    let kernel = load(origin, "kernel", &choice.kernel, &choice.config)?;
    let ramdisk = choice
        .ramdisk
        .as_ref()
        .map(|file| load(origin, "ramdisk", file, &choice.config))
        .transpose()?;

    let mut block = Pages::new_block(plan.len() as usize, "the hypervisor")?;
    plan.load_into(block.bytes_mut()).map_err(bad_image)?;
    let mut symbols = Pages::new(IMAGE.len(), "the hypervisor's symbols")?;
    symbols.bytes_mut()[..IMAGE.len()].copy_from_slice(IMAGE);
    println!(
        "galvan.efi: hypervisor, {} KiB at {:#x}",
        plan.len() >> 10,
        block.phys()
    );

    let stack = Pages::new(STACK, "the stack")?;
    let tables = Tables::find();
    let mut info = BootInfo::new(LoaderKind::UEFI);
    info.entry_tsc = ENTRY_TSC.load(Ordering::Relaxed);
    info.rsdp = tables.rsdp;
    info.smbios = tables.smbios;
    info.efi_system_table = tables.system_table;
    info.framebuffer = firmware::frame_buffer().unwrap_or_default();
    info.image = Image {
        phys: block.range(),
        virt: plan.virt(),
    };
    info.symbols = symbols.range();
    info.symbols.len = IMAGE.len() as u64;
    info.stack = stack.range();
    if info.rsdp == 0 {
        println!("galvan.efi: firmware has no ACPI tables");
    }

    let texts = [
        Some(&choice.options),
        Some(&choice.kernel.cmdline),
        choice.ramdisk.as_ref().map(|file| &file.cmdline),
    ];
    let texts_len: usize = texts.iter().flatten().map(|text| text.len() + 16).sum();
    let mut arena = Arena::new(size_of_val(&GDT) + 16 + texts_len)?;
    let gdt = arena.put(&GDT.map(u64::to_le_bytes).concat())?.start;
    info.cmdline = arena.put(choice.options.as_bytes())?;
    info.dom0_kernel = Module {
        data: kernel.range(),
        cmdline: arena.put(choice.kernel.cmdline.as_bytes())?,
    };
    if let (Some(loaded), Some(file)) = (&ramdisk, &choice.ramdisk) {
        info.dom0_ramdisk = Module {
            data: loaded.range(),
            cmdline: arena.put(file.cmdline.as_bytes())?,
        };
    }
    let info_page = Pages::new(size_of::<BootInfo>(), "the boot information")?;

    let no_map = |error: uefi::Error| Failure::new(error.status(), "firmware has no memory map");
    let efi_map = boot::memory_map(MemoryType::LOADER_DATA).map_err(no_map)?;
    let layout = Layout {
        top: memory_map::top_to_map(
            efi_map.entries().map(handover::plain),
            options.keep_boot_services,
        ),
        image_virt: plan.virt(),
        image_phys: block.phys(),
        image_len: plan.len(),
        gib_pages: cpu::has_gib_pages(&ThisProcessor),
    };
    let map_pages = handover::prepare(efi_map.len())?;
    drop(efi_map);
    let mut frames = TableFrames::new(layout.frames_needed())?;
    let cr3 = layout
        .build(&mut frames)
        .map_err(|error| Failure::new(Status::OUT_OF_RESOURCES, error))?;
    info.page_tables = frames.range();

    println!("galvan.efi: starting the hypervisor");
    let jump = Jump {
        state: State {
            cr3,
            stack: stack.range(),
            entry: plan.entry(),
            gdt,
        },
        keep_boot_services: options.keep_boot_services,
        marks: [
            (info.image.phys, MemoryKind::HYPERVISOR_IMAGE),
            (info.symbols, MemoryKind::HYPERVISOR_IMAGE),
            (info.dom0_kernel.data, MemoryKind::MODULE),
            (info.dom0_ramdisk.data, MemoryKind::MODULE),
        ],
    };
    // SAFETY: the tables map all RAM at its own address, and with it this application; the image
    // was loaded by its plan; what `jump` and `info` refer to is held by variables of this
    // function, which `go` never returns to.
    unsafe { handover::go(&jump, map_pages, info_page, info) }
}

/// Loads one of dom0's files and says so.
fn load(origin: &mut Origin, what: &str, file: &File, config: &str) -> Result<Loaded, Failure> {
    let loaded = origin
        .load(&file.name)
        .map_err(|failure| failure.at(config, Some(file.line)))?;
    println!(
        "galvan.efi: {what} {}, {} KiB at {:#x}",
        file.name,
        loaded.range().len.div_ceil(1024),
        loaded.range().start
    );
    Ok(loaded)
}
