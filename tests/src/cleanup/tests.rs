use std::process::Stdio;

use super::*;

#[test]
fn dropped_group_takes_descendants_with_it() {
    let mut shell = command("sh", Signal::SIGKILL);
    shell.args(["-c", "sleep 1000 & echo $!; wait"]).stdout(Stdio::piped());
    let mut group = Group::spawn(&mut shell, Signal::SIGKILL).unwrap();
    let mut line = String::new();
    let stdout = group.child().stdout.take().unwrap();
    io::BufRead::read_line(&mut io::BufReader::new(stdout), &mut line).unwrap();
    let sleeper = PathBuf::from(format!("/proc/{}/stat", line.trim()));
    assert!(sleeper.exists());
    drop(group);
    let gone = |stat: io::Result<String>| stat.map_or(true, |stat| stat.contains(") Z "));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !gone(fs::read_to_string(&sleeper)) {
        assert!(Instant::now() < deadline, "still there");
        std::thread::yield_now();
    }
}

#[test]
fn exit_status_comes_through_the_wrapper() {
    let mut shell = command("sh", Signal::SIGTERM);
    shell.args(["-c", "exit 7"]);
    let mut group = Group::spawn(&mut shell, Signal::SIGTERM).unwrap();
    assert_eq!(group.wait().unwrap().code(), Some(7));
    assert_eq!(group.try_wait().unwrap().unwrap().code(), Some(7));
}

#[test]
fn dead_run_directories_are_swept_and_live_ones_kept() {
    let parent = tempfile::tempdir().unwrap();
    let alive = RunDir::create(parent.path()).unwrap();
    let dead = parent.path().join("run-dead");
    fs::create_dir(&dead).unwrap();
    let second = RunDir::create(parent.path()).unwrap();
    assert!(!dead.exists());
    assert!(alive.path().exists() && second.path().exists());
    let gone = second.path().to_owned();
    drop(second);
    assert!(!gone.exists());
}

#[test]
fn the_program_ends_though_nobody_reads_its_last_word() {
    const CHILD: &str = "UBLK_VM_TEST_ENDS";
    if std::env::var_os(CHILD).is_some() {
        fail(&anyhow::anyhow!("nobody hears this"));
    }
    let (reader, writer) = nix::unistd::pipe().unwrap();
    drop(reader);
    let test = "the_program_ends_though_nobody_reads_its_last_word";
    let status = again(test, CHILD, Path::new("/")).stderr(writer).status();
    assert_eq!(status.unwrap().code(), Some(1));
}

/// A program that runs one test again, for what ends the program that it is in. It finds `value` in
/// the variable `name`.
fn again(test: &str, name: &str, value: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("cleanup::tests::{test}"), "--nocapture"]);
    command.env(name, value).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn a_signal_ends_children_in_order() {
    const CHILD: &str = "UBLK_VM_TEST_SIGNAL";
    if let Some(directory) = std::env::var_os(CHILD) {
        handle_signals().unwrap();
        let script =
            "trap 'echo > \"$0/ended\"; exit' TERM; echo > \"$0/ready\"; sleep 1000 & wait";
        let mut shell = command("sh", Signal::SIGTERM);
        shell.args(["-c", script]).arg(directory);
        let status = Group::spawn(&mut shell, Signal::SIGTERM).unwrap().wait();
        panic!("the shell ended before its time: {status:?}");
    }
    let scratch = tempfile::tempdir().unwrap();
    let mut child =
        again("a_signal_ends_children_in_order", CHILD, scratch.path()).spawn().unwrap();
    while !scratch.path().join("ready").exists() {
        assert_eq!(child.try_wait().unwrap(), None);
        std::thread::yield_now();
    }
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + Signal::SIGTERM as i32));
    assert!(scratch.path().join("ended").exists(), "the shell was killed before it could clean up");
}
