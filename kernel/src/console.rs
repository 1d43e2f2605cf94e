//! The console: the last text of hypervisor and guests, as `xl dmesg` shows it, and what is typed.
//!
//! The ring is written by the logger of `kernel/bare`, by `console_io` and the debug port of guests,
//! and read by `XEN_SYSCTL_readconsole`. What is typed goes to dom0, which reads it by `console_io`;
//! after three times Ctrl-A it goes to the hypervisor as debug keys, until three times Ctrl-A again.

use core::sync::atomic::{AtomicBool, Ordering};

use galvan_base::sync::{RankedLock, rank};
use galvan_dom0_proto::xen::VIRQ_CONSOLE;

use crate::hv::Hv;

/// Bytes of text kept; a power of two.
pub const RING_SIZE: usize = 128 << 10;

struct Ring {
    text: [u8; RING_SIZE],
    /// Bytes ever written.
    produced: u64,
    /// Where a reader begins that has no index of its own: moved on by `clear`.
    cleared: u64,
}

/// The ring, to be a `static`: it takes text before there is any heap.
pub struct ConsoleRing(RankedLock<Ring, { rank::CONSOLE }>);

impl core::fmt::Debug for ConsoleRing {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "ConsoleRing({} bytes written)", self.0.lock().produced)
    }
}

impl Default for ConsoleRing {
    fn default() -> Self {
        Self::new()
    }
}

impl ConsoleRing {
    /// An empty ring.
    pub const fn new() -> Self {
        Self(RankedLock::new(Ring {
            text: [0; RING_SIZE],
            produced: 0,
            cleared: 0,
        }))
    }

    /// Appends text; the oldest is forgotten.
    pub fn write(&self, text: &[u8]) {
        let mut r = self.0.lock();
        for &b in text {
            let at = r.produced as usize % RING_SIZE;
            if let Some(slot) = r.text.get_mut(at) {
                *slot = b;
            }
            r.produced += 1;
        }
    }

    /// Copies text from position `index` on (or, where `from_start`, from the oldest that was not
    /// cleared) into `buf`; gives the number of bytes and the position after them. Positions are
    /// the low 32 bits of a running count, as the ABI has it.
    pub fn read(&self, from_start: bool, index: u32, buf: &mut [u8]) -> (usize, u32) {
        let r = self.0.lock();
        let oldest = r.produced.saturating_sub(RING_SIZE as u64);
        let mut at = if from_start {
            r.cleared.max(oldest)
        } else {
            // The position nearest below what was written that has these low bits.
            let behind = (r.produced as u32).wrapping_sub(index);
            r.produced.saturating_sub(u64::from(behind)).max(oldest)
        };
        let mut n = 0;
        for slot in buf.iter_mut() {
            if at >= r.produced {
                break;
            }
            *slot = r.text.get(at as usize % RING_SIZE).copied().unwrap_or(0);
            at += 1;
            n += 1;
        }
        (n, at as u32)
    }

    /// Forgets what was written so far, for readers that start anew.
    pub fn clear(&self) {
        let mut r = self.0.lock();
        r.cleared = r.produced;
    }
}

/// Bytes typed that dom0 has not read yet: more than a line that somebody pastes.
const TYPED: usize = 2048;

/// The key that switches the console when it is pressed [`SWITCH_TIMES`] times in a row: Ctrl-A.
const SWITCH_KEY: u8 = 1;
const SWITCH_TIMES: u8 = 3;

#[derive(Debug)]
struct Typed {
    text: [u8; TYPED],
    /// Bytes ever put in and ever taken out.
    put: usize,
    taken: usize,
    /// How often in a row the switch key was pressed.
    switch: u8,
    /// What is typed is a debug key, not text for dom0.
    to_hypervisor: bool,
    /// Keys that wait for [`ConsoleInput::take_key`]: one bit for each ASCII character.
    keys: u128,
}

/// What is typed on the physical console.
#[derive(Debug)]
pub struct ConsoleInput {
    typed: RankedLock<Typed, { rank::CONSOLE }>,
    has_keys: AtomicBool,
}

