//! Output of a command to its user.

use std::fmt::Display;
use std::io::Write;

use ublk_target::os::text::Printable;

/// Prints a line on standard error, without control characters of names from others.
macro_rules! say {
    ($($said:tt)*) => { $crate::cli::terminal::say_error(format_args!($($said)*)) };
}
pub(super) use say;

/// Prints a line on standard error; see [`say`].
pub fn say_error(what: impl Display) {
    // There is nobody else to be told.
    let _ = writeln!(std::io::stderr(), "ublk-target: {}", Printable(what));
}

/// Prints a line on standard output.
pub fn print_line(what: impl Display) -> std::io::Result<()> {
    writeln!(std::io::stdout(), "{}", Printable(what))
}
