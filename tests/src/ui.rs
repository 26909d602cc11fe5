//! What the user sees: results on standard output, notes on standard error,
//! and on a terminal one status line that says what goes on just now.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Default)]
struct State {
    /// The status line that is on the screen.
    shown: String,
    /// The last step that was printed where there is no terminal.
    step: String,
}

static STATE: Mutex<State> = Mutex::new(State { shown: String::new(), step: String::new() });

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows what goes on, on a terminal; elsewhere it says nothing.
pub fn status(text: &str) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    let mut state = state();
    if state.shown != text {
        // A line longer than the screen would wrap, and could not be erased.
        let columns = rustix::termios::tcgetwinsize(std::io::stderr())
            .map_or(80, |size| usize::from(size.ws_col).max(20));
        let cut: String = text.chars().take(columns - 1).collect();
        let _ = write!(std::io::stderr(), "\r\x1b[K{cut}");
        state.shown = text.to_owned();
    }
}

/// Says which step of something long has begun: as the status on a terminal,
/// as a line of its own elsewhere.
pub fn step(text: &str) {
    if std::io::stderr().is_terminal() {
        return status(text);
    }
    let mut state = state();
    if state.step != text {
        let _ = writeln!(std::io::stderr(), "{text}");
        state.step = text.to_owned();
    }
}

/// Removes the status line, for other output to follow.
pub fn clear() {
    erase(&mut state());
}

fn erase(state: &mut State) {
    if !state.shown.is_empty() {
        let _ = write!(std::io::stderr(), "\r\x1b[K");
        state.shown.clear();
    }
}

/// Prints a line on standard error.
pub fn note(text: &str) {
    let mut state = state();
    erase(&mut state);
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints a line on standard output.
pub fn out(text: &str) {
    let mut state = state();
    erase(&mut state);
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{text}");
    let _ = stdout.flush();
}
