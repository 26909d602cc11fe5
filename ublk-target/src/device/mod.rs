//! Devices from outside: their state files, their state in the driver, and their processes.

pub mod description;
pub mod mark;
pub mod partitions;
pub mod paths;
pub mod processes;
pub mod program;
pub mod role_file;
pub mod standing;
pub mod state_file;
pub mod trouble;
