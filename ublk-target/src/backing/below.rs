//! Finds the ublk devices below a backing: through partitions, device mapper, md, bcache, kernel
//! loop devices, file systems, and other ublk devices.
//!
//! A device also waits for the other devices of a server below it: they share lanes, and may hold
//! the workers of these lanes.
//!
//! The search cannot see what the kernel does not show: drives of another machine that come back to
//! this one over a network, FUSE file systems, ublk devices of other programs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use uring_ext::block::LoopFile;

use crate::backing::Backing;
use crate::backing::usage::swap_paths;
use crate::os::procfs::parse_devt;
use crate::os::procfs::{split_devt, unescape};

/// Major and minor number.
type Number = (u32, u32);

/// The ublk devices that a device may have to wait for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Below {
    /// By id: whether the device is certainly below. A file on a file system of several devices may
    /// be on any of them. A device that only shares a server with one below is not itself below.
    devices: BTreeMap<u32, bool>,
}

/// The recorded facts about the ublk devices of this program.
pub trait Records {
    /// The backings of a device.
    fn backings(&self, id: u32) -> Vec<PathBuf>;
    /// The other devices that its server serves.
    fn beside(&self, id: u32) -> Vec<u32>;
}

impl Below {
    /// Finds the devices below open backings.
    #[must_use]
    pub fn backings(backings: &[Backing], records: &dyn Records) -> Self {
        // A path could lead elsewhere by now.
        let opened =
            |backing: &Backing| PathBuf::from(format!("/proc/self/fd/{}", backing.as_raw_fd()));
        Self::paths(&backings.iter().map(opened).collect::<Vec<_>>(), records)
    }

    /// Finds the devices below files and block devices that are not open.
    #[must_use]
    pub fn paths(paths: &[PathBuf], records: &dyn Records) -> Self {
        Search::new(&System { records }).from(paths)
    }

    #[cfg(test)]
    pub(crate) fn of(ids: &[u32]) -> Self {
        Self { devices: ids.iter().map(|id| (*id, true)).collect() }
    }

    /// One of these devices that must, or may have to, be waited for.
    #[must_use]
    pub fn any_of(&self, ids: &BTreeSet<u32>) -> Option<u32> {
        self.devices.keys().copied().find(|id| ids.contains(id))
    }

    /// The devices that are certainly below.
    pub fn certain(&self) -> impl Iterator<Item = u32> + '_ {
        self.devices.iter().filter(|(_, is_certain)| **is_certain).map(|(id, _)| *id)
    }

    /// Whether this device is certainly below.
    #[must_use]
    pub fn has(&self, id: u32) -> bool {
        self.devices.get(&id).is_some_and(|is_certain| *is_certain)
    }
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Location {
    /// A block device.
    Device(Number),
    /// A file or directory on a file system with this number. On btrfs the number belongs to no
    /// device, but the mount is known.
    File { system: Number, mount: Option<u64> },
}

/// The search's view of the system.
trait Look {
    /// The path of sysfs.
    fn sys(&self) -> &Path;
    fn at(&self, path: &Path) -> Option<Location>;
    /// The file of the loop device with this name.
    fn loop_file(&self, name: &str) -> Option<LoopFile>;
    /// The mounts, as `/proc/PID/mountinfo` shows them.
    fn mountinfo(&self) -> String;
    /// The swap devices and files, as `/proc/swaps` shows them.
    fn swaps(&self) -> String;
    fn records(&self) -> &dyn Records;
}

/// The system that this process runs on.
struct System<'a> {
    records: &'a dyn Records,
}

