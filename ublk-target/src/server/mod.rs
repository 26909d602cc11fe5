//! Serving a device: lanes on the data path, and the device's life around them.

mod clock;
pub mod config;
pub mod device;
pub mod fleet;
mod io_lane;
pub mod lane;
mod lanes;
mod layout;
pub mod message;
pub mod on_death;
pub mod pace;
pub mod petition;
mod plan;
pub mod polling;
mod precedence;
pub mod protection;
pub mod recovery;
mod ring_io;
pub mod room;
mod shared;
mod side_ring;
pub mod signals;
mod supervision;
pub mod upgrade;
mod waits;
