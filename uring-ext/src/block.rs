//! What block devices say of themselves that sysfs does not.

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

/// The file behind a loop device of the kernel, by its numbers: its name is that of whoever has
/// attached it, and there may be others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopFile {
    /// Number of the device that its file system is on, as `st_dev` has it.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Number of the block device that it is, as `st_rdev` has it; 0 for a regular file.
    pub rdevice: u64,
}

/// The file that a loop device is attached to.
///
/// # Errors
/// `ENXIO` for one that is attached to none, `ENOTTY` for another device.
pub fn loop_file(device: BorrowedFd<'_>) -> Result<LoopFile, Errno> {
    const { assert!(size_of::<LoopInfo>() == 232) };
    let mut info = std::mem::MaybeUninit::<LoopInfo>::zeroed();
    // SAFETY: the kernel writes a `struct loop_info64` to the address, which has room for it.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) };
    if result < 0 {
        return Err(Errno::of(&std::io::Error::last_os_error()));
    }
    // SAFETY: it is made of integers, for which zeros will do, too.
    let info = unsafe { info.assume_init() };
    Ok(LoopFile { device: info.device, inode: info.inode, rdevice: info.rdevice })
}
