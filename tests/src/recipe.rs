//! What the guest image is made of. Everything that shapes the image is text
//! in this file or in `guest-image/`, and the image's directory is named after
//! the hash of that text: a changed recipe is a new image.

use std::fmt::Write as _;

/// Release the guest is made of.
pub const SUITE: &str = "trixie";

/// Suite the newer kernel comes from.
pub const BACKPORTS: &str = "trixie-backports";

/// Size of the root file system, in KiB; the file is sparse.
pub const ROOT_FS_KIB: u64 = 4 << 20;

/// Where the root file system starts in its disk, in bytes: room for the
/// partition table that gives the root its stable name.
pub const ROOT_FS_OFFSET: u64 = 1 << 20;

/// Signature in the partition table; the kernel finds its root by it.
pub const DISK_SIGNATURE: u32 = 0x7562_6c6b;

/// Runs at the end of mmdebstrap.
pub const CUSTOMIZE_SH: &str = include_str!("../guest-image/customize.sh");

/// The guest's init.
pub const INIT_SH: &str = include_str!("../guest-image/init.sh");

/// Raised when the code around this recipe changes what comes out of it.
const BUILDER_VERSION: u32 = 1;

/// Packages by plain name. No systemd as init, no man pages, no initramfs: the
/// NVMe driver and ext4 are built into both kernels.
const PACKAGES: &[&str] = &[
    "linux-image-cloud-amd64/trixie-backports",
    "linux-libc-dev/trixie-backports",
    // The smallest package that satisfies the kernels' dependency on a maker
    // of initramfs images; its hook is left out below.
    "tiny-initramfs",
    "bpftrace",
    "btrfs-progs",
    "dmsetup",
    "e2fsprogs",
    "fdisk",
    "fio",
    "kmod",
    "nvme-cli",
    "procps",
    "psmisc",
    "strace",
    "udev",
    "util-linux",
    "xfsprogs",
];

/// The release's own kernel. One version of the metapackage can be installed,
/// and that is the newer one; so this asks for the image that the release's
/// metapackage depends on.
const STABLE_KERNEL: &str = "?and(?name(^linux-image-[0-9].*-cloud-amd64$),\
     ?reverse-depends(?and(?exact-name(linux-image-cloud-amd64),?codename(^trixie$))))";

/// Files of packages that are not unpacked.
const EXCLUDED: &[&str] = &[
    "/etc/kernel/postinst.d/*", // they would make initramfs images
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
];

/// How mmdebstrap gets root in the chroot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// It is root.
    Root,
    /// A user namespace.
    Unshare,
}

impl Privilege {
    /// What mmdebstrap calls it.
    pub const fn mode(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Unshare => "unshare",
        }
    }
}

/// Arguments of mmdebstrap: mirror, keyring and the path of the written-out
/// [`CUSTOMIZE_SH`] come from the machine, the rest is the recipe.
pub fn mmdebstrap_args(
    privilege: Privilege,
    mirror: &str,
    keyring: &str,
    customize: &str,
) -> Vec<String> {
    let mut args = vec![
        format!("--mode={}", privilege.mode()),
        "--variant=apt".into(),
        "--architectures=amd64".into(),
        "--format=null".into(),
        format!("--keyring={keyring}"),
        format!("--include={}", PACKAGES.join(",")),
        // A pattern holds commas, so it needs an option of its own.
        format!("--include={STABLE_KERNEL}"),
        // unshare mode cannot use the default for the apt sandbox user
        "--aptopt=APT::Sandbox::User \"root\"".into(),
    ];
    args.extend(EXCLUDED.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    args.push(format!("--customize-hook={customize}"));
    args.push(SUITE.into());
    args.push("-".into());
    args.push(format!("deb {mirror} {SUITE} main"));
    args.push(format!("deb {mirror} {BACKPORTS} main"));
    args
}

/// Hash of all that shapes the image, as the name of its directory. Neither
/// the mirror nor the way to be root is part of it.
pub fn hash() -> String {
    let mut text = String::new();
    let args = mmdebstrap_args(Privilege::Root, "MIRROR", "KEYRING", "CUSTOMIZE");
    let _ = writeln!(text, "{BUILDER_VERSION} {ROOT_FS_KIB} {ROOT_FS_OFFSET} {DISK_SIGNATURE}");
    let _ = writeln!(text, "{}", args.join("\n"));
    let _ = writeln!(text, "{CUSTOMIZE_SH}\0{INIT_SH}");
    hash_of(&text)
}

/// 128 bits of FNV-1a as hexadecimal digits: the same in every release of the
/// compiler, and nobody attacks the name of a cache directory.
pub fn hash_of(text: &str) -> String {
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in text.bytes() {
        hash ^= u128::from(byte);
        hash = hash.wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
    }
    format!("{hash:032x}").split_off(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_is_fnv_1a() {
        // Published vectors of the 128-bit variant, lower half.
        assert_eq!(hash_of(""), "62b821756295c58d");
        assert_eq!(hash_of("a"), "78912b704e4a8964");
        assert_ne!(hash_of("ab"), hash_of("ba"));
    }

    #[test]
    fn hash_names_the_recipe_not_the_machine() {
        assert_eq!(hash(), hash());
        assert_eq!(hash().len(), 16);
        let one = mmdebstrap_args(Privilege::Root, "http://a/", "k", "c");
        let other = mmdebstrap_args(Privilege::Unshare, "http://b/", "k", "c");
        assert_ne!(one, other);
    }

    #[test]
    fn patterns_are_never_joined_with_packages() {
        let args = mmdebstrap_args(Privilege::Root, "m", "k", "c");
        let includes: Vec<_> = args.iter().filter(|a| a.starts_with("--include=")).collect();
        assert_eq!(includes.len(), 2);
        assert!(includes.iter().filter(|i| i.contains('?')).all(|i| i.starts_with("--include=?")));
    }

    #[test]
    fn both_suites_come_from_the_mirror() {
        let args = mmdebstrap_args(Privilege::Root, "http://m/debian", "k", "c");
        assert!(args.ends_with(&[
            "trixie".into(),
            "-".into(),
            "deb http://m/debian trixie main".into(),
            "deb http://m/debian trixie-backports main".into()
        ]));
    }
}
