//! The thread that answers.

mod layer_change;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{UnixCredentials, getsockopt};
use nix::unistd::geteuid;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use ublk_engine::engine::Recorder;
use ublk_engine::units::Bytes;

use crate::device::program::Program;
use crate::io_thread::message::LaneHandle;
use crate::socket::connection::Connection;
use crate::socket::control_request::{ControlRequest, ControlSender};
use crate::socket::lanes::{Lanes, Silent};
use crate::socket::protocol::{Answer, Command, Snapshot};
use crate::socket::summary::{lane_stats, latencies};
use layer_change::LayerChange;

/// Limits for clients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most connections at a time; further ones get an error.
    pub connections: usize,
    /// How long a client may be connected without a request before another one can replace it.
    pub to_ask: Duration,
    /// The longest time without traffic on a connection.
    pub idle: Duration,
    /// How long the lanes may take to answer, all together.
    pub lanes: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        let idle = Duration::from_secs(30);
        let to_ask = Duration::from_secs(1);
        Self { connections: 8, to_ask, idle, lanes: Duration::from_secs(3) }
    }
}

/// The pause after a failed accept, for instance at the limit of open files.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 16;

/// The thread that answers on the sockets of all devices of a process. It ends when it is dropped.
#[derive(Debug)]
pub struct StatsThread {
    changes: Option<Sender<Change>>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// A device's socket. It is removed when this is dropped.
#[derive(Debug)]
pub struct StatsServer {
    path: PathBuf,
    device: u32,
    thread: Arc<StatsThread>,
}

/// A message to the thread.
#[derive(Debug)]
enum Change {
    Add(Box<Service>),
    Remove(u32),
}

impl StatsThread {
    /// Starts a thread without sockets.
    ///
    /// # Errors
    /// `EAGAIN` if there can be no more threads, `EMFILE` at the limit of open files.
    pub fn start(name: &str) -> io::Result<Arc<Self>> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = Arc::new(EventFd::from_value_and_flags(0, flags)?);
        let (changes, inbox) = channel();
        let services = Services { wake: Arc::clone(&wake), inbox, services: Vec::new() };
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = Some(thread.spawn(move || services.run())?);
        Ok(Arc::new(Self { changes: Some(changes), wake, thread }))
    }

    /// Listens on `path` for a device. It replaces an existing socket: the caller has the device,
    /// so the former server is dead.
    ///
    /// # Errors
    /// Those of making and naming a socket.
    pub fn listen(
        self: &Arc<Self>,
        path: PathBuf,
        device: u32,
        lanes: Vec<LaneHandle>,
        control_sender: ControlSender,
        limits: Limits,
    ) -> io::Result<StatsServer> {
        let service = Service {
            device,
            listener: listen(&path)?,
            accept_after: None,
            lanes: Lanes::new(lanes, limits.lanes),
            control_sender,
            wake: Arc::clone(&self.wake),
            connections: Vec::new(),
            accepted: 0,
            layer_change: None,
            limits,
        };
        self.tell(Change::Add(Box::new(service)));
        Ok(StatsServer { path, device, thread: Arc::clone(self) })
    }

    fn tell(&self, change: Change) {
        // It can only fail when the thread has panicked, which its end tells of.
        let _ = self.changes.as_ref().map(|changes| changes.send(change));
        let _ = self.wake.write(1);
    }
}

impl Drop for StatsThread {
    fn drop(&mut self) {
        self.changes = None;
        // It can only fail at 2^64 - 1.
        let _ = self.wake.write(1);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread for statistics has panicked");
        }
    }
}

impl StatsServer {
    /// Listens on `path` with its own thread; see [`StatsThread::listen`].
    ///
    /// # Errors
    /// Those of making and naming a socket, and `EAGAIN` if there can be no more threads.
    pub fn start(
        path: PathBuf,
        device: u32,
        lanes: Vec<LaneHandle>,
        control_sender: ControlSender,
        limits: Limits,
    ) -> io::Result<Self> {
        let thread = StatsThread::start(&format!("ublkb{device}-stats"))?;
        thread.listen(path, device, lanes, control_sender, limits)
    }
}

impl Drop for StatsServer {
    fn drop(&mut self) {
        self.thread.tell(Change::Remove(self.device));
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A listening socket that only its owner can connect to.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before the socket listens, so there is no moment in which others could.
    let narrowed = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600));
    if let Err(error) = narrowed.and_then(|()| Ok(net::listen(&socket, BACKLOG)?)) {
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(UnixListener::from(socket))
}

/// The state of the thread.
struct Services {
    wake: Arc<EventFd>,
    inbox: Receiver<Change>,
    services: Vec<Service>,
}

impl Services {
    fn run(mut self) {
        loop {
            let ready = self.wait();
            if ready[0] {
                // Before the turns, so that what comes later wakes again.
                let _ = self.wake.read();
            }
            let mut rest = &ready[1..];
            for service in &mut self.services {
                let (own, others) = rest.split_at(1 + service.connections.len());
                service.take_turn(own);
                rest = others;
            }
            if ready[0] && !self.take_changes() {
                break;
            }
        }
        self.services.iter_mut().for_each(|service| service.lanes.end_measuring());
    }

