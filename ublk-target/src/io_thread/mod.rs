//! Threads that serve queues: loop, rings, how they wait, and what control asks of them.

pub mod busy_poll;
pub mod event_loop;
pub mod idle_policy;
pub mod io_lane;
pub mod lanes;
pub mod message;
pub mod realtime_boost;
pub mod rings;
pub mod setup;
pub mod side_ring;
pub mod spare;
pub mod spawn;
pub mod station;
pub mod thread;
