//! The layers of a device: `[[device.layer]]`, outermost first.

use std::ops::Range;

use toml::Spanned;
use toml::de::DeValue;
use ublk_target::config::{BadLayers, LayerKind, LayerName, Layers};

use super::{Reading, Setting};
use crate::cli::arguments::{Command, Interpose};

/// The kinds of layers. Each is a layer of `interpose attach`.
const KINDS: [&str; 2] = ["fault", "throttle"];

/// Options of a device that are the short form of a layer.
pub(super) const SHORT_FORM: [&str; 2] = ["rule", "seed"];

/// A parsed layer.
struct Layer {
    span: Range<usize>,
    name: Option<LayerName>,
    kind: LayerKind,
}

impl Reading<'_> {
    /// Parses the value of `layer`.
    pub(super) fn layers(&mut self, value: &Spanned<DeValue<'_>>) -> Option<Layers> {
        let DeValue::Array(tables) = value.get_ref() else {
            self.fault(value.span(), "a layer begins with `[[device.layer]]`");
            return None;
        };
        let read: Vec<_> = tables.iter().map(|table| self.layer(table)).collect();
        let read = read.into_iter().collect::<Option<Vec<_>>>()?;
        let named = read.iter().map(|layer| (layer.name.clone(), layer.kind.clone()));
        Layers::named(named).map_err(|error| self.fault(place(&error, &read), error)).ok()
    }

    fn layer(&mut self, table: &Spanned<DeValue<'_>>) -> Option<Layer> {
        let before = self.faults.len();
        let DeValue::Table(keys) = table.get_ref() else {
            self.fault(table.span(), "a layer begins with `[[device.layer]]`");
            return None;
        };
        let (mut kind, mut name) = (None, None);
        let mut settings = Vec::new();
        for (key, value) in keys {
            match key.get_ref().as_ref() {
                "kind" => kind = self.one_of("kind", &KINDS, value),
                "name" => name = self.name(value),
                _ => settings.extend(self.setting(key, value, "layer")),
            }
        }
        if !keys.keys().any(|key| key.get_ref() == "kind") {
            self.fault(table.span(), "the layer has no `kind`");
        }
        let kind = self.kind(kind?, table.span(), settings);
        let kind = kind.filter(|_| self.faults.len() == before)?;
        Some(Layer { span: table.span(), name, kind })
    }

    fn name(&mut self, value: &Spanned<DeValue<'_>>) -> Option<LayerName> {
        let DeValue::String(name) = value.get_ref() else {
            self.fault(value.span(), "`name` is not a text");
            return None;
        };
        name.parse().map_err(|error| self.fault(value.span(), error)).ok()
    }

    /// Parses the options of a layer as those of `ublk-target interpose attach`.
    fn kind(
        &mut self,
        kind: &str,
        span: Range<usize>,
        settings: Vec<Setting>,
    ) -> Option<LayerKind> {
        let line = |settings: &[Setting]| {
            let options = settings.iter().flat_map(|setting| setting.arguments.clone());
            let words = ["ublk-target", "interpose", "attach", "--id=0", kind].map(str::to_owned);
            words.into_iter().chain(options).collect()
        };
        let parsed = self.parsed(&format!("layer {kind}"), span, settings, &line)?;
        let Command::Interpose(Interpose::Attach { layer, .. }) = parsed else { return None };
        Some(layer.kind())
    }
}

/// The place to report an error of the layers together.
fn place(error: &BadLayers, layers: &[Layer]) -> Range<usize> {
    let wrong = if let BadLayers::SameName(name) = error { Some(name) } else { None };
    let is_it = |layer: &&Layer| wrong.is_none() || layer.name.as_ref() == wrong;
    layers.iter().rfind(is_it).map(|layer| layer.span.clone()).unwrap_or_default()
}
