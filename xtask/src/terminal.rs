//! This process's terminal as the screen and keyboard of a machine's serial port.

use std::io::{IsTerminal, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// The key that begins a command to this program instead of the machine: Ctrl-A.
const ESCAPE: u8 = 1;

/// Joins the terminal and `serial` until the machine goes off or Ctrl-A x is typed.
pub fn join(serial: TcpStream) -> Result<()> {
    let raw = Raw::enter();
    let quit = Arc::new(AtomicBool::new(false));
    let mut keys = serial.try_clone().context("the serial port")?;
    let asked = Arc::clone(&quit);
    // It ends with the process: nothing wakes a thread that reads from a terminal.
    std::thread::spawn(move || {
        let mut filter = Filter::default();
        let mut buffer = [0; 256];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buffer) {
            let typed = filter.feed(&buffer[..n]);
            if keys.write_all(&typed).is_err() {
                break;
            }
            if filter.quit {
                asked.store(true, Ordering::Release);
                let _ = keys.shutdown(std::net::Shutdown::Both);
                break;
            }
        }
    });
    let mut from = serial;
    let mut buffer = [0; 4096];
    let mut out = std::io::stdout();
    let result = loop {
        match from.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(n) => {
                out.write_all(&buffer[..n])?;
                out.flush()?;
            }
            Err(_) if quit.load(Ordering::Acquire) => break Ok(()),
            Err(error) => break Err(error).context("the serial port"),
        }
    };
    drop(raw);
    eprintln!();
    result
}

/// What is typed, less the commands to this program.
#[derive(Debug, Default)]
struct Filter {
    escaped: bool,
    quit: bool,
}

impl Filter {
    fn feed(&mut self, typed: &[u8]) -> Vec<u8> {
        let mut pass = Vec::new();
        for &key in typed {
            if std::mem::take(&mut self.escaped) {
                match key {
                    b'x' => {
                        self.quit = true;
                        break;
                    }
                    // Twice is once.
                    ESCAPE => pass.push(ESCAPE),
                    _ => {}
                }
            } else if key == ESCAPE {
                self.escaped = true;
            } else {
                pass.push(key);
            }
        }
        pass
    }
}

/// The terminal without line editing; dropping it restores what was.
struct Raw(Option<String>);

impl Raw {
    fn enter() -> Self {
        if !std::io::stdin().is_terminal() {
            return Self(None);
        }
        let before = stty(&["-g"]).filter(|s| !s.is_empty());
        if before.is_some() {
            stty(&["raw", "-echo"]);
        }
        Self(before)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            stty(&[before]);
        }
    }
}

fn stty(args: &[&str]) -> Option<String> {
    let out = Command::new("stty")
        .args(args)
        .stdin(Stdio::inherit())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    Some(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_a_x_quits_and_what_came_before_is_passed_on() {
        let mut filter = Filter::default();
        assert_eq!(filter.feed(b"ls\r\x01"), b"ls\r");
        assert_eq!(filter.feed(b"xyz"), b"");
        assert!(filter.quit);
    }

    #[test]
    fn control_a_twice_is_the_key_itself() {
        let mut filter = Filter::default();
        assert_eq!(filter.feed(b"\x01\x01a\x01qb"), b"\x01ab");
        assert!(!filter.quit);
    }
}
