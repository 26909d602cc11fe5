//! The control plane: commands to `/dev/ublk-control`, each with a bounded wait.
//!
//! Built on the UAPI bindings and the control ring of `libublk`. Its `UblkCtrl` is not used: it
//! rejects features that we need, hides error numbers behind retries, and waits without a limit.

mod error;
mod in_flight;
mod pending;

use std::fs::{File, OpenOptions};
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use libublk::{sys, ublk_init_ctrl_task_ring};

use crate::Errno;
use crate::feature::Features;
use crate::params::Params;

pub use error::ControlError;
use error::{open_error, ring_error};
use in_flight::Answer;
pub use pending::Pending;
use pending::{await_answer, submit};

/// The node of the driver.
pub const CONTROL_PATH: &str = "/dev/ublk-control";
/// The node's device numbers, while the driver is loaded.
const CONTROL_NUMBERS: &str = "/sys/class/misc/ublk-control/dev";

/// Plain data that the kernel reads or fills.
///
/// # Safety
/// The type is `repr(C)`, has no padding, and any bytes are a valid value.
unsafe trait Plain: Copy + Send + 'static {}
// SAFETY: bound from the UAPI, integers only; the sizes of its fields add up to its size.
unsafe impl Plain for sys::ublksrv_ctrl_dev_info {}
// SAFETY: integers only, padding explicit.
unsafe impl Plain for Params {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: integers.
unsafe impl Plain for [u64; CPU_MASK_WORDS] {}

/// Words of a CPU mask: 8,192 CPUs, the greatest number that Linux is built for.
const CPU_MASK_WORDS: usize = 128;

/// An open `/dev/ublk-control`. Belongs to the thread that opened it: its ring is the thread's.
#[derive(Debug)]
pub struct Control {
    file: File,
    /// The longest wait for a command that is not returned as [`Pending`].
    patience: Duration,
    _thread: PhantomData<*const ()>,
}

impl Control {
    /// Opens the node and makes the thread's control ring.
    ///
    /// # Errors
    /// As [`Control::open_node`] and [`Control::with`].
    pub fn open() -> Result<Self, ControlError> {
        Self::with(Self::open_node()?)
    }

    /// Opens the node without setting up a ring.
    ///
    /// # Errors
    /// [`ControlError::NoDriver`], [`ControlError::NoDriverNorRoot`], [`ControlError::NoNode`],
    /// [`ControlError::NoPermission`], [`ControlError::Setup`].
    pub fn open_node() -> Result<File, ControlError> {
        let numbers = std::fs::read_to_string(CONTROL_NUMBERS).ok();
        let numbers = numbers.as_deref().map(str::trim);
        let opened = OpenOptions::new().read(true).write(true).open(CONTROL_PATH);
        let node = opened.map_err(|error| {
            let is_root = nix::unistd::geteuid().is_root();
            open_error(Errno::of(&error), numbers, is_root)
        })?;
        match numbers.filter(|numbers| !is_node(&node, numbers)) {
            Some(numbers) => Err(ControlError::NoNode(numbers.to_owned())),
            None => Ok(node),
        }
    }

    /// Makes the thread's control ring. From its first command on the kernel runs workers for it,
    /// which share the process's files and mounts.
    ///
    /// # Errors
    /// [`ControlError::NoIoUring`], [`ControlError::Setup`].
    pub fn with(file: File) -> Result<Self, ControlError> {
        ublk_init_ctrl_task_ring(|ring| {
            if ring.is_none() {
                *ring = Some(IoUring::<squeue::Entry128>::builder().build(32)?);
            }
            Ok(())
        })
        .map_err(ring_error)?;
        Ok(Self { file, patience: Duration::from_secs(30), _thread: PhantomData })
    }

    /// The driver's features (Linux 6.5).
    ///
    /// # Errors
    /// [`ControlError::TooOld`] on older kernels.
    pub fn features(&self) -> Result<Features, ControlError> {
        let command = Command::new("UBLK_U_CMD_GET_FEATURES", sys::UBLK_U_CMD_GET_FEATURES);
        match self.exchange(command, u32::MAX, 0_u64) {
            Ok(bits) => Ok(Features(bits)),
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => Err(ControlError::TooOld),
            Err(error) => Err(error),
        }
    }

