//! The layers between the client and the target of a device.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ublk_engine::target::Rule;

/// The maximum number of layers of a device.
pub const MAX_LAYERS: usize = 64;

/// The maximum length of a layer's name in bytes.
const MAX_NAME: usize = 32;

/// The layers of a device, outermost first. The outermost layer is nearest to the client and sees a
/// request first; the innermost is next to the target. They have this order in all lists. Names are
/// unique, and there are at most [`MAX_LAYERS`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<LayerConfig>")]
pub struct Layers(Vec<LayerConfig>);

/// A layer of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// Its name, unique in the device.
    pub name: LayerName,
    /// Its kind and options.
    pub kind: LayerKind,
}

/// The kind of a layer, with its options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum LayerKind {
    /// Injects errors, short transfers and delays.
    Fault {
        /// The first rule that matches a request applies.
        rules: Vec<Rule>,
        /// The random seed.
        seed: u64,
    },
}

/// The name of a layer: lower-case letters, digits and `-`, a letter first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct LayerName(String);

/// Why a text is not a name of a layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no name of a layer; use at most {MAX_NAME} lower-case letters, digits and `-`, a letter \
     first"
)]
pub struct BadLayerName(String);

/// Why a device cannot have these layers.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLayers {
    /// More than [`MAX_LAYERS`].
    #[error("{0} layers are too many; a device has at most {MAX_LAYERS}")]
    TooMany(usize),
    /// Two layers have the same name.
    #[error("two layers of the device have the name `{0}`")]
    SameName(LayerName),
}

impl LayerKind {
    /// The name of the kind.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Fault { .. } => "fault",
        }
    }
}

impl Layers {
    /// No layers.
    #[must_use]
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// Layers with the given names, outermost first. A layer without one is named after its kind:
    /// `fault`, `fault-2` and so on.
    ///
    /// # Errors
    /// [`BadLayers`].
    pub fn named(
        layers: impl IntoIterator<Item = (Option<LayerName>, LayerKind)>,
    ) -> Result<Self, BadLayers> {
        let layers: Vec<_> = layers.into_iter().collect();
        let mut taken: Vec<LayerName> =
            layers.iter().filter_map(|(name, _)| name.clone()).collect();
        let named = layers.into_iter().map(|(name, kind)| {
            let name = name.unwrap_or_else(|| {
                let nth = |nth: u32| match nth {
                    1 => LayerName(kind.name().to_owned()),
                    nth => LayerName(format!("{}-{nth}", kind.name())),
                };
                let free = (1..).map(nth).find(|name| !taken.contains(name));
                // There are more numbers than layers.
                let free = free.unwrap_or_else(|| nth(0));
                taken.push(free.clone());
                free
            });
            LayerConfig { name, kind }
        });
        named.collect::<Vec<_>>().try_into()
    }

    /// Iterates, outermost first.
    pub fn iter(&self) -> std::slice::Iter<'_, LayerConfig> {
        self.0.iter()
    }

    /// Whether there are no layers.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl TryFrom<Vec<LayerConfig>> for Layers {
    type Error = BadLayers;

    fn try_from(layers: Vec<LayerConfig>) -> Result<Self, BadLayers> {
        if layers.len() > MAX_LAYERS {
            return Err(BadLayers::TooMany(layers.len()));
        }
        let mut names: Vec<_> = layers.iter().map(|layer| &layer.name).collect();
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(BadLayers::SameName(pair[0].clone())),
            None => Ok(Self(layers)),
        }
    }
}

impl LayerName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for LayerName {
    type Error = BadLayerName;

    fn try_from(name: String) -> Result<Self, BadLayerName> {
        let is_part = |c: u8| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'-');
        let begins = name.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
        if begins && name.len() <= MAX_NAME && name.bytes().all(is_part) {
            Ok(Self(name))
        } else {
            Err(BadLayerName(name))
        }
    }
}

impl FromStr for LayerName {
    type Err = BadLayerName;

    fn from_str(name: &str) -> Result<Self, BadLayerName> {
        name.to_owned().try_into()
    }
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fault(seed: u64) -> LayerKind {
        LayerKind::Fault { rules: vec!["short".parse().unwrap()], seed }
    }

    fn names(layers: &Layers) -> Vec<&str> {
        layers.iter().map(|layer| layer.name.as_str()).collect()
    }

    #[test]
    fn layers_without_a_name_are_named_after_their_kind() {
        let named = |names: &[&str]| {
            let name = |name: &&str| (!name.is_empty()).then(|| name.parse().unwrap());
            Layers::named(names.iter().map(name).zip((0..).map(fault)))
        };
        let table: [(&[&str], &[&str]); 4] = [
            (&[], &[]),
            (&["", "", ""], &["fault", "fault-2", "fault-3"]),
            (&["", "bad-disk", ""], &["fault", "bad-disk", "fault-2"]),
            (&["", "fault-2", "", "fault"], &["fault-3", "fault-2", "fault-4", "fault"]),
        ];
        for (given, expected) in table {
            let layers = named(given).unwrap();
            assert_eq!(names(&layers), expected);
            // The order is as given.
            assert!(layers.iter().zip(0..).all(|(layer, seed)| layer.kind == fault(seed)));
        }
        let refused = named(&["x", "", "x"]).unwrap_err().to_string();
        assert_eq!(refused, "two layers of the device have the name `x`");
        assert!(named(&[""; MAX_LAYERS]).is_ok());
        let refused = named(&[""; MAX_LAYERS + 1]).unwrap_err().to_string();
        assert_eq!(refused, "65 layers are too many; a device has at most 64");
    }

    #[test]
    fn names_are_plain() {
        for name in ["a", "fault", "fault-2", "x9", &"y".repeat(32)] {
            assert_eq!(name.parse::<LayerName>().unwrap().as_str(), name);
        }
        for name in ["", "-", "2", "-a", "A", "aB", "a b", "a\n", "ä", "a/b", &"y".repeat(33)] {
            let refused = name.parse::<LayerName>().unwrap_err().to_string();
            assert!(refused.contains("is no name of a layer") && !refused.contains('\n'));
        }
    }

    #[test]
    fn what_is_read_is_checked() {
        let layer = |name: &str| json!({"name": name, "kind": {"fault": {"rules": ["p=0.5,short"], "seed": 3}}});
        let read = serde_json::from_value::<Layers>;
        let layers = read(json!([layer("b"), layer("a")])).unwrap();
        assert_eq!(names(&layers), ["b", "a"]);
        assert_eq!(serde_json::to_value(&layers).unwrap(), json!([layer("b"), layer("a")]));
        let mut unknown = layer("a");
        unknown["kind"]["fault"]["target"] = json!(null);
        let bad = [
            (json!([layer("a"), layer("b"), layer("a")]), "have the name `a`"),
            (json!([layer("A")]), "\"A\" is no name"),
            (json!(vec![layer("a"); 65]), "65 layers"),
            (json!([unknown]), "unknown field `target`"),
            (json!([{"name": "a"}]), "missing field `kind`"),
            (json!([{"name": "a", "kind": "delay"}]), "unknown variant `delay`"),
        ];
        for (value, expected) in bad {
            let refused = read(value).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
