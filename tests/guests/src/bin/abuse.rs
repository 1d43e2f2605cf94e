//! The hostile micro-guest.
#![no_std]
#![no_main]

use galvan_dom0_proto::hvm::HvmStartInfo;
use galvan_guests::println;

#[unsafe(no_mangle)]
fn guest_main(_: &'static HvmStartInfo) {
    println!("ABUSE-BEGIN");
}
