//! Stations on real rings. Their character device is `/dev/zero`, which can be mapped but knows no
//! commands. Every fetch fails, so each station is refused and ends.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bufreg::Incarnation;
use nix::poll::PollTimeout;
use ublk_engine::engine::{EngineConfig, QueueIdentity, SlotChoice, SlotTable};
use ublk_engine::lend::LendMode;
use ublk_engine::request::Geometry;
use ublk_engine::target::{BaseTarget, NullTarget};
use ublk_engine::units::Qid;
use uring_ext::ring::Polling;

use super::*;
use crate::backing::Backing;
use crate::config::busy_wait::BusyWait;
use crate::os::wakeups::{Hangup, Wakeups};

const DEPTH: u16 = 16;

struct Rig {
    lanes: SharedLanes,
    wakeups: Arc<Wakeups>,
    cdev: Arc<File>,
    backings: Arc<[Backing]>,
}

impl Rig {
    fn new(limit: usize) -> Self {
        Self {
            lanes: SharedLanes::new(limit),
            wakeups: Arc::new(Wakeups::new(Hangup::Ends).unwrap()),
            cdev: Arc::new(File::open("/dev/zero").unwrap()),
            backings: Arc::new([Backing::zero().unwrap()]),
        }
    }

    fn slots(lend: LendMode) -> SlotTable {
        let lent = if lend == LendMode::Copy { 0 } else { DEPTH };
        let pool = if lend == LendMode::Copy { DEPTH } else { 1 };
        SlotTable { lent, pool, scratch: 0, choice: SlotChoice::From(0) }
    }

    fn config(&self, device: u32, lend: LendMode, slots: SlotTable) -> LaneConfig {
        LaneConfig {
            engine: EngineConfig {
                queue: QueueIdentity { device, qid: Qid(0), depth: DEPTH },
                incarnation: Incarnation(3),
                lend,
                slots,
                geometry: Geometry { size: 1 << 20, block: 512, max_bytes: 4096 },
                deadline: None,
            },
            io_lane: false,
            polling: Polling::Off,
            busy_wait: BusyWait::Auto,
            faults: None,
            buffer_bytes: 4096,
            target: BaseTarget::Null(NullTarget).into(),
            cdev: Arc::clone(&self.cdev),
            backings: Arc::clone(&self.backings),
            cpus: Vec::new(),
            wakeups: Arc::clone(&self.wakeups),
        }
    }

    fn start(&mut self, device: u32, lend: LendMode) -> StationHandle {
        let config = self.config(device, lend, Self::slots(lend));
        self.lanes.start(&config).unwrap().1
    }

    /// The share of a station that lends in this many slots.
    fn hold(&mut self, lent: u16) -> Result<Holding, LaneError> {
        let slots = SlotTable { lent, ..Self::slots(LendMode::Fused) };
        self.lanes.hold(&self.config(0, LendMode::Fused, slots))
    }

    /// Waits until a station has ended by itself, and takes back its share.
    fn join(&mut self, mut station: StationHandle) -> Result<LaneReport, LaneError> {
        station.await_ready().unwrap();
        self.await_end(&mut station);
        self.lanes.join(station)
    }

    fn await_end(&self, station: &mut StationHandle) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !station.has_ended() {
            assert!(Instant::now() < deadline, "it does not end");
            let _ = self.wakeups.wait(PollTimeout::from(100_u8));
        }
    }

    fn lane(&self, index: usize) -> &SharedLane {
        self.lanes.lanes[index].as_ref().unwrap()
    }
}

#[test]
fn stations_come_and_go_and_leave_their_places() {
    let mut rig = Rig::new(2);
    // More stations than there are names.
    for round in 0..300 {
        let lends = [LendMode::Fused, LendMode::Slot, LendMode::Copy, LendMode::Fused];
        let stations: Vec<_> = (0..).zip(lends).cycle().take(16).collect();
        let stations: Vec<_> = stations.into_iter().map(|(id, lend)| rig.start(id, lend)).collect();
        assert_eq!(rig.lanes.count(), 2);
        let spread = [0, 1].map(|lane| rig.lane(lane).stations);
        assert_eq!(spread, [8, 8], "round {round}");
        for station in stations {
            let refused = rig.join(station).unwrap_err();
            let LaneError::Refused { errno, .. } = refused else { panic!("{refused}") };
            assert_eq!(errno, Errno::EOPNOTSUPP);
        }
    }
    for lane in [0, 1] {
        let lane = rig.lane(lane);
        assert_eq!((lane.stations, lane.tags), (0, 0));
        assert!(lane.files.has(u32::from(rig.lanes.files) - 1));
        // All slots but that of the spare buffer, which they share.
        assert!(lane.slots.has(u32::from(SLOTS) - 1));
        assert_eq!(lane.spares.len(), 1);
        assert_eq!(lane.names.len(), usize::from(NAMES) - 1);
    }
    // Buffers are reused: there are as many as were in use at once.
    assert_eq!(rig.lanes.pools.len(), 4);
}

