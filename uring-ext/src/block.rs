//! Facts about block devices that sysfs does not show.

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::Errno;

/// `LOOP_GET_STATUS64` (`include/uapi/linux/loop.h`).
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// The file behind a kernel loop device, identified by numbers: its name is valid only in the mount
/// namespace of the process that attached it, and the file may have other names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopFile {
    /// The device of its file system (`st_dev`).
    pub device: u64,
    /// Its inode number (`st_ino`).
    pub inode: u64,
    /// Its own device number if it is a block device (`st_rdev`), 0 for a regular file.
    pub rdevice: u64,
}

/// The file that a loop device is attached to.
///
/// # Errors
/// `ENXIO` if it is attached to no file, `ENOTTY` if it is no loop device.
pub fn loop_file(device: BorrowedFd<'_>) -> Result<LoopFile, Errno> {
    const { assert!(size_of::<LoopInfo>() == 232) };
    let mut info = std::mem::MaybeUninit::<LoopInfo>::zeroed();
    // SAFETY: the kernel writes a `struct loop_info64` to the address, which has enough space.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) };
    if result < 0 {
        return Err(Errno::of(&std::io::Error::last_os_error()));
    }
    // SAFETY: it consists of integers, and was zeroed before the call.
    let info = unsafe { info.assume_init() };
    Ok(LoopFile { device: info.device, inode: info.inode, rdevice: info.rdevice })
}
