//! What cargo says on standard error while it builds: what it does just now, and what its user has
//! to read.

use std::io::{BufRead, IsTerminal, Result};
use std::process::Command;

/// A piece of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// What it does now, for a moment: `57/143: syn, libc`.
    Doing(String),
    /// A line of a diagnostic, in its colours.
    Diagnostic(String),
}

/// Columns of the word that begins a line about cargo's own doing.
const VERB_COLUMNS: usize = 12;

/// Has a cargo that writes into a pipe show its progress, and colours where its user sees them.
pub fn want_progress(command: &mut Command) {
    command.env("CARGO_TERM_PROGRESS_WHEN", "always").env("CARGO_TERM_PROGRESS_WIDTH", "120");
    if std::io::stderr().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
}

/// Hands over what cargo says, piece by piece, until it ends.
///
/// # Errors
/// When its output cannot be read.
pub fn read(mut output: impl BufRead, mut tell: impl FnMut(Said)) -> Result<()> {
    let mut line = Vec::new();
    loop {
        let available = output.fill_buf()?;
        if available.is_empty() {
            break;
        }
        // Its progress bar is drawn again and again in the same line.
        let end = available.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
        let taken = end.map_or(available.len(), |end| end + 1);
        line.extend_from_slice(&available[..taken]);
        output.consume(taken);
        if end.is_some() {
            if let Some(said) = said(&line) {
                tell(said);
            }
            line.clear();
        }
    }
    if let Some(said) = said(&line) {
        tell(said);
    }
    Ok(())
}

fn said(line: &[u8]) -> Option<Said> {
    if line == b"\n" {
        return Some(Said::Diagnostic(String::new()));
    }
    let whole = String::from_utf8_lossy(line);
    let text = without_escapes(&whole);
    let text = text.trim_end();
    if text.is_empty() {
        return None;
    }
    let Some((verb, rest)) = own(text) else {
        // Where the progress bar was, the line is cleared first.
        let line = whole.trim_end().trim_start_matches("\x1b[K");
        return Some(Said::Diagnostic(line.to_owned()));
    };
    // The bar itself is for a line of its own.
    let bar = rest.strip_prefix('[').and_then(|bar| bar.split_once("] "));
    match (bar, verb) {
        (Some((_, doing)), _) => Some(Said::Doing(doing.trim_start().to_owned())),
        // The progress bar says it, too, and how far that is.
        (None, "Compiling" | "Fresh" | "Finished") => None,
        (None, _) => Some(Said::Doing(format!("{} {rest}", verb.to_lowercase()))),
    }
}

/// The word and the rest of a line about cargo's own doing: `   Compiling syn v3.0.9`.
fn own(text: &str) -> Option<(&str, &str)> {
    let (verb, rest) = text.split_at_checked(VERB_COLUMNS)?;
    let (verb, rest) = (verb.trim_start(), rest.strip_prefix(' ')?);
    let is_word = verb.starts_with(|c: char| c.is_ascii_uppercase())
        && verb.chars().all(|c| c.is_ascii_alphabetic());
    is_word.then_some((verb, rest))
}

/// A text without the sequences by which terminals are told of colours and the like.
fn without_escapes(text: &str) -> String {
    let mut plain = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => {
                // Up to the letter that ends it.
                chars.find(char::is_ascii_alphabetic);
            }
            '\r' | '\n' => {}
            _ => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From cargo 1.95, cut short.
    const OUTPUT: &str = concat!(
        "    Blocking waiting for file lock on build directory\n",
        "   Compiling proc-macro2 v1.0.107\n",
        "    Building [                  ] 0/13: proc-macro2(build.rs), unicode-ident     \r",
        "   Compiling quote v1.0.47\n",
        "\x1b[1m\x1b[36m    Building\x1b[0m [=>         ] 1/13: quote(build.rs)    \r",
        "\r\x1b[K",
        "warning: unused variable: `x`\n",
        " --> src/main.rs:1:17\n",
        "  |\n",
        "1 | fn main() { let x = Bar { Baz: 1 }; }\n",
        "\n",
        "            Foo: not a verb\n",
        "\x1b[31merror\x1b[0m: could not compile `x`",
    );

    #[test]
    fn doing_and_diagnostics_are_told_apart() {
        let mut all = Vec::new();
        // In small pieces, as a pipe may hand them over.
        read(std::io::BufReader::with_capacity(7, OUTPUT.as_bytes()), |one| all.push(one)).unwrap();
        let doing = |text: &str| Said::Doing(text.into());
        let diagnostic = |text: &str| Said::Diagnostic(text.into());
        assert_eq!(
            all,
            [
                doing("blocking waiting for file lock on build directory"),
                doing("0/13: proc-macro2(build.rs), unicode-ident"),
                doing("1/13: quote(build.rs)"),
                diagnostic("warning: unused variable: `x`"),
                diagnostic(" --> src/main.rs:1:17"),
                diagnostic("  |"),
                diagnostic("1 | fn main() { let x = Bar { Baz: 1 }; }"),
                diagnostic(""),
                diagnostic("            Foo: not a verb"),
                diagnostic("\x1b[31merror\x1b[0m: could not compile `x`"),
            ]
        );
    }
}
