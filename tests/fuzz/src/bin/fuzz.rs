//! What libFuzzer drives: the target that `GALVAN_FUZZ` names, with the inputs it makes up. Without a
//! name it prints all of them and what they are about.
#![no_main]

use std::sync::OnceLock;

use galvan_fuzz::{TARGETS, Target};

static TARGET: OnceLock<&Target> = OnceLock::new();

fn chosen() -> &'static Target {
    let Ok(name) = std::env::var("GALVAN_FUZZ") else {
        for t in TARGETS {
            println!("{}\t{}", t.name, t.about);
        }
        std::process::exit(0);
    };
    let found = TARGETS.iter().find(|t| t.name == name);
    found.unwrap_or_else(|| panic!("GALVAN_FUZZ={name} is no target"))
}

libfuzzer_sys::fuzz_target!(
    init: {
        TARGET.get_or_init(chosen);
    },
    |data: &[u8]| (TARGET.get_or_init(chosen).run)(data)
);
