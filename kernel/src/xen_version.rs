//! Who Galvan says it is.

use alloc::string::String;

/// Name and version as guests and tools see them.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The ABI level, which the tools of a distribution are chosen by: major << 16 | minor of the
    /// Xen release whose interfaces are served.
    pub abi: u32,
    /// What follows the ABI level in `xl info`: names Galvan and its version.
    pub extraversion: String,
    /// The hypervisor's command line.
    pub cmdline: String,
    /// The compiler.
    pub compiler: &'static str,
    /// When it was built.
    pub build_date: &'static str,
}

impl Identity {
    /// Identity at an ABI level.
    pub fn new(abi: u32, cmdline: String) -> Self {
        Identity {
            abi,
            extraversion: String::from(concat!("-galvan-", env!("CARGO_PKG_VERSION"))),
            cmdline,
            compiler: "rustc",
            build_date: option_env!("GALVAN_BUILD_DATE").unwrap_or("unknown"),
        }
    }
}