    /// Waits for an event. Returns whether the thread has a message, and for each service whether
    /// its listener and its connections are ready.
    fn wait(&mut self) -> Vec<bool> {
        let now = Instant::now();
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        let mut timeout = PollTimeout::NONE;
        for service in &mut self.services {
            timeout = sooner(timeout, service.patience(now));
            service.name(&mut fds);
        }
        let result = poll(&mut fds, timeout);
        fds.iter().map(|fd| fd.any().unwrap_or(true) && result.is_ok()).collect()
    }

    /// Takes new services and drops old ones; `false` if no more will come.
    fn take_changes(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(Change::Add(service)) => self.services.push(*service),
                Ok(Change::Remove(device)) => self.remove(device),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn remove(&mut self, device: u32) {
        if let Some(at) = self.services.iter().position(|service| service.device == device) {
            self.services.swap_remove(at).lanes.end_measuring();
        }
    }
}

/// The service of one device.
#[derive(Debug)]
struct Service {
    device: u32,
    listener: UnixListener,
    /// No client is accepted before this time.
    accept_after: Option<Instant>,
    lanes: Lanes,
    control_sender: ControlSender,
    /// Wakes the thread.
    wake: Arc<EventFd>,
    connections: Vec<Connection>,
    /// Connections so far.
    accepted: u64,
    layer_change: Option<LayerChange>,
    limits: Limits,
}

impl Service {
    /// Handles the listener and the connections that are ready.
    fn take_turn(&mut self, ready: &[bool]) {
        for (connection, ready) in self.connections.iter_mut().zip(&ready[1..]) {
            if *ready {
                connection.exchange();
            }
        }
        let now = Instant::now();
        self.take_answer(now);
        for index in 0..self.connections.len() {
            self.serve(index);
        }
        self.connections.retain(|connection| !connection.is_over(now));
        self.drop_unwanted_change();
        if !self.connections.iter().any(|connection| connection.latencies.is_some()) {
            self.lanes.end_measuring();
        }
        if ready[0] {
            self.accept();
        }
    }

    /// Lists the descriptors to poll: those of the listener and the connections.
    fn name<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        let wanted =
            if self.accept_after.is_some() { PollFlags::empty() } else { PollFlags::POLLIN };
        fds.push(PollFd::new(self.listener.as_fd(), wanted));
        let of_connections = self.connections.iter();
        fds.extend(of_connections.map(|each| PollFd::new(each.fd(), each.interest())));
    }

