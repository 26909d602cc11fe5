//! The guest's console, read from the file that QEMU writes.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};

/// Lines of a panic that are shown at most.
const PANIC_LINES: usize = 80;

/// What the guest has printed so far.
#[derive(Debug)]
pub struct Console {
    file: File,
    /// Complete lines, without control characters.
    lines: Vec<String>,
    partial: Vec<u8>,
}

impl Console {
    /// Opens the file, which QEMU may not have written to yet.
    pub fn new(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self { file, lines: Vec::new(), partial: Vec::new() })
    }

    /// Takes in what is new; says whether there was anything.
    pub fn read_new(&mut self) -> bool {
        let mut bytes = Vec::new();
        let _ = self.file.read_to_end(&mut bytes);
        self.take(&bytes);
        !bytes.is_empty()
    }

    fn take(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let text = String::from_utf8_lossy(&line);
            self.lines.push(text.chars().filter(|c| !c.is_control() || *c == '\t').collect());
        }
    }

    /// Nothing was printed yet.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.partial.is_empty()
    }

    /// The last lines.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let partial = String::from_utf8_lossy(&self.partial);
        let mut lines = self.lines[self.lines.len().saturating_sub(count)..].to_vec();
        if !partial.trim().is_empty() {
            lines.push(partial.into_owned());
        }
        lines
    }

    /// The kernel has given up.
    pub fn panicked(&self) -> bool {
        self.lines.iter().any(|line| line.contains("Kernel panic - not syncing"))
    }

    /// The report that led to the panic, from its first line on.
    pub fn panic_text(&self) -> Vec<String> {
        let starts = ["BUG: ", "Oops: ", "general protection fault", "Kernel panic - not syncing"];
        let first = self.lines.iter().position(|line| starts.iter().any(|s| line.contains(s)));
        let mut text = self.lines[first.unwrap_or(0)..].to_vec();
        text.truncate(PANIC_LINES);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_that_come_in_pieces_are_put_together() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut console = Console::new(file.path()).unwrap();
        assert!(!console.read_new() && console.is_empty());
        file.write_all(b"[    0.1] one\r\n[    0.2] Kernel pa").unwrap();
        assert!(console.read_new() && !console.panicked());
        assert_eq!(console.tail(9), ["[    0.1] one", "[    0.2] Kernel pa"]);
        file.write_all(b"nic - not syncing: x\r\nafter\r\n").unwrap();
        assert!(console.read_new() && console.panicked());
        assert_eq!(console.tail(1), ["after"]);
    }

    #[test]
    fn a_panic_is_told_from_its_cause_on() {
        let mut console = Console::new(tempfile::NamedTempFile::new().unwrap().path()).unwrap();
        console.take(b"boot\nBUG: kernel NULL pointer dereference\nRIP: 0010\nKernel panic - not syncing: Fatal\n");
        let text = console.panic_text();
        assert_eq!(text.len(), 3);
        assert!(text[0].starts_with("BUG: "));
    }
}
