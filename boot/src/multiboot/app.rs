//! From the entry point to the hand-over, step by step.

use core::convert::Infallible;
use core::fmt;

use galvan_boot::cpu::{self, Unfit};
use galvan_boot::elf_load::{BLOCK_ALIGN, BadImage, Plan};
use galvan_boot::info::{
    BootInfo, DIRECT_MAP_BASE, Image, MemoryKind, MemoryRange, Module, PhysRange,
};
use galvan_boot::mbi::{self, BadInfo, Handed, Map, Memory};
use galvan_boot::memory_map::{Full, MapBuilder, NoRoom, capacity};
use galvan_boot::paging::{Layout, MapError};

use crate::console::{self, say};
use crate::edge;
use crate::edge::enter::{GDT, State, enter};
use crate::edge::processor::ThisProcessor;
use crate::memory::{Block, Kept, Left, TOP, TableFrames};

/// The hypervisor: the ELF executable `galvan`, symbols included.
static IMAGE: &[u8] = include_bytes!(env!(
    "GALVAN_IMAGE",
    "GALVAN_IMAGE has to be the absolute path of the hypervisor's ELF image (`cargo xtask build` sets it)"
));

const PAGE: u64 = 4096;

/// How many ranges are added to the firmware's map: this program, two modules, the image, its
/// symbols, page tables.
const MARKS: usize = 6;

/// Starts the hypervisor, or says why not.
pub fn main(magic: u32, info: u32, own: PhysRange, stack: PhysRange) -> ! {
    console::init();
    match run(magic, info, own, stack) {
        Ok(never) => match never {},
        Err(failure) => console::fail(failure),
    }
}

fn run(magic: u32, info: u32, own: PhysRange, stack: PhysRange) -> Result<Infallible, Failure> {
    let entry_tsc = edge::tsc();
    say(format_args!("Galvan {}", env!("CARGO_PKG_VERSION")));
    say(cpu::check(&ThisProcessor)?.name());

    // SAFETY: the program passes here once.
    let kept = unsafe { Kept::take() };
    let left = Left { own };
    let handed = Handed::read(magic, info, &left)?;
    say(format_args!(
        "started by {} ({}), {} modules",
        Text(handed.loader_name),
        handed.loader.name(),
        handed.module_count
    ));
    let (kernel, ramdisk) = handed.checked_modules(own)?;
    if handed.module_count > 2 {
        say("ignoring all modules but the first two, dom0's kernel and ramdisk");
    }

    if capacity(handed.map.entries(), MARKS) > kept.map.len() {
        return Err(Failure::LongMap(handed.map.entries()));
    }
    let mut map = MapBuilder::new(&mut kept.map);
    handed.map.add_to(&mut map)?;
    for (what, range) in [
        ("the hypervisor", own),
        ("dom0's kernel", kernel.data),
        (
            "dom0's ramdisk",
            ramdisk.map_or(PhysRange::EMPTY, |module| module.data),
        ),
    ] {
        if !map.is_reclaimable(range) {
            return Err(Failure::NotMemory(what, range));
        }
    }
    map.mark(own.start, own.len, MemoryKind::LOADER)?;
    for module in [Some(kernel), ramdisk].into_iter().flatten() {
        map.mark(module.data.start, module.data.len, MemoryKind::MODULE)?;
    }

    let mut keep = |bytes: &[u8]| kept.arena.put(bytes).ok_or(Failure::LongTexts);
    let mut info = BootInfo::new(handed.loader);
    info.entry_tsc = entry_tsc;
    info.cmdline = keep(handed.cmdline)?;
    info.dom0_kernel = Module {
        data: kernel.data,
        cmdline: keep(kernel.cmdline)?,
    };
    if let Some(ramdisk) = ramdisk {
        info.dom0_ramdisk = Module {
            data: ramdisk.data,
            cmdline: keep(ramdisk.cmdline)?,
        };
    }
    let gdt = keep(GDT.map(u64::to_le_bytes).as_flattened())?.start;
    info.efi_system_table = handed.efi_system_table;
    if let Some(copy) = handed.rsdp {
        // 36 bytes in all versions so far.
        info.rsdp = keep(copy.get(..64).unwrap_or(copy))?.start;
    }
    let is_bios = matches!(handed.map, Map::E820 { .. }) && handed.efi_system_table == 0;
    let bios_screen = || {
        let video = left.bytes(mbi::BIOS_VIDEO.start, mbi::BIOS_VIDEO.len as usize);
        video.filter(|_| is_bios).and_then(mbi::bios_text_screen)
    };
    info.framebuffer = handed.framebuffer.or_else(bios_screen).unwrap_or_default();

    // What the loader has left is read, except for the modules: from here on memory is written to.
    let plan = Plan::new(IMAGE)?;
    let mut take = |what, len, align, kind| {
        let at = map
            .take_highest(len, align, TOP, kind)
            .map_err(|NoRoom| Failure::NoRoom(what, len))?;
        // SAFETY: it was free by the memory map, in which this program and the modules are not
        // free, and is not free any more.
        Ok::<_, Failure>(unsafe { Block::new(at, len) })
    };
    let mut block = take(
        "the hypervisor",
        plan.len(),
        BLOCK_ALIGN,
        MemoryKind::HYPERVISOR_IMAGE,
    )?;
    plan.load_into(block.bytes_mut())?;
    let mut symbols = take(
        "the hypervisor's symbols",
        IMAGE.len() as u64,
        PAGE,
        MemoryKind::HYPERVISOR_IMAGE,
    )?;
    symbols.bytes_mut().copy_from_slice(IMAGE);
    say(format_args!(
        "hypervisor, {} KiB at {:#x}",
        plan.len() >> 10,
        block.range().start
    ));
    info.image = Image {
        phys: block.range(),
        virt: plan.virt(),
    };
    info.symbols = symbols.range();
    info.stack = stack;

    let mut layout = Layout {
        top: 0,
        image_virt: plan.virt(),
        image_phys: block.range().start,
        image_len: plan.len(),
        gib_pages: cpu::has_gib_pages(&ThisProcessor),
    };
    layout.top = map.top_to_map();
    let frames = layout.frames_needed() * PAGE;
    let at = map
        .take_highest(frames, PAGE, TOP, MemoryKind::LOADER)
        .map_err(|NoRoom| Failure::NoRoom("page tables", frames))?;
    // SAFETY: as in `take`.
    let mut tables = TableFrames::new(unsafe { Block::new(at, frames) });
    let cr3 = layout.build(&mut tables)?;
    info.page_tables = PhysRange::new(at, frames);

    for data in [info.dom0_kernel.data, info.dom0_ramdisk.data] {
        let tail = data.end().next_multiple_of(PAGE) - data.end();
        // SAFETY: the rest of a module's last page. It is memory like the module, whose last byte
        // is in it; modules begin on page boundaries, and so does this program, so that nothing
        // else that is still needed is in it.
        unsafe { Block::new(data.end(), tail) }.bytes_mut().fill(0);
    }

    let entries = map.finish();
    info.memory_map = PhysRange::new(
        entries.as_ptr() as u64,
        (entries.len() * MemoryRange::SIZE) as u64,
    );
    kept.info = info;
    say("starting the hypervisor");
    let state = State {
        cr3,
        stack,
        entry: plan.entry(),
        gdt,
    };
    // SAFETY: the new tables map all memory up to 4 GiB and more at its own address, and with it
    // this program; the image was loaded by its plan; all that the hand-over refers to is in this
    // program's memory, in what was taken for it, or in modules.
    unsafe { enter(&state, DIRECT_MAP_BASE + &raw const kept.info as u64) }
}

