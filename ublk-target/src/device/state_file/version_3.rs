//! State files of format 3, in which a fault target contained another target.

use serde_json::{Map, Value, json};

use crate::config::{LayerKind, Layers};

/// The maximum number of layers in this format. Each layer is two levels of JSON, and a device
/// without layers has at most six. No program reads more than 127 levels.
pub(super) const MAX_NESTED: usize = 60;

/// Whether the format can hold these layers: earlier programs know their kinds, and their names are
/// those that [`unfold`] gives them.
pub(super) fn can_hold(layers: &Layers) -> bool {
    let known = |kind: &LayerKind| match kind {
        // Earlier programs know these two fields and no others.
        LayerKind::Fault { rules: _, seed: _ } => true,
        LayerKind::Throttle(_) => false,
    };
    let mut named = layers.iter().zip(0..);
    layers.iter().len() <= MAX_NESTED
        && named.all(|(layer, nth)| known(&layer.kind) && layer.name.as_str() == name(nth))
}

/// Converts a record of the present format to format 3, as earlier programs wrote it: each layer
/// becomes a target that contains the next one.
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

/// Converts a record to the present format: the fault targets around the innermost target become
/// layers. Records of an unknown form are left unchanged, and refused later.
///
/// # Errors
/// The record already has layers, which no program has written in this format.
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

/// The name of a layer, which format 3 lacks; the outermost layer is number 0.
fn name(nth: usize) -> String {
    match nth {
        0 => "fault".to_owned(),
        nth => format!("fault-{}", nth + 1),
    }
}

/// The options of a fault target, and the target that it contains.
fn outermost(target: &mut Value) -> Option<(Map<String, Value>, Value)> {
    let fields = target.as_object_mut().filter(|fields| fields.len() == 1)?;
    let fault = fields.get_mut("fault")?.as_object_mut()?;
    let inner = fault.remove("target")?;
    Some((std::mem::take(fault), inner))
}

#[cfg(test)]
mod tests;
