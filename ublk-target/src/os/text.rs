//! Text from others: process names, paths, descriptions of devices. It may contain control
//! sequences for a terminal.

use std::fmt::{self, Display, Write};

/// Shows a text without control sequences: control characters except the line end, and characters
/// that change the writing direction, appear as `\u{…}`.
pub struct Printable<T>(pub T);

impl<T: Display> Display for Printable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping { to: f, keeps_lines: true }, "{}", self.0)
    }
}

/// A name within a line: as [`Printable`], with line ends escaped, too.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    // Writing to a string does not fail.
    let _ = Escaping { to: &mut escaped, keeps_lines: false }.write_str(text);
    escaped
}

struct Escaping<'a, W: Write + ?Sized> {
    to: &'a mut W,
    keeps_lines: bool,
}

impl<W: Write + ?Sized> Write for Escaping<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            let is_kept = self.keeps_lines && character == '\n';
            if is_obeyed(character) && !is_kept {
                write!(self.to, "{}", character.escape_default())?;
            } else {
                self.to.write_char(character)?;
            }
        }
        Ok(())
    }
}

/// Whether a terminal interprets the character instead of showing it.
fn is_obeyed(character: char) -> bool {
    let is_direction = matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || is_direction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_escaped() {
        let table = [
            ("plain text", "plain text"),
            ("a\x1b[2Jb", "a\\u{1b}[2Jb"),
            ("title\x1b]0;x\x07", "title\\u{1b}]0;x\\u{7}"),
            ("c1 \u{9b}31m", "c1 \\u{9b}31m"),
            ("back\x08\x7f", "back\\u{8}\\u{7f}"),
            ("right\u{202e}to left", "right\\u{202e}to left"),
            ("größer …", "größer …"),
        ];
        for (text, expected) in table {
            assert_eq!(printable(text), expected);
            assert_eq!(Printable(text).to_string(), expected);
        }
        assert_eq!(printable("two\nlines\r"), "two\\nlines\\r");
        assert_eq!(Printable("two\nlines\r").to_string(), "two\nlines\\r");
    }
}
