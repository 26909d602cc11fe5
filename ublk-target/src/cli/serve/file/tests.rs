use std::time::Duration;

use ublk_engine::lend::LendMode;
use ublk_engine::units::Bytes;
use ublk_target::config::lend::LendRequest;
use ublk_target::config::on_death::OnDeath;
use ublk_target::config::{ExtentConfig, LayerKind, Layers, TargetConfig};

use super::*;
use crate::cli::arguments::LayerArgument;

fn parsed(text: &str) -> Result<FleetConfig, Vec<String>> {
    parse(text, Path::new("/etc/x.toml"))
}

#[test]
fn devices_have_the_options_of_add() {
    let config = parsed(
        r#"
        lanes = 3
        [[device]]
        id = 7
        target = "loop"
        file = "/dev/a"
        queues = 2
        depth = 64
        lend = "slot"
        io-timeout = 1.5
        io-lane = true
        passthru = false
        on-death = "reissue"
        no-part-scan = true
        [[device]]
        id = 8
        target = "linear"
        file = ["/dev/b,1M,2M", "c.img"]
        rule = ["p=0.5,error=EIO", "short"]
        seed = 4
        [[device]]
        target = "null"
        id = 9
        size = "1G"
        [[device]]
        target = "stripe"
        id = 10
        file = ["/dev/d", "/dev/e"]
        chunk = 8192
        "#,
    );
    let FleetConfig { lanes, devices } = config.unwrap();
    assert_eq!(lanes, Some(3));
    let loop_target = TargetConfig::Loop { file: "/dev/a".into() };
    let first = DeviceConfig {
        id: Some(7),
        queues: 2,
        depth: 64,
        lend: LendMode::Slot.into(),
        io_timeout: Some(Duration::from_millis(1500)),
        io_lane: true,
        on_death: OnDeath::Reissue,
        no_part_scan: true,
        ..DeviceConfig::of_target(loop_target)
    };
    assert_eq!(devices[0], first);
    let extent = |file: &str, offset, len| ExtentConfig { file: file.into(), offset, len };
    let extents = vec![
        extent("/dev/b", Bytes(1 << 20), Some(Bytes(2 << 20))),
        extent("/etc/c.img", Bytes(0), None),
    ];
    assert_eq!(devices[1].target, TargetConfig::Linear { extents });
    assert_eq!(devices[1].layers, faults(&[("", &["p=0.5,error=EIO", "short"], 4)]));
    let null = DeviceConfig::of_target(TargetConfig::Null { size: Bytes(1 << 30) });
    assert_eq!(devices[2], DeviceConfig { id: Some(9), ..null });
    assert_eq!(devices[2].lend, LendRequest::Auto);
    let files = vec!["/dev/d".into(), "/dev/e".into()];
    assert_eq!(devices[3].target, TargetConfig::Stripe { chunk: Bytes(8192), files });
}

/// Layers of faults, the outermost first: name, rules, seed.
fn faults(layers: &[(&str, &[&str], u64)]) -> Layers {
    let layers = layers.iter().map(|(name, rules, seed)| {
        let name = (!name.is_empty()).then(|| name.parse().unwrap());
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        (name, LayerKind::Fault { rules, seed: *seed })
    });
    Layers::named(layers).unwrap()
}

