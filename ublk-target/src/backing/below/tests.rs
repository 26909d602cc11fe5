//! On a made-up sysfs.

use std::os::unix::fs::symlink;

use super::*;
use crate::backing::Opening;

/// A system with these block devices, files and mounts.
#[derive(Default)]
struct Made {
    sys: Option<tempfile::TempDir>,
    places: BTreeMap<PathBuf, Location>,
    loops: BTreeMap<String, LoopFile>,
    mountinfo: String,
    swaps: String,
    records: BTreeMap<u32, Vec<PathBuf>>,
    /// The server of each, if it has others.
    servers: BTreeMap<u32, u32>,
}

impl Records for Made {
    fn backings(&self, id: u32) -> Vec<PathBuf> {
        self.records.get(&id).cloned().unwrap_or_default()
    }

    fn beside(&self, id: u32) -> Vec<u32> {
        let Some(server) = self.servers.get(&id) else { return Vec::new() };
        let others = self.servers.iter().filter(|(other, it)| **other != id && *it == server);
        others.map(|(other, _)| *other).collect()
    }
}

impl Look for Made {
    fn sys(&self) -> &Path {
        self.sys.as_ref().unwrap().path()
    }

    fn at(&self, path: &Path) -> Option<Location> {
        self.places.get(path).copied()
    }

    fn loop_file(&self, name: &str) -> Option<LoopFile> {
        self.loops.get(name).copied()
    }

    fn mountinfo(&self) -> String {
        self.mountinfo.clone()
    }

    fn swaps(&self) -> String {
        self.swaps.clone()
    }

    fn records(&self) -> &dyn Records {
        self
    }
}

const UBLK: u32 = 240;

impl Made {
    fn new() -> Self {
        let made = Self { sys: Some(tempfile::tempdir().unwrap()), ..Self::default() };
        fs::create_dir_all(made.sys().join("dev/block")).unwrap();
        made
    }

    /// A block device; `path` is its folder below `block`.
    fn device(&mut self, path: &str, number: Number) {
        let directory = self.sys().join("block").join(path);
        fs::create_dir_all(directory.join("slaves")).unwrap();
        let text = format!("{}:{}", number.0, number.1);
        fs::write(directory.join("dev"), format!("{text}\n")).unwrap();
        symlink(&directory, self.sys().join("dev/block").join(text)).unwrap();
        let node = Path::new("/dev").join(directory.file_name().unwrap());
        self.places.insert(node, Location::Device(number));
    }

    fn ublk(&mut self, id: u32, backings: &[&str]) {
        self.device(&format!("ublkb{id}"), (UBLK, id));
        self.records.insert(id, backings.iter().map(PathBuf::from).collect());
    }

    fn on(&self, above: &str, below: &str) {
        let block = self.sys().join("block");
        let slave = block.join(above).join("slaves").join(below.replace('/', "-"));
        symlink(block.join(below), slave).unwrap();
    }

    fn partition(&mut self, disk: &str, name: &str, number: Number) {
        self.device(&format!("{disk}/{name}"), number);
        fs::write(self.sys().join("block").join(disk).join(name).join("partition"), "1\n").unwrap();
    }

    fn file(&mut self, path: &str, system: Number, mount: Option<u64>) {
        self.places.insert(path.into(), Location::File { system, mount });
    }

    fn kernel_loop(&mut self, name: &str, number: Number, file: LoopFile, path: &str) {
        self.device(name, number);
        let attributes = self.sys().join("block").join(name).join("loop");
        fs::create_dir_all(&attributes).unwrap();
        fs::write(attributes.join("backing_file"), format!("{path}\n")).unwrap();
        self.loops.insert(name.to_owned(), file);
    }

    fn below(&self, path: &str) -> Vec<(u32, bool)> {
        Search::new(self).from(&[path.into()]).devices.into_iter().collect()
    }
}

