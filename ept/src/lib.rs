//! ept
#![no_std]
