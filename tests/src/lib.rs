//! tests
#![no_std]
