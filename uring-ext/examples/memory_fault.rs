//! A deliberate fault: frees a buffer that an operation still uses. `cargo vmtest` runs this
//! under valgrind and believes what valgrind says of everything else only if it is reported.

/// An operation in flight. Like the kernel, it knows its buffer by address.
struct Operation {
    buffer: *const u8,
    bytes: usize,
}

impl Operation {
    /// Moves the data, as a completion that comes late would.
    fn complete(&self) -> u32 {
        let byte = |at| {
            let address = self.buffer.wrapping_add(at);
            // SAFETY: none, that is the point: the memory is freed. What this reads is still in
            // this process's heap, and nothing is done with it.
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
