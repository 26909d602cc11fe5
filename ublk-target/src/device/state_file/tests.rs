use std::os::unix::fs::PermissionsExt;

use ublk_engine::units::Bytes;

use super::*;
use crate::config::on_death::OnDeath;
use crate::config::{ExtentConfig, LayerKind, Layers, TargetConfig};

fn state() -> StateFile {
    let known = Known {
        path: PathBuf::from("/dev/nvme0n1"),
        size: Bytes(1 << 30),
        identity: "wwid nvme.1".to_owned(),
        page_cache: false,
    };
    let file = PathBuf::from("/dev/nvme0n1");
    let layers = faults([(&["p=0.5,error=EIO"][..], 7)]);
    let config = DeviceConfig { layers, ..DeviceConfig::of_target(TargetConfig::Loop { file }) };
    StateFile::new(3, vec![known], config)
}

/// Layers of faults, outermost first, with their default names.
fn faults<'a>(layers: impl IntoIterator<Item = (&'a [&'a str], u64)>) -> Layers {
    let fault = |(rules, seed): (&[&str], u64)| {
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        (None, LayerKind::Fault { rules, seed })
    };
    Layers::named(layers.into_iter().map(fault)).unwrap()
}

#[test]
fn a_state_file_is_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let run = directory.path().join("run");
    state().write(&run).unwrap();
    assert_eq!(StateFile::read(&run, 3).unwrap(), state());
    assert!(matches!(StateFile::read(&run, 4), Err(StateProblem::Missing(_))));
    assert_eq!(recorded_ids(&run), [3]);
    // A file that a killed server has left.
    fs::write(run.join("3.json.77"), "{").unwrap();
    fs::write(run.join("33.json.77"), "{").unwrap();
    StateFile::remove(&run, 3);
    let left: Vec<_> = fs::read_dir(&run).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["33.json.77"]);
    assert!(recorded_ids(&run).is_empty());
}

/// As programs with format 3 wrote it: the first ones, whose supervisors also wrote to it, and
/// later ones, with several fault targets around a target and with none. Later programs recover and
/// upgrade their devices.
const RECORDED: [&str; 3] = [
    r#"{"backings":[{"identity":"wwid nvme.1","page_cache":false,
        "path":"/dev/nvme0n1","size":1073741824}],"config":{"block_size":null,"busy_wait":"auto",
        "depth":128,"first_slot":null,"id":null,"io_lane":false,"io_timeout":null,"lend":"auto",
        "on_death":"fail","passthru":false,"polling":"off","queues":1,"target":{"fault":{"rules":
        ["p=0.5,error=EIO"],"seed":7,"target":{"loop":{"file":"/dev/nvme0n1"}}}},"unpolled":"refuse"},
        "crc32c":"e91c6068","diskseq":17,"given_up":null,"id":3,"incarnation":0,
        "nonce":"00123456789a","pid":4711,"program":"/usr/sbin/ublk-target","supervisor":null,
        "target":"fault(loop)","trouble":"the server (77) has died","version":3}"#,
    r#"{"backings":[{"identity":"wwid nvme.1","page_cache":false,"path":"/dev/nvme1n1","size":1073741824},
        {"identity":"wwid nvme.2","page_cache":false,"path":"/dev/nvme2n1","size":1048576}],"config":{
        "block_size":null,"busy_wait":"auto","depth":128,"first_slot":null,"id":5,"io_lane":false,
        "io_timeout":null,"lend":"auto","no_part_scan":true,"on_death":"reissue","passthru":false,
        "polling":"off","queues":2,"target":{"fault":{"rules":["range=1G+4K,error=EIO"],"seed":7,"target":{
        "fault":{"rules":["op=flush,error=ENOSPC"],"seed":0,"target":{"fault":{"rules":
        ["op=read,count=2,delay=5ms","short"],"seed":18446744073709551615,"target":{"linear":{"extents":[{
        "file":"/dev/nvme1n1","len":1048576,"offset":4096},{"file":"/dev/nvme2n1","len":null,"offset":0}
        ]}}}}}}}},"unpolled":"refuse"},"crc32c":"a0950e49","diskseq":18,"id":5,"incarnation":0,
        "nonce":"00123456789b","pid":4712,"program":"/usr/sbin/ublk-target","supervisor":4711,
        "target":"fault(fault(fault(linear)))","version":3}"#,
    r#"{"backings":[{"identity":"wwid nvme.1","page_cache":false,"path":"/dev/nvme1n1","size":1073741824},
        {"identity":"wwid nvme.2","page_cache":false,"path":"/dev/nvme2n1","size":1073741824}],"config":{
        "block_size":4096,"busy_wait":"auto","depth":128,"first_slot":null,"id":6,"io_lane":false,
        "io_timeout":null,"lend":"auto","on_death":"fail","passthru":false,"polling":"off","queues":1,
        "target":{"stripe":{"chunk":65536,"files":["/dev/nvme1n1","/dev/nvme2n1"]}},"unpolled":"refuse"},
        "crc32c":"c7ffb1a9","diskseq":18,"id":6,"incarnation":0,"nonce":"00123456789b","pid":4712,
        "program":"/usr/sbin/ublk-target","supervisor":4711,"target":"stripe","version":3}"#,
];

