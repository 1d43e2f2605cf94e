//! What goes wrong before boot services end: one line for the console, one status for firmware.

use alloc::string::{String, ToString};
use core::fmt;

use galvan_boot::config::ConfigError;
use uefi::Status;

/// Why the hypervisor was not started.
#[derive(Debug)]
pub struct Failure {
    /// The configuration file to blame, and the line in it.
    place: Option<(String, Option<usize>)>,
    reason: String,
    /// What the boot manager is told.
    pub status: Status,
}

impl Failure {
    /// A failure that is nobody's file's fault.
    pub fn new(status: Status, reason: impl fmt::Display) -> Self {
        Self {
            place: None,
            reason: reason.to_string(),
            status,
        }
    }

    /// A failure of configuration file `file`.
    pub fn of_config(file: &str, error: &ConfigError<'_>) -> Self {
        Self::new(Status::LOAD_ERROR, error.reason).at(file, error.line)
    }

    /// Says which line of which file asked for what failed.
    pub fn at(self, file: &str, line: Option<usize>) -> Self {
        Self {
            place: Some((file.to_string(), line)),
            ..self
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some((file, Some(line))) => write!(f, "{file}:{line}: ")?,
            Some((file, None)) => write!(f, "{file}: ")?,
            None => {}
        }
        f.write_str(&self.reason)
    }
}