impl Look for System<'_> {
    fn sys(&self) -> &Path {
        Path::new("/sys")
    }

    fn at(&self, path: &Path) -> Option<Location> {
        // A file of a server that does not answer must not be waited for.
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let mask = StatxFlags::TYPE | StatxFlags::MNT_ID;
        let stat = statx(CWD, path, flags, mask).ok()?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        if kind.is_block_device() {
            return Some(Location::Device((stat.stx_rdev_major, stat.stx_rdev_minor)));
        }
        let has_mount = stat.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        let system = (stat.stx_dev_major, stat.stx_dev_minor);
        let is_stored = kind.is_file() || kind.is_dir();
        is_stored.then(|| Location::File { system, mount: has_mount.then_some(stat.stx_mnt_id) })
    }

    fn loop_file(&self, name: &str) -> Option<LoopFile> {
        let device = File::open(Path::new("/dev").join(name)).ok()?;
        uring_ext::block::loop_file(device.as_fd()).ok()
    }

    fn mountinfo(&self) -> String {
        // A thread may have other mounts than its process.
        let read = |of| fs::read_to_string(format!("/proc/{of}/mountinfo"));
        read("thread-self").or_else(|_| read("self")).unwrap_or_default()
    }

    fn swaps(&self) -> String {
        fs::read_to_string("/proc/swaps").unwrap_or_default()
    }

    fn records(&self) -> &dyn Records {
        self.records
    }
}

/// A mounted file system.
struct Mount {
    id: u64,
    system: Number,
    kind: String,
    source: String,
    /// The mounts of the file system; each may name another device of it.
    options: String,
}

/// A search. It ends: it visits each device once, or twice if the device becomes certain later.
struct Search<'a> {
    look: &'a dyn Look,
    mounts: Rc<[Mount]>,
    seen: BTreeMap<Number, bool>,
    to_do: Vec<(Number, bool)>,
    /// File systems already visited.
    systems: BTreeSet<(Number, Option<u64>, bool)>,
    found: BTreeMap<u32, bool>,
}

impl<'a> Search<'a> {
    fn new(look: &'a dyn Look) -> Self {
        let mounts = look.mountinfo().lines().filter_map(parse_mount).collect();
        let (seen, to_do, found) = (BTreeMap::new(), Vec::new(), BTreeMap::new());
        Self { look, mounts, seen, to_do, systems: BTreeSet::new(), found }
    }

    fn from(mut self, paths: &[PathBuf]) -> Below {
        paths.iter().for_each(|path| self.add_path(path, true));
        while let Some((device, is_certain)) = self.to_do.pop() {
            self.look_below(device, is_certain);
        }
        Below { devices: self.found }
    }

    fn add(&mut self, device: Number, is_certain: bool) {
        let is_known = self.seen.get(&device).is_some_and(|known| *known || !is_certain);
        if !is_known {
            self.seen.insert(device, is_certain);
            self.to_do.push((device, is_certain));
        }
    }

    fn add_path(&mut self, path: &Path, is_certain: bool) {
        match self.look.at(path) {
            Some(Location::Device(device)) => self.add(device, is_certain),
            Some(Location::File { system, mount }) => self.add_system(system, mount, is_certain),
            None => {}
        }
    }