    /// Adds a device, and returns its description as the driver adjusted it. With an id of
    /// `u32::MAX` the driver chooses the id.
    ///
    /// # Errors
    /// `EEXIST` if the id is taken, `EINVAL` for queues, depth or features beyond the driver's
    /// limits, `ENOSPC` or `EACCES` at the limit of the number of devices.
    pub fn add(
        &self,
        info: sys::ublksrv_ctrl_dev_info,
    ) -> Result<sys::ublksrv_ctrl_dev_info, ControlError> {
        let command = Command::new("UBLK_U_CMD_ADD_DEV", sys::UBLK_U_CMD_ADD_DEV);
        self.exchange(command, info.dev_id, info)
    }

    /// The state of a device.
    ///
    /// # Errors
    /// `ENODEV` if there is none with this id.
    pub fn info(&self, id: u32) -> Result<sys::ublksrv_ctrl_dev_info, ControlError> {
        let command = Command::new("UBLK_U_CMD_GET_DEV_INFO", sys::UBLK_U_CMD_GET_DEV_INFO);
        self.exchange(command, id, sys::ublksrv_ctrl_dev_info::default())
    }

    /// Sets the parameters of a device that is not started.
    ///
    /// # Errors
    /// `EINVAL` if the driver rejects them, `EACCES` if the device is live.
    pub fn set_params(&self, id: u32, params: Params) -> Result<(), ControlError> {
        let command = Command::new("UBLK_U_CMD_SET_PARAMS", sys::UBLK_U_CMD_SET_PARAMS);
        self.exchange(command, id, params).map(drop)
    }

    /// Reads the parameters of a device.
    ///
    /// # Errors
    /// `ENODEV`, `EINVAL`.
    pub fn params(&self, id: u32) -> Result<Params, ControlError> {
        let command = Command::new("UBLK_U_CMD_GET_PARAMS", sys::UBLK_U_CMD_GET_PARAMS);
        self.exchange(command, id, Params::request())
    }

    /// The CPUs that submit to a queue.
    ///
    /// # Errors
    /// `ENODEV`, `EINVAL` for a queue that the device does not have.
    pub fn queue_affinity(&self, id: u32, qid: u16) -> Result<Vec<usize>, ControlError> {
        let command =
            Command::new("UBLK_U_CMD_GET_QUEUE_AFFINITY", sys::UBLK_U_CMD_GET_QUEUE_AFFINITY)
                .data(u64::from(qid));
        let mask = self.exchange(command, id, [0_u64; CPU_MASK_WORDS])?;
        let cpus = 0..CPU_MASK_WORDS * 64;
        Ok(cpus.filter(|cpu| mask[cpu / 64] & (1 << (cpu % 64)) != 0).collect())
    }

    /// Starts a device: `/dev/ublkbN` appears. The driver first waits until every tag of every
    /// queue is fetched, and scans for partitions, so the lanes must be serving.
    ///
    /// # Errors
    /// `EINVAL` without parameters, `EEXIST` if the device is started.
    pub fn start(&self, id: u32, pid: u32) -> Result<Pending, ControlError> {
        let command =
            Command::new("UBLK_U_CMD_START_DEV", sys::UBLK_U_CMD_START_DEV).data(u64::from(pid));
        self.send(command, id, None::<Box<()>>)
    }

    /// Stops a device: `/dev/ublkbN` disappears, outstanding I/O is completed or fails, and the
    /// lanes' fetches end with `ENODEV`.
    ///
    /// # Errors
    /// `ENODEV`.
    pub fn stop(&self, id: u32) -> Result<Pending, ControlError> {
        self.send(
            Command::new("UBLK_U_CMD_STOP_DEV", sys::UBLK_U_CMD_STOP_DEV),
            id,
            None::<Box<()>>,
        )
    }

