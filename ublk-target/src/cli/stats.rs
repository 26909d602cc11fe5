//! `stats`.

mod show;

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ublk_target::socket::client::{Client, ClientError};
use ublk_target::socket::report::Report;

use super::Stats;
use super::terminal::say;

/// Interval of keep-alives; the server closes silent connections after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Why watching ended without an error.
enum End {
    /// By a signal.
    Interrupted,
    /// The device went away.
    Gone(ClientError),
    /// The output was closed.
    Unread,
}

/// Shows the activity of a device in one interval, or in one after another.
pub fn stats(args: &Stats) -> anyhow::Result<ExitCode> {
    // Without --watch a signal just ends the program.
    let interrupts = if args.watch { Some(interrupts()?) } else { None };
    let mut client = Client::connect(args.which.id())?;
    match show_intervals(args, &mut client, interrupts.as_ref())? {
        None | Some(End::Interrupted | End::Unread) => {}
        Some(End::Gone(gone)) if args.watch => say!("{gone}"),
        Some(End::Gone(gone)) => return Err(gone.into()),
    }
    Ok(ExitCode::SUCCESS)
}

fn show_intervals(
    args: &Stats,
    client: &mut Client,
    interrupts: Option<&SignalFd>,
) -> anyhow::Result<Option<End>> {
    let mut earlier = match client.snapshot(true, args.slots) {
        Err(gone @ ClientError::Gone(_)) => return Ok(Some(End::Gone(gone))),
        snapshot => snapshot?,
    };
    let mut next = Instant::now();
    loop {
        // Without drift, unless the time for a look has passed already.
        next = (next + args.interval).max(Instant::now());
        if let Some(end) = wait(client, next, interrupts)? {
            return Ok(Some(end));
        }
        let later = match client.snapshot(true, args.slots) {
            Err(gone @ ClientError::Gone(_)) => return Ok(Some(End::Gone(gone))),
            snapshot => snapshot?,
        };
        let report = Report::between(&earlier, later.clone());
        earlier = later;
        match print(args, &report) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(Some(End::Unread)),
            printed => printed.context("cannot print")?,
        }
        if !args.watch {
            return Ok(None);
        }
    }
}

fn print(args: &Stats, report: &Report) -> io::Result<()> {
    let text = match (args.json, args.watch) {
        (true, true) => serde_json::to_string(report)? + "\n",
        (true, false) => serde_json::to_string_pretty(report)? + "\n",
        (false, true) => show::text(report) + "\n",
        (false, false) => show::text(report),
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Turns signals that end the program into events.
fn interrupts() -> anyhow::Result<SignalFd> {
    let set: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    set.thread_block().context("cannot block signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    SignalFd::with_flags(&set, flags).context("cannot wait for signals")
}

/// Waits until `next`, and keeps the connection alive.
fn wait(
    client: &mut Client,
    next: Instant,
    interrupts: Option<&SignalFd>,
) -> Result<Option<End>, ClientError> {
    loop {
        let left = next.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        // Rounded up, so that the time is over when the wait is.
        let slice = left.min(KEEP_ALIVE) + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(slice).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(client.as_fd(), PollFlags::POLLIN)];
        fds.extend(interrupts.map(|signals| PollFd::new(signals.as_fd(), PollFlags::POLLIN)));
        let ready = poll(&mut fds, timeout).unwrap_or(0) > 0;
        let is_ready = |fd: &PollFd| ready && fd.any() == Some(true);
        if fds.get(1).is_some_and(is_ready) {
            return Ok(Some(End::Interrupted));
        }
        if is_ready(&fds[0]) {
            return Ok(Some(End::Gone(client.gone())));
        }
        if Instant::now() >= next {
            return Ok(None);
        }
        match client.keep_alive() {
            Err(gone @ ClientError::Gone(_)) => return Ok(Some(End::Gone(gone))),
            kept => kept?,
        }
    }
}
