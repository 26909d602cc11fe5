//! A station: a queue in a lane. Its contents, and its remains.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, SyncSender};

use bufreg::Incarnation;
use ublk_engine::engine::EngineConfig;
use ublk_engine::lane::{Lane, LaneError, PortConfig, TableRange};
use ublk_engine::plan::{BackingIndex, WINDOW_OPS};
use ublk_engine::target::AnyTarget;
use ublk_engine::units::Tag;
use uring_ext::iod::IoDescArray;
use uring_ext::nvme::{Namespace, RangeAddr, Ranges};
use uring_ext::pool::{BufferPool, Direction, RequestAddr};
use uring_ext::ring::Polling;

use crate::backing::Backing;
use crate::config::busy_wait::BusyWait;
use crate::io_thread::message::LaneMessage;
use crate::io_thread::setup::{LaneConfig, failed};
use crate::io_thread::spare::SpareBuffer;
use crate::os::wakeups::Wakeups;

/// The maximum number of stations of a lane.
pub(crate) const MAX_STATIONS: usize = 1024;
/// The bits of a station's name: the lower bits of an incarnation, which completions carry. Name 0
/// is the lane's.
pub(crate) const NAMES: u16 = 1 << 12;
/// The name in completions of the lane itself.
pub(crate) const OWN: Incarnation = Incarnation(0);

/// The data of a station, apart from the rings of its lane.
pub(crate) struct Parts {
    pub name: u16,
    qid: u16,
    pub iods: IoDescArray,
    /// The station's own buffers.
    pub pool: Option<BufferPool>,
    /// The number of the lane's spare buffer, which precedes its own buffers.
    pub spare: Option<usize>,
    ranges: Option<Ranges>,
    cdev: Arc<File>,
    pub backings: Arc<[Backing]>,
}

/// The position of a station in its lane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Berth {
    pub name: u16,
    pub first_file: u32,
    pub first_slot: u16,
    pub spare: Option<SpareBuffer>,
}

/// The channels between a station and its outside.
pub(crate) struct StationChannels {
    pub inbox: Receiver<LaneMessage>,
    /// Notified when all tags are fetched, and again if the driver refuses one later.
    pub ready: SyncSender<Result<(), LaneError>>,
    pub end: SyncSender<Ended>,
    /// Set when the driver has taken back some fetches, and no request is open.
    pub is_withdrawn: Arc<AtomicBool>,
}

/// A station on its way to its lane, with all its memory.
pub(crate) struct Arrival {
    pub lane: Lane<AnyTarget>,
    pub parts: Parts,
    pub place: TableRange,
    pub spare: Option<SpareBuffer>,
    /// The character device and the backings.
    pub files: Box<[RawFd]>,
    pub channels: StationChannels,
    pub wakeups: Arc<Wakeups>,
    /// Its lane may spin for completions before it sleeps.
    pub looks: bool,
}

/// A station that has left its lane.
pub(crate) struct Ended {
    pub lane: Lane<AnyTarget>,
    pub parts: Parts,
    pub error: Option<LaneError>,
}

/// The remains of a station, and the channel that announces its end.
pub(crate) struct Leaving {
    pub ended: Ended,
    pub end: SyncSender<Ended>,
    pub wakeups: Arc<Wakeups>,
}

impl Leaving {
    pub fn announce(self) {
        // There is room for the only station.
        let _ = self.end.try_send(self.ended);
        self.wakeups.lane_ended();
    }
}

impl Arrival {
    /// A station at `berth`. `pool` has its own buffers.
    ///
    /// # Errors
    /// `ENOMEM` and other errors of memory.
    pub fn new(
        config: &LaneConfig,
        berth: Berth,
        pool: Option<BufferPool>,
        channels: StationChannels,
    ) -> Result<Self, LaneError> {
        let Berth { name, first_file, first_slot, spare } = berth;
        let queue = config.engine.queue;
        let iods = IoDescArray::map(&config.cdev, queue.qid.0, queue.depth)
            .map_err(failed("mapping the request descriptors"))?;
        let ranges = if config.has_namespace() {
            // One for each entry of the table of operations in flight.
            let places = usize::from(queue.depth) * WINDOW_OPS;
            let places = u16::try_from(places).unwrap_or(u16::MAX);
            Some(Ranges::new(places).map_err(failed("allocating ranges"))?)
        } else {
            None
        };
        let parts = Parts {
            name,
            qid: queue.qid.0,
            iods,
            pool,
            spare: spare.map(|spare| spare.index),
            ranges,
            cdev: Arc::clone(&config.cdev),
            backings: Arc::clone(&config.backings),
        };
        let place = TableRange { first_file, first_slot, spare: spare.map(|spare| spare.slot) };
        Ok(Self {
            lane: new_lane(config, name, place),
            parts,
            place,
            spare,
            files: config.files(),
            channels,
            wakeups: Arc::clone(&config.wakeups),
            looks: config.busy_wait != BusyWait::Off,
        })
    }
}

fn new_lane(config: &LaneConfig, name: u16, place: TableRange) -> Lane<AnyTarget> {
    // No process lives long enough to use up the upper bits.
    let life = config.engine.incarnation.0 << NAMES.trailing_zeros();
    let engine = EngineConfig { incarnation: Incarnation(life | u32::from(name)), ..config.engine };
    let port = PortConfig {
        routes: config.backings.iter().map(Backing::route).collect(),
        polled: config.polling != Polling::Off,
        faults: config.faults,
        place,
    };
    Lane::new(config.target.clone(), engine, port)
}

impl LaneConfig {
    /// The files of a station: the character device and the backings.
    pub(crate) fn files(&self) -> Box<[RawFd]> {
        let backings = self.backings.iter().map(AsRawFd::as_raw_fd);
        std::iter::once(self.cdev.as_raw_fd()).chain(backings).collect()
    }
}

impl Parts {
    pub fn copy(
        &self,
        tag: Tag,
        pool: &BufferPool,
        buffer: u16,
        direction: Direction,
        bytes: Range<u32>,
    ) -> i32 {
        let request = RequestAddr { qid: self.qid, tag: tag.0 };
        let (from, len) = (bytes.start, bytes.end - bytes.start);
        match pool.copy(self.cdev.as_fd(), request, direction, buffer, from, len) {
            Ok(copied) => i32::try_from(copied).unwrap_or(i32::MAX),
            Err(errno) => errno.negated(),
        }
    }

    pub fn has_shrunk(&self, backing: BackingIndex, end: u64) -> bool {
        self.backings.get(usize::from(backing.0)).is_some_and(|backing| backing.has_shrunk(end))
    }

    pub fn range(&mut self, place: u16, namespace: Namespace, offset: u64, len: u64) -> RangeAddr {
        match &mut self.ranges {
            Some(ranges) => ranges.set(place, namespace, offset, len),
            // They exist for stations with a namespace among their backings.
            None => unreachable!("a station without a namespace deallocates nothing"),
        }
    }
}

/// Allocates the buffers of the station's own.
///
/// # Errors
/// `ENOMEM`.
pub(crate) fn own_pool(config: &LaneConfig) -> Result<Option<BufferPool>, LaneError> {
    match config.own_buffers() {
        0 => Ok(None),
        count => BufferPool::new(count, config.buffer_bytes)
            .map(Some)
            .map_err(failed("allocating buffers")),
    }
}

/// Allocates the spare buffer of a lane.
///
/// # Errors
/// `ENOMEM`.
pub(crate) fn spare_pool(bytes: u32) -> Result<BufferPool, LaneError> {
    BufferPool::new(1, bytes).map_err(failed("allocating buffers"))
}
