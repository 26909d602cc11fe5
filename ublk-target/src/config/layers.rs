//! The layers between the client and the target of a device.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ublk_engine::target::{Rates, Rule};

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
    /// Lets only so many requests and bytes a second pass.
    Throttle(Rates),
}

/// A change of a device's layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum LayerEdit {
    /// Put a layer between the client and the target.
    Attach {
        /// Its name; without one, it is named after its kind.
        name: Option<LayerName>,
        /// Its kind and options.
        kind: LayerKind,
        /// The layer directly outside of it; without one, it becomes the outermost.
        inside: Option<LayerName>,
    },
    /// Remove a layer.
    Detach {
        /// Its name.
        name: LayerName,
    },
    /// Have exactly these layers.
    Replace {
        /// The layers.
        layers: Layers,
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
    /// No layer has this name.
    #[error("the device has no layer `{name}`; {}", Names(has))]
    Missing {
        /// The name.
        name: LayerName,
        /// The names of its layers.
        has: Vec<LayerName>,
    },
    /// Two layers have the same name.
    #[error("two layers of the device have the name `{0}`")]
    SameName(LayerName),
}

/// Names of layers in a sentence.
struct Names<'a>(&'a [LayerName]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("it has no layers");
        }
        let names: Vec<_> = self.0.iter().map(|name| format!("`{name}`")).collect();
        write!(f, "it has {}", names.join(", "))
    }
}

impl LayerKind {
    /// The name of the kind.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Fault { .. } => "fault",
            Self::Throttle(_) => "throttle",
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
                let free = LayerName::after(&kind, &taken);
                taken.push(free.clone());
                free
            });
            LayerConfig { name, kind }
        });
        named.collect::<Vec<_>>().try_into()
    }

    /// The layers after a change, and the name of the layer that is attached or detached.
    ///
    /// # Errors
    /// [`BadLayers`].
    pub fn edited(&self, edit: &LayerEdit) -> Result<(Self, Option<LayerName>), BadLayers> {
        let mut layers = self.0.clone();
        let name = match edit {
            LayerEdit::Attach { name, kind, inside } => {
                let taken: Vec<_> = layers.iter().map(|layer| layer.name.clone()).collect();
                let name = name.clone().unwrap_or_else(|| LayerName::after(kind, &taken));
                let at = inside.as_ref().map_or(Ok(0), |outer| Ok(self.position(outer)? + 1))?;
                layers.insert(at, LayerConfig { name: name.clone(), kind: kind.clone() });
                Some(name)
            }
            LayerEdit::Detach { name } => {
                layers.remove(self.position(name)?);
                Some(name.clone())
            }
            LayerEdit::Replace { layers: new } => {
                layers.clone_from(&new.0);
                None
            }
        };
        Ok((layers.try_into()?, name))
    }

    fn position(&self, name: &LayerName) -> Result<usize, BadLayers> {
        let missing = || BadLayers::Missing {
            name: name.clone(),
            has: self.iter().map(|layer| layer.name.clone()).collect(),
        };
        self.iter().position(|layer| layer.name == *name).ok_or_else(missing)
    }

    /// For each of these layers, the position of the same layer among others. It is the same if it has
    /// the same name and the same options.
    #[must_use]
    pub fn kept_from(&self, others: &Self) -> Box<[Option<usize>]> {
        let same = |layer: &LayerConfig| others.iter().position(|other| other == layer);
        self.iter().map(same).collect()
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
    /// The first name after a kind that is not taken: `fault`, `fault-2` and so on.
    fn after(kind: &LayerKind, taken: &[Self]) -> Self {
        let nth = |nth: u32| match nth {
            1 => Self(kind.name().to_owned()),
            nth => Self(format!("{}-{nth}", kind.name())),
        };
        let free = (1..).map(nth).find(|name| !taken.contains(name));
        // There are more numbers than layers.
        free.unwrap_or_else(|| nth(0))
    }

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
    fn layers_are_attached_and_detached_by_name() {
        let name = |name: &str| name.parse::<LayerName>().unwrap();
        let attach = |own: &str, inside: &str| LayerEdit::Attach {
            name: (!own.is_empty()).then(|| name(own)),
            kind: fault(9),
            inside: (!inside.is_empty()).then(|| name(inside)),
        };
        let detach = |gone: &str| LayerEdit::Detach { name: name(gone) };
        let before = Layers::named([(None, fault(1)), (Some(name("b")), fault(2))]).unwrap();
        let table: [(LayerEdit, &[&str], &str); 6] = [
            (attach("", ""), &["fault-2", "fault", "b"], "fault-2"),
            (attach("x", "fault"), &["fault", "x", "b"], "x"),
            (attach("x", "b"), &["fault", "b", "x"], "x"),
            (detach("fault"), &["b"], "fault"),
            (detach("b"), &["fault"], "b"),
            (LayerEdit::Replace { layers: Layers::none() }, &[], ""),
        ];
        for (edit, expected, changed) in table {
            let (after, said) = before.edited(&edit).unwrap();
            assert_eq!(names(&after), expected, "{edit:?}");
            assert_eq!(said.as_ref().map_or("", LayerName::as_str), changed);
            for (layer, kept) in after.iter().zip(&after.kept_from(&before)) {
                assert_eq!(kept.map(|at| &before.0[at]), before.0.iter().find(|it| *it == layer));
            }
            let text = serde_json::to_string(&edit).unwrap();
            assert_eq!(serde_json::from_str::<LayerEdit>(&text).unwrap(), edit);
        }
        let refused = [
            (attach("b", ""), "two layers of the device have the name `b`"),
            (attach("x", "y"), "the device has no layer `y`; it has `fault`, `b`"),
            (detach("y"), "the device has no layer `y`; it has `fault`, `b`"),
        ];
        for (edit, expected) in refused {
            assert_eq!(before.edited(&edit).unwrap_err().to_string(), expected);
        }
        let none = Layers::none().edited(&detach("y")).unwrap_err().to_string();
        assert_eq!(none, "the device has no layer `y`; it has no layers");
    }

    #[test]
    fn a_layer_with_other_options_is_not_kept() {
        let old = Layers::named([(None, fault(1)), (None, fault(2))]).unwrap();
        let new = Layers::named([(None, fault(1)), (None, fault(3))]).unwrap();
        assert_eq!(*new.kept_from(&old), [Some(0), None]);
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