#[test]
fn devices_have_layers_in_their_order() {
    let config = parsed(
        r#"
        [[device]]
        id = 7
        target = "loop"
        file = "a.img"
        [[device.layer]]
        kind = "fault"
        rule = "short"
        [[device.layer]]
        kind = "fault"
        name = "bad-writes"
        rule = ["op=write,error=EIO", "delay=1ms"]
        seed = 9
        [[device.layer]]
        kind = "fault"
        rule = ["p=0.1,error=ENOSPC"]
        [[device]]
        id = 8
        target = "null"
        layer = []
        [[device]]
        id = 9
        target = "null"
        rule = "short"
        [[device]]
        id = 10
        target = "null"
        layer = [{ kind = "fault", rule = "short" }]
        "#,
    );
    let devices = config.unwrap().devices;
    let layers = faults(&[
        ("", &["short"], 0),
        ("bad-writes", &["op=write,error=EIO", "delay=1ms"], 9),
        ("", &["p=0.1,error=ENOSPC"], 0),
    ]);
    assert_eq!(devices[0].layers, layers);
    assert_eq!(devices[0].target, TargetConfig::Loop { file: "/etc/a.img".into() });
    assert_eq!(devices[0].target_name(), "fault(fault(fault(loop)))");
    let names: Vec<_> = devices[0].layers.iter().map(|layer| layer.name.as_str()).collect();
    assert_eq!(names, ["fault", "bad-writes", "fault-2"]);
    assert!(devices[1].layers.is_empty());
    // The short form says the same as the long one.
    assert_eq!(devices[2].layers, faults(&[("", &["short"], 0)]));
    assert_eq!(devices[3].layers, devices[2].layers);
}

#[test]
fn a_file_without_devices_says_so() {
    assert_eq!(parsed("device = []\n"), Ok(FleetConfig::default()));
}