    /// Stops a device unless it is open (`UBLK_F_SAFE_STOP_DEV`, Linux 7.0).
    ///
    /// # Errors
    /// `EBUSY` if it is open, `EOPNOTSUPP` on older kernels, `ENODEV`.
    pub fn try_stop(&self, id: u32) -> Result<Pending, ControlError> {
        let command = Command::new("UBLK_U_CMD_TRY_STOP_DEV", sys::UBLK_U_CMD_TRY_STOP_DEV);
        self.send(command, id, None::<Box<()>>)
    }

    /// Starts the recovery of a device after its server has died (`UBLK_F_USER_RECOVERY`, Linux
    /// 6.1).
    ///
    /// # Errors
    /// `EBUSY` while a server has the device, or while the driver waits for buffers of the dead
    /// server; `EINVAL` for a device that was added without recovery, `ENODEV`.
    pub fn start_recovery(&self, id: u32) -> Result<(), ControlError> {
        let (name, op) = ("UBLK_U_CMD_START_USER_RECOVERY", sys::UBLK_U_CMD_START_USER_RECOVERY);
        let pending = self.send(Command::new(name, op), id, None::<Box<()>>)?;
        self.finish(pending).map(drop)
    }

    /// Ends the recovery of a device: `pid` is its new server, and waiting I/O continues. The
    /// driver first waits until every tag of every queue is fetched.
    ///
    /// # Errors
    /// `EBUSY` if the device has a server, `EINVAL` if another process has the character device
    /// open, `ENODEV`.
    pub fn end_recovery(&self, id: u32, pid: u32) -> Result<Pending, ControlError> {
        let (name, op) = ("UBLK_U_CMD_END_USER_RECOVERY", sys::UBLK_U_CMD_END_USER_RECOVERY);
        self.send(Command::new(name, op).data(u64::from(pid)), id, None::<Box<()>>)
    }

    /// Makes new I/O wait, and cancels fetches without a request, so that the server can be
    /// replaced (`UBLK_F_QUIESCE`, Linux 6.16). Waits until each queue has a fetch to cancel, for
    /// at most `patience` and at least one millisecond. Whatever the answer is, new I/O waits until
    /// the device is recovered.
    ///
    /// # Errors
    /// `EBUSY` after `patience`, `EOPNOTSUPP` for a device without the feature, `ENODEV` for one
    /// that is not started.
    pub fn quiesce(&self, id: u32, patience: Duration) -> Result<Pending, ControlError> {
        // 0 would wait without a limit.
        let ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX).max(1);
        let command = Command::new("UBLK_U_CMD_QUIESCE_DEV", sys::UBLK_U_CMD_QUIESCE_DEV);
        self.send(command.data(ms), id, None::<Box<()>>)
    }

    /// Tells the kernel a device's new size in sectors of 512 bytes (`UBLK_F_UPDATE_SIZE`, Linux
    /// 6.16). The device has to be live.
    ///
    /// # Errors
    /// `EOPNOTSUPP` on older kernels, `ENODEV`.
    pub fn update_size(&self, id: u32, sectors: u64) -> Result<(), ControlError> {
        let command = Command::new("UBLK_U_CMD_UPDATE_SIZE", sys::UBLK_U_CMD_UPDATE_SIZE);
        let pending = self.send(command.data(sectors), id, None::<Box<()>>)?;
        self.finish(pending).map(drop)
    }

    /// Stops and removes a device without waiting for its server to close it (Linux 6.9).
    ///
    /// # Errors
    /// `ENODEV` if there is none with this id.
    pub fn delete(&self, id: u32) -> Result<Pending, ControlError> {
        let command = Command::new("UBLK_U_CMD_DEL_DEV_ASYNC", sys::UBLK_U_CMD_DEL_DEV_ASYNC);
        self.send(command, id, None::<Box<()>>)
    }

