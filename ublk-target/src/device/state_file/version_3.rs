//! State files of format 3, in which a target with faults had the other target inside.

use serde_json::{Map, Value, json};

use crate::config::{LayerKind, Layers};

/// The most layers that are written in this format. Each of them is two levels of JSON, a device without
/// any is six at most, and no program reads more than 127.
pub(super) const MAX_NESTED: usize = 60;

/// Whether the format can say all about these layers: earlier programs know them, and they have the
/// names that they are given when they are read.
pub(super) fn can_hold(layers: &Layers) -> bool {
    let known = |kind: &LayerKind| match kind {
        // All that they know of it.
        LayerKind::Fault { rules: _, seed: _ } => true,
    };
    let mut named = layers.iter().zip(0..);
    layers.iter().len() <= MAX_NESTED
        && named.all(|(layer, nth)| known(&layer.kind) && layer.name.as_str() == name(nth))
}

/// Makes a record of the present format one of format 3, as earlier programs have written it: each
/// layer becomes a target with the next one inside.
pub(super) fn fold(record: &mut Value) {
    let Some(config) = record.get_mut("config").and_then(Value::as_object_mut) else { return };
    let Some(Value::Array(layers)) = config.remove("layers") else { return };
    let mut target = config.remove("target").unwrap_or_default();
    for mut layer in layers.into_iter().rev() {
        let mut kind = layer["kind"].take();
        kind["fault"]["target"] = target;
        target = kind;
    }
    config.insert("target".to_owned(), target);
}

/// Makes the record one of the present format: the targets around the innermost one become layers. What is
/// of no known shape is left to be refused with the rest.
///
/// # Errors
/// That the record has layers already, which no program has written.
pub(super) fn unfold(record: &mut Value) -> Result<(), String> {
    let Some(config) = record.get_mut("config").and_then(Value::as_object_mut) else {
        return Ok(());
    };
    if config.contains_key("layers") {
        return Err("format 3 has no layers".to_owned());
    }
    let Some(mut target) = config.remove("target") else { return Ok(()) };
    let mut layers = Vec::new();
    while let Some((fault, inner)) = outermost(&mut target) {
        layers.push(json!({ "name": name(layers.len()), "kind": { "fault": fault } }));
        target = inner;
    }
    config.insert("target".to_owned(), target);
    if !layers.is_empty() {
        config.insert("layers".to_owned(), layers.into());
    }
    Ok(())
}

/// The name of a layer, which the format does not have; the outermost is number 0.
fn name(nth: usize) -> String {
    match nth {
        0 => "fault".to_owned(),
        nth => format!("fault-{}", nth + 1),
    }
}

/// The faults of a target that has another one inside, and that one.
fn outermost(target: &mut Value) -> Option<(Map<String, Value>, Value)> {
    let fields = target.as_object_mut().filter(|fields| fields.len() == 1)?;
    let fault = fields.get_mut("fault")?.as_object_mut()?;
    let inner = fault.remove("target")?;
    Some((std::mem::take(fault), inner))
}

#[cfg(test)]
mod tests;
