//! dom0-proto
#![no_std]
