//! The configuration of a device.

pub mod busy_wait;
mod layers;
pub mod lend;
pub mod on_death;
pub mod polling;
mod target;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use uring_ext::ring::Polling;

use self::busy_wait::BusyWait;
use self::lend::LendRequest;
use self::on_death::OnDeath;
use self::polling::{Unpolled, WrittenPolling};

pub use layers::{
    BadLayerName, BadLayers, LayerConfig, LayerEdit, LayerKind, LayerName, Layers, MAX_LAYERS,
};
pub use target::{ExtentConfig, TargetConfig};

/// The configuration of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// The id asked for; the driver chooses one otherwise.
    pub id: Option<u32>,
    /// Number of queues, 1 to 4,096. The driver takes no more than there are CPUs.
    pub queues: u16,
    /// Tags of each queue, 1 to 4,096.
    pub depth: u16,
    /// How to lend.
    pub lend: LendRequest,
    /// The slot of tag 0 of each queue; the other tags use the following slots. Without it, fused mode
    /// begins at 0, and slot mode takes any free slot.
    pub first_slot: Option<u16>,
    /// Issue the operations of each queue from a second lane.
    pub io_lane: bool,
    /// How long an operation on a backing may take before it is cancelled.
    pub io_timeout: Option<Duration>,
    /// Send NVMe commands to the backings, which must be whole namespaces.
    pub passthru: bool,
    /// How lanes wait for completions of operations.
    #[serde(with = "WrittenPolling")]
    pub polling: Polling,
    /// Whether lanes spin for completions before they sleep.
    #[serde(default)]
    pub busy_wait: BusyWait,
    /// What to do if a backing cannot be polled.
    pub unpolled: Unpolled,
    /// What happens to the device when its server dies.
    pub on_death: OnDeath,
    /// Block size in bytes, a power of two from 512 to 4,096; that of the backings if left out.
    #[serde(default)]
    pub block_size: Option<u32>,
    /// Whether the kernel skips the partition scan.
    // Not written if false, so that older programs can still serve the device.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_part_scan: bool,
    /// The target.
    pub target: TargetConfig,
    /// The layers before the target.
    // Not written if there are none, for the same reason.
    #[serde(default, skip_serializing_if = "Layers::is_empty")]
    pub layers: Layers,
}

impl DeviceConfig {
    /// One queue of 128 tags, the best lend mode, and the defaults for all other options.
    #[must_use]
    pub const fn of_target(target: TargetConfig) -> Self {
        Self {
            id: None,
            queues: 1,
            depth: 128,
            lend: LendRequest::Auto,
            first_slot: None,
            io_lane: false,
            io_timeout: None,
            passthru: false,
            polling: Polling::Off,
            busy_wait: BusyWait::Auto,
            unpolled: Unpolled::Refuse,
            on_death: OnDeath::Fail,
            block_size: None,
            no_part_scan: false,
            target,
            layers: Layers::none(),
        }
    }

    /// The target with its layers, as text: `loop`, `fault(loop)`.
    #[must_use]
    pub fn target_name(&self) -> String {
        let name = self.target.name().to_owned();
        let within = |name, layer: &LayerConfig| format!("{}({name})", layer.kind.name());
        self.layers.iter().rev().fold(name, within)
    }
}