#[test]
fn through_partitions_dm_and_md() {
    let mut made = Made::new();
    made.device("nvme0n1", (259, 0));
    made.ublk(0, &["/dev/nvme0n1"]);
    made.ublk(1, &[]);
    made.partition("ublkb0", "ublkb0p1", (259, 7));
    made.partition("ublkb0", "ublkb0p2", (259, 8));
    made.device("dm-0", (252, 0));
    made.device("md1", (9, 1));
    made.partition("md1", "md1p1", (259, 9));
    made.on("dm-0", "ublkb0/ublkb0p1");
    made.on("md1", "dm-0");
    made.on("md1", "ublkb1");
    assert_eq!(made.below("/dev/nvme0n1"), []);
    assert_eq!(made.below("/dev/ublkb0p2"), [(0, true)]);
    assert_eq!(made.below("/dev/dm-0"), [(0, true)]);
    assert_eq!(made.below("/dev/md1p1"), [(0, true), (1, true)]);
    assert_eq!(made.below("/dev/missing"), []);
}

#[test]
fn through_other_ublk_devices() {
    let mut made = Made::new();
    made.device("nvme0n1", (259, 0));
    made.ublk(0, &["/dev/nvme0n1"]);
    made.ublk(5, &["/dev/ublkb0", "/dev/nvme0n1"]);
    made.ublk(6, &["/dev/ublkb5"]);
    assert_eq!(made.below("/dev/ublkb6"), [(0, true), (5, true), (6, true)]);
    // Round in a circle, which tables of device mapper can be made to go.
    made.device("dm-0", (252, 0));
    made.on("dm-0", "ublkb6");
    made.records.insert(0, vec!["/dev/dm-0".into()]);
    assert_eq!(made.below("/dev/dm-0"), [(0, true), (5, true), (6, true)]);
}

#[test]
fn through_loop_devices_and_zram() {
    let mut made = Made::new();
    made.ublk(0, &[]);
    made.ublk(1, &[]);
    let number = |minor: u64| u64::from(UBLK) << 8 | minor;
    let block = LoopFile { device: 5, inode: 3, rdevice: number(0) };
    made.kernel_loop("loop0", (7, 0), block, "/dev/ublkb0");
    let regular = LoopFile { device: number(1), inode: 12, rdevice: 0 };
    made.kernel_loop("loop1", (7, 1), regular, "/mnt/image (deleted)");
    made.device("zram0", (254, 0));
    fs::write(made.sys().join("block/zram0/backing_dev"), "/dev/loop1\n").unwrap();
    made.device("zram1", (254, 1));
    fs::write(made.sys().join("block/zram1/backing_dev"), "none\n").unwrap();
    assert_eq!(made.below("/dev/loop0"), [(0, true)]);
    assert_eq!(made.below("/dev/loop1"), [(1, true)]);
    assert_eq!(made.below("/dev/zram0"), [(1, true)]);
    assert_eq!(made.below("/dev/zram1"), []);
}

#[test]
fn through_file_systems() {
    let mut made = Made::new();
    (0..4).for_each(|id| made.ublk(id, &[]));
    made.mountinfo = "22 1 240:0 / /mnt rw,relatime shared:1 - ext4 /dev/ublkb0 rw\n\
                      30 22 9:9 / /x rw - xfs /dev/x rw,attr2,logdev=/dev/ublkb1,noquota\n\
                      31 22 0:40 / /over rw - overlay overlay rw,lowerdir=/a:/mnt/b,upperdir=/c\n\
                      32 22 0:50 / /tmp rw - tmpfs tmpfs rw,size=1G\n\
                      33 22 0:51 / /nfs rw - nfs4 host:/mnt/b rw,addr=10.0.0.1\n"
        .to_owned();
    made.swaps = "Filename Type Size Used Priority\n/dev/ublkb3 partition 1 0 -2\n".to_owned();
    made.file("/mnt/image", (UBLK, 0), Some(22));
    made.file("/mnt/b", (UBLK, 0), Some(22));
    made.file("/c", (UBLK, 2), Some(99));
    made.file("/x/image", (9, 9), Some(30));
    made.file("/over/image", (0, 40), Some(31));
    made.file("/tmp/image", (0, 50), Some(32));
    made.file("/nfs/image", (0, 51), Some(33));
    // In a mount namespace that is gone.
    made.file("/gone", (UBLK, 3), Some(98));
    assert_eq!(made.below("/mnt/image"), [(0, true)]);
    assert_eq!(made.below("/x/image"), [(1, true)]);
    assert_eq!(made.below("/over/image"), [(0, true), (2, true)]);
    assert_eq!(made.below("/tmp/image"), [(3, false)]);
    assert_eq!(made.below("/nfs/image"), []);
    assert_eq!(made.below("/gone"), [(3, true)]);
}