/// What became of a typed byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Dom0 can read it.
    ForDom0,
    /// It was a debug key, or part of the switch.
    Taken,
    /// It goes nowhere: dom0 does not read.
    Dropped,
    /// From now on what is typed goes to the hypervisor (true) or to dom0.
    Switched(bool),
}

impl Default for ConsoleInput {
    fn default() -> Self {
        Self::new()
    }
}

impl ConsoleInput {
    /// Nothing typed yet; dom0 has the console.
    pub const fn new() -> Self {
        let typed = Typed {
            text: [0; TYPED],
            put: 0,
            taken: 0,
            switch: 0,
            to_hypervisor: false,
            keys: 0,
        };
        ConsoleInput {
            typed: RankedLock::new(typed),
            has_keys: AtomicBool::new(false),
        }
    }

    /// Takes a byte from the keyboard's side.
    pub fn put(&self, b: u8) -> Key {
        let mut t = self.typed.lock();
        t.switch = if b == SWITCH_KEY { t.switch + 1 } else { 0 };
        if t.switch == SWITCH_TIMES {
            t.switch = 0;
            t.to_hypervisor = !t.to_hypervisor;
            return Key::Switched(t.to_hypervisor);
        }
        if t.to_hypervisor {
            if b.is_ascii_graphic() {
                t.keys |= 1 << b;
                self.has_keys.store(true, Ordering::Release);
            }
            return Key::Taken;
        }
        if t.put.wrapping_sub(t.taken) == TYPED {
            return Key::Dropped;
        }
        let at = t.put % TYPED;
        if let Some(slot) = t.text.get_mut(at) {
            *slot = b;
        }
        t.put = t.put.wrapping_add(1);
        Key::ForDom0
    }

    /// Takes what was typed for dom0; gives the number of bytes.
    pub fn read(&self, buf: &mut [u8]) -> usize {
        let mut t = self.typed.lock();
        let mut n = 0;
        for slot in buf.iter_mut() {
            if t.taken == t.put {
                break;
            }
            *slot = t.text.get(t.taken % TYPED).copied().unwrap_or(0);
            t.taken = t.taken.wrapping_add(1);
            n += 1;
        }
        n
    }

    /// A debug key that was pressed, if one was: to be acted upon where no lock is held.
    #[inline]
    pub fn take_key(&self) -> Option<u8> {
        if !self.has_keys.load(Ordering::Acquire) {
            return None;
        }
        let mut t = self.typed.lock();
        let key = (t.keys != 0).then(|| t.keys.trailing_zeros() as u8);
        t.keys &= t.keys.wrapping_sub(1);
        self.has_keys.store(t.keys != 0, Ordering::Release);
        key
    }
}

/// The hardware has bytes that were typed: takes all of them.
pub fn typed(hv: Hv) {
    let mut dom0 = false;
    while let Some(b) = hv.hw.console_read() {
        match hv.input.put(b) {
            Key::ForDom0 => dom0 = true,
            Key::Switched(true) => log::info!(
                "what is typed now are debug keys ('h' lists them); three times Ctrl-A goes back to dom0"
            ),
            Key::Switched(false) => log::info!("what is typed now goes to dom0"),
            Key::Taken | Key::Dropped => {}
        }
    }
    if dom0 {
        hv.raise_global_virq(VIRQ_CONSOLE);
    }
}

/// Gathers the bytes a guest writes to lines, so that guests' output does not mix within a line.
#[derive(Debug)]
pub struct LineBuffer {
    text: [u8; 128],
    len: usize,
}

impl Default for LineBuffer {
    fn default() -> Self {
        LineBuffer {
            text: [0; 128],
            len: 0,
        }
    }
}