/// A text, and how the lines of its faults begin and what they say.
const FAULTS: &[(&str, &[(usize, &str)])] = &[
    ("", &[(1, "there is no `[[device]]`; for a file without devices, write `device = []`")]),
    ("lanes = 2\n", &[(1, "there is no `[[device]]`")]),
    ("lanes = 0", &[(1, "`lanes` is not a number from 1 to 1024")]),
    ("lanes = \"2\"", &[(1, "`lanes` is not a number")]),
    ("lane = 2\ndevices = 3", &[(2, "unknown key `devices`"), (1, "unknown key `lane`")]),
    ("device = 3", &[(1, "begins with `[[device]]`")]),
    ("device = [3]", &[(1, "begins with `[[device]]`")]),
    ("[[device]]\nid = 1\n", &[(1, "no `target`")]),
    ("[[device]]\ntarget = \"null\"\n", &[(1, "no `id`")]),
    ("[[device]]\nid = 1\ntarget = \"nul\"\n", &[(3, "`target` is not one of null, loop")]),
    ("[[device]]\nid = 1\ntarget = 4\n", &[(3, "`target` is not one of null, loop")]),
    ("[[device]]\nid = 1\ntarget = \"loop\"\n", &[(1, "--file <PATH>")]),
    ("[[device]]\nid = -1\ntarget = \"null\"\n", &[(2, "invalid value '-1' for '--id <ID>'")]),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\nqueues = 0\nfile = \"x\"\ndepth = 9999\n",
        &[(5, "the target null has no option `file`"), (6, "9999"), (4, "0 is not in 1..=4096")],
    ),
    ("[[device]]\nid = 1\ntarget = \"null\"\nsize = { a = 1 }\n", &[(4, "`size` is not a text")]),
    ("[[device]]\nid = 1\ntarget = \"null\"\nlend = \"best\"\n", &[(4, "invalid value 'best'")]),
    ("[[device]]\nid = 1\ntarget = \"null\"\npassthru = 3\n", &[(4, "--passthru")]),
    ("[[device]]\nid = 1\ntarget = \"null\"\nqueues = [1, 2]\n", &[(4, "--queues")]),
    ("[[device]]\nid = 1\ntarget = \"null\"\nrule = \"x=y\"\n", &[(4, "--rule")]),
    ("[[device]]\nid = 1\ntarget = \"null\"\nseed = 3\n", &[(1, "--rule")]),
    ("[[device]]\nid = 1\ntarget = \"linear\"\nfile = \"/x,y\"\n", &[(4, "--file")]),
    ("[[device]]\nid = 1\ntarget = \"null\"\nsupervise = true\n", &[(4, "not for devices of")]),
    ("[[device]]\nid = 1\ntarget = \"null\"\nhelp = true\n", &[(4, "no option `help`")]),
    ("[[device]]\nid = 1\ntarget = \"null\"\n\"-n\" = 3\n", &[(4, "no option `-n`")]),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device]]\nid = 1\ntarget = \"null\"\n",
        &[(4, "device 1 is already defined in line 1")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"loop\"\nfile = \"/q\"\n[[device]]\nid = 2\n\
         target = \"linear\"\nfile = [\"/p\", \"/q,4K\"]\n",
        &[(5, "/q is already a backing of device 1")],
    ),
    ("[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\n", &[(4, "no `kind`")]),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fright\"\nrule = 3\n",
        &[(5, "`kind` is not one of fault")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\nlayer = 3\n",
        &[(4, "begins with `[[device.layer]]`")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\nlayer = [3]\n",
        &[(4, "begins with `[[device.layer]]`")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fault\"\n",
        &[(4, "--rule")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"x=y\"\nseed = -1\n",
        &[(6, "x=y"), (7, "--seed")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"short\"\nsize = \"1G\"\n",
        &[(7, "the layer fault has no option `size`")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"short\"\nhelp = true\n",
        &[(7, "a layer has no option `help`")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"short\"\nseed = { a = 1 }\n",
        &[(7, "`seed` is not a text")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"short\"\nname = \"Bad\"\n",
        &[(7, "is no name of a layer")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"short\"\nname = 3\n",
        &[(7, "`name` is not a text")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"short\"\nname = \"a\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"short\"\nname = \"a\"\n",
        &[(8, "two layers of the device have the name `a`")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\nrule = \"short\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"short\"\n",
        &[(4, "`rule` belongs to a `[[device.layer]]`")],
    ),
    (
        "[[device]]\nid = 1\ntarget = \"null\"\nsize = \"x\"\n[[device.layer]]\nkind = \"fault\"\nrule = \"y\"\n",
        &[(4, "--size"), (7, "--rule")],
    ),
    ("lanes = 2\n[[device]\nid = = 3\n", &[(2, "unclosed"), (3, "extra `=`"), (3, "unexpected")]),
];

#[test]
fn every_fault_is_told_with_its_line() {
    for (text, expected) in FAULTS {
        let faults = parsed(text).unwrap_err();
        assert_eq!(faults.len(), expected.len(), "{text}\n{faults:#?}");
        for (line, what) in *expected {
            let start = format!("/etc/x.toml:{line}: ");
            let is_it = |fault: &&String| fault.starts_with(&start) && fault.contains(what);
            assert!(faults.iter().any(|fault| is_it(&fault)), "{text}\n{start}{what}\n{faults:#?}");
        }
        assert!(faults.iter().all(|fault| !fault.contains('\n')), "{faults:#?}");
    }
}

#[test]
fn a_file_that_is_missing_is_named() {
    let faults = read(Path::new("/nowhere/x.toml")).unwrap_err();
    assert!(faults[0].starts_with("/nowhere/x.toml: No such file"), "{faults:?}");
}

#[test]
fn a_file_is_read_whole_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.toml");
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let faults = read(&pipe).unwrap_err();
    assert!(faults[0].ends_with("/pipe: it is not a regular file"), "{faults:?}");
    // The rest of it would be missing without a word, and a reload would delete those devices.
    let device = "[[device]]\nid = 0\ntarget = \"null\"\n";
    let long = format!("{device}{}", "#\n".repeat(1 << 19));
    std::fs::write(&path, long + &device.replace('0', "1")).unwrap();
    let faults = read(&path).unwrap_err();
    assert!(faults[0].contains("is longer than"), "{faults:?}");
}

#[test]
fn a_throttle_is_a_layer_of_a_device() {
    let text = r#"
        [[device]]
        id = 1
        target = "null"
        [[device.layer]]
        kind = "throttle"
        read-iops = 100
        write-bps = "2M"
    "#;
    let layers = parsed(text).unwrap().devices.remove(0).layers;
    let expected = "throttle --read-iops 100 --write-bps 2M".parse::<LayerArgument>().unwrap();
    assert_eq!(layers.iter().map(|layer| &layer.kind).collect::<Vec<_>>(), [&expected.kind]);
    let refused = parsed(&text.replace("100", "0")).unwrap_err();
    assert!(refused.len() == 1 && refused[0].contains("toml:7: "), "{refused:?}");
}
