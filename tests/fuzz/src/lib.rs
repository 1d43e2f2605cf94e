//! Fuzz targets: functions of arbitrary bytes that must neither panic nor leave anything inconsistent.
//!
//! `cargo xtask fuzz` runs each under libFuzzer; inputs that once failed are kept in
//! `tests/fuzz/corpus/NAME` and are played by `cargo test`, together with some random ones.

mod bytes;
mod files;
mod hypercalls;
mod instructions;
mod scratch;
mod vpci;

pub use bytes::Bytes;
pub use scratch::Scratch;

/// One target.
#[derive(Debug)]
pub struct Target {
    /// Its name, and that of its folder of inputs.
    pub name: &'static str,
    /// What it feeds, in a few words.
    pub about: &'static str,
    /// Takes one input.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target {
        name: "hypercalls",
        about: "sequences of hypercalls of dom0 and two guests, then the end of all guests",
        run: hypercalls::run,
    },
    Target {
        name: "records",
        about: "a guest's saved context, loaded and saved again",
        run: hypercalls::records,
    },
    Target {
        name: "instructions",
        about: "the instruction decoder, beside iced-x86",
        run: instructions::run,
    },
    Target {
        name: "vpci",
        about: "virtual PCI of a hardware domain over devices whose registers are anything",
        run: vpci::run,
    },
    Target {
        name: "kernels",
        about: "kernel files: ELF, bzImage and their compressed payloads",
        run: files::kernels,
    },
    Target {
        name: "acpi",
        about: "firmware's ACPI tables, the IVRS",
        run: files::acpi,
    },
    Target {
        name: "config",
        about: "galvan.cfg and both command lines",
        run: files::config,
    },
    Target {
        name: "multiboot",
        about: "what a multiboot loader leaves in memory, both versions",
        run: files::multiboot,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Inputs that once failed, and the seeds.
    #[test]
    fn kept_inputs_pass() {
        for t in TARGETS {
            let folder = format!("{}/corpus/{}", env!("CARGO_MANIFEST_DIR"), t.name);
            let Ok(files) = std::fs::read_dir(&folder) else {
                continue;
            };
            for file in files {
                let path = file.expect("a directory entry").path();
                println!("{}", path.display());
                (t.run)(&std::fs::read(path).expect("a readable file"));
            }
        }
    }

    /// A fixed sequence of bytes that look random (xorshift64*).
    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..len)
            .map(|_| {
                x ^= x >> 12;
                x ^= x << 25;
                x ^= x >> 27;
                (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
            })
            .collect()
    }

    #[test]
    fn random_inputs_pass() {
        for t in TARGETS {
            for seed in 0..200 {
                // Shown when it fails.
                println!("{} {seed}", t.name);
                (t.run)(&noise(seed, 64 + seed as usize * 16));
            }
        }
    }
}
