use std::fs::OpenOptions;
use std::ops::ControlFlow;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::*;
use crate::os::wait::Wait;

fn record(role: Role) -> RoleRecord {
    RoleRecord { role, device: Some(3), supervisor: Some(77), nonce: Some(Nonce::own()) }
}

fn directory_in(run: &Path) -> PathBuf {
    run.join(DIRECTORY)
}

fn path_of(held: &RoleFile) -> PathBuf {
    directory_in(&held.run).join(&held.name)
}

/// An unlocked file.
fn leave(path: &Path, text: &[u8]) {
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    file.unwrap().write_all(text).unwrap();
}

fn count(run: &Path) -> usize {
    fs::read_dir(directory_in(run)).map_or(0, Iterator::count)
}

#[test]
fn a_process_is_what_it_says_for_as_long_as_it_says_so() {
    let run = tempfile::tempdir().unwrap();
    let run = run.path();
    let own = std::process::id();
    assert_eq!(RoleFiles::read(run).of(own), None);
    let held = RoleFile::hold(run, record(Role::Server)).unwrap();
    assert_eq!(RoleFiles::read(run).of(own), Some(record(Role::Server)));
    // Neither its parent, nor a process that does not exist.
    assert_eq!(RoleFiles::read(run).of(std::os::unix::process::parent_id()), None);
    assert_eq!(RoleFiles::read(run).of(u32::MAX), None);
    drop(held);
    assert_eq!(RoleFiles::read(run).of(own), None);
    assert!(!directory_in(run).exists(), "nothing is left");
}

/// A process was killed between the directory and its file.
#[test]
fn an_empty_directory_is_removed_by_the_next_reader() {
    let run = tempfile::tempdir().unwrap();
    drop(Files::make(run.path()).unwrap());
    assert!(run.path().join(DIRECTORY).exists());
    assert_eq!(RoleFiles::read(run.path()).0.len(), 0);
    assert!(!run.path().join(DIRECTORY).exists());
}

/// Each has one change.
#[test]
fn a_file_is_of_one_process() {
    let own = Identity::of("self").unwrap();
    assert_eq!(Identity::of(&std::process::id().to_string()), Some(own));
    assert_eq!(own.pid, std::process::id());
    let others = [
        Identity { pid: own.pid + 1, ..own },
        Identity { started_ms: own.started_ms + 10, ..own },
        Identity { pid_namespace: Some(1), ..own },
    ];
    for of in others {
        let files = RoleFiles(vec![Content { record: record(Role::Server), of }]);
        assert_eq!(files.of(own.pid), None, "{of:?}");
    }
    let files = RoleFiles(vec![Content { record: record(Role::Fleet), of: own }]);
    assert_eq!(files.of(own.pid), Some(record(Role::Fleet)));
}

#[test]
fn what_a_dead_process_has_left_is_removed() {
    let run = tempfile::tempdir().unwrap();
    let run = run.path();
    let held = RoleFile::hold(run, record(Role::Server)).unwrap();
    let whole = fs::read(path_of(&held)).unwrap();
    for (number, text) in [&whole[..], &whole[..9], b""].into_iter().enumerate() {
        leave(&directory_in(run).join(format!("{number:016x}.json")), text);
    }
    assert_eq!(count(run), 4);
    let files = RoleFiles::read(run);
    assert_eq!(files.0.len(), 1, "{files:?}");
    assert_eq!(count(run), 1);
    drop(held);
}

