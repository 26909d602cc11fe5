//! The line to the agent: what goes in and what comes out.

use std::io::{Read, Write};
use std::process::ChildStdin;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use crate::proto::{Frame, ToHost};
use crate::ui;

/// Where a piece of output came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the program's terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// The guest's end of the line, shared with the thread that passes on what the
/// user types.
#[derive(Debug, Clone)]
pub struct Sink(Arc<Mutex<ChildStdin>>);

impl Sink {
    pub(super) fn new(stdin: ChildStdin) -> Self {
        Self(Arc::new(Mutex::new(stdin)))
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn send(&self, frame: &Frame) -> std::io::Result<()> {
        frame.write_to(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What comes from the agent.
pub(super) enum Event {
    Message(ToHost),
    Output(Stream, Vec<u8>),
    Closed(String),
}

/// Turns the bytes from the agent into events until the line closes.
pub(super) fn receive(mut from_guest: impl Read, events: &Sender<Event>) {
    loop {
        let event = match Frame::read_from(&mut from_guest) {
            Ok(Some(Frame::Stdout(bytes))) => Event::Output(Stream::Stdout, bytes),
            Ok(Some(Frame::Stderr(bytes))) => Event::Output(Stream::Stderr, bytes),
            Ok(Some(Frame::Message(body))) => match serde_json::from_slice(&body) {
                Ok(message) => Event::Message(message),
                Err(error) => Event::Closed(format!("unreadable message: {error}")),
            },
            Ok(Some(Frame::Stdin(_))) => Event::Closed("input from the guest".into()),
            Ok(None) => Event::Closed(String::new()),
            Err(error) => Event::Closed(error.to_string()),
        };
        let last = matches!(event, Event::Closed(_));
        if events.send(event).is_err() || last {
            return;
        }
    }
}

/// Passes a job's output on to the user.
pub fn pass_on(stream: Stream, bytes: &[u8]) {
    ui::clear();
    let _ = match stream {
        Stream::Stdout => {
            std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush())
        }
        Stream::Stderr => std::io::stderr().write_all(bytes),
    };
}
