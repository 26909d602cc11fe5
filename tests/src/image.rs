//! Makes and keeps the guest image.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::cleanup;
use crate::config::Kernel;
use crate::mmdebstrap::{self, KEYRING};
use crate::recipe::{self, Privilege, ROOT_FS_KIB, ROOT_FS_OFFSET};
use crate::{paths, ui};

const RECORD: &str = "image.json";
const ROOT: &str = "root.img";
const HEADERS: &str = "headers";
const PACKAGES: &str = "packages";
/// Images kept when a new one has been made.
const KEEP: usize = 2;

/// A finished image.
#[derive(Debug, Clone)]
pub struct Image {
    directory: PathBuf,
    record: Record,
}

/// What is written down beside the image, last of all.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    /// Kernel versions, oldest first.
    kernels: Vec<String>,
}

impl Image {
    /// The directory of the image.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The root disk.
    pub fn root_disk(&self) -> PathBuf {
        self.directory.join(ROOT)
    }

    /// The user-space headers (`linux/`, `asm/`, `asm-generic/`) of the newest
    /// kernel's release line.
    pub fn headers(&self) -> PathBuf {
        self.directory.join(HEADERS)
    }

    /// The release of a kernel, as `uname -r` says it.
    pub fn kernel_release(&self, kernel: Kernel) -> &str {
        let found = match kernel {
            Kernel::Backports => self.record.kernels.last(),
            Kernel::Stable => self.record.kernels.first(),
        };
        found.map_or("", String::as_str)
    }

    /// The version of a package in the image, as dpkg has it.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn package_version(&self, name: &str) -> Result<String> {
        let path = self.directory.join(PACKAGES);
        let list = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let mut packages = list.lines().filter_map(|line| line.split_once(' '));
        let found = packages.find(|(package, _)| *package == name);
        let (_, version) = found.with_context(|| format!("{} names no {name}", path.display()))?;
        Ok(version.to_owned())
    }

    /// The file of a kernel.
    pub fn kernel(&self, kernel: Kernel) -> PathBuf {
        self.directory.join(format!("vmlinuz-{}", self.kernel_release(kernel)))
    }

    fn open(directory: PathBuf) -> Option<Self> {
        let text = fs::read_to_string(directory.join(RECORD)).ok()?;
        let record: Record = serde_json::from_str(&text).ok()?;
        let image = Self { directory, record };
        let complete = !image.record.kernels.is_empty()
            && [Kernel::Backports, Kernel::Stable].iter().all(|k| image.kernel(*k).is_file())
            && image.root_disk().is_file()
            && image.directory.join(PACKAGES).is_file();
        complete.then_some(image)
    }
}

/// The image of the present recipe, if it has been made.
///
/// # Errors
/// When there is no place for it.
pub fn present_image() -> Result<Option<Image>> {
    let image = Image::open(paths::cache()?.join(recipe::hash()));
    if let Some(image) = &image {
        // Used images are kept: the directory's time is that of its last use.
        let directory = File::open(&image.directory);
        let _ = directory.and_then(|d| d.set_modified(std::time::SystemTime::now()));
    }
    Ok(image)
}

