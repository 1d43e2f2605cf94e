//! The console ring: the last text of hypervisor and guests, as `xl dmesg` shows it.
//!
//! Written by the logger of `kernel/bare`, by `console_io` and the debug port of guests; read by
//! `XEN_SYSCTL_readconsole`.

use galvan_base::sync::{RankedLock, rank};

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
        Self(RankedLock::new(Ring { text: [0; RING_SIZE], produced: 0, cleared: 0 }))
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

/// Gathers the bytes a guest writes to lines, so that guests' output does not mix within a line.
#[derive(Debug)]
pub struct LineBuffer {
    text: [u8; 128],
    len: usize,
}

impl Default for LineBuffer {
    fn default() -> Self {
        LineBuffer { text: [0; 128], len: 0 }
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
    fn control_characters_do_not_reach_the_log() {
        let mut l = LineBuffer::default();
        let mut out = Vec::new();
        for &b in b"\x1b[2Jhi\r\n" {
            l.push(b, |s| out.push(std::string::String::from(s)));
        }
        assert_eq!(out, ["[2Jhi"]);
    }
}
