//! Event channels against models of their state, a guest's consumer, and hostile guests.