/// The image of the present recipe, made if it is not there yet.
///
/// # Errors
/// When it cannot be made; the message says what to do.
pub fn ensure_image() -> Result<Image> {
    if let Some(image) = present_image()? {
        return Ok(image);
    }
    let cache = paths::cache()?;
    let directory = cache.join(recipe::hash());
    fs::create_dir_all(&cache).with_context(|| format!("make {}", cache.display()))?;
    ui::status("waiting for another run that makes the guest image");
    let _lock = cleanup::lock_file(&cache.join("lock"))?;
    ui::clear();
    if let Some(image) = Image::open(directory.clone()) {
        return Ok(image);
    }
    // Whoever holds the lock is the only one to build, so these are dead.
    for entry in fs::read_dir(&cache)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("building-") {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    ui::note("making the guest image (about a minute, once)");
    build(&cache, &directory).context("make the guest image")?;
    prune(&cache, &directory);
    Image::open(directory).context("the guest image was made but is not complete")
}

fn build(cache: &Path, directory: &Path) -> Result<()> {
    let privilege = mmdebstrap::privilege();
    let building = tempfile::Builder::new().prefix("building-").tempdir_in(cache)?;
    // In a user namespace, root is somebody else who cannot look into homes.
    let scratch_parent = match privilege {
        Privilege::Root => building.path().to_owned(),
        Privilege::Unshare => mmdebstrap::unpack_parent(),
    };
    let scratch = tempfile::Builder::new().prefix("ublk-image-").tempdir_in(&scratch_parent)?;
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o777))?;
    // A signal leaves none of their gigabytes.
    for directory in [building.path(), scratch.path()] {
        cleanup::remember_directory(directory);
    }

    let mirror = mmdebstrap::find_mirror(scratch.path())?;
    debootstrap(privilege, &mirror, scratch.path())?;
    ui::step("guest image: keeping it");
    let kernels = collect(scratch.path(), building.path())?;
    let record = serde_json::to_vec_pretty(&Record { kernels })?;
    File::create(building.path().join(RECORD))?.write_all(&record)?;
    drop(scratch);
    if directory.exists() {
        fs::remove_dir_all(directory)?; // incomplete, or it would have been opened
    }
    fs::set_permissions(building.path(), fs::Permissions::from_mode(0o755))?;
    let built = building.keep();
    fs::rename(&built, directory).context("put the image in its place")?;
    cleanup::forget_directory(&built);
    ui::clear();
    Ok(())
}

fn debootstrap(privilege: Privilege, mirror: &str, scratch: &Path) -> Result<()> {
    let customize = write_script(scratch, "customize.sh", recipe::CUSTOMIZE_SH)?;
    let init = write_script(scratch, "init.sh", recipe::INIT_SH)?;
    let root = File::create(scratch.join(ROOT))?;
    root.set_len(ROOT_FS_OFFSET + ROOT_FS_KIB * 1024)?;
    root.set_permissions(fs::Permissions::from_mode(0o666))?;
    std::os::unix::fs::FileExt::write_all_at(&root, &partition_table()?, 0)?;
    let customize = customize.display().to_string();
    let args = recipe::mmdebstrap_args(privilege, mirror, KEYRING, &customize);
    let env = [
        ("OUT", scratch.into()),
        ("INIT", init.into()),
        ("FS_KIB", ROOT_FS_KIB.to_string().into()),
    ];
    mmdebstrap::run("guest image", &args, &env)
}

fn write_script(directory: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = directory.join(name);
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// One partition that holds the root file system. The kernel knows a partition
/// by signature and number, whatever the drive is called.
fn partition_table() -> Result<[u8; 512]> {
    let sectors = |bytes: u64| u32::try_from(bytes / 512);
    let mut sector = [0u8; 512];
    sector[440..444].copy_from_slice(&recipe::DISK_SIGNATURE.to_le_bytes());
    // Flags 0; CHS addresses that mean "see the block addresses"; type Linux.
    sector[446..454].copy_from_slice(&[0, 0xfe, 0xff, 0xff, 0x83, 0xfe, 0xff, 0xff]);
    sector[454..458].copy_from_slice(&sectors(ROOT_FS_OFFSET)?.to_le_bytes());
    sector[458..462].copy_from_slice(&sectors(ROOT_FS_KIB * 1024)?.to_le_bytes());
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    Ok(sector)
}

/// Moves what the build made into the image's directory, as files of the
/// user's own, and returns the kernels' versions.
fn collect(scratch: &Path, target: &Path) -> Result<Vec<String>> {
    let mut kernels = Vec::new();
    for entry in fs::read_dir(scratch)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(version) = name.strip_prefix("vmlinuz-") {
            fs::copy(entry.path(), target.join(&name))?;
            kernels.push(version.to_owned());
        }
    }
    ensure!(kernels.len() == 2, "expected two kernels in the image, found {kernels:?}");
    kernels.sort_by_key(|version| version_key(version));
    run(Command::new("cp")
        .args(["--sparse=always", "--no-preserve=all"])
        .arg(scratch.join(ROOT))
        .arg(target.join(ROOT)))?;
    fs::copy(scratch.join(PACKAGES), target.join(PACKAGES))?;
    let headers = target.join(HEADERS);
    fs::create_dir(&headers)?;
    run(Command::new("tar")
        .args(["--no-same-owner", "-xf"])
        .arg(scratch.join("headers.tar"))
        .arg("-C")
        .arg(&headers))?;
    Ok(kernels)
}