    /// The time until the next deadline.
    fn patience(&mut self, now: Instant) -> PollTimeout {
        self.accept_after = self.accept_after.filter(|after| *after > now);
        if self.connections.iter().any(Connection::has_line_to_answer) {
            return PollTimeout::ZERO;
        }
        let answer = self.layer_change.as_ref().map(|change| change.deadline(now));
        let deadlines = self.connections.iter().filter_map(Connection::deadline);
        let deadlines = deadlines.chain(self.accept_after).chain(answer);
        deadlines.min().map_or(PollTimeout::NONE, |deadline| until(deadline, now))
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                log::warn!("cannot accept a client that wants statistics: {error}");
                self.accept_after = Some(Instant::now() + ACCEPT_PAUSE);
                return;
            }
        };
        let peer = getsockopt(&stream, PeerCredentials).ok();
        let is_allowed = peer.is_some_and(is_allowed);
        // One in another pid namespace has the id 0 here.
        let client = peer.and_then(|peer| u32::try_from(peer.pid()).ok()).filter(|pid| *pid > 0);
        self.accepted += 1;
        let connection = Connection::new(stream, client, self.limits.idle, self.accepted);
        let Ok(connection) = connection else { return };
        if !is_allowed {
            connection.dismiss("statistics are for root only");
            return;
        }
        if self.connections.len() >= self.limits.connections {
            let (to_ask, now) = (self.limits.to_ask, Instant::now());
            let mut others = self.connections.iter();
            if let Some(idle) = others.position(|other| other.has_not_asked_for(to_ask, now)) {
                self.connections.swap_remove(idle);
            }
        }
        if self.connections.len() >= self.limits.connections {
            connection.dismiss(&format!(
                "there are {} connections already; end one of them",
                self.limits.connections
            ));
        } else {
            self.connections.push(connection);
        }
    }

    /// Answers the next line of a connection, if there is one and the client has read the previous
    /// answer.
    fn serve(&mut self, index: usize) {
        let answer = match self.connections[index].next_command() {
            None => return,
            Some(Err(bad)) => Answer::Error(bad.to_string()),
            Some(Ok(Command::Snapshot { latencies, slots })) => {
                match self.snapshot(index, latencies, slots) {
                    Ok(snapshot) => Answer::Snapshot(snapshot),
                    Err(silent) => Answer::Error(silent.to_string()),
                }
            }
            // What it asked for is not to be done once it has gone, as after a long stop of this process.
            Some(Ok(
                Command::Grow { .. } | Command::Upgrade { .. } | Command::ChangeLayers { .. },
            )) if self.connections[index].has_gone() => {
                return;
            }
            Some(Ok(Command::Grow { .. } | Command::Upgrade { .. }))
                if self.layer_change.is_some() =>
            {
                let refusal = self.layer_change.as_ref().map(LayerChange::refusal);
                Answer::Error(refusal.unwrap_or_default())
            }
            Some(Ok(Command::Grow { size })) => {
                let size = size.map(Bytes);
                let grown = self.control_sender.ask(|reply| ControlRequest::Grow { size, reply });
                grown.map_or_else(Answer::Error, |size| Answer::Size(size.0))
            }
            Some(Ok(Command::ChangeLayers { edit, timeout_ms })) => {
                match self.begin_change(index, edit, Duration::from_millis(timeout_ms)) {
                    Ok(()) => return,
                    Err(error) => Answer::Error(error),
                }
            }
            Some(Ok(Command::Upgrade { program, file, descriptor })) => {
                let client = self.connections[index].client;
                let accepted = see(&program, file, client, descriptor).and_then(|program| {
                    self.control_sender.ask(|reply| ControlRequest::Upgrade { program, reply })
                });
                accepted.map_or_else(Answer::Error, |()| Answer::Accepted)
            }
        };
        self.connections[index].send(answer);
    }

    fn snapshot(
        &mut self,
        index: usize,
        wants_latencies: bool,
        slots: bool,
    ) -> Result<Snapshot, Silent> {
        if wants_latencies || self.connections[index].latencies.is_some() {
            self.share_latencies()?;
        }
        let snapshots = self.lanes.snapshots(slots)?;
        let mut snapshot = Snapshot { device: self.device, ..Snapshot::default() };
        let connection = &mut self.connections[index];
        for (lane, found) in snapshots {
            let mut stats = lane_stats(&found, slots);
            if let Some(recorders) = &connection.latencies {
                stats.latencies = latencies(&recorders[lane]);
            }
            snapshot.lanes.push(stats);
        }
        if let Some(recorders) = &mut connection.latencies {
            snapshot.latencies = latencies(&all_of(recorders));
            recorders.iter_mut().for_each(Recorder::clear);
        }
        self.measure_for(index, wants_latencies)?;
        Ok(snapshot)
    }

    /// Gives each connection that wants latencies its share: the latencies of the lanes since the
    /// last time.
    fn share_latencies(&mut self) -> Result<(), Silent> {
        let connections = &mut self.connections;
        self.lanes.harvest(|lane, recorder| {
            for latencies in connections.iter_mut().flat_map(|each| &mut each.latencies) {
                latencies[lane].add(recorder);
            }
        })
    }

    /// Starts or stops measuring for a connection.
    fn measure_for(&mut self, index: usize, wanted: bool) -> Result<(), Silent> {
        let latencies = &mut self.connections[index].latencies;
        if !wanted {
            *latencies = None;
        } else if latencies.is_none() {
            *latencies = Some((0..self.lanes.count()).map(|_| Recorder::new()).collect());
            if !self.lanes.are_measured() {
                return self.lanes.begin_measuring();
            }
        }
        Ok(())
    }
}

/// The program that a client has open: by its descriptor, or by its path if this leads to the same
/// file here. The server has left the client's mounts.
fn see(
    path: &Path,
    file: (u64, u64),
    client: Option<u32>,
    descriptor: i32,
) -> Result<Program, String> {
    let by_descriptor = client.and_then(|pid| Program::of_descriptor(pid, descriptor, path).ok());
    let seen = by_descriptor.map_or_else(|| Program::open(path), Ok);
    let seen = seen.map_err(|error| error.to_string())?;
    if seen.identity() == file {
        return Ok(seen);
    }
    Err(format!("the server and the client find different files at {}", path.display()))
}

fn all_of(recorders: &[Recorder]) -> Recorder {
    let mut all = Recorder::new();
    recorders.iter().for_each(|recorder| all.add(recorder));
    all
}

/// Whether the client is root. The mode of the socket already ensures this, unless somebody changes
/// it.
fn is_allowed(peer: UnixCredentials) -> bool {
    peer.uid() == 0 || peer.uid() == geteuid().as_raw()
}

/// The time until `deadline`, rounded up, so that the deadline has passed after the wait.
fn until(deadline: Instant, now: Instant) -> PollTimeout {
    let left = deadline.saturating_duration_since(now) + Duration::from_millis(1);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

/// The shorter of two waits.
fn sooner(one: PollTimeout, other: PollTimeout) -> PollTimeout {
    match (one.is_none(), other.is_none()) {
        (true, _) => other,
        (_, true) => one,
        (false, false) => one.min(other),
    }
}
