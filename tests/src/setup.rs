//! Finds out which programs and libraries the host lacks, and installs them.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail, ensure};

use crate::{paths, ui};

/// Something that the host must have.
struct Requirement {
    /// Debian's (and Ubuntu's) package.
    package: &'static str,
    /// What it is for.
    purpose: &'static str,
    present: fn(&Machine) -> bool,
}

/// The machine as far as requirements look at it.
struct Machine {
    root: PathBuf,
    superuser: bool,
    /// The user's choice of libclang, as bindgen understands it.
    libclang_path: Option<PathBuf>,
}

const REQUIREMENTS: &[Requirement] = &[
    Requirement {
        package: "qemu-system-x86",
        purpose: "qemu-system-x86_64, which runs the guest",
        present: |machine| machine.program("qemu-system-x86_64"),
    },
    Requirement {
        package: "mmdebstrap",
        purpose: "mmdebstrap, which unpacks the guest's packages",
        present: |machine| machine.program("mmdebstrap"),
    },
    Requirement {
        package: "mount",
        purpose: "mount, which mmdebstrap calls",
        present: |machine| machine.program("mount"),
    },
    Requirement {
        package: "e2fsprogs",
        purpose: "mkfs.ext4, which makes the guest's disks",
        present: |machine| machine.program("mkfs.ext4"),
    },
    Requirement {
        package: "debian-archive-keyring",
        purpose: "the keys that Debian's packages are signed with",
        present: |machine| machine.file("usr/share/keyrings/debian-archive-keyring.gpg"),
    },
    Requirement {
        package: "uidmap",
        purpose: "newuidmap, for making the image without being root",
        present: |machine| machine.superuser || machine.program("newuidmap"),
    },
    Requirement {
        package: "util-linux",
        purpose: "setpriv and taskset, which QEMU is run with",
        present: |machine| machine.program("setpriv"),
    },
    Requirement {
        package: "libclang1",
        purpose: "libclang, which bindgen needs to build a dependency",
        present: Machine::libclang,
    },
    Requirement {
        package: "gcc",
        purpose: "cc, the linker",
        present: |machine| machine.program("cc"),
    },
    Requirement {
        package: "libc6-dev",
        purpose: "libc.a, for the programs that run in the guest",
        present: |machine| {
            machine.file("usr/lib/x86_64-linux-gnu/libc.a") || machine.file("usr/lib64/libc.a")
        },
    },
];

/// What single checks need, which are skipped without it.
const OF_CHECKS: &[Requirement] = &[Requirement {
    package: "valgrind",
    purpose: "valgrind, which checks the use of memory",
    present: |machine| machine.program("valgrind"),
}];

impl Machine {
    fn this() -> Self {
        Self {
            root: PathBuf::from("/"),
            superuser: nix::unistd::geteuid().is_root(),
            libclang_path: std::env::var_os("LIBCLANG_PATH").map(PathBuf::from),
        }
    }

    fn program(&self, name: &str) -> bool {
        paths::program_below(&self.root, name).is_some()
    }

    fn file(&self, path: &str) -> bool {
        self.root.join(path).is_file()
    }

    fn libclang(&self) -> bool {
        if let Some(path) = &self.libclang_path {
            return path.is_file() || holds_libclang(path);
        }
        let mut directories: Vec<PathBuf> =
            ["usr/lib", "usr/lib64", "usr/local/lib", "usr/lib/x86_64-linux-gnu"]
                .iter()
                .map(|directory| self.root.join(directory))
                .collect();
        for entry in fs::read_dir(self.root.join("usr/lib")).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("llvm") {
                directories.push(entry.path().join("lib"));
            }
        }
        directories.iter().any(|directory| holds_libclang(directory))
    }
}

/// `libclang.so`, `libclang-14.so.1`, …, but not `libclang-cpp.so`.
fn holds_libclang(directory: &Path) -> bool {
    fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let versioned = name.strip_prefix("libclang").map(|rest| rest.trim_start_matches('-'));
        versioned.is_some_and(|rest| {
            let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
            rest == "so" || rest.starts_with("so.") || (rest.is_empty() && name.contains(".so"))
        })
    })
}

