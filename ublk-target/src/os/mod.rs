//! The process's interface to the kernel: descriptors, signals, processes, files, limits.

pub mod clock;
pub mod inherited;
pub mod kernel;
pub mod memory;
pub mod own_directory;
pub mod own_files;
pub mod process;
pub mod procfs;
pub mod protection;
pub mod random;
pub mod steps;
pub mod text;
pub mod wait;
pub mod wakeups;
