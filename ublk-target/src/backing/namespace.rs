//! NVMe namespaces with commands that bypass the block layer (`/dev/ngXnY`).

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise, fsync};
use ublk_engine::route::Route;
use ublk_engine::units::Bytes;
use uring_ext::nvme::{self, Identity, MAX_BLOCKS};
use uring_ext::{Errno, nvme::Namespace};

use crate::backing::limits::Limits;
use crate::backing::{Backing, BackingProblem, Handle, failed};
use crate::os::kernel::KernelVersion;

/// The first kernel with `IORING_SETUP_SQE_MIXED`, which allows such commands beside other entries.
const FIRST_KERNEL: KernelVersion = KernelVersion(6, 19);

/// Both devices of a namespace.
#[derive(Debug)]
pub(super) struct NamespaceFiles {
    /// Held exclusively, since commands to the generic device do not check for other users.
    _block: File,
    generic: File,
}

impl NamespaceFiles {
    pub fn size_now(&self) -> Result<Bytes, BackingProblem> {
        let refused = |errno| BackingProblem::Failed { doing: "cannot be identified", errno };
        let identity = nvme::identify(self.generic.as_fd()).map_err(refused)?;
        size(&identity).ok_or_else(|| refused(Errno::EIO))
    }
}

impl AsRawFd for NamespaceFiles {
    fn as_raw_fd(&self) -> RawFd {
        self.generic.as_raw_fd()
    }
}

/// The generic device of a block device; `None` if it is not a whole NVMe namespace.
pub(super) fn generic_of(block: &Path) -> Option<PathBuf> {
    let number = block.file_name()?.to_str()?.strip_prefix("nvme")?;
    is_number(number).then(|| Path::new("/dev").join(format!("ng{number}")))
}

/// The block device of a generic device; `None` for any other path.
pub(super) fn block_of(generic: &Path) -> Option<PathBuf> {
    let number = generic.file_name()?.to_str()?.strip_prefix("ng")?;
    is_number(number).then(|| Path::new("/dev").join(format!("nvme{number}")))
}

/// Whether the text is the `XnY` of a controller and a namespace.
fn is_number(text: &str) -> bool {
    let is_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.split_once('n').is_some_and(|(controller, n)| is_digits(controller) && is_digits(n))
}

/// Opens a namespace. `block` is its block device, opened exclusively.
pub(super) fn open(block: Backing, generic: PathBuf) -> Result<Backing, BackingProblem> {
    let running = KernelVersion::running();
    if running < FIRST_KERNEL {
        return Err(BackingProblem::TooOld { needs: FIRST_KERNEL, running });
    }
    let Handle::Device(block_file) = block.handle else {
        return Err(BackingProblem::NoNamespace);
    };
    let file = OpenOptions::new().read(true).write(!block.limits.read_only).open(&generic);
    let file = file.map_err(failed("its generic device cannot be opened"))?;
    let refused = |errno| BackingProblem::Failed { doing: "cannot be identified", errno };
    let identity = nvme::identify(file.as_fd()).map_err(refused)?;
    if nvme::identify(block_file.as_fd()).map_err(refused)? != identity {
        // The names agree and the namespaces do not.
        return Err(BackingProblem::NoNamespace);
    }
    if identity.metadata_bytes > 0 {
        return Err(BackingProblem::Metadata(identity.metadata_bytes));
    }
    let limits = limits(block.limits, &block.path, identity.namespace)?;
    drop_cache(&block_file).map_err(failed("its cache cannot be written back"))?;
    Ok(Backing {
        path: generic,
        size: size(&identity).ok_or_else(|| refused(Errno::EIO))?,
        handle: Handle::Namespace(NamespaceFiles { _block: block_file, generic: file }),
        identity: block.identity,
        limits,
        route: Route::Namespace {
            namespace: identity.namespace,
            deallocates_zeroes: identity.deallocates_zeroes,
        },
        can_poll: block.can_poll,
        is_buffered: false,
    })
}

fn size(identity: &Identity) -> Option<Bytes> {
    let shift = identity.namespace.block_shift;
    identity.blocks.checked_mul(1 << shift).map(Bytes)
}

/// The limits of the block device, except the length of one command: the drive does not split a
/// command, and fails one that is too long.
fn limits(limits: Limits, block: &Path, namespace: Namespace) -> Result<Limits, BackingProblem> {
    if limits.logical_block != 1 << namespace.block_shift {
        return Err(BackingProblem::NoNamespace);
    }
    let longest = MAX_BLOCKS << namespace.block_shift;
    let hardware = hardware_max_io(block).unwrap_or_else(|| limits.max_io.into()).min(longest);
    Ok(Limits {
        max_io: u32::try_from(hardware).unwrap_or(limits.max_io),
        max_write_zeroes: limits.max_write_zeroes.min(longest),
        ..limits
    })
}

fn hardware_max_io(block: &Path) -> Option<u64> {
    let queue = Path::new("/sys/block").join(block.file_name()?).join("queue");
    let kib: u64 =
        std::fs::read_to_string(queue.join("max_hw_sectors_kb")).ok()?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Commands to the generic device bypass the page cache of the block device.
fn drop_cache(block: &File) -> std::io::Result<()> {
    fsync(block)?;
    fadvise(block, 0, None, Advice::DontNeed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_have_two_names() {
        let pairs = [("/dev/nvme0n1", "/dev/ng0n1"), ("/dev/nvme12n34", "/dev/ng12n34")];
        for (block, generic) in pairs {
            assert_eq!(generic_of(Path::new(block)).as_deref(), Some(Path::new(generic)));
            assert_eq!(block_of(Path::new(generic)).as_deref(), Some(Path::new(block)));
        }
        for other in ["/dev/nvme0", "/dev/nvme0n1p2", "/dev/nvme0c0n1", "/dev/sda", "/dev/ng0"] {
            assert_eq!(generic_of(Path::new(other)), None, "{other}");
            assert_eq!(block_of(Path::new(other)), None, "{other}");
        }
    }
}
