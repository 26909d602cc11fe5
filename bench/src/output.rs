//! Printing.

use std::io::{self, ErrorKind, Write};

use anyhow::Context;

/// Prints a text to standard output. A closed pipe is no error.
///
/// # Errors
/// If writing fails for another reason.
pub fn print(text: &str) -> anyhow::Result<()> {
    write_to(&mut io::stdout().lock(), text)
}

fn write_to(out: &mut impl Write, text: &str) -> anyhow::Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("cannot print"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer that always fails with this error.
    struct Fails(ErrorKind);

    impl Write for Fails {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn readers_may_go_away() {
        assert!(write_to(&mut Fails(ErrorKind::BrokenPipe), "x").is_ok());
        assert!(write_to(&mut Fails(ErrorKind::StorageFull), "x").is_err());
        let mut text = Vec::new();
        write_to(&mut text, "whole").unwrap();
        assert_eq!(text, b"whole");
    }
}