#[test]
fn only_files_of_root_alone_are_believed_or_removed() {
    let run = tempfile::tempdir().unwrap();
    let run = run.path();
    let held = RoleFile::hold(run, record(Role::Server)).unwrap();
    let own = std::process::id();
    let path = path_of(&held);
    let at = |number: u64| directory_in(run).join(format!("{number:016x}.json"));
    symlink(&path, at(0)).unwrap();
    nix::unistd::mkfifo(&at(1), nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Files of other programs.
    for name in ["notes", "0.json", "00000000000000zz.json", "0123456789abcdef.conf"] {
        leave(&directory_in(run).join(name), b"");
    }
    assert_eq!(RoleFiles::read(run).0.len(), 1);
    assert_eq!(count(run), 7);
    // Others could have written it, or locked it.
    for mode in [0o644, 0o620, 0o666] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(RoleFiles::read(run).of(own), None, "{mode:o}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(&path, at(2)).unwrap();
    assert_eq!(RoleFiles::read(run).of(own), None, "it has another name");
}

/// Other users may have made a hard link while they could write to the directory.
#[test]
fn what_a_dead_process_has_left_is_removed_under_all_names() {
    let run = tempfile::tempdir().unwrap();
    let run = run.path();
    drop(Files::make(run).unwrap());
    let at = |number: u64| directory_in(run).join(format!("{number:016x}.json"));
    leave(&at(0), b"");
    fs::hard_link(at(0), at(1)).unwrap();
    fs::hard_link(at(0), run.join("aside")).unwrap();
    sweep(run);
    assert!(!directory_in(run).exists());
    assert!(run.join("aside").exists());
}

/// The target of the link belongs to another user, whatever names it has.
#[test]
fn a_link_in_the_place_of_the_directory_is_not_followed() {
    let top = tempfile::tempdir().unwrap();
    let run = top.path().join("run");
    let elsewhere = top.path().join("elsewhere");
    fs::create_dir(&run).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    let victim = elsewhere.join("0123456789abcdef.json");
    leave(&victim, b"theirs");
    symlink(&elsewhere, directory_in(&run)).unwrap();
    sweep(&run);
    assert!(victim.exists());
    // A process that writes a file removes the link.
    let held = RoleFile::hold(&run, record(Role::Server)).unwrap();
    assert!(victim.exists());
    assert!(fs::symlink_metadata(directory_in(&run)).unwrap().is_dir());
    assert_eq!(RoleFiles::read(&run).of(std::process::id()), Some(record(Role::Server)));
    drop(held);
    // A link that is there at the end is not followed.
    let held = RoleFile::hold(&run, record(Role::Server)).unwrap();
    let theirs = elsewhere.join(&held.name);
    leave(&theirs, b"theirs");
    fs::rename(directory_in(&run), top.path().join("moved")).unwrap();
    symlink(&elsewhere, directory_in(&run)).unwrap();
    drop(held);
    assert!(theirs.exists());
    // A link to the directory of the state files is not followed.
    let link = top.path().join("link");
    symlink(&run, &link).unwrap();
    assert!(RoleFile::hold(&link, record(Role::Server)).is_none());
}

#[test]
fn only_root_can_look_into_the_directory() {
    let run = tempfile::tempdir().unwrap();
    let run = run.path();
    let _held = RoleFile::hold(run, record(Role::Server)).unwrap();
    let mode = || fs::metadata(directory_in(run)).unwrap().mode() & 0o7777;
    assert_eq!(mode(), 0o700);
    // Files that others could write are ignored until the directory is closed to them.
    fs::set_permissions(directory_in(run), fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(RoleFiles::read(run).of(std::process::id()), None);
    let _other = RoleFile::hold(run, record(Role::Fleet)).unwrap();
    assert_eq!(mode(), 0o700);
    assert!(RoleFiles::read(run).of(std::process::id()).is_some());
}

#[test]
fn a_file_is_locked_until_it_is_removed() {
    let run = tempfile::tempdir().unwrap();
    let files = Files::make(run.path()).unwrap();
    let new = files.directory.create("0123456789abcdef.json").unwrap();
    let found = files.look_at("0123456789abcdef.json").unwrap();
    let is_taken = |new: &File| {
        let locked = lock(new.try_clone().unwrap());
        locked.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    assert!(is_taken(&new), "its process has it while it is about to be removed");
    files.remove("0123456789abcdef.json");
    drop(found);
    assert!(is_taken(&new), "its process has a file without a name");
}

#[test]
fn a_file_that_cannot_be_written_is_done_without() {
    let top = tempfile::tempdir().unwrap();
    let run = top.path().join("run");
    fs::write(&run, "").unwrap();
    assert!(RoleFile::hold(&run, record(Role::Helper)).is_none());
    assert_eq!(RoleFiles::read(&run).of(std::process::id()), None);
}

/// Neither a program that this process starts nor the program that it becomes has the lock.
#[test]
fn the_lock_is_not_inherited() {
    let run = tempfile::tempdir().unwrap();
    let held = RoleFile::hold(run.path(), record(Role::Server)).unwrap();
    let path = path_of(&held);
    let mut child = Command::new("sh")
        .args(["-c", "echo; read it"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The process is the other program now.
    io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let aside = run.path().join("aside");
    fs::rename(&path, &aside).unwrap();
    let is_locked = || {
        let file = File::open(&aside).unwrap();
        Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
    };
    assert!(is_locked());
    drop(held);
    // Another test may be starting a program at this moment.
    let freed =
        Wait::at_most(Duration::from_secs(60)).every(Duration::from_millis(1)).until(|| {
            if is_locked() { ControlFlow::Continue("the lock") } else { ControlFlow::Break(()) }
        });
    assert_eq!(freed, Ok(()), "the child has it");
    drop(child.stdin.take());
    child.wait().unwrap();
}

/// Removing stale files does not remove a file that is being made.
#[test]
fn those_who_begin_and_those_who_sweep_do_not_hinder_each_other() {
    let run = tempfile::tempdir().unwrap();
    let run = run.path();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let sweeper = scope.spawn(|| {
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                sweep(run);
            }
        });
        for _ in 0..200 {
            let held = RoleFile::try_hold(run, record(Role::Server)).unwrap();
            assert_eq!(fs::metadata(path_of(&held)).unwrap().nlink(), 1);
            let read = RoleFiles::read(run);
            assert_eq!(read.of(std::process::id()), Some(record(Role::Server)));
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        sweeper.join().unwrap();
    });
    assert!(!directory_in(run).exists());
}
