//! Serving a device: lanes on the data path, and the device's life around them.

pub mod busy_poll;
mod clock;
pub mod config;
pub mod control_request;
pub mod device;
pub mod fleet;
mod idle_policy;
mod io_lane;
pub mod lane;
mod lanes;
mod layout;
pub mod message;
pub mod on_death;
mod plan;
pub mod polling;
pub mod protection;
mod realtime_boost;
pub mod recovery;
mod ring_io;
pub mod room;
mod shared;
mod side_ring;
pub mod signals;
mod supervision;
pub mod upgrade;
