//! Direct I/O, which goes past the page cache to the device.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};

/// Opens a file or device for reading and writing.
///
/// # Errors
/// When it cannot be opened that way.
pub fn open(path: impl AsRef<Path>) -> Result<File> {
    const O_DIRECT: i32 = 0o40000;
    let path = path.as_ref();
    let file = File::options().read(true).write(true).custom_flags(O_DIRECT).open(path);
    file.with_context(|| format!("open {}", path.display()))
}

/// Bytes at a page boundary, as direct I/O wants them.
#[derive(Debug)]
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// Memory of `length` bytes, all of them `fill`.
    pub fn new(length: usize, fill: u8) -> Self {
        let memory = vec![fill; length + 4096];
        let start = memory.as_ptr().align_offset(4096);
        Self { memory, start, length }
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}
