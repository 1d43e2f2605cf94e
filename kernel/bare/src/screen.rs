//! The screen: the log as text on the frame buffer that firmware has left, until dom0 takes it over,
//! and once more for the last words of a machine.
//!
//! Frame-buffer memory is slow to read, so nothing is scrolled: when the last line is full, writing
//! goes on at the top, with an empty line between the new and the old.

use core::convert::Infallible;
use core::sync::atomic::{AtomicBool, Ordering};

use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::ascii::FONT_8X13;
use embedded_graphics::pixelcolor::BinaryColor;
use embedded_graphics::text::{Baseline, Text};
use embedded_graphics::{Drawable, Pixel};
use galvan_base::Mpa;
use galvan_base::sync::{RankedLock, rank};
use galvan_boot::info::FrameBuffer;

const CELL: (u32, u32) = (8, 13);
const GREY: u32 = 0x00c0_c0c0;

struct Screen {
    pixels: *mut u32,
    width: u32,
    height: u32,
    stride: u32,
    column: u32,
    row: u32,
}

// SAFETY: the frame buffer is only written under the lock of `SCREEN`.
unsafe impl Send for Screen {}

static SCREEN: RankedLock<Option<Screen>, { rank::CONSOLE_DEVICE }> = RankedLock::new(None);
/// dom0 draws: Galvan keeps off.
static RELEASED: AtomicBool = AtomicBool::new(false);

/// Takes the frame buffer, if there is one with 32 bits a pixel, and clears it.
pub fn init(f: &FrameBuffer) {
    let bytes = u64::from(f.stride) * u64::from(f.height) * 4;
    let usable = f.width >= 320 && f.height >= 200 && f.stride >= f.width && bytes <= f.size;
    if f.base == 0 || !usable {
        return;
    }
    let pixels = crate::paging::map_framebuffer(Mpa::new_truncate(f.base), bytes as usize).cast::<u32>();
    let mut s = Screen { pixels, width: f.width, height: f.height, stride: f.stride, column: 0, row: 0 };
    for row in 0..s.rows() + 1 {
        s.clear_row(row);
    }
    *SCREEN.lock() = Some(s);
    log::info!("screen: {} x {}", f.width, f.height);
}

/// Leaves the screen to dom0.
pub fn release() {
    RELEASED.store(true, Ordering::Relaxed);
}

/// Writes text.
pub fn write(text: &[u8]) {
    if RELEASED.load(Ordering::Relaxed) {
        return;
    }
    if let Some(s) = SCREEN.lock().as_mut() {
        s.put(text);
    }
}

/// Writes last words, over whatever dom0 shows.
pub fn write_in_panic(text: &[u8]) {
    if let Some(mut guard) = SCREEN.try_lock()
        && let Some(s) = guard.as_mut()
    {
        s.put(text);
    }
}

impl Screen {
    fn rows(&self) -> u32 {
        self.height / CELL.1
    }

    fn put(&mut self, text: &[u8]) {
        for &b in text {
            if b == b'\n' || self.column >= self.width / CELL.0 {
                self.new_line();
            }
            if b.is_ascii_graphic() {
                let at = Point::new((self.column * CELL.0) as i32, (self.row * CELL.1) as i32);
                let glyph = [b];
                if let Ok(s) = core::str::from_utf8(&glyph) {
                    let style = MonoTextStyle::new(&FONT_8X13, BinaryColor::On);
                    let _ = Text::with_baseline(s, at, style, Baseline::Top).draw(self);
                }
            }
            if b != b'\n' {
                self.column += 1;
            }
        }
    }

    fn new_line(&mut self) {
        self.column = 0;
        self.row = (self.row + 1) % self.rows();
        self.clear_row(self.row);
        self.clear_row((self.row + 1) % self.rows());
    }

    fn clear_row(&mut self, row: u32) {
        for y in row * CELL.1..((row + 1) * CELL.1).min(self.height) {
            for x in 0..self.width {
                self.set(x, y, 0);
            }
        }
    }

    fn set(&mut self, x: u32, y: u32, v: u32) {
        if x < self.width && y < self.height {
            // SAFETY: inside the mapped frame buffer, whose size was checked.
            unsafe { self.pixels.add((y * self.stride + x) as usize).write_volatile(v) };
        }
    }
}

impl OriginDimensions for Screen {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Screen {
    type Color = BinaryColor;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<BinaryColor>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(at, color) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y)) {
                self.set(x, y, if color.is_on() { GREY } else { 0 });
            }
        }
        Ok(())
    }
}
