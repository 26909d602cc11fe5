//! `Identify` data of a namespace.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::{
    Command, IDENTIFY_CONTROLLER, IDENTIFY_NAMESPACE, IOCTL_ADMIN_CMD, IOCTL_ID, Namespace,
    RetryDelays, opcode,
};
use crate::Errno;

/// `Identify` data of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its number and block size.
    pub namespace: Namespace,
    /// Its size in blocks.
    pub blocks: u64,
    /// Bytes of metadata of each block in the current format.
    pub metadata_bytes: u16,
    /// Whether blocks that write-zeroes deallocates read as zeros.
    pub deallocates_zeroes: bool,
}

/// Asks the namespace behind a generic device or a block device for its format (`Identify`).
///
/// # Errors
/// `ENOTTY` if it is no NVMe device, `EACCES` without permission, `EIO` if the drive refuses or its
/// data is invalid.
pub fn identify(device: BorrowedFd<'_>) -> Result<Identity, Errno> {
    // SAFETY: the request takes no argument.
    let nsid = unsafe { libc::ioctl(device.as_raw_fd(), IOCTL_ID.into()) };
    let nsid = u32::try_from(nsid).map_err(|_| last_errno())?;
    let data = identify_by(device, nsid, IDENTIFY_NAMESPACE)?;
    let mut identity = parse(nsid, &data).ok_or(Errno::EIO)?;
    // A drive without this data demands no delay.
    let controller = identify_by(device, 0, IDENTIFY_CONTROLLER);
    let delays = controller.map(|data| RetryDelays::parse(&data));
    identity.namespace.retry_delays = delays.unwrap_or_default();
    Ok(identity)
}

/// `Identify` with this command dword 10.
fn identify_by(device: BorrowedFd<'_>, nsid: u32, cdw10: u32) -> Result<[u8; 4096], Errno> {
    let mut data = [0_u8; 4096];
    let mut command = Command {
        opcode: opcode::IDENTIFY,
        nsid,
        cdw10,
        addr: data.as_mut_ptr().expose_provenance() as u64,
        data_len: 4096,
        ..Command::default()
    };
    // SAFETY: the command has the layout of `struct nvme_passthru_cmd`. It and its 4,096 bytes of
    // data outlive the call, and the kernel uses neither afterwards.
    let done = unsafe {
        libc::ioctl(device.as_raw_fd(), IOCTL_ADMIN_CMD.into(), std::ptr::from_mut(&mut command))
    };
    match done {
        0 => Ok(data),
        status => Err(if status < 0 { last_errno() } else { Errno::EIO }),
    }
}

fn last_errno() -> Errno {
    Errno::of(&std::io::Error::last_os_error())
}

/// Parses `Identify Namespace` data.
fn parse(nsid: u32, data: &[u8; 4096]) -> Option<Identity> {
    let blocks = u64::from_le_bytes(data[0..8].try_into().ok()?);
    let (formats, current) = (data[25], data[26]);
    // The two upper bits of the index are above the flag for interleaved metadata.
    let index = (current & 0xf) | (current >> 1 & 0x30);
    if index > formats {
        return None;
    }
    let format = 128 + 4 * usize::from(index);
    let metadata_bytes = u16::from_le_bytes(data[format..format + 2].try_into().ok()?);
    let block_shift = data[format + 2];
    let behaviour = data[33];
    (9..=16).contains(&block_shift).then_some(Identity {
        namespace: Namespace { nsid, block_shift, retry_delays: RetryDelays::default() },
        blocks,
        metadata_bytes,
        deallocates_zeroes: behaviour & 0x7 == 1 && behaviour & (1 << 3) != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_in_use_is_read() {
        let mut data = [0; 4096];
        data[0..8].copy_from_slice(&1000_u64.to_le_bytes());
        (data[25], data[26], data[33]) = (2, 0x11, 0x09);
        data[128..132].copy_from_slice(&[0, 0, 9, 0]);
        data[132..136].copy_from_slice(&[8, 0, 12, 0]);
        let identity = Identity {
            namespace: Namespace { nsid: 1, block_shift: 12, retry_delays: RetryDelays::default() },
            blocks: 1000,
            metadata_bytes: 8,
            deallocates_zeroes: true,
        };
        assert_eq!(parse(1, &data), Some(identity));
        data[26] = 0;
        assert_eq!(
            parse(1, &data).map(|ns| (ns.namespace.block_shift, ns.metadata_bytes)),
            Some((9, 0))
        );
        data[26] = 3;
        assert_eq!(parse(1, &data), None, "a format that does not exist");
    }
}
