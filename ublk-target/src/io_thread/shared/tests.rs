//! Stations on real rings. Their character device is `/dev/zero`, which can be mapped and knows no
//! commands: every fetch fails, and so each station is refused and ends.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use ublk_engine::engine::{QueueIdentity, SlotChoice};
use ublk_engine::lend::LendMode;
use ublk_engine::request::Geometry;
use ublk_engine::target::{BaseTarget, NullTarget};
use ublk_engine::units::Qid;
use uring_ext::ring::Polling;

use super::*;
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

    fn start(&mut self, device: u32, lend: LendMode) -> StationHandle {
        let slots = Self::slots(lend);
        let (holding, wake) = self.lanes.hold(self.backings.len(), &slots, DEPTH).unwrap();
        let config = LaneConfig {
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
            wake,
            wakeups: Arc::clone(&self.wakeups),
        };
        self.lanes.start(holding, &config).unwrap().1
    }

    /// Waits until a station has ended by itself, and takes back what it had.
    fn join(&mut self, mut station: StationHandle) -> Result<LaneReport, LaneError> {
        station.await_ready().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !station.has_ended() {
            assert!(Instant::now() < deadline, "it does not end");
            let _ = self.wakeups.wait(PollTimeout::from(100_u8));
        }
        self.lanes.join(station)
    }

    fn lane(&self, index: usize) -> &SharedLane {
        self.lanes.lanes[index].as_ref().unwrap()
    }
}

#[test]
fn stations_come_and_go_and_leave_their_places() {
    let mut rig = Rig::new(2);
    // More than there are names.
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
        assert!(lane.slots.has(SLOTS.into()));
        assert_eq!(lane.names.len(), usize::from(NAMES) - 1);
    }
    // Buffers are used again: there are as many as were in use at once.
    assert_eq!(rig.lanes.pools.len(), 16);
}

#[test]
fn a_lane_without_room_is_left_alone() {
    let mut rig = Rig::new(1);
    let slots = |lent| SlotTable { lent, ..Rig::slots(LendMode::Fused) };
    let (first, _) = rig.lanes.hold(1, &slots(SLOTS - 10), DEPTH).unwrap();
    let refused = rig.lanes.hold(1, &slots(16), DEPTH).unwrap_err();
    assert!(refused.to_string().starts_with("finding a lane with room: ENOSPC"), "{refused}");
    rig.lanes.give_back(first);
    assert!(rig.lanes.hold(1, &slots(16), DEPTH).is_ok());
}

#[test]
fn an_empty_lane_is_taken_before_another_is_started() {
    let mut rig = Rig::new(2);
    let slots = Rig::slots(LendMode::Fused);
    let mut hold = || rig.lanes.hold(1, &slots, DEPTH).unwrap().0;
    let first = hold();
    let lane = first.lane;
    rig.lanes.give_back(first);
    let mut hold = || rig.lanes.hold(1, &slots, DEPTH).unwrap().0;
    let (again, other, third) = (hold(), hold(), hold());
    assert_eq!(again.lane, lane);
    assert_ne!(other.lane, lane);
    assert!([lane, other.lane].contains(&third.lane));
    assert_eq!(rig.lanes.count(), 2);
}

/// Places beyond the ring's table stand for whatever keeps a station from arriving.
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
    // The memory of its buffers is there for the next one.
    assert_eq!(rig.lanes.pools.len(), 1);
    rig.lanes.lanes[0].as_mut().unwrap().files = Runs::new(1..100);
    assert!(rig.join(first).is_err());
}
