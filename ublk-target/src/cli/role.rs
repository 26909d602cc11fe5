//! The role of this process, in its role file ([`role_file`](ublk_target::device::role_file)).

use std::path::Path;

use ublk_target::device::paths::RUN_DIR;
use ublk_target::device::role_file::{self, RoleFile, RoleRecord};

use super::device::{Life, Role};

/// Writes the role file of a process of one command. It exists while the returned value does.
pub fn say(role: Role, device: Option<u32>, life: &Life) -> Option<RoleFile> {
    let role = match role {
        Role::Server => role_file::Role::Server,
        Role::Supervisor => role_file::Role::Supervisor,
    };
    let Life { supervisor, nonce, .. } = *life;
    RoleFile::hold(Path::new(RUN_DIR), RoleRecord { role, device, supervisor, nonce })
}

/// As [`say`], for a process of another kind.
pub fn say_of_device(role: role_file::Role, device: Option<u32>) -> Option<RoleFile> {
    let record = RoleRecord { role, device, supervisor: None, nonce: None };
    RoleFile::hold(Path::new(RUN_DIR), record)
}
