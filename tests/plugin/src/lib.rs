//! A plugin of QEMU that counts how often each block of a guest's instructions is executed, and
//! writes at the end, for each of them: its address, its number of instructions, and the count.
//!
//! `-plugin FILE,out=PATH`. The interface is that of `include/qemu/qemu-plugin.h`, of which this
//! uses only what has been there, unchanged, since QEMU 4.2. Whoever builds it may say which
//! version of it the emulator speaks: `QEMU_PLUGIN_VERSION`, 1 without.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// A translated block (`struct qemu_plugin_tb`).
#[repr(C)]
pub struct Block {
    opaque: [u8; 0],
}

/// `QEMU_PLUGIN_CB_NO_REGS`: the callback looks at no register.
const NO_REGS: c_uint = 0;

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, callback: extern "C" fn(u64, *mut Block));
    fn qemu_plugin_register_vcpu_tb_exec_cb(
        block: *mut Block,
        callback: extern "C" fn(c_uint, *mut c_void),
        flags: c_uint,
        data: *mut c_void,
    );
    fn qemu_plugin_register_atexit_cb(
        id: u64,
        callback: extern "C" fn(u64, *mut c_void),
        data: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(block: *const Block) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const Block) -> u64;
}

/// The version of the interface.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)] // the emulator looks for this name
pub static qemu_plugin_version: c_int = match option_env!("QEMU_PLUGIN_VERSION") {
    None => 1,
    Some(version) => match c_int::from_str_radix(version, 10) {
        Ok(version) => version,
        Err(_) => panic!("QEMU_PLUGIN_VERSION is not a number"),
    },
};

/// What is counted of a block. One that is translated again is counted anew.
struct Count {
    address: u64,
    instructions: usize,
    executions: AtomicU64,
}

static COUNTS: Mutex<Vec<&'static Count>> = Mutex::new(Vec::new());
static OUT: OnceLock<PathBuf> = OnceLock::new();

/// Called by the emulator when it has loaded the plugin.
///
/// # Safety
/// `argv` has `argc` strings, as the emulator gives them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let count = usize::try_from(argc).unwrap_or(0);
    for index in 0..count {
        // SAFETY: there are so many strings.
        let argument = unsafe { argv.add(index) };
        // SAFETY: as before.
        let argument = unsafe { argument.read() };
        // SAFETY: each string is there, and ends with a zero.
        let argument = unsafe { CStr::from_ptr(argument) };
        if let Some(path) = argument.to_str().ok().and_then(|text| text.strip_prefix("out=")) {
            let _ = OUT.set(path.into());
        }
    }
    if OUT.get().is_none() {
        eprintln!("insn-counts: out=PATH is missing");
        return -1;
    }
    // SAFETY: the callback has the type that is asked for.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    // SAFETY: as before; it is given no data.
    unsafe { qemu_plugin_register_atexit_cb(id, ended, std::ptr::null_mut()) };
    0
}

extern "C" fn translated(_id: u64, block: *mut Block) {
    // SAFETY: the block is the emulator's, and there during this call.
    let address = unsafe { qemu_plugin_tb_vaddr(block) };
    // SAFETY: as before.
    let instructions = unsafe { qemu_plugin_tb_n_insns(block) };
    // The emulator may execute it as long as it lives.
    let count: &'static Count =
        Box::leak(Box::new(Count { address, instructions, executions: AtomicU64::new(0) }));
    let data = std::ptr::from_ref(count).cast_mut().cast();
    // SAFETY: the callback has the type that is asked for, and its data are never freed.
    unsafe { qemu_plugin_register_vcpu_tb_exec_cb(block, executed, NO_REGS, data) };
    COUNTS.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(count);
}

extern "C" fn executed(_cpu: c_uint, data: *mut c_void) {
    // SAFETY: `translated` has given this address of a `Count` that is never freed.
    let count = unsafe { &*data.cast::<Count>() };
    count.executions.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn ended(_id: u64, _data: *mut c_void) {
    let Some(path) = OUT.get() else { return };
    if let Err(error) = write(path) {
        eprintln!("insn-counts: {}: {error}", path.display());
    }
}

fn write(path: &PathBuf) -> std::io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let counts = COUNTS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for Count { address, instructions, executions } in counts.iter() {
        let executions = executions.load(Ordering::Relaxed);
        if executions > 0 {
            writeln!(out, "{address:x} {instructions} {executions}")?;
        }
    }
    out.flush()
}