    /// Waits at most `timeout` for the answer. `None` if there is none yet.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(
        &self,
        pending: &mut Pending,
        timeout: Duration,
    ) -> Option<Result<u32, ControlError>> {
        let Answer { res, .. } = await_answer(pending, timeout)?;
        Some(pending.result(res))
    }

    /// Waits for the answer, as long as for other commands.
    ///
    /// # Errors
    /// The driver's, or [`ControlError::Timeout`].
    pub fn finish(&self, mut pending: Pending) -> Result<u32, ControlError> {
        let answer = self.wait(&mut pending, self.patience);
        answer.unwrap_or_else(|| Err(pending.late()))
    }

    fn exchange<T: Plain>(&self, command: Command, id: u32, value: T) -> Result<T, ControlError> {
        let mut pending = self.send(command, id, Some(Box::new(value)))?;
        let Some(Answer { res, buffer }) = await_answer(&mut pending, self.patience) else {
            return Err(pending.late());
        };
        pending.result(res)?;
        let filled = buffer.and_then(|buffer| buffer.downcast::<T>().ok());
        Ok(filled.map_or(value, |filled| *filled))
    }

    fn send<T: Send + 'static>(
        &self,
        command: Command,
        id: u32,
        buffer: Option<Box<T>>,
    ) -> Result<Pending, ControlError> {
        let length = if buffer.is_some() { size_of::<T>() } else { 0 };
        let length = u16::try_from(length).unwrap_or(u16::MAX);
        submit(command.name, buffer, |address| {
            let bytes = ctrl_cmd(id, length, address, command.data);
            opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), command.op).cmd(bytes).build()
        })
    }
}

/// Whether a file is the character device with these numbers, in the form of sysfs.
fn is_node(file: &File, numbers: &str) -> bool {
    let Ok(meta) = file.metadata() else { return false };
    let device = meta.rdev();
    let own = format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device));
    meta.file_type().is_char_device() && own == numbers
}

struct Command {
    name: &'static str,
    op: u32,
    data: u64,
}

impl Command {
    const fn new(name: &'static str, op: u32) -> Self {
        Self { name, op, data: 0 }
    }

    const fn data(mut self, data: u64) -> Self {
        self.data = data;
        self
    }
}

/// `struct ublksrv_ctrl_cmd` at the start of the 80 command bytes.
fn ctrl_cmd(id: u32, len: u16, addr: u64, data: u64) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[0..4].copy_from_slice(&id.to_ne_bytes());
    // The command is not for a single queue.
    bytes[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    bytes[6..8].copy_from_slice(&len.to_ne_bytes());
    bytes[8..16].copy_from_slice(&addr.to_ne_bytes());
    bytes[16..24].copy_from_slice(&data.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_layout_of_the_uapi() {
        let bytes = ctrl_cmd(7, 64, 0x1122_3344_5566_7788, 9);
        assert_eq!(size_of::<sys::ublksrv_ctrl_cmd>(), 32);
        assert_eq!(bytes[0..4], 7_u32.to_ne_bytes());
        assert_eq!(bytes[4..6], [0xff, 0xff]);
        assert_eq!(bytes[6..8], 64_u16.to_ne_bytes());
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788_u64.to_ne_bytes());
        assert_eq!(bytes[16..24], 9_u64.to_ne_bytes());
        assert!(bytes[24..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn plain_types_have_no_padding() {
        assert_eq!(size_of::<sys::ublksrv_ctrl_dev_info>(), 64);
        assert_eq!(size_of::<Params>(), 136);
    }

    #[test]
    fn errors_of_opening_say_what_to_do() {
        let (gone, loaded) = (None, Some("10:125\n"));
        let table = [
            (2, gone, true, "not loaded; run `modprobe ublk_drv`"),
            (6, gone, true, "not loaded; run `modprobe ublk_drv`"),
            (2, gone, false, "run as root"),
            (2, gone, false, "`modprobe ublk_drv` as root"),
            (2, loaded, true, "needs the character device 10:125"),
            (13, loaded, false, "run as root"),
            (13, gone, false, "run as root"),
            (1, loaded, true, "run as root"),
            (24, loaded, true, "EMFILE"),
        ];
        for (errno, numbers, is_root, expected) in table {
            let message = open_error(Errno::new(errno), numbers, is_root).to_string();
            assert!(message.contains(expected), "{errno}: {message}");
            let is_loaded = numbers.is_some();
            assert!(!(is_loaded && message.contains("modprobe")), "{errno}: {message}");
        }
    }
}
