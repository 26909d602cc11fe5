//! What the user sees: results on standard output, notes on standard error,
//! and on a terminal one status line that says what goes on just now. Each
//! thread has a part of the line.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

/// What separates the parts of the status line.
const SEPARATOR: &str = " | ";
/// Without a terminal, a line about the progress of a step at most so often.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

struct State {
    /// What each thread does, in the order in which they began.
    parts: Vec<(ThreadId, String)>,
    /// The status line that is on the screen.
    shown: String,
    /// The last line of each thread where there is no terminal.
    printed: Vec<(ThreadId, String, Instant)>,
    /// The program ends: there is no status any more.
    ended: bool,
}

static STATE: Mutex<State> = Mutex::new(State {
    parts: Vec::new(),
    shown: String::new(),
    printed: Vec::new(),
    ended: false,
});

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows what this thread does, on a terminal; elsewhere it says nothing.
pub fn status(text: &str) {
    if !std::io::stderr().is_terminal() {
        return;
    }
    let mut state = state();
    let me = thread::current().id();
    match state.parts.iter_mut().find(|(thread, _)| *thread == me) {
        Some((_, part)) => text.clone_into(part),
        None => state.parts.push((me, text.to_owned())),
    }
    state.draw();
}

/// Says which step of something long has begun: as the status on a terminal,
/// as a line of its own elsewhere.
pub fn step(text: &str) {
    if std::io::stderr().is_terminal() {
        return status(text);
    }
    state().print(text, Duration::ZERO);
}

/// Says how far a step is, which changes often: as the status on a terminal, as
/// a line every few seconds elsewhere.
pub fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        return status(text);
    }
    state().print(text, PROGRESS_INTERVAL);
}

/// Removes this thread's part of the status line.
pub fn clear() {
    let mut state = state();
    state.forget();
    state.draw();
}

/// Removes the status line for good, since the program ends.
pub fn end_status() {
    let mut state = state();
    state.ended = true;
    state.draw();
}

/// Prints a line on standard error.
pub fn note(text: &str) {
    let mut state = state();
    state.forget();
    state.erase();
    let _ = writeln!(std::io::stderr(), "{text}");
    state.draw();
}

/// Prints a line on standard output.
pub fn out(text: &str) {
    let mut state = state();
    state.forget();
    state.erase();
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{text}");
    let _ = stdout.flush();
    state.draw();
}

impl State {
    fn forget(&mut self) {
        let me = thread::current().id();
        self.parts.retain(|(thread, _)| *thread != me);
    }

    /// Puts the parts on the screen.
    fn draw(&mut self) {
        let parts: Vec<&str> = match self.ended {
            true => Vec::new(),
            false => self.parts.iter().map(|(_, part)| part.as_str()).collect(),
        };
        // A line longer than the screen would wrap, and could not be erased.
        let columns = rustix::termios::tcgetwinsize(std::io::stderr())
            .map_or(80, |size| usize::from(size.ws_col).max(20));
        let line = status_line(&parts, columns - 1);
        if line.is_empty() {
            self.erase();
        } else if line != self.shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K{line}");
            self.shown = line;
        }
    }

    fn erase(&mut self) {
        if !self.shown.is_empty() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
            self.shown.clear();
        }
    }

    /// Prints a line, unless this thread has just said the same, or anything since `interval`.
    fn print(&mut self, text: &str, interval: Duration) {
        let me = thread::current().id();
        let last = self.printed.iter().find(|(thread, ..)| *thread == me);
        if last.is_some_and(|(_, last, at)| last == text || at.elapsed() < interval) {
            return;
        }
        let _ = writeln!(std::io::stderr(), "{text}");
        self.printed.retain(|(thread, ..)| *thread != me);
        self.printed.push((me, text.to_owned(), Instant::now()));
    }
}

/// The parts in one line of so many characters at most. Where they do not fit, each gets the same
/// room, and what one does not need is the next ones'.
fn status_line(parts: &[&str], columns: usize) -> String {
    let mut line = String::new();
    for (n, part) in parts.iter().enumerate() {
        if n > 0 {
            line.push_str(SEPARATOR);
        }
        let (used, to_come) = (line.chars().count(), parts.len() - n);
        let separators = SEPARATOR.len() * (to_come - 1);
        let room = columns.saturating_sub(used + separators) / to_come;
        // The others' parts may be short.
        let others: usize = parts[n + 1..].iter().map(|other| other.chars().count()).sum();
        let room = room.max(columns.saturating_sub(used + separators + others));
        line.extend(part.chars().take(room));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_share_the_line() {
        assert_eq!(status_line(&[], 20), "");
        assert_eq!(status_line(&["abcdef"], 20), "abcdef");
        assert_eq!(status_line(&["abcdef"], 4), "abcd");
        assert_eq!(status_line(&["abc", "def"], 20), "abc | def");
        // 13 characters: 5 for each, and the separator.
        assert_eq!(status_line(&["abcdefgh", "ijklmnop"], 13), "abcde | ijklm");
        assert_eq!(status_line(&["abcdefgh", "i"], 11), "abcdefg | i");
        assert_eq!(status_line(&["a", "ijklmnopq"], 11), "a | ijklmno");
    }
}