impl LineBuffer {
    /// Takes a byte; gives the line to `emit` when it is complete or the buffer is full. Control
    /// characters other than tab are dropped: a guest must not steer the administrator's terminal.
    pub fn push(&mut self, b: u8, emit: impl FnOnce(&str)) {
        if b == b'\n' || self.len == self.text.len() {
            let line = self.text.get(..self.len).unwrap_or(&[]);
            emit(core::str::from_utf8(line).unwrap_or("?"));
            self.len = 0;
        }
        if (b.is_ascii_graphic() || b == b' ' || b == b'\t')
            && let Some(slot) = self.text.get_mut(self.len)
        {
            *slot = b;
            self.len += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn all(r: &ConsoleRing) -> Vec<u8> {
        let mut buf = std::vec![0; RING_SIZE];
        let (n, _) = r.read(true, 0, &mut buf);
        buf.truncate(n);
        buf
    }

    static A: ConsoleRing = ConsoleRing::new();
    static B: ConsoleRing = ConsoleRing::new();

    #[test]
    fn an_incremental_reader_gets_each_byte_once() {
        A.write(b"one ");
        let mut buf = [0; 3];
        let (n, i) = A.read(true, 0, &mut buf);
        assert_eq!((&buf[..n], i), (&b"one"[..], 3));
        A.write(b"two");
        let mut buf = [0; 10];
        let (n, i) = A.read(false, i, &mut buf);
        assert_eq!((&buf[..n], i), (&b" two"[..], 7));
        assert_eq!(A.read(false, i, &mut buf).0, 0);
        A.clear();
        assert!(all(&A).is_empty());
        A.write(b"x");
        assert_eq!(all(&A), b"x");
    }

    #[test]
    fn a_full_ring_forgets_the_oldest() {
        let line = [b'a'; 1000];
        for _ in 0..RING_SIZE / 1000 + 5 {
            B.write(&line);
        }
        B.write(b"end");
        let t = all(&B);
        assert_eq!(t.len(), RING_SIZE);
        assert!(t.ends_with(b"aend"));
        // A reader that fell behind goes on with the oldest there is.
        let mut buf = [0; 4];
        assert_eq!(B.read(false, 5, &mut buf).0, 4);
    }

    #[test]
    fn what_is_typed_is_read_once_and_nothing_is_overwritten() {
        let c = ConsoleInput::new();
        for i in 0..TYPED {
            assert_eq!(c.put(b'a' + (i % 26) as u8), Key::ForDom0);
        }
        assert_eq!(c.put(b'!'), Key::Dropped);
        let mut buf = [0; TYPED + 1];
        assert_eq!(c.read(&mut buf[..3]), 3);
        assert_eq!(&buf[..3], b"abc");
        assert_eq!(c.put(b'?'), Key::ForDom0);
        assert_eq!(c.read(&mut buf), TYPED - 2);
        assert_eq!(&buf[..2], b"de");
        assert_eq!(buf[TYPED - 3], b'?');
        assert_eq!(c.read(&mut buf), 0);
    }

    #[test]
    fn three_times_the_switch_key_moves_the_console() {
        let c = ConsoleInput::new();
        assert_eq!([c.put(1), c.put(1)], [Key::ForDom0; 2]);
        assert_eq!(c.put(b'x'), Key::ForDom0);
        assert_eq!([c.put(1), c.put(1)], [Key::ForDom0; 2]);
        assert_eq!(c.put(1), Key::Switched(true));
        assert_eq!(c.take_key(), None);
        assert_eq!([c.put(b'q'), c.put(b'h'), c.put(0xff)], [Key::Taken; 3]);
        assert_eq!(
            [c.take_key(), c.take_key(), c.take_key()],
            [Some(b'h'), Some(b'q'), None]
        );
        assert_eq!([c.put(1), c.put(1)], [Key::Taken; 2]);
        assert_eq!(c.put(1), Key::Switched(false));
        assert_eq!(c.put(b'y'), Key::ForDom0);
    }

    #[test]
    fn control_characters_do_not_reach_the_log() {
        let mut l = LineBuffer::default();
        let mut out = Vec::new();
        for &b in b"\x1b[2Jhi\r\n" {
            l.push(b, |s| out.push(std::string::String::from(s)));
        }
        assert_eq!(out, ["[2Jhi"]);
    }
}
