//! Threads that serve queues: the loop, the rings, the idle policy, and messages from control.

pub mod busy_poll;
pub mod event_loop;
pub mod hold;
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
