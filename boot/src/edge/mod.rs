//! What both loaders (`src/efi`, `src/multiboot`) do with the processor. No module of the library,
//! because that has no unsafe code.

pub mod enter;
pub mod processor;

/// The processor's time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC only reads a counter, which all processors with virtualisation have.
    unsafe { core::arch::x86_64::_rdtsc() }
}
