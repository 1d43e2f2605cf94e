//! A plugin for QEMU's TCG that counts executed instructions, of the hypervisor and of all, so that any
//! hypervisor can be measured without its help. `cargo xtask bench` builds it, loads it, and reads what
//! it writes.
//!
//! The hypervisor's are those between the instruction behind a VMRUN and the next VMRUN. That instruction
//! is told by where in the host's memory it is, so that a guest's with the same address is another.
//! For machines with one processor.
//!
//! Arguments: `out=FILE`, and `mark=NAME:OFFSET:BYTES` for each place in the code that is watched for: the
//! offset within its page and its first bytes, both in hexadecimal. Each time such a place is executed a
//! line goes to the file: name, instructions since power-on, those of the hypervisor (and what ran before
//! it), VMRUNs.
//!
//! With `code=START:END`, which are hexadecimal addresses of which only the hypervisor executes anything, it is
//! counted as well how often each instruction there was executed: before the line of a place come lines
//! `@ADDRESS COUNT`, of those executed since the last one.

mod code;
mod marks;
// Its functions are QEMU's, which the tests' program has not.
#[cfg(not(test))]
mod plugin;
