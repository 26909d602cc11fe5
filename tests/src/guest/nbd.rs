//! Block devices of the kernel's NBD driver, whose server is a program here.

use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::netlink::{Attributes, Family};
use super::{process, wait_for};

/// `include/uapi/linux/nbd-netlink.h`.
const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_CLIENT_FLAGS: u16 = 6;
const NBD_ATTR_SOCKETS: u16 = 7;
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;

/// `include/uapi/linux/nbd.h`.
const NBD_FLAG_HAS_FLAGS: u64 = 1 << 0;
const NBD_FLAG_SEND_FLUSH: u64 = 1 << 2;
const NBD_FLAG_SEND_FUA: u64 = 1 << 3;
const NBD_CFLAG_DESTROY_ON_DISCONNECT: u64 = 1 << 0;

/// What a drive is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Size in MiB.
    pub mib: u64,
    /// Logical block size in bytes, which is also what is written whole or not at all.
    pub block_bytes: u32,
    /// Whether it has FUA; a volatile cache it has in any case.
    pub fua: bool,
}

/// A device of the driver's, which goes when it is disconnected.
#[derive(Debug)]
pub struct NbdDevice {
    index: u32,
}

impl NbdDevice {
    /// Makes a device whose requests come to the other end of a stream socket.
    ///
    /// # Errors
    /// When the kernel has no NBD, or does not take the socket.
    pub fn connect(socket: impl AsFd, shape: Shape) -> Result<Self> {
        // Or there would be 16 devices for nobody.
        process::run(&["modprobe", "nbd", "nbds_max=0"])?;
        let socket = u32::try_from(socket.as_fd().as_raw_fd())?;
        let fua = if shape.fua { NBD_FLAG_SEND_FUA } else { 0 };
        let item = Attributes::default().u32(NBD_SOCK_FD, socket);
        let attributes = Attributes::default()
            .u64(NBD_ATTR_SIZE_BYTES, shape.mib << 20)
            .u64(NBD_ATTR_BLOCK_SIZE_BYTES, shape.block_bytes.into())
            .u64(NBD_ATTR_SERVER_FLAGS, NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | fua)
            .u64(NBD_ATTR_CLIENT_FLAGS, NBD_CFLAG_DESTROY_ON_DISCONNECT)
            .nested(NBD_ATTR_SOCKETS, &Attributes::default().nested(NBD_SOCK_ITEM, &item));
        let answer = Family::open("nbd")?.request(NBD_CMD_CONNECT, &attributes);
        let index = answer.context("connect an NBD device")?.get_u32(NBD_ATTR_INDEX)?;
        let device = Self { index };
        wait_for("the node of an NBD device", Duration::from_secs(10), || {
            Ok(device.path().exists().then_some(()))
        })?;
        Ok(device)
    }

    /// The block device.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.index))
    }

    /// Has the kernel fail what is in flight and close the socket.
    ///
    /// # Errors
    /// When it is not connected.
    pub fn disconnect(&self) -> Result<()> {
        let attributes = Attributes::default().u32(NBD_ATTR_INDEX, self.index);
        let answer = Family::open("nbd")?.request(NBD_CMD_DISCONNECT, &attributes);
        answer.with_context(|| format!("disconnect nbd{}", self.index)).map(drop)
    }

    /// Waits until it is gone, which it is when nobody has it open any more.
    ///
    /// # Errors
    /// When somebody keeps it open.
    pub fn wait_until_gone(self) -> Result<()> {
        let path = format!("/sys/block/nbd{}", self.index);
        wait_for("an NBD device to go", Duration::from_secs(60), || {
            Ok((!Path::new(&path).exists()).then_some(()))
        })
    }
}

/// Takes the driver out again.
///
/// # Errors
/// When a device is in use.
pub fn unload() -> Result<()> {
    process::run(&["modprobe", "--remove", "nbd"]).map(drop)
}
