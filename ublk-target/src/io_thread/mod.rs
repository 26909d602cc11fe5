//! Threads that serve queues: loop, rings, how they wait, and what control asks of them.

pub mod busy_poll;
pub mod idle_policy;
pub mod io_lane;
pub mod lane;
pub mod message;
pub mod realtime_boost;
pub mod ring_io;
pub mod setup;
pub mod shared;
pub mod side_ring;
pub mod thread;