/// Their expected content.
fn recorded() -> [StateFile; 3] {
    let known = |number: u32, size| Known {
        path: format!("/dev/nvme{number}n1").into(),
        size: Bytes(size),
        identity: format!("wwid nvme.{number}"),
        page_cache: false,
    };
    let first = StateFile {
        diskseq: Some(17),
        nonce: Some("00123456789a".parse().unwrap()),
        pid: 4711,
        program: "/usr/sbin/ublk-target".into(),
        ..state()
    };
    let of_later = |id, backings, config| StateFile {
        diskseq: Some(18),
        nonce: Some("00123456789b".parse().unwrap()),
        pid: 4712,
        supervisor: Some(4711),
        program: "/usr/sbin/ublk-target".into(),
        ..StateFile::new(id, backings, DeviceConfig { id: Some(id), ..config })
    };
    let extent = |file: &str, offset, len| ExtentConfig { file: file.into(), offset, len };
    let extents = vec![
        extent("/dev/nvme1n1", Bytes(4096), Some(Bytes(1 << 20))),
        extent("/dev/nvme2n1", Bytes(0), None),
    ];
    let linear = DeviceConfig {
        queues: 2,
        no_part_scan: true,
        on_death: OnDeath::Reissue,
        layers: faults([
            (&["range=1G+4K,error=EIO"][..], 7),
            (&["op=flush,error=ENOSPC"], 0),
            (&["op=read,count=2,delay=5ms", "short"], u64::MAX),
        ]),
        ..DeviceConfig::of_target(TargetConfig::Linear { extents })
    };
    let files = ["/dev/nvme1n1", "/dev/nvme2n1"].map(PathBuf::from).to_vec();
    let stripe = TargetConfig::Stripe { chunk: Bytes(65536), files };
    let stripe = DeviceConfig { block_size: Some(4096), ..DeviceConfig::of_target(stripe) };
    [
        first,
        of_later(5, vec![known(1, 1 << 30), known(2, 1 << 20)], linear),
        of_later(6, vec![known(1, 1 << 30), known(2, 1 << 30)], stripe),
    ]
}

#[test]
fn state_files_of_earlier_programs_are_read_and_written_as_they_were() {
    for (text, expected) in RECORDED.into_iter().zip(recorded()) {
        let read = StateFile::parse(text, expected.id, Path::new("x.json")).unwrap();
        assert_eq!(read, expected);
        let mut value: serde_json::Value = serde_json::from_str(text).unwrap();
        if value.as_object_mut().unwrap().remove("trouble").is_some() {
            // Later programs with this format did not write these two.
            value.as_object_mut().unwrap().remove("given_up").unwrap();
            value[CHECKSUM] = "fa9c1151".into();
        }
        // Byte for byte, including the checksum.
        assert_eq!(read.to_text().unwrap(), serde_json::to_string_pretty(&value).unwrap());
    }
}

/// A layer with a name of its own.
fn with_named_layer() -> StateFile {
    let name = "bad-disk".parse().unwrap();
    let kind = state().config.layers.iter().next().unwrap().kind.clone();
    let layers = Layers::named([(Some(name), kind)]).unwrap();
    StateFile { config: DeviceConfig { layers, ..state().config }, ..state() }
}

#[test]
fn a_layer_with_a_name_of_its_own_needs_format_4() {
    let text = with_named_layer().to_text().unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["version"], 4);
    assert_eq!(value["config"]["layers"][0]["name"], "bad-disk");
    assert_eq!(StateFile::parse(&text, 3, Path::new("3.json")).unwrap(), with_named_layer());
}

