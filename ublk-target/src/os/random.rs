//! Random numbers from the kernel.

use rustix::rand::{GetRandomFlags, getrandom};

/// An unpredictable number.
#[must_use]
pub fn number() -> u64 {
    let mut bytes = [0; 8];
    // The pool is ready once the machine has booted; until then this waits.
    while getrandom(&mut bytes, GetRandomFlags::empty()) != Ok(bytes.len()) {}
    u64::from_ne_bytes(bytes)
}