#[test]
fn a_lane_without_room_is_left_alone() {
    let mut rig = Rig::new(1);
    let first = rig.hold(SLOTS - 10).unwrap();
    let refused = rig.hold(16).unwrap_err();
    assert!(refused.to_string().starts_with("finding a lane with room: ENOSPC"), "{refused}");
    rig.lanes.give_back(first);
    assert!(rig.hold(16).is_ok());
}

/// A lane keeps its spare buffer, so a nearly full table has room again after a device is removed.
#[test]
fn a_lane_that_has_a_spare_buffer_needs_no_slot_for_another() {
    let mut rig = Rig::new(2);
    for round in 0..3 {
        let holding = rig.hold(SLOTS - 1).unwrap();
        assert_eq!(rig.lanes.count(), 1, "round {round}");
        rig.lanes.give_back(holding);
    }
    // A device that uses all slots needs a lane that has never had a spare buffer.
    let slots = SlotTable { lent: SLOTS, pool: 0, ..Rig::slots(LendMode::Fused) };
    let all = rig.lanes.hold(&rig.config(1, LendMode::Fused, slots)).unwrap();
    assert_eq!((rig.lanes.count(), all.lane), (2, 1));
}

#[test]
fn an_empty_lane_is_taken_before_another_is_started() {
    let mut rig = Rig::new(2);
    let first = rig.hold(16).unwrap();
    let lane = first.lane;
    rig.lanes.give_back(first);
    let [again, other, third] = [(); 3].map(|()| rig.hold(16).unwrap());
    assert_eq!(again.lane, lane);
    assert_ne!(other.lane, lane);
    assert!([lane, other.lane].contains(&third.lane));
    assert_eq!(rig.lanes.count(), 2);
}

/// Ranges beyond the ring's table stand for any error that keeps a station from arriving.
#[test]
fn a_station_that_cannot_arrive_leaves_its_place() {
    let mut rig = Rig::new(1);
    let first = rig.start(0, LendMode::Fused);
    rig.lanes.lanes[0].as_mut().unwrap().files = Runs::new(20_000..20_010);
    for round in 0..20 {
        let station = rig.start(1, LendMode::Copy);
        let refused = station.await_ready().unwrap_err().to_string();
        assert!(refused.starts_with("registering files: EINVAL"), "round {round}: {refused}");
        assert_eq!(rig.lanes.join(station).unwrap_err().to_string(), refused);
        assert_eq!(rig.lane(0).stations, 1);
    }
    assert_eq!(rig.lanes.count(), 1, "the lane goes on");
    assert!(rig.lane(0).files.has(10));
    // The next station gets the memory of its buffers.
    assert_eq!(rig.lanes.pools.len(), 1);
    rig.lanes.lanes[0].as_mut().unwrap().files = Runs::new(1..100);
    assert!(rig.join(first).is_err());
}

#[test]
fn a_lane_of_one_queue_ends_with_it() {
    let rig = Rig::new(1);
    for lend in [LendMode::Fused, LendMode::Slot, LendMode::Copy] {
        for io_lane in [false, true] {
            let config = LaneConfig { io_lane, ..rig.config(0, lend, Rig::slots(lend)) };
            let (_, mut station) = start_own(config).unwrap();
            station.await_ready().unwrap();
            rig.await_end(&mut station);
            let (is_withdrawn, failure) = (station.is_withdrawn(), station.take_failure());
            assert!(!is_withdrawn && failure.is_none(), "nobody has to end it");
            let refused = station.join().unwrap_err();
            assert!(matches!(refused, LaneError::Refused { .. }), "{lend}: {refused}");
            assert_eq!(Arc::strong_count(&rig.cdev), 1, "its files have gone");
        }
    }
    assert_eq!(rig.lanes.count(), 0);
    // A failed set-up reports its error, not only its end.
    let slots = SlotTable { lent: u16::MAX, ..Rig::slots(LendMode::Fused) };
    let (_, mut station) = start_own(rig.config(0, LendMode::Fused, slots)).unwrap();
    let refused = station.await_ready().unwrap_err();
    assert!(refused.to_string().starts_with("registering the buffer table: EINVAL"), "{refused}");
    while !station.has_ended() {
        std::thread::yield_now();
    }
    assert_eq!(station.join().unwrap_err(), refused);
}

#[test]
fn a_device_with_longer_requests_brings_a_longer_spare_buffer() {
    let mut rig = Rig::new(1);
    let hold = |rig: &mut Rig, buffer_bytes| {
        let slots = Rig::slots(LendMode::Slot);
        let config = LaneConfig { buffer_bytes, ..rig.config(0, LendMode::Slot, slots) };
        rig.lanes.hold(&config).unwrap().spare.unwrap()
    };
    let table = [(8192, 0), (4096, 0), (8192, 0), (16_384, 1), (8192, 0), (12_288, 1)];
    for (bytes, index) in table {
        let spare = hold(&mut rig, bytes);
        assert_eq!(spare.index, index, "{bytes}");
        assert_eq!(spare.pool.count(), 1);
    }
    assert_eq!(rig.lane(0).spares.len(), 2);
    // A station that copies has its own buffers.
    let copies = rig.config(0, LendMode::Copy, Rig::slots(LendMode::Copy));
    assert!(rig.lanes.hold(&copies).unwrap().spare.is_none());
}
