//! Serving a device: lanes on the data path, and the device's life around them.

pub mod config;
pub mod device;
pub mod lane;
mod layout;
mod signals;
