//! The machine as the policy sees it.
use galvan_base::Mpa;
use galvan_base::hw::HostIrq;

pub fn frames_ready() -> bool {
    false
}
pub fn table_frame() -> Option<Mpa> {
    None
}
pub fn running() -> &'static str {
    "nothing"
}
pub fn reset() -> ! {
    crate::cpu::halt_forever()
}
pub fn host_interrupt(_: HostIrq) {}
pub fn cpu_main() -> ! {
    crate::cpu::halt_forever()
}
