//! vmx
#![no_std]