/// Text of the loader's, whatever bytes it has.
struct Text(&'static [u8]);

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("a nameless loader");
        }
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// Why the hypervisor is not started.
enum Failure {
    Unfit(Unfit),
    Info(BadInfo),
    Image(BadImage),
    Tables(MapError),
    LongMap(usize),
    LongTexts,
    NotMemory(&'static str, PhysRange),
    NoRoom(&'static str, u64),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unfit(unfit) => unfit.fmt(f),
            Self::Info(bad) => bad.fmt(f),
            Self::Image(bad) => write!(f, "hypervisor image: {bad}"),
            Self::Tables(error) => error.fmt(f),
            Self::LongMap(entries) => write!(f, "the memory map has {entries} entries, too many"),
            Self::LongTexts => f.write_str("the command lines are too long"),
            Self::NotMemory(what, range) => write!(
                f,
                "{what} was loaded to {:#x}-{:#x}, which is not all free memory",
                range.start,
                range.end()
            ),
            Self::NoRoom(what, len) => {
                write!(
                    f,
                    "not enough memory below 4 GiB for {what} ({} KiB)",
                    len >> 10
                )
            }
        }
    }
}

impl From<Unfit> for Failure {
    fn from(unfit: Unfit) -> Self {
        Self::Unfit(unfit)
    }
}

impl From<BadInfo> for Failure {
    fn from(bad: BadInfo) -> Self {
        Self::Info(bad)
    }
}

impl From<BadImage> for Failure {
    fn from(bad: BadImage) -> Self {
        Self::Image(bad)
    }
}

impl From<MapError> for Failure {
    fn from(error: MapError) -> Self {
        Self::Tables(error)
    }
}

impl From<Full> for Failure {
    fn from(_: Full) -> Self {
        Self::LongMap(crate::memory::MAP_ENTRIES)
    }
}
