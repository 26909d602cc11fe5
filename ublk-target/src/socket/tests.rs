//! The socket server end to end, with threads in the place of lanes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bufreg::{Generation, Lent, Owner, SlotIndex, SlotState};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ublk_engine::engine::{Recorder, Stamps};
use ublk_engine::request::RequestKind;
use ublk_engine::units::Qid;

use crate::config::LayerEdit;
use crate::io_thread::message::{LaneHandle, LaneMessage, LaneSnapshot};
use crate::os::wakeups::{Hangup, Wakeups, event_descriptor};
use crate::socket::client::{Client, ClientError};
use crate::socket::control_request::{ControlRequest, ControlSender, LayersChanged};
use crate::socket::protocol::{Answer, Command, MAX_REQUEST_BYTES};
use crate::socket::{Limits, StatsServer, is_deserted, socket_path};

/// What lanes are made to do here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Answer,
    /// Take messages and never answer.
    Ignore,
    /// End at the first message.
    End,
}

/// Brings control requests to a main thread that has ended.
fn nobody() -> ControlSender {
    ControlSender::new(Arc::new(Wakeups::new(Hangup::Ends).unwrap())).0
}

type Seen = Arc<Mutex<Vec<&'static str>>>;

/// A thread that answers like a lane. Whenever it is asked for a snapshot, it serves a read.
fn fake_lane(qid: u16, manner: Manner) -> (LaneHandle, Seen) {
    let wake = Arc::new(event_descriptor().unwrap());
    let (handle, inbox) = LaneHandle::new(Qid(qid), 4096, &wake);
    let seen = Seen::default();
    let noted = Arc::clone(&seen);
    std::thread::spawn(move || {
        let (mut reads, mut recorder, mut ignored) = (0, None, Vec::new());
        while let Ok(message) = inbox.recv() {
            match manner {
                Manner::Answer => noted.lock().unwrap().push(name(&message)),
                Manner::Ignore => {
                    ignored.push(message);
                    continue;
                }
                Manner::End => return,
            }
            match message {
                LaneMessage::Snapshot { mut snapshot, reply } => {
                    reads += 1;
                    serve_read(&mut recorder);
                    fill(&mut snapshot, reads);
                    let _ = reply.try_send(snapshot);
                }
                LaneMessage::Measure { recorder: new, reply } => {
                    let _ = reply.try_send(std::mem::replace(&mut recorder, new));
                }
                LaneMessage::CancelAll
                | LaneMessage::SetThrottling { .. }
                | LaneMessage::Grow { .. }
                | LaneMessage::Hold { .. }
                | LaneMessage::OldestBegun { .. }
                | LaneMessage::Release { .. }
                | LaneMessage::Drain => {}
            }
        }
    });
    (handle, seen)
}

fn name(message: &LaneMessage) -> &'static str {
    match message {
        LaneMessage::Snapshot { .. } => "snapshot",
        LaneMessage::Measure { recorder: Some(_), .. } => "measure",
        LaneMessage::Measure { recorder: None, .. } => "end",
        LaneMessage::CancelAll => "cancel",
        LaneMessage::SetThrottling { .. } => "set-throttling",
        LaneMessage::Grow { .. } => "grow",
        LaneMessage::Hold { .. } => "hold",
        LaneMessage::OldestBegun { .. } => "oldest-begun",
        LaneMessage::Release { .. } => "release",
        LaneMessage::Drain => "drain",
    }
}

fn serve_read(recorder: &mut Option<Box<Recorder>>) {
    let stamps = Stamps { reaped: 1000, begun: 2000, issued: 3000, done: 50_000 };
    if let Some(recorder) = recorder {
        recorder.record(RequestKind::Read, stamps, 51_000);
    }
}

fn fill(snapshot: &mut LaneSnapshot, reads: u64) {
    snapshot.at = reads * 1_000_000;
    snapshot.stats.requests[0] = reads;
    snapshot.stats.bytes[0] = reads * 4096;
    let owner = Owner { device: 7, qid: snapshot.qid.0, tag: 3 };
    let (generation, state) = (Generation(1), SlotState::Active);
    let slots = (0..snapshot.lent.capacity()).filter_map(|slot| u16::try_from(slot).ok());
    let lent = slots.map(|slot| Lent {
        slot: SlotIndex(slot),
        generation,
        owner,
        since: 0,
        state,
        borrows: 0,
    });
    snapshot.lent.extend(lent);
}

const MINUTE: Duration = Duration::from_secs(60);
const PATIENT: Limits = Limits { connections: 8, to_ask: MINUTE, idle: MINUTE, lanes: MINUTE };

/// A server in a directory of its own.
struct Fixture {
    directory: tempfile::TempDir,
    server: Option<StatsServer>,
    seen: Seen,
}

