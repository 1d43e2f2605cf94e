//! The screen: the log as text on the frame buffer (or in the VGA's text memory) that firmware has
//! left, until dom0 takes it over, and once more for the last words of a machine.
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
use galvan_boot::info::{FrameBuffer, PixelFormat};

const CELL: (u32, u32) = (8, 13);
const GREY: u32 = 0x00c0_c0c0;

/// Light grey on black, in the upper byte of a text cell.
const ATTRIBUTE: u16 = 0x0700;

struct Screen {
    surface: Surface,
    columns: u32,
    rows: u32,
    column: u32,
    row: u32,
}

enum Surface {
    Pixels(Pixels),
    Text { cells: *mut u16, stride: u32 },
}

struct Pixels {
    pixels: *mut u32,
    width: u32,
    height: u32,
    stride: u32,
}

// SAFETY: the frame buffer is only written under the lock of `SCREEN`.
unsafe impl Send for Screen {}

static SCREEN: RankedLock<Option<Screen>, { rank::CONSOLE_DEVICE }> = RankedLock::new(None);
/// dom0 draws: Galvan keeps off.
static RELEASED: AtomicBool = AtomicBool::new(false);

/// Takes the screen, if there is one with 32 bits a pixel or one of text, and clears it.
pub fn init(f: &FrameBuffer) {
    let text = f.format == PixelFormat::TEXT;
    let (cell, bytes_per_unit, least) = if text {
        ((1, 1), 2, (40, 2))
    } else {
        (CELL, 4, (320, 200))
    };
    let bytes = u64::from(f.stride) * u64::from(f.height) * bytes_per_unit;
    let usable =
        f.width >= least.0 && f.height >= least.1 && f.stride >= f.width && bytes <= f.size;
    if f.base == 0 || !usable {
        return;
    }
    let memory = crate::paging::map_framebuffer(Mpa::new_truncate(f.base), bytes as usize);
    let surface = if text {
        Surface::Text {
            cells: memory.cast(),
            stride: f.stride,
        }
    } else {
        Surface::Pixels(Pixels {
            pixels: memory.cast(),
            width: f.width,
            height: f.height,
            stride: f.stride,
        })
    };
    let (columns, rows) = (f.width / cell.0, f.height / cell.1);
    let mut s = Screen {
        surface,
        columns,
        rows,
        column: 0,
        row: 0,
    };
    // With what is left below the last whole line.
    for row in 0..rows + 1 {
        s.clear_row(row);
    }
    *SCREEN.lock() = Some(s);
    log::info!(
        "screen: {} x {}{}",
        f.width,
        f.height,
        if text { ", text" } else { "" }
    );
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
    fn put(&mut self, text: &[u8]) {
        for &b in text {
            if b == b'\n' || self.column >= self.columns {
                self.new_line();
            }
            if b.is_ascii_graphic() {
                self.draw(b);
            }
            if b != b'\n' {
                self.column += 1;
            }
        }
    }

    /// Draws a character where the next one goes.
    fn draw(&mut self, b: u8) {
        match &mut self.surface {
            Surface::Pixels(pixels) => {
                let at = Point::new((self.column * CELL.0) as i32, (self.row * CELL.1) as i32);
                let glyph = [b];
                if let Ok(s) = core::str::from_utf8(&glyph) {
                    let style = MonoTextStyle::new(&FONT_8X13, BinaryColor::On);
                    let _ = Text::with_baseline(s, at, style, Baseline::Top).draw(pixels);
                }
            }
            Surface::Text { cells, stride }
                if self.column < self.columns && self.row < self.rows =>
            {
                let at = self.row * *stride + self.column;
                // SAFETY: inside the mapped text memory, whose size was checked.
                unsafe {
                    cells
                        .add(at as usize)
                        .write_volatile(ATTRIBUTE | u16::from(b))
                };
            }
            Surface::Text { .. } => {}
        }
    }

    fn new_line(&mut self) {
        self.column = 0;
        self.row = (self.row + 1) % self.rows;
        self.clear_row(self.row);
        self.clear_row((self.row + 1) % self.rows);
    }

    fn clear_row(&mut self, row: u32) {
        match &mut self.surface {
            Surface::Pixels(pixels) => {
                for y in row * CELL.1..((row + 1) * CELL.1).min(pixels.height) {
                    for x in 0..pixels.width {
                        pixels.set(x, y, 0);
                    }
                }
            }
            Surface::Text { cells, stride } if row < self.rows => {
                for column in 0..self.columns {
                    let at = row * *stride + column;
                    // SAFETY: inside the mapped text memory, whose size was checked.
                    unsafe {
                        cells
                            .add(at as usize)
                            .write_volatile(ATTRIBUTE | u16::from(b' '))
                    };
                }
            }
            Surface::Text { .. } => {}
        }
    }
}

impl Pixels {
    fn set(&mut self, x: u32, y: u32, v: u32) {
        if x < self.width && y < self.height {
            // SAFETY: inside the mapped frame buffer, whose size was checked.
            unsafe {
                self.pixels
                    .add((y * self.stride + x) as usize)
                    .write_volatile(v)
            };
        }
    }
}

impl OriginDimensions for Pixels {
    fn size(&self) -> Size {
        Size::new(self.width, self.height)
    }
}

impl DrawTarget for Pixels {
    type Color = BinaryColor;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<BinaryColor>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(at, color) in pixels {
            if let (Ok(x), Ok(y)) = (u32::try_from(at.x), u32::try_from(at.y)) {
                self.set(x, y, if color.is_on() { GREY } else { 0 });
            }
        }
        Ok(())
    }
}
