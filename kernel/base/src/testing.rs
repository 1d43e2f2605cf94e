//! A machine that lives in a host process: the fakes behind which policy is tested.