impl Fixture {
    fn new(limits: Limits) -> Self {
        Self::with_lanes(limits, &[Manner::Answer])
    }

    fn with_lanes(limits: Limits, manners: &[Manner]) -> Self {
        Self::with(limits, manners, nobody())
    }

    fn with(limits: Limits, manners: &[Manner], control_sender: ControlSender) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let lanes = (0..).zip(manners).map(|(qid, manner)| fake_lane(qid, *manner));
        let (lanes, seen): (Vec<_>, Vec<_>) = lanes.unzip();
        let path = socket_path(directory.path(), 7);
        let server = StatsServer::start(path, 7, lanes, control_sender, limits).unwrap();
        Self { directory, server: Some(server), seen: Arc::clone(&seen[0]) }
    }

    fn path(&self) -> PathBuf {
        socket_path(self.directory.path(), 7)
    }

    fn stream(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    fn client(&self) -> Client {
        Client::new(7, self.stream(), Duration::from_secs(60))
    }

    fn seen(&self, what: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|seen| **seen == what).count()
    }

    fn wait_until_seen(&self, what: &str) {
        wait_until(|| self.seen(what) > 0);
    }
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Number of reads whose latencies a client is told of.
fn measured(client: &mut Client) -> u64 {
    let snapshot = client.snapshot(true, false).unwrap();
    assert_eq!(snapshot.latencies, snapshot.lanes[0].latencies);
    let total = snapshot.latencies.iter().find(|l| (&*l.kind, &*l.stage) == ("read", "total"));
    total.map_or(0, |total| total.count)
}

#[test]
fn counters_are_told_without_measuring() {
    let fixture = Fixture::with_lanes(PATIENT, &[Manner::Answer; 2]);
    let mut client = fixture.client();
    for reads in 1..=3 {
        let snapshot = client.snapshot(false, false).unwrap();
        assert_eq!(snapshot.device, 7);
        assert_eq!(snapshot.lanes.iter().map(|lane| lane.qid).collect::<Vec<_>>(), [0, 1]);
        let lane = &snapshot.lanes[1];
        let done = lane.activity.requests["read"];
        assert_eq!(
            (done.requests, done.bytes, lane.at_ns),
            (reads, reads * 4096, reads * 1_000_000)
        );
        assert!(lane.latencies.is_empty() && lane.lent.is_none());
    }
    assert_eq!(*fixture.seen.lock().unwrap(), ["snapshot"; 3]);
}

#[test]
fn each_client_sees_its_own_intervals() {
    let fixture = Fixture::new(PATIENT);
    let (mut one, mut other) = (fixture.client(), fixture.client());
    assert_eq!(measured(&mut one), 0, "nothing is measured before");
    assert_eq!(measured(&mut other), 0);
    // The lane serves a read at each snapshot, after it has handed over what it measured.
    assert_eq!(measured(&mut one), 1);
    assert_eq!(measured(&mut other), 2);
    assert_eq!(measured(&mut other), 1);
    assert_eq!(measured(&mut one), 3);
}

#[test]
fn measuring_is_on_exactly_while_it_is_wanted() {
    let fixture = Fixture::new(PATIENT);
    let mut onlooker = fixture.client();
    onlooker.snapshot(false, false).unwrap();
    assert_eq!(fixture.seen("measure"), 0);
    let (mut one, mut other) = (fixture.client(), fixture.client());
    measured(&mut one);
    assert_eq!(fixture.seen("measure"), 1, "begins");
    measured(&mut other);
    drop(one);
    measured(&mut other);
    onlooker.snapshot(false, false).unwrap();
    assert_eq!(fixture.seen("end"), 0, "one is left");
    drop(other);
    fixture.wait_until_seen("end");
    // Dies while its answer is under way.
    let mut stream = fixture.stream();
    let line = Command::Snapshot { latencies: true, slots: true }.to_line();
    stream.write_all(line.as_bytes()).unwrap();
    drop(stream);
    wait_until(|| fixture.seen("end") == 2);
    let measured_so_far = fixture.seen("measure");
    onlooker.snapshot(false, false).unwrap();
    assert_eq!((fixture.seen("measure"), fixture.seen("end")), (measured_so_far, 2));
    // One that does not want latencies any more ends it as well.
    let mut fickle = fixture.client();
    measured(&mut fickle);
    fickle.snapshot(false, false).unwrap();
    wait_until(|| fixture.seen("end") == 3);
}

#[test]
fn bad_lines_are_answered() {
    let fixture = Fixture::new(PATIENT);
    let mut stream = fixture.stream();
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut ask = |line: &[u8]| {
        stream.write_all(line).unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        answer
    };
    assert!(ask(b"help\n").contains("must be a JSON object"));
    assert!(ask(b"{\"version\":9,\"command\":\"snapshot\"}\n").contains("version 9 is not known"));
    assert!(ask(b"\n \n{\"version\":1,\"command\":\"x\"}\r\n").contains("unknown variant `x`"));
    assert!(ask(b"{\"version\":1,\"command\":\"snapshot\"}\n").contains("\"device\":7"));
    assert!(ask(&[b' '; MAX_REQUEST_BYTES + 1]).contains("at most 16384 bytes"));
    assert_eq!(answers.read(&mut [0]).unwrap(), 0, "and the connection ends");
}

