use std::path::Path;

use proptest::prelude::*;
use serde::Deserialize;
use ublk_engine::target::Rule;
use ublk_engine::units::Bytes;

use super::super::StateFile;
use super::*;
use crate::config::{DeviceConfig, ExtentConfig, LayerName, MAX_LAYERS, TargetConfig};

/// The target type of the last program that wrote only format 3 and had no layers.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum OldTarget {
    Fault {
        rules: Vec<Rule>,
        seed: u64,
        target: Box<OldTarget>,
    },
    #[serde(untagged)]
    Other(TargetConfig),
}

/// How that program reads a file: the fault layers, outermost first, and the innermost target.
fn as_earlier_programs_do(mut record: Value) -> (Vec<LayerKind>, TargetConfig) {
    let mut target = serde_json::from_value(record["config"]["target"].take()).unwrap();
    let mut faults = Vec::new();
    loop {
        match target {
            OldTarget::Fault { rules, seed, target: inner } => {
                faults.push(LayerKind::Fault { rules, seed });
                target = *inner;
            }
            OldTarget::Other(target) => return (faults, target),
        }
    }
}

fn state(target: TargetConfig, layers: Layers) -> StateFile {
    StateFile::new(3, Vec::new(), DeviceConfig { layers, ..DeviceConfig::of_target(target) })
}

fn fault() -> impl Strategy<Value = LayerKind> {
    let rule = prop::sample::select(vec!["short", "p=0.5,error=EIO", "op=read,count=2,delay=5ms"]);
    let rules = prop::collection::vec(rule.prop_map(|rule| rule.parse().unwrap()), 0..3);
    (rules, any::<u64>()).prop_map(|(rules, seed)| LayerKind::Fault { rules, seed })
}

/// Half of the stacks have default names only.
fn layers() -> impl Strategy<Value = Layers> {
    let name = prop::sample::select(vec!["", "", "", "fault", "fault-2", "fault-3", "bad-disk"]);
    let of_own = prop::collection::vec((name, fault()), 0..5);
    let unnamed = prop::collection::vec((Just(""), fault()), 0..=MAX_LAYERS);
    prop_oneof![of_own, unnamed].prop_filter_map("one name twice", |layers| {
        let name = |name: &str| (!name.is_empty()).then(|| name.parse::<LayerName>().unwrap());
        Layers::named(layers.into_iter().map(|(text, kind)| (name(text), kind))).ok()
    })
}

/// The deepest JSON of all targets.
fn linear() -> TargetConfig {
    let extent = ExtentConfig { file: "/dev/sda".into(), offset: Bytes(0), len: None };
    TargetConfig::Linear { extents: vec![extent; 2] }
}

fn target() -> impl Strategy<Value = TargetConfig> {
    prop_oneof![
        any::<u32>().prop_map(|size| TargetConfig::Null { size: Bytes(size.into()) }),
        Just(TargetConfig::Loop { file: "/dev/sda".into() }),
        Just(linear()),
        Just(TargetConfig::Stripe { chunk: Bytes(4096), files: vec!["/dev/sda".into(); 2] }),
    ]
}

proptest! {
    #[test]
    fn every_stack_is_read_back_and_by_earlier_programs_if_they_can(
        target in target(), layers in layers()
    ) {
        let state = state(target, layers);
        let text = state.to_text().unwrap();
        prop_assert_eq!(&StateFile::parse(&text, 3, Path::new("3.json")).unwrap(), &state);
        let record: Value = serde_json::from_str(&text).unwrap();
        let layers = &state.config.layers;
        let kinds: Vec<_> = layers.iter().map(|layer| layer.kind.clone()).collect();
        let unnamed = Layers::named(kinds.iter().map(|kind| (None, kind.clone()))).unwrap();
        if unnamed == *layers && kinds.len() <= MAX_NESTED {
            prop_assert_eq!(&record["version"], 3);
            prop_assert_eq!(record["config"].get("layers"), None);
            prop_assert_eq!(as_earlier_programs_do(record), (kinds, state.config.target));
        } else {
            prop_assert_eq!(&record["version"], 4);
            prop_assert_eq!(record["config"]["layers"].as_array().unwrap().len(), kinds.len());
        }
    }
}

#[test]
fn no_more_targets_are_nested_than_can_be_read() {
    for count in [MAX_NESTED, MAX_NESTED + 1, MAX_LAYERS] {
        let fault = || LayerKind::Fault { rules: vec!["short".parse().unwrap()], seed: 7 };
        let layers = Layers::named((0..count).map(|_| (None, fault()))).unwrap();
        let state = state(linear(), layers);
        let text = state.to_text().unwrap();
        assert_eq!(StateFile::parse(&text, 3, Path::new("3.json")).unwrap(), state);
        assert_eq!(text.contains("\"version\": 3"), count == MAX_NESTED);
        // One more layer is too many.
        let mut record = serde_json::to_value(&state).unwrap();
        fold(&mut record);
        let is_read = serde_json::from_str::<Value>(&record.to_string()).is_ok();
        assert_eq!(is_read, count == MAX_NESTED, "{count}");
    }
}

#[test]
fn earlier_programs_do_not_know_a_throttle() {
    let rates = r#"{"read":{"iops":9,"bps":null},"write":{"iops":null,"bps":null},"burst":0}"#;
    let throttle = LayerKind::Throttle(serde_json::from_str(rates).unwrap());
    let layers = Layers::named([(Some("fault".parse().unwrap()), throttle)]).unwrap();
    assert!(!can_hold(&layers));
    let layers = serde_json::to_value(&layers).unwrap();
    let expected = format!(r#"[{{"name":"fault","kind":{{"throttle":{rates}}}}}]"#);
    assert_eq!(layers, serde_json::from_str::<Value>(&expected).unwrap());
}
