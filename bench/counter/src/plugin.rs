//! The plugin's side towards QEMU.
//!
//! Interface: QEMU's "TCG Plugins", version 1 (QEMU 4.2 to 8.1).
//!
//! UNSAFETY: everything that QEMU offers is a C function. The handles it passes to a callback are valid until
//! that returns, and are used nowhere else.

use std::collections::HashSet;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};

use crate::code::Code;
use crate::marks::{Insn, Mark};

/// QEMU's.
mod ffi {
    use std::ffi::{c_int, c_uint, c_void};

    /// A translated block.
    #[repr(C)]
    pub struct Tb([u8; 0]);
    /// One of its instructions.
    #[repr(C)]
    pub struct Insn([u8; 0]);

    /// `QEMU_PLUGIN_INLINE_ADD_U64`
    pub const ADD: c_int = 0;
    /// `QEMU_PLUGIN_CB_NO_REGS`
    pub const NO_REGS: c_int = 0;

    unsafe extern "C" {
        pub fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, f: extern "C" fn(u64, *mut Tb));
        pub fn qemu_plugin_tb_n_insns(tb: *const Tb) -> usize;
        pub fn qemu_plugin_tb_get_insn(tb: *const Tb, index: usize) -> *mut Insn;
        pub fn qemu_plugin_insn_data(insn: *const Insn) -> *const c_void;
        pub fn qemu_plugin_insn_size(insn: *const Insn) -> usize;
        pub fn qemu_plugin_insn_vaddr(insn: *const Insn) -> u64;
        pub fn qemu_plugin_insn_haddr(insn: *const Insn) -> *mut c_void;
        pub fn qemu_plugin_register_vcpu_insn_exec_inline(
            insn: *mut Insn,
            op: c_int,
            counter: *mut c_void,
            by: u64,
        );
        pub fn qemu_plugin_register_vcpu_insn_exec_cb(
            insn: *mut Insn,
            f: extern "C" fn(c_uint, *mut c_void),
            flags: c_int,
            data: *mut c_void,
        );
    }
}

const VMRUN: [u8; 3] = [0x0f, 0x01, 0xd8];

/// Instructions, counted by QEMU's code.
static ALL: AtomicU64 = AtomicU64::new(0);
/// Those of the hypervisor up to its last VMRUN.
static OWN: AtomicU64 = AtomicU64::new(0);
/// [`ALL`] at the last exit.
static AT_EXIT: AtomicU64 = AtomicU64::new(0);
static IN_GUEST: AtomicBool = AtomicBool::new(false);
static VMRUNS: AtomicU64 = AtomicU64::new(0);
/// Where in this process's memory the instructions behind VMRUNs are.
static BEHIND: Mutex<Option<HashSet<usize>>> = Mutex::new(None);
static MARKS: OnceLock<Vec<Mark>> = OnceLock::new();
/// What is counted by instruction.
static CODE: OnceLock<Code> = OnceLock::new();
static OUT: Mutex<Option<File>> = Mutex::new(None);

/// The version of the interface.
#[unsafe(no_mangle)]
pub static qemu_plugin_version: c_int = 1;

/// QEMU loads the plugin: 0 if it can work.
///
/// # Safety
/// QEMU's promise: `argv` has `argc` strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let mut marks = Vec::new();
    for n in 0..usize::try_from(argc).unwrap_or(0) {
        // SAFETY: by the caller's promise.
        let text = unsafe { CStr::from_ptr(*argv.add(n)) };
        let text = text.to_string_lossy();
        if let Some(file) = text.strip_prefix("out=") {
            match File::create(file) {
                Ok(file) => *OUT.lock().unwrap_or_else(|e| e.into_inner()) = Some(file),
                Err(error) => {
                    eprintln!("{file}: {error}");
                    return 1;
                }
            }
        } else if let Some(mark) = text.strip_prefix("mark=").and_then(Mark::parse) {
            marks.push(mark);
        } else if let Some(code) = text.strip_prefix("code=").and_then(Code::parse) {
            let _ = CODE.set(code);
        } else {
            eprintln!("not understood: {text}");
            return 1;
        }
    }
    let _ = MARKS.set(marks);
    // SAFETY: `translated` is a function of the type that is asked for.
    unsafe { ffi::qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    0
}