#[test]
fn lines_sent_at_once_are_answered_one_by_one() {
    let fixture = Fixture::new(PATIENT);
    let mut stream = fixture.stream();
    let line = Command::Snapshot { latencies: false, slots: false }.to_line();
    stream.write_all(line.repeat(50).as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let answers = BufReader::new(stream).lines().map(Result::unwrap);
    assert_eq!(answers.filter(|answer| answer.contains("snapshot")).count(), 50);
}

#[test]
fn those_who_do_not_read_or_write_hurt_nobody() {
    let idle = Duration::from_secs(1);
    let fixture = Fixture::new(Limits { idle, ..PATIENT });
    let mut half = fixture.stream();
    half.write_all(b"{\"version\":").unwrap();
    // Asks without end and reads nothing. The write fails when the server has had enough.
    let mut greedy = fixture.stream();
    let asking = std::thread::spawn(move || {
        let line = Command::Snapshot { latencies: true, slots: true }.to_line();
        while greedy.write_all(line.as_bytes()).is_ok() {}
    });
    // A client each time: on a busy machine one could be idle for too long itself.
    let began = Instant::now();
    while began.elapsed() < 2 * idle {
        fixture.client().snapshot(false, false).unwrap();
    }
    assert_eq!(half.read(&mut [0]).unwrap(), 0, "nothing moved on it");
    asking.join().unwrap();
    fixture.wait_until_seen("end");
    fixture.client().snapshot(false, false).unwrap();
}

#[test]
fn an_empty_line_keeps_a_connection() {
    let idle = Duration::from_millis(1500);
    let fixture = Fixture::new(Limits { idle, ..PATIENT });
    let (mut kept, mut lost) = (fixture.client(), fixture.client());
    let began = Instant::now();
    while began.elapsed() < 2 * idle {
        kept.keep_alive().unwrap();
        std::thread::sleep(idle / 20);
    }
    kept.snapshot(false, false).unwrap();
    assert!(matches!(lost.snapshot(false, false), Err(ClientError::Gone(7))));
}

#[test]
fn a_big_answer_comes_in_pieces() {
    let fixture = Fixture::new(PATIENT);
    let snapshot = fixture.client().snapshot(false, true).unwrap();
    let lent = snapshot.lanes[0].lent.as_ref().unwrap();
    assert_eq!(lent.len(), 3 * 4096);
    assert_eq!((lent[99].slot, &*lent[99].state, lent[99].age_ns), (99, "active", 1_000_000));
    assert!(Answer::Snapshot(snapshot).into_line().len() > 500_000, "beyond a socket's buffer");
}

#[test]
fn connections_are_bounded() {
    let fixture = Fixture::new(Limits { connections: 2, ..PATIENT });
    let (mut one, mut other) = (fixture.client(), fixture.client());
    one.snapshot(true, false).unwrap();
    other.snapshot(true, false).unwrap();
    let refused = fixture.client().snapshot(true, false).unwrap_err().to_string();
    assert!(refused.contains("there are 2 connections already"), "{refused}");
    drop(one);
    wait_until(|| fixture.client().snapshot(false, false).is_ok());
    other.snapshot(true, false).unwrap();
}

#[test]
fn clients_that_ask_for_nothing_make_room() {
    let fixture = Fixture::new(Limits { connections: 2, to_ask: Duration::ZERO, ..PATIENT });
    let mut asking = fixture.client();
    asking.snapshot(false, false).unwrap();
    let idle = fixture.client();
    fixture.client().snapshot(false, false).unwrap();
    // Only the one that had not asked has gone.
    wait_until(|| {
        let mut fds = [PollFd::new(idle.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(1_000_u16)).is_ok_and(|ready| ready == 1)
    });
    asking.snapshot(false, false).unwrap();
}

#[test]
fn lanes_that_do_not_answer_are_named() {
    let limits = Limits { lanes: Duration::from_millis(50), ..PATIENT };
    let fixture = Fixture::with_lanes(limits, &[Manner::Answer, Manner::Ignore]);
    let refused = fixture.client().snapshot(true, false).unwrap_err().to_string();
    assert!(refused.contains("queue 1 does not answer"), "{refused}");
}

#[test]
fn lanes_that_have_ended_are_left_out() {
    let fixture = Fixture::with_lanes(PATIENT, &[Manner::Answer, Manner::End]);
    let mut client = fixture.client();
    for _ in 0..2 {
        let snapshot = client.snapshot(true, true).unwrap();
        assert_eq!(snapshot.lanes.iter().map(|lane| lane.qid).collect::<Vec<_>>(), [0]);
    }
    let fixture = Fixture::with_lanes(PATIENT, &[Manner::End]);
    assert!(matches!(fixture.client().snapshot(true, true), Err(ClientError::Gone(7))));
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let (stream, _silent) = UnixStream::pair().unwrap();
    let mut client = Client::new(3, stream, Duration::from_millis(50));
    let error = client.snapshot(true, false).unwrap_err().to_string();
    assert!(error.contains("the server of device 3 does not answer"), "{error}");
}

#[test]
fn answers_that_make_no_sense_are_refused() {
    let table = [
        ("hello\n", "is not understood"),
        ("{}\n", "missing field `version`"),
        ("{\"version\":1}\n", "is not understood"),
        ("{\"version\":1,\"snapshot\":{\"device\":7}}\n", "missing field `lanes`"),
        ("{\"version\":4,\"error\":\"x\"}\n", "its version is 4"),
        ("{\"version\":1,\"error\":\"busy\"}\n", "refuses: busy"),
        ("{\"version\":1,\"err", "device 3 is gone"),
    ];
    for (answer, expected) in table {
        let (stream, mut server) = UnixStream::pair().unwrap();
        server.write_all(answer.as_bytes()).unwrap();
        drop(server);
        let mut client = Client::new(3, stream, Duration::from_secs(60));
        let error = client.snapshot(true, false).unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{answer:?}: {error}");
    }
}

#[test]
fn the_end_waits_for_nobody() {
    let mut fixture = Fixture::new(PATIENT);
    let _silent = fixture.stream();
    let mut client = fixture.client();
    client.snapshot(true, false).unwrap();
    let began = Instant::now();
    drop(fixture.server.take());
    assert!(began.elapsed() < Duration::from_secs(30));
    assert!(!fixture.path().exists(), "the socket is left");
    fixture.wait_until_seen("end");
    assert!(matches!(client.snapshot(true, false), Err(ClientError::Gone(7))));
}

#[test]
fn the_socket_is_its_owners_and_replaces_a_stale_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = socket_path(directory.path(), 7);
    // Dropping a listener leaves its name, as the death of a server does.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = StatsServer::start(path.clone(), 7, Vec::new(), nobody(), PATIENT).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    assert!(!is_deserted(directory.path(), 7), "somebody listens");
    drop(server);
    assert!(!is_deserted(directory.path(), 7), "it is gone");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(is_deserted(directory.path(), 7));
    std::fs::remove_file(&path).unwrap();
    let nowhere = socket_path(&directory.path().join("missing"), 7);
    assert!(StatsServer::start(nowhere, 7, Vec::new(), nobody(), PATIENT).is_err());
}

/// One that waits for a change of layers, others that want something meanwhile, and one that goes.
#[test]
fn one_client_at_a_time_changes_the_layers() {
    let wakeups = Arc::new(Wakeups::new(Hangup::Ends).unwrap());
    let (control_sender, requests) = ControlSender::new(wakeups);
    let fixture = Fixture::with(PATIENT, &[Manner::Answer], control_sender);
    let change = || {
        let edit = LayerEdit::Detach { name: "x".parse().unwrap() };
        Command::ChangeLayers { edit, timeout_ms: 60_000 }.to_line()
    };
    let begun = || {
        let request = requests.recv_timeout(MINUTE).unwrap();
        let ControlRequest::ChangeLayers { reply, .. } = request else { panic!("{request:?}") };
        assert!(reply.begin());
        reply
    };
    let answer = |stream: &UnixStream| {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    };
    let mut one = fixture.stream();
    one.write_all(change().as_bytes()).unwrap();
    let reply = begun();
    let mut other = fixture.stream();
    for line in [change(), Command::Grow { size: None }.to_line()] {
        other.write_all(line.as_bytes()).unwrap();
        let said = answer(&other);
        let who = format!("process {} is changing the layers", std::process::id());
        assert!(said.contains(&who), "{said}");
    }
    assert!(fixture.client().snapshot(false, false).is_ok(), "statistics do not wait");
    assert!(reply.is_wanted());
    reply.send(Ok(LayersChanged { name: None, pause: Duration::from_micros(5) }));
    assert!(answer(&one).contains("\"pause_us\":5"));
    // The same connection again. Then its client goes.
    one.write_all(change().as_bytes()).unwrap();
    let reply = begun();
    drop(one);
    wait_until(|| !reply.is_wanted());
    other.write_all(change().as_bytes()).unwrap();
    let next = begun();
    reply.send(Err("nobody hears this".to_owned()));
    next.send(Err("no".to_owned()));
    assert!(answer(&other).contains("\"error\":\"no\""));
}
