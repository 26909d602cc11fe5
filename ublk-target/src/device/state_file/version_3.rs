//! State files of format 3, in which a target with faults had the other target inside.

use serde_json::{Map, Value, json};

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

/// The faults of a target that has another one inside, and that one.
fn outermost(target: &mut Value) -> Option<(Map<String, Value>, Value)> {
    let fields = target.as_object_mut().filter(|fields| fields.len() == 1)?;
    let fault = fields.get_mut("fault")?.as_object_mut()?;
    let inner = fault.remove("target")?;
    Some((std::mem::take(fault), inner))
}