    /// Visits the devices below a block device.
    fn look_below(&mut self, (major, minor): Number, is_certain: bool) {
        let link = self.look.sys().join(format!("dev/block/{major}:{minor}"));
        let Ok(directory) = fs::canonicalize(link) else { return };
        if directory.join("partition").exists() {
            if let Some(disk) = directory.parent().and_then(number_in) {
                self.add(disk, is_certain);
            }
        }
        for slave in entries(&directory.join("slaves")).iter().filter_map(|it| number_in(it)) {
            self.add(slave, is_certain);
        }
        let name = directory.file_name().map(|name| name.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        if let Some(id) = name.strip_prefix("ublkb").and_then(|id| id.parse().ok()) {
            self.look_below_ublk(id, is_certain);
        }
        if directory.join("loop").exists() {
            self.look_below_loop(&name, &directory, is_certain);
        }
        // Where zram writes what nobody uses.
        let second = fs::read_to_string(directory.join("backing_dev")).unwrap_or_default();
        if second.starts_with('/') {
            self.add_path(Path::new(second.trim_end()), is_certain);
        }
    }

    fn look_below_ublk(&mut self, id: u32, is_certain: bool) {
        let look = self.look;
        *self.found.entry(id).or_default() |= is_certain;
        for path in look.records().backings(id) {
            self.add_path(&path, is_certain);
        }
        for other in look.records().beside(id) {
            if self.found.contains_key(&other) {
                continue;
            }
            self.found.insert(other, false);
            for path in look.records().backings(other) {
                self.add_path(&path, false);
            }
        }
    }

    fn look_below_loop(&mut self, name: &str, directory: &Path, is_certain: bool) {
        let Some(file) = self.look.loop_file(name) else { return };
        if file.rdevice != 0 {
            return self.add(split_devt(file.rdevice), is_certain);
        }
        let system = split_devt(file.device);
        // Its name may be that of something else by now.
        let path = fs::read_to_string(directory.join("loop/backing_file")).unwrap_or_default();
        match self.look.at(Path::new(path.trim_end())) {
            Some(Location::File { system: of_path, mount }) if of_path == system => {
                self.add_system(system, mount, is_certain);
            }
            _ => self.add_system(system, None, is_certain),
        }
    }

    /// Visits the devices of a file system.
    fn add_system(&mut self, system: Number, mount: Option<u64>, is_certain: bool) {
        if !self.systems.insert((system, mount, is_certain)) {
            return;
        }
        let has_device = system.0 != 0;
        if has_device {
            self.add(system, is_certain);
        }
        let mounts = Rc::clone(&self.mounts);
        let is_it = |it: &&Mount| it.system == system || mount == Some(it.id);
        let is_known = mounts.iter().any(|mount| is_it(&mount)) || has_device;
        for mount in mounts.iter().filter(is_it) {
            self.add_mounted(mount, is_certain);
        }
        // Else any that is on devices in such a way.
        for mount in mounts.iter().filter(|mount| !is_known && mount.system.0 == 0) {
            self.add_mounted(mount, false);
        }
    }

    /// Visits the device that a mount names.
    fn add_mounted(&mut self, mount: &Mount, is_certain: bool) {
        if mount.source.starts_with('/') {
            // Some have several.
            for source in mount.source.split(':') {
                if let Some(Location::Device(device)) = self.look.at(Path::new(source)) {
                    self.add(device, is_certain);
                    if mount.kind == "btrfs" {
                        self.add_btrfs_with(device, is_certain);
                    }
                }
            }
        }
        if mount.kind == "tmpfs" {
            let swaps = self.look.swaps();
            swap_paths(&swaps).for_each(|path| self.add_path(Path::new(path), false));
        }
        // Devices of journals, directories of an overlay.
        for (_, value) in mount.options.split(',').filter_map(|option| option.split_once('=')) {
            for path in value.split(':').filter(|path| path.starts_with('/')) {
                self.add_path(Path::new(&unescape(path)), is_certain);
            }
        }
    }

    /// All devices of the btrfs with this device: its mounts name only one of them.
    fn add_btrfs_with(&mut self, device: Number, is_certain: bool) {
        for system in entries(&self.look.sys().join("fs/btrfs")) {
            let devices: Vec<_> =
                entries(&system.join("devices")).iter().filter_map(|it| number_in(it)).collect();
            if devices.contains(&device) {
                devices.into_iter().for_each(|device| self.add(device, is_certain));
            }
        }
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// The number of a block device by its folder in sysfs.
fn number_in(directory: &Path) -> Option<Number> {
    parse_devt(&fs::read_to_string(directory.join("dev")).ok()?)
}

fn parse_mount(line: &str) -> Option<Mount> {
    let mut fields = line.split(' ');
    let id = fields.next()?.parse().ok()?;
    let system = parse_devt(fields.nth(1)?)?;
    // Places, any number of options and tags; then type, source and options.
    let mut rest = fields.skip_while(|field| *field != "-").skip(1);
    let kind = rest.next()?.to_owned();
    let source = unescape(rest.next()?);
    Some(Mount { id, system, kind, source, options: rest.next().unwrap_or_default().to_owned() })
}

#[cfg(test)]
mod tests;
