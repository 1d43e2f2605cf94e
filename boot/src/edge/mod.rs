//! What both loaders (`src/efi`, `src/multiboot`) do with the processor. No module of the library,
//! because that has no unsafe code.

pub mod enter;
pub mod processor;
