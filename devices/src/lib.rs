//! devices
#![no_std]
