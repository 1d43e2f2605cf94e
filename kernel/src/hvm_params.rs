//! HVM parameters: numbered words that toolstack and guest leave for each other (public
//! `hvm/params.h`).

use galvan_dom0_proto::hvm::{HVM_NR_PARAMS, HVM_PARAM_TRIPLE_FAULT_REASON};
use galvan_dom0_proto::sched::SHUTDOWN_CRASH;

/// The parameters of one domain.
#[derive(Clone, Debug)]
pub struct HvmParams([u64; HVM_NR_PARAMS as usize]);

impl Default for HvmParams {
    fn default() -> Self {
        let mut all = HvmParams([0; HVM_NR_PARAMS as usize]);
        // Nobody who means to restart does it that way where there is a hypercall.
        all.set(HVM_PARAM_TRIPLE_FAULT_REASON, SHUTDOWN_CRASH.into());
        all
    }
}

impl HvmParams {
    /// A parameter; `None` if there is none of this number.
    pub fn get(&self, index: u32) -> Option<u64> {
        self.0.get(index as usize).copied()
    }

    /// Changes a parameter; false if there is none of this number.
    pub fn set(&mut self, index: u32, v: u64) -> bool {
        match self.0.get_mut(index as usize) {
            Some(p) => {
                *p = v;
                true
            }
            None => false,
        }
    }
}
