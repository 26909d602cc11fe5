//! State files of format 3, in which a fault target contained another target.

use serde_json::{Map, Value, json};

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
        let name = match layers.len() {
            0 => "fault".to_owned(),
            others => format!("fault-{}", others + 1),
        };
        layers.push(json!({ "name": name, "kind": { "fault": fault } }));
        target = inner;
    }
    config.insert("target".to_owned(), target);
    if !layers.is_empty() {
        config.insert("layers".to_owned(), layers.into());
    }
    Ok(())
}

/// The options of a fault target, and the target that it contains.
fn outermost(target: &mut Value) -> Option<(Map<String, Value>, Value)> {
    let fields = target.as_object_mut().filter(|fields| fields.len() == 1)?;
    let fault = fields.get_mut("fault")?.as_object_mut()?;
    let inner = fault.remove("target")?;
    Some((std::mem::take(fault), inner))
}