/// QEMU has translated a block: each of its instructions is to be counted.
extern "C" fn translated(_id: u64, tb: *mut ffi::Tb) {
    // SAFETY: the block is valid now; the index is below the number of its instructions; an instruction's
    // data are as many bytes as its size says.
    let all: Vec<(*mut ffi::Insn, Insn<'_>)> = unsafe {
        (0..ffi::qemu_plugin_tb_n_insns(tb))
            .map(|n| {
                let i = ffi::qemu_plugin_tb_get_insn(tb, n);
                let data = ffi::qemu_plugin_insn_data(i).cast::<u8>();
                let size = ffi::qemu_plugin_insn_size(i);
                let insn = Insn {
                    at: ffi::qemu_plugin_insn_vaddr(i),
                    bytes: std::slice::from_raw_parts(data, size),
                };
                (i, insn)
            })
            .collect()
    };
    let mut behind = BEHIND.lock().unwrap_or_else(|e| e.into_inner());
    let behind = behind.get_or_insert_default();
    for (n, (handle, insn)) in all.iter().enumerate() {
        // SAFETY: the instruction is valid now.
        let host = unsafe { ffi::qemu_plugin_insn_haddr(*handle) } as usize;
        if n == 0 && behind.contains(&host) {
            call(*handle, exited, 0);
        }
        count(*handle, &ALL);
        if let Some(counter) = CODE.get().and_then(|code| code.counter(insn.at)) {
            count(*handle, counter);
        }
        if insn.bytes == VMRUN && host != 0 {
            behind.insert(host + VMRUN.len());
            call(*handle, entering, 0);
        }
        let rest = || all[n..].iter().map(|(_, insn)| *insn);
        for (index, mark) in MARKS.get().into_iter().flatten().enumerate() {
            if mark.is_at(rest()) {
                call(*handle, reached, index);
            }
        }
    }
}

/// Has an instruction counted.
fn count(handle: *mut ffi::Insn, counter: &'static AtomicU64) {
    // SAFETY: the instruction is valid now; the counter is static, and QEMU's to change, whose only processor
    // executes the code.
    unsafe {
        let counter = counter.as_ptr().cast();
        ffi::qemu_plugin_register_vcpu_insn_exec_inline(handle, ffi::ADD, counter, 1);
    }
}

/// Has a function called ahead of an instruction.
fn call(handle: *mut ffi::Insn, f: extern "C" fn(u32, *mut c_void), data: usize) {
    // SAFETY: the instruction is valid now; the data are a number.
    unsafe {
        ffi::qemu_plugin_register_vcpu_insn_exec_cb(handle, f, ffi::NO_REGS, data as *mut c_void);
    }
}

extern "C" fn entering(_cpu: u32, _: *mut c_void) {
    if !IN_GUEST.swap(true, Relaxed) {
        OWN.fetch_add(ALL.load(Relaxed) - AT_EXIT.load(Relaxed), Relaxed);
    }
    VMRUNS.fetch_add(1, Relaxed);
}

extern "C" fn exited(_cpu: u32, _: *mut c_void) {
    IN_GUEST.store(false, Relaxed);
    AT_EXIT.store(ALL.load(Relaxed), Relaxed);
}

extern "C" fn reached(_cpu: u32, index: *mut c_void) {
    let all = ALL.load(Relaxed);
    let open = if IN_GUEST.load(Relaxed) {
        0
    } else {
        all - AT_EXIT.load(Relaxed)
    };
    let own = OWN.load(Relaxed) + open;
    let name = MARKS.get().and_then(|m| m.get(index as usize));
    if let (Some(mark), Some(out)) = (name, OUT.lock().unwrap_or_else(|e| e.into_inner()).as_mut())
    {
        for (at, n) in CODE.get().into_iter().flat_map(Code::take) {
            let _ = writeln!(out, "@{at:x} {n}");
        }
        // A file that cannot be written ends in lines that are missing, which its reader says.
        let _ = writeln!(out, "{} {all} {own} {}", mark.name, VMRUNS.load(Relaxed));
    }
}
