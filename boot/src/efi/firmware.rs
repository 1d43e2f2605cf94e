//! What firmware and processor tell: load options, tables, the screen, CPUID.

use alloc::string::String;
use alloc::vec::Vec;
use core::mem::ManuallyDrop;
use core::time::Duration;

use galvan_boot::info::{FrameBuffer, PixelFormat};
use uefi::boot::{self, OpenProtocolAttributes, OpenProtocolParams, ScopedProtocol};
use uefi::proto::ProtocolPointer;
use uefi::proto::console::gop::{self, GraphicsOutput};
use uefi::proto::loaded_image::LoadedImage;
use uefi::table::cfg::ConfigTableEntry;
use uefi::{Handle, system};

/// Whether firmware runs on 5-level page tables.
pub fn has_five_levels() -> bool {
    let cr4: u64;
    // SAFETY: reading CR4 at privilege level 0 has no effect.
    unsafe {
        core::arch::asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags));
    }
    cr4 & 1 << 12 != 0
}

/// The application's load options as text; `None` if they are something else (boot entries made
/// by firmware may carry binary data).
pub fn load_options(image: &LoadedImage) -> Option<String> {
    let bytes = image.load_options_as_bytes().unwrap_or_default();
    let units: Vec<u16> = bytes
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .take_while(|&unit| unit != 0)
        .collect();
    let text = String::from_utf16(&units).ok()?;
    let printable = |c: char| c == '\t' || c == '\r' || c == '\n' || !c.is_control();
    text.chars().all(printable).then_some(text)
}

/// What the EFI system table leads to. Physical addresses; 0 = not there.
#[derive(Debug, Default)]
pub struct Tables {
    /// ACPI's root pointer, of ACPI 2.0 or later if there is one.
    pub rsdp: u64,
    /// SMBIOS's entry point, of version 3 if there is one.
    pub smbios: u64,
    /// The system table itself.
    pub system_table: u64,
}

impl Tables {
    /// Looks through the configuration tables.
    pub fn find() -> Self {
        system::with_config_table(|entries| {
            let address_of = |guid| {
                entries
                    .iter()
                    .find(|entry| entry.guid == guid)
                    .map(|entry| entry.address as u64)
                    .filter(|&address| address != 0)
            };
            Self {
                rsdp: address_of(ConfigTableEntry::ACPI2_GUID)
                    .or_else(|| address_of(ConfigTableEntry::ACPI_GUID))
                    .unwrap_or(0),
                smbios: address_of(ConfigTableEntry::SMBIOS3_GUID)
                    .or_else(|| address_of(ConfigTableEntry::SMBIOS_GUID))
                    .unwrap_or(0),
                system_table: uefi::table::system_table_raw()
                    .map_or(0, |table| table.as_ptr() as u64),
            }
        })
    }
}

/// The screen as it is, in its current mode.
pub fn frame_buffer() -> Option<FrameBuffer> {
    let handle = boot::get_handle_for_protocol::<GraphicsOutput>().ok()?;
    // SAFETY: only the mode is read, no mode is set and nothing is drawn, so that the console,
    // which has the protocol open, is not disturbed. (Opening it exclusively would end the
    // console.)
    let mut gop = unsafe { get_protocol::<GraphicsOutput>(handle) }.ok()?;
    let mode = gop.current_mode_info();
    let (format, [red, green, blue, reserved]) = match mode.pixel_format() {
        gop::PixelFormat::Rgb => (PixelFormat::RGB, [0xff, 0xff00, 0xff_0000, 0xff00_0000]),
        gop::PixelFormat::Bgr => (PixelFormat::BGR, [0xff_0000, 0xff00, 0xff, 0xff00_0000]),
        gop::PixelFormat::Bitmask => {
            let mask = mode.pixel_bitmask()?;
            (
                PixelFormat::MASKS,
                [mask.red, mask.green, mask.blue, mask.reserved],
            )
        }
        gop::PixelFormat::BltOnly => return None,
    };
    let (width, height) = mode.resolution();
    let stride = mode.stride();
    let mut memory = gop.frame_buffer();
    Some(FrameBuffer {
        base: memory.as_mut_ptr() as u64,
        size: memory.size() as u64,
        width: u32::try_from(width).ok()?,
        height: u32::try_from(height).ok()?,
        stride: u32::try_from(stride).ok()?,
        format,
        red_mask: red,
        green_mask: green,
        blue_mask: blue,
        reserved_mask: reserved,
    })
}

/// A protocol of `handle`, without taking it away from whoever else uses it. It is not closed
/// again: opened like this it need not be (UEFI specification, OpenProtocol(), GET_PROTOCOL), and
/// OVMF answers NOT_FOUND to an application that closes its own LoadedImage.
///
/// # Safety
///
/// The protocol stays installed, and other agents go on using it: no state of it may be changed
/// that they rely on.
pub unsafe fn get_protocol<P: ProtocolPointer + ?Sized>(
    handle: Handle,
) -> uefi::Result<ManuallyDrop<ScopedProtocol<P>>> {
    let params = OpenProtocolParams {
        handle,
        agent: boot::image_handle(),
        controller: None,
    };
    // SAFETY: passed on to the caller.
    unsafe { boot::open_protocol(params, OpenProtocolAttributes::GetProtocol) }
        .map(ManuallyDrop::new)
}

/// Gives the administrator time to read: until a key is pressed, or 5 seconds.
pub fn wait_for_reader() {
    const STEP: Duration = Duration::from_millis(50);
    for _ in 0..100 {
        let pressed = system::with_stdin(|stdin| matches!(stdin.read_key(), Ok(Some(_))));
        if pressed {
            return;
        }
        boot::stall(STEP);
    }
}
