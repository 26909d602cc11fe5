//! Changing the layers of a device while it is used.

use std::time::Duration;

use crate::config::LayerEdit;
use crate::control::barrier::{Barrier, InWords, NotReached};
use crate::control::error::LayersError;
use crate::control::layout::Layout;
use crate::control::plan::Plan;
use crate::control::server::{Server, rewrite};
use crate::io_thread::hold::TargetChange;
use crate::os::steps::step;
use crate::socket::control_request::LayersChanged;

impl Server {
    /// Changes the layers of the device at the barrier, if that is reached within `limit` and while the
    /// change is wanted. Layers that stay keep their state.
    pub(super) fn change_layers(
        &mut self,
        plan: &mut Plan,
        edit: &LayerEdit,
        limit: Duration,
        is_wanted: impl Fn() -> bool,
    ) -> Result<LayersChanged, LayersError> {
        let before = &plan.config.layers;
        let (layers, name) = before.edited(edit)?;
        let (target, kept) = (plan.layout.with_layers(&layers), layers.kept_from(before));
        // All that can be made before requests are held back.
        self.layer_changes += 1;
        let change = |qid| {
            let target = target.for_queue_after(qid, self.layer_changes);
            TargetChange { target, kept: kept.clone(), is_made: false }
        };
        let changes = self.lanes.qids().map(change).collect();
        let barrier = Barrier::reach(&self.lanes, &self.wakeups, limit, is_wanted);
        let barrier = barrier.map_err(|error| in_words(error, &plan.layout))?;
        // The next server must know what this one serves. If this server dies before the lanes have
        // changed, no request has begun under the new order.
        rewrite(&mut self.record, |record| {
            record.config.layers.clone_from(&layers);
            record.target = record.config.target_name();
        })?;
        step("layers-recorded");
        let pause = barrier.change(changes);
        step("layers-changed");
        plan.config.layers = layers;
        plan.layout.target = target;
        log::info!(
            "device {}: {} from now on; requests were held back for {pause:.1?}",
            self.id,
            plan.config.target_name()
        );
        Ok(LayersChanged { name, pause })
    }
}

fn in_words(error: NotReached, layout: &Layout) -> LayersError {
    match error {
        NotReached::Busy { waited, oldest } => {
            let request = oldest.map_or_else(
                || "a lane of the device does not answer".to_owned(),
                |(qid, begun)| {
                    let index = begun.op.map(|op| usize::from(op.backing.0));
                    let backing = index.and_then(|index| layout.backings.get(index));
                    InWords { qid, begun, backing: backing.map(|it| it.path()) }.to_string()
                },
            );
            LayersError::Busy { waited, request }
        }
        NotReached::Interrupted(signal) => LayersError::Interrupted(signal),
        NotReached::Unwanted => LayersError::Unwanted,
        NotReached::Ended => LayersError::LaneEnded,
        NotReached::Failed(errno) => LayersError::NoDescriptors(errno),
    }
}
