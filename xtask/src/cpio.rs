//! Archives in the format that the kernel unpacks its initrd from ("newc" cpio).

use std::collections::BTreeSet;

/// An archive being written. Directories above an entry are made as needed.
#[derive(Debug, Default)]
pub struct Cpio {
    data: Vec<u8>,
    dirs: BTreeSet<String>,
    next: u32,
}

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

impl Cpio {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory and those above it.
    pub fn dir(&mut self, path: &str) {
        self.parents(path);
        if self.dirs.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | 0o755, &[]);
        }
    }

    /// A file with its permissions.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.parents(path);
        self.entry(path, FILE | mode, contents);
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, SYMLINK | 0o777, target.as_bytes());
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.data
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.next += 1;
        let fields = [
            self.next,
            mode,
            0,
            0,
            1,
            0,
            contents.len() as u32,
            0,
            0,
            0,
            0,
            path.len() as u32 + 1,
            0,
        ];
        self.data.extend(b"070701");
        for field in fields {
            self.data.extend(format!("{field:08x}").as_bytes());
        }
        self.data.extend(path.as_bytes());
        self.data.push(0);
        self.pad();
        self.data.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.data.resize(self.data.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn an_independent_reader_lists_what_was_written() {
        let mut cpio = Cpio::new();
        cpio.file("a/b/odd", 0o644, b"12345");
        cpio.symlink("a/link", "b/odd");
        cpio.file("init", 0o755, b"#!/bin/sh\n");
        let data = cpio.finish();
        let Ok(mut reader) = Command::new("busybox")
            .args(["cpio", "-tv"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
        else {
            return; // No busybox on this host.
        };
        reader.stdin.take().unwrap().write_all(&data).unwrap();
        let listing = String::from_utf8(reader.wait_with_output().unwrap().stdout).unwrap();
        let names: Vec<&str> = listing
            .lines()
            .map(|l| l.rsplit(':').next().unwrap())
            .collect();
        assert_eq!(names.len(), 5, "{listing}");
        assert!(listing.contains("a/link -> b/odd"), "{listing}");
        assert!(listing.contains("-rwxr-xr-x"), "{listing}");
    }

    #[test]
    fn entries_start_on_multiples_of_four() {
        let mut cpio = Cpio::new();
        cpio.file("x", 0o644, b"1");
        cpio.file("yy", 0o644, b"22");
        let data = cpio.finish();
        let starts: Vec<usize> = data
            .windows(6)
            .enumerate()
            .filter(|(_, w)| w == b"070701")
            .map(|(at, _)| at)
            .collect();
        assert_eq!(starts.len(), 3);
        assert!(starts.iter().all(|at| at % 4 == 0), "{starts:?}");
    }
}