type Wanted = Vec<&'static Requirement>;

fn missing(machine: &Machine, wanted: impl IntoIterator<Item = &'static Requirement>) -> Wanted {
    wanted.into_iter().filter(|requirement| !(requirement.present)(machine)).collect()
}

/// Sees to it that the host has all that the harness uses: silent if so.
///
/// # Errors
/// When something is missing and cannot be installed; the message says what,
/// and the command to type.
pub fn ensure() -> Result<()> {
    ensure_those(REQUIREMENTS.iter().collect())
}

/// The same for some packages only.
///
/// # Errors
/// As [`ensure()`].
pub fn ensure_only(packages: &[&str]) -> Result<()> {
    let is_needed = |requirement: &&Requirement| packages.contains(&requirement.package);
    ensure_those(REQUIREMENTS.iter().filter(is_needed).collect())
}

/// The same, and what single checks need if it is available; else it says what is missing.
///
/// # Errors
/// As [`ensure()`].
pub fn ensure_with_checks() -> Result<()> {
    let Err(error) = ensure_those(REQUIREMENTS.iter().chain(OF_CHECKS).collect()) else {
        return Ok(());
    };
    // apt installs nothing at all if it does not know one of the packages.
    if ensure().is_err() {
        return Err(error); // it names everything
    }
    ui::note(&format!("not all checks can be made: {error:#}"));
    Ok(())
}

fn ensure_those(wanted: Wanted) -> Result<()> {
    let machine = Machine::this();
    let missing_now = missing(&machine, wanted);
    if missing_now.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing_now.iter().map(|requirement| requirement.package).collect();
    if !machine.program("apt-get") {
        let list: String = missing_now
            .iter()
            .map(|r| format!("\n  {} (Debian package {})", r.purpose, r.package))
            .collect();
        bail!("this machine lacks, and has no apt to install:{list}");
    }
    install(&machine, &packages)?;
    let still = missing(&machine, missing_now);
    let names: Vec<&str> = still.iter().map(|requirement| requirement.purpose).collect();
    ensure!(still.is_empty(), "still missing after the installation: {}", names.join("; "));
    Ok(())
}

fn install(machine: &Machine, packages: &[&str]) -> Result<()> {
    let prefix: &[&str] = if machine.superuser {
        &[]
    } else if machine.program("sudo") && sudo_without_password() {
        &["sudo", "-n"]
    } else if machine.program("sudo") && std::io::stdin().is_terminal() {
        &["sudo"]
    } else {
        bail!("packages are missing; type this, then try again:\n{}", by_hand(machine, packages));
    };
    ui::note(&format!("installing {}", packages.join(", ")));
    for step in apt_commands(packages) {
        let mut argv: Vec<&str> = prefix.to_vec();
        argv.extend(["env", "DEBIAN_FRONTEND=noninteractive"]);
        argv.extend(step.iter().map(String::as_str));
        // In the foreground: sudo may ask for a password, apt shows progress.
        let status = Command::new(argv[0]).args(&argv[1..]).status()?;
        ensure!(status.success(), "{} ended with {status}", step.join(" "));
    }
    Ok(())
}

fn sudo_without_password() -> bool {
    let output = Command::new("sudo").args(["-n", "true"]).output();
    output.is_ok_and(|output| output.status.success())
}

fn apt_commands(packages: &[&str]) -> [Vec<String>; 2] {
    let mut install = vec!["apt-get", "install", "-y", "--no-install-recommends"];
    install.extend(packages);
    [vec!["apt-get".into(), "update".into()], install.into_iter().map(String::from).collect()]
}