/// The numbers in a version, for sorting.
fn version_key(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(
        output.status.success(),
        "{} ended with {}: {}",
        command.get_program().to_string_lossy(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Removes all but the newest images.
fn prune(cache: &Path, newest: &Path) {
    let mut images: Vec<_> = fs::read_dir(cache)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path != newest && path.join(RECORD).is_file())
        .filter_map(|path| Some((path.metadata().and_then(|m| m.modified()).ok()?, path)))
        .collect();
    images.sort();
    images.reverse();
    for (_, path) in images.into_iter().skip(KEEP - 1) {
        let _ = fs::remove_dir_all(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_by_number() {
        let mut versions = ["7.2.12+deb13-cloud-amd64", "6.12.9+deb13", "6.12.107+deb13"];
        versions.sort_by_key(|version| version_key(version));
        assert_eq!(versions, ["6.12.9+deb13", "6.12.107+deb13", "7.2.12+deb13-cloud-amd64"]);
    }

    #[test]
    fn partition_covers_the_file_system() {
        let table = partition_table().unwrap();
        assert_eq!(&table[440..444], b"klbu");
        assert_eq!(u32::from_le_bytes(table[454..458].try_into().unwrap()), 2048);
        assert_eq!(u32::from_le_bytes(table[458..462].try_into().unwrap()), 8 << 20);
        assert_eq!(&table[510..], [0x55, 0xaa]);
    }

    #[test]
    fn an_image_without_one_of_its_files_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        fs::write(path.join(ROOT), b"x").unwrap();
        fs::write(path.join("vmlinuz-6.1"), b"x").unwrap();
        assert!(Image::open(path.clone()).is_none());
        fs::write(path.join(RECORD), r#"{"kernels":["6.1","7.2"]}"#).unwrap();
        assert!(Image::open(path.clone()).is_none());
        fs::write(path.join("vmlinuz-7.2"), b"x").unwrap();
        assert!(Image::open(path.clone()).is_none());
        fs::write(path.join(PACKAGES), "fio 3.39-1\nfio-doc 1:3.38\n").unwrap();
        let image = Image::open(path.clone()).unwrap();
        assert_eq!(image.package_version("fio").unwrap(), "3.39-1");
        assert!(image.package_version("qemu").is_err());
        assert_eq!(image.kernel(Kernel::Stable), path.join("vmlinuz-6.1"));
        assert_eq!(image.kernel_release(Kernel::Backports), "7.2");
    }

    #[test]
    fn old_images_are_pruned() {
        let cache = tempfile::tempdir().unwrap();
        for (n, name) in ["new", "second", "third", "fourth"].iter().enumerate() {
            let directory = cache.path().join(name);
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join(RECORD), "{}").unwrap();
            let age = std::time::Duration::from_secs(1000 * n as u64);
            let time = std::time::SystemTime::now() - age;
            File::open(&directory).unwrap().set_modified(time).unwrap();
        }
        fs::create_dir(cache.path().join("run")).unwrap();
        prune(cache.path(), &cache.path().join("new"));
        let left = |name: &str| cache.path().join(name).exists();
        assert!(left("new") && left("second") && left("run"));
        assert!(!left("third") && !left("fourth"));
    }
}
