//! A deliberate fault: frees a buffer that an operation still uses. `cargo vmtest` runs this under
//! valgrind first, and trusts valgrind's other results only if it reports this fault.

/// An operation in flight. Like the kernel, it knows its buffer by address.
struct Operation {
    buffer: *const u8,
    bytes: usize,
}

impl Operation {
    /// Reads the data, as a late completion would.
    fn complete(&self) -> u32 {
        let byte = |at| {
            let address = self.buffer.wrapping_add(at);
            // SAFETY: none; this is the deliberate fault: the memory is freed. The address is still
            // in this process's heap, and the value read is only printed.
            u32::from(unsafe { address.read_volatile() })
        };
        (0..self.bytes).map(byte).sum()
    }
}

fn main() {
    let buffer = vec![1; 512];
    let operation = Operation { buffer: buffer.as_ptr(), bytes: buffer.len() };
    drop(buffer); // without waiting for the completion
    println!("{}", operation.complete());
}