fn by_hand(machine: &Machine, packages: &[&str]) -> String {
    let root = if machine.program("sudo") { "sudo sh" } else { "su" };
    let steps = apt_commands(packages).map(|step| step.join(" "));
    format!("  {root} -c '{}'", steps.join(" && "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[&str]) -> (tempfile::TempDir, Machine) {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let path = root.path().to_owned();
        (root, Machine { root: path, superuser: true, libclang_path: None })
    }

    const COMPLETE: &[&str] = &[
        "usr/bin/qemu-system-x86_64",
        "usr/bin/mmdebstrap",
        "usr/sbin/mkfs.ext4",
        "usr/bin/setpriv",
        "usr/bin/cc",
        "usr/share/keyrings/debian-archive-keyring.gpg",
        "usr/lib/llvm-14/lib/libclang.so.1",
        "usr/lib/x86_64-linux-gnu/libc.a",
        "usr/bin/mount",
    ];

    fn packages(machine: &Machine) -> Vec<&'static str> {
        missing(machine, REQUIREMENTS).iter().map(|requirement| requirement.package).collect()
    }

    #[test]
    fn a_bare_machine_lacks_everything() {
        let (_root, machine) = machine(&[]);
        // All but uidmap, which only ordinary users need.
        assert_eq!(packages(&machine).len(), REQUIREMENTS.len() - 1);
    }

    #[test]
    fn a_complete_machine_lacks_nothing() {
        let (_root, mut machine) = machine(COMPLETE);
        assert_eq!(packages(&machine), [""; 0]);
        machine.superuser = false;
        assert_eq!(packages(&machine), ["uidmap"]);
    }

    #[test]
    fn each_missing_file_is_told_by_its_package() {
        for (n, package) in [
            (0, "qemu-system-x86"),
            (1, "mmdebstrap"),
            (2, "e2fsprogs"),
            (3, "util-linux"),
            (4, "gcc"),
            (5, "debian-archive-keyring"),
            (6, "libclang1"),
            (7, "libc6-dev"),
            (8, "mount"),
        ] {
            let mut files = COMPLETE.to_vec();
            files.remove(n);
            let (_root, machine) = machine(&files);
            assert_eq!(packages(&machine), [package]);
        }
    }

    #[test]
    fn the_harness_does_without_what_checks_need() {
        let (_root, complete) = machine(COMPLETE);
        assert_eq!(missing(&complete, OF_CHECKS).len(), OF_CHECKS.len());
        let mut files = COMPLETE.to_vec();
        files.push("usr/bin/valgrind");
        let (_root, complete) = machine(&files);
        assert!(missing(&complete, REQUIREMENTS.iter().chain(OF_CHECKS)).is_empty());
    }

    #[test]
    fn libclang_has_many_names() {
        for (file, counts) in [
            ("usr/lib/llvm-19/lib/libclang.so", true),
            ("usr/lib/llvm-19/lib/libclang-19.so.1", true),
            ("usr/lib/x86_64-linux-gnu/libclang-14.so.14.0.6", true),
            ("usr/lib/x86_64-linux-gnu/libclang-cpp.so.14", false),
            ("usr/lib/llvm-19/lib/libclangAST.a", false),
            ("usr/lib/llvm-19/lib/libclang.a", false),
        ] {
            let (_root, machine) = machine(&[file]);
            assert_eq!(machine.libclang(), counts, "{file}");
        }
        let (root, mut machine) = machine(&["opt/clang/libclang.so"]);
        assert!(!machine.libclang());
        machine.libclang_path = Some(root.path().join("opt/clang"));
        assert!(machine.libclang());
        machine.libclang_path = Some(root.path().join("opt"));
        assert!(!machine.libclang());
    }

    #[test]
    fn one_command_to_type() {
        let steps = "'apt-get update && apt-get install -y --no-install-recommends a b'";
        let (_root, without) = machine(&[]);
        assert_eq!(by_hand(&without, &["a", "b"]), format!("  su -c {steps}"));
        let (_root, with) = machine(&["usr/bin/sudo"]);
        assert_eq!(by_hand(&with, &["a", "b"]), format!("  sudo sh -c {steps}"));
    }
}
