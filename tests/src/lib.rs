//! Whole-machine tests: what a machine that starts with Galvan must print and do.
//!
//! A [`Scenario`] says which machine is started and holds a dialogue with its serial port. `cargo
//! xtask test` builds what is started, runs the scenarios one after the other and reports; the
//! dialogue itself ([`Console`]) knows nothing of emulators and would do with a real serial port.

mod console;
mod echo;
mod scenario;
pub mod scenarios;
mod text;

pub use console::{Console, Fault};
pub use echo::Echo;
pub use scenario::{Bus, Config, Emulator, Loader, Scenario, Start};
