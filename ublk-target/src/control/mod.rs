//! The life of devices: adding, serving, recovery, upgrades, deletion, supervision, fleets.

mod barrier;
pub mod deletion;
mod device_to_delete;
mod ending;
pub mod error;
pub mod fleet;
pub mod helpers;
pub mod lanes;
mod layers;
pub mod layout;
pub mod leftovers;
pub mod plan;
pub mod polling;
pub mod recoverable;
pub mod recovery;
pub mod server;
pub mod supervision;
pub mod supervisor;
pub mod upgrade;