/// A file on btrfs has a device number of its subvolume's, which no mount shows.
#[test]
fn through_btrfs() {
    let mut made = Made::new();
    (0..4).for_each(|id| made.ublk(id, &[]));
    made.mountinfo = "40 1 0:60 / /one rw - btrfs /dev/ublkb0 rw,space_cache=v2\n\
                      41 1 0:61 / /two rw - btrfs /dev/ublkb2 rw\n"
        .to_owned();
    for (system, device) in [("1111", "ublkb0"), ("1111", "ublkb1"), ("2222", "ublkb2")] {
        let devices = made.sys().join("fs/btrfs").join(system).join("devices");
        fs::create_dir_all(&devices).unwrap();
        symlink(made.sys().join("block").join(device), devices.join(device)).unwrap();
    }
    made.file("/one/image", (0, 77), Some(40));
    made.file("/lost", (0, 78), Some(99));
    assert_eq!(made.below("/one/image"), [(0, true), (1, true)]);
    assert_eq!(made.below("/lost"), [(0, false), (1, false), (2, false)]);
    let file = LoopFile { device: 77, inode: 5, rdevice: 0 };
    made.kernel_loop("loop3", (7, 3), file, "/one/image");
    assert_eq!(made.below("/dev/loop3"), [(0, true), (1, true)]);
    // What is certain stays so, whatever else may be.
    let both = Search::new(&made).from(&["/lost".into(), "/one/image".into()]);
    assert!(both.has(0) && both.has(1) && !both.has(2) && !both.has(3));
    assert_eq!(both.devices.into_keys().collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn on_the_system_that_runs() {
    let directory = tempfile::tempdir_in(".").unwrap();
    let path = directory.path().join("disk");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let backings = [Backing::open(&path, Opening::ALONE).unwrap(), Backing::zero().unwrap()];
    assert_eq!(Below::backings(&backings, &Made::default()), Below::default());
    let made = Made::default();
    let system = System { records: &made };
    let Some(Location::File { mount, .. }) = system.at(&path) else { panic!("no file") };
    let mounts = system.mountinfo();
    let own = mounts.lines().filter_map(parse_mount).any(|it| Some(it.id) == mount);
    assert!(own, "{mount:?} is none of {mounts}");
}

/// A device whose server is the same as that of one below may hold what that one needs; so may what it
/// stands on.
#[test]
fn through_servers_of_several_devices() {
    let mut made = Made::new();
    made.device("nvme0n1", (259, 0));
    for (id, backing) in
        [(0, "/dev/nvme0n1"), (1, "/dev/ublkb0"), (2, "/dev/nvme0n1"), (3, "/dev/ublkb2")]
    {
        made.ublk(id, &[backing]);
    }
    assert_eq!(made.below("/dev/ublkb2"), [(2, true)]);
    made.servers = BTreeMap::from([(0, 70), (1, 71), (2, 71)]);
    assert_eq!(made.below("/dev/ublkb2"), [(0, false), (1, false), (2, true)]);
    assert_eq!(made.below("/dev/ublkb1"), [(0, true), (1, true), (2, false)]);
    assert_eq!(made.below("/dev/ublkb0"), [(0, true)]);
    let below = Search::new(&made).from(&["/dev/ublkb3".into()]);
    assert_eq!(below.any_of(&BTreeSet::from([0, 5])), Some(0));
    assert_eq!(below.any_of(&BTreeSet::from([5])), None);
    assert!(below.has(2) && !below.has(0), "it stands on that one, and not on the other");
}
