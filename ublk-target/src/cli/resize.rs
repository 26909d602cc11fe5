//! `resize`.

use std::fmt::Display;
use std::fs::File;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use ublk_engine::units::Bytes;
use ublk_target::control::deletion::users;
use ublk_target::device::description::{self, Description};
use ublk_target::os::kernel;
use ublk_target::os::steps::step;
use ublk_target::os::wait::Wait;
use ublk_target::socket::client::Client;
use uring_ext::control::Control;
use uring_ext::feature::UPDATE_SIZE;

use super::Resize;
use super::terminal::{print_line, say};

/// The longest wait for another command that resizes a device.
const PATIENCE: Duration = Duration::from_secs(30);

/// Locks out other `resize` commands. The checked sizes and users must stay valid until the driver
/// knows the new size; otherwise a device could shrink unintentionally. The node belongs to root,
/// and nothing else locks it.
fn keep_others_out() -> anyhow::Result<Flock<File>> {
    let tell = |what: &dyn Display, _| say!("waiting for {what} …");
    let mut wait = Wait::at_most(PATIENCE).every(Duration::from_millis(5));
    wait = wait.reporting_once(Duration::ZERO, tell);
    let mut node = Some(Control::open_node()?);
    let locked = wait.until(|| {
        let file = match node.take().map(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock))
        {
            Some(Err((file, Errno::EWOULDBLOCK))) => file,
            Some(Ok(locked)) => return ControlFlow::Break(Ok(locked)),
            Some(Err((_, errno))) => return ControlFlow::Break(Err(errno)),
            None => return ControlFlow::Break(Err(Errno::EBADF)),
        };
        node = Some(file);
        ControlFlow::Continue("another command that resizes a device")
    });
    match locked {
        Ok(Ok(locked)) => Ok(locked),
        Ok(Err(errno)) => anyhow::bail!("cannot lock the driver's control node: {errno}"),
        Err(_) => {
            anyhow::bail!("another `ublk-target resize` has not ended for {} s", PATIENCE.as_secs())
        }
    }
}

/// Changes the size of a live device. The server only prepares for it. This process tells the
/// kernel the new size, so that the server never waits for its own device.
pub fn resize(args: &Resize) -> anyhow::Result<ExitCode> {
    let (id, control) = (args.which.id(), Control::open()?);
    let _alone = keep_others_out()?;
    let described = Description::of(&control, id);
    if described.as_ref().is_err_and(description::is_missing) {
        anyhow::bail!("there is no ublk device {id}");
    }
    let described = described?;
    if !kernel::features(&control)?.has(UPDATE_SIZE) {
        anyhow::bail!(
            "resizing needs the ublk feature UPDATE_SIZE (Linux {} or newer), which this kernel ({}) \
             lacks; delete the device and add it again",
            UPDATE_SIZE.since,
            kernel::release().unwrap_or_default()
        );
    }
    if described.state != "LIVE" {
        anyhow::bail!("device {id} is {}; only a live device can be resized", described.state);
    }
    if args.size.is_some_and(|size| size.0 == 0 || size.0 % 512 != 0) {
        anyhow::bail!("the size must be a multiple of 512 bytes, and not 0");
    }
    let longest = Bytes(Client::connect(id)?.grow(args.size.map(|size| size.0))?);
    let (new, old) = (args.size.unwrap_or(longest), Bytes(described.size_bytes));
    if new > longest {
        anyhow::bail!(
            "the backings of device {id} hold {longest}, less than {new}; enlarge them first"
        );
    }
    if new < old {
        if !args.shrink {
            anyhow::bail!(
                "{new} is less than the present size {old} of {}: the data beyond would be lost; \
                 use --shrink to allow this",
                described.device.display()
            );
        }
        let users = users(id);
        if !users.is_empty() {
            anyhow::bail!(
                "{} is in use: {}; stop that use before you shrink it",
                described.device.display(),
                users.join(", ")
            );
        }
    }
    step("resize-checked");
    if new != old {
        control.update_size(id, new.sectors().0)?;
    }
    print_line(format_args!("{}: {new} (was {old})", described.device.display()))?;
    Ok(ExitCode::SUCCESS)
}