#[test]
fn format_3_is_read_as_strictly_as_it_was() {
    let read = |old: &str, new: &str| {
        let mut value: serde_json::Value = serde_json::from_str(RECORDED[1]).unwrap();
        value.as_object_mut().unwrap().remove(CHECKSUM);
        let text = value.to_string();
        let changed = text.replace(old, new);
        assert_ne!(changed, text, "{old}");
        let mut changed: serde_json::Value = serde_json::from_str(&changed).unwrap();
        changed[CHECKSUM] = checksum_of(&changed).into();
        StateFile::parse(&changed.to_string(), 5, Path::new("5.json")).unwrap_err().to_string()
    };
    for (old, new, expected) in [
        ("\"seed\":0", "\"seed\":0,\"quacks\":1", "unknown field `quacks`"),
        ("\"seed\":0,", "", "missing field `seed`"),
        ("{\"linear\":", "{\"loop\":{\"file\":\"/x\"},\"linear\":", "is corrupt"),
        ("\"queues\":2", "\"queues\":2,\"layers\":[]", "format 3 has no layers"),
        // A target of format 3 in a file of format 4.
        ("\"version\":3", "\"version\":4", "unknown variant `fault`"),
        ("\"version\":3", "\"version\":2", "has format 2, and this program knows 3 to 4"),
        ("\"version\":3", "\"version\":5", "has format 5, and this program knows 3 to 4"),
    ] {
        let refused = read(old, new);
        assert!(refused.contains(expected), "{new}: {refused}");
    }
}

#[test]
fn a_corrupt_state_file_is_not_believed() {
    let directory = tempfile::tempdir().unwrap();
    let whole = with_named_layer().to_text().unwrap();
    let mut good: serde_json::Value = serde_json::from_str(&whole).unwrap();
    good.as_object_mut().unwrap().remove(CHECKSUM);
    let good = good.to_string();
    // As written by somebody who knows the checksum.
    let summed = |old: &str, new: &str| {
        let changed = good.replace(old, new);
        assert_ne!(changed, good, "{old}");
        let sum = checksum_of(&serde_json::from_str(&changed).unwrap());
        format!("{{\"{CHECKSUM}\":\"{sum}\",{}", &changed[1..])
    };
    let bad = [
        (String::new(), "is corrupt"),
        (whole[..whole.len() / 2].to_owned(), "is corrupt"),
        ("[2]".to_owned(), "has no version"),
        (good.clone(), "its checksum"),
        (whole.replace("1073741824", "1073741840"), "its checksum"),
        (whole.replace("\"version\": 4", "\"version\": 99"), "has format 99"),
        (summed("\"id\":3", "\"id\":4"), "it belongs to device 4"),
        (summed("auto", "telepathy"), "telepathy"),
        (summed("error=EIO", "error=EGAD"), "EGAD"),
        (summed("\"queues\":1", "\"queues\":-1"), "is corrupt"),
        (summed("\"queues\":1", "\"queues\":1,\"quacks\":1"), "quacks"),
        (summed("\"bad-disk\"", "\"\""), "is no name of a layer"),
        (summed("{\"fault\":{", "{\"fright\":{"), "fright"),
    ];
    for (text, expected) in bad {
        let path = StateFile::path(directory.path(), 3);
        fs::write(&path, &text).unwrap();
        let refused = StateFile::read(directory.path(), 3).unwrap_err().to_string();
        assert!(refused.contains(expected), "{text}: {refused}");
    }
}

#[test]
fn no_flipped_bit_is_believed() {
    for good in [state(), with_named_layer()] {
        let text = good.to_text().unwrap().into_bytes();
        for bit in 0..text.len() * 8 {
            let mut flipped = text.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let Ok(flipped) = String::from_utf8(flipped) else { continue };
            // A blank may have become another blank.
            if let Ok(read) = StateFile::parse(&flipped, 3, Path::new("3.json")) {
                assert_eq!(read, good, "bit {bit}");
            }
        }
    }
}

#[test]
fn a_state_file_that_others_can_write_is_not_trusted() {
    let directory = tempfile::tempdir().unwrap();
    state().write(directory.path()).unwrap();
    let path = StateFile::path(directory.path(), 3);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let refused = StateFile::read(directory.path(), 3).unwrap_err().to_string();
    assert!(refused.contains("mode 666"), "{refused}");
    // A link is refused too, since it may lead anywhere.
    fs::rename(&path, directory.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", &path).unwrap();
    assert!(matches!(StateFile::read(directory.path(), 3), Err(StateProblem::Unreadable { .. })));
}

#[test]
fn a_pipe_in_the_place_of_a_state_file_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["3.json", "3.json.00123456789a"] {
        let mode = nix::sys::stat::Mode::S_IRWXU;
        nix::unistd::mkfifo(&directory.path().join(name), mode).unwrap();
    }
    let refused = StateFile::read(directory.path(), 3).unwrap_err().to_string();
    assert!(refused.ends_with("cannot be read: it is not a regular file"), "{refused}");
    assert!(!own_files::is_being_written(&directory.path().join("3.json.00123456789a")));
}
