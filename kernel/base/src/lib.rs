//! kernel/base
#![no_std]
