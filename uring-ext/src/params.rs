//! Device parameters (`struct ublk_params`).
//!
//! The struct in `libublk` lacks the DMA alignment and the segment limits. Without them the block
//! layer would send buffers that the backing refuses. So this module has the whole struct, built
//! from the members that `libublk` binds.

use libublk::sys;

/// `struct ublk_params` up to and including the segment limits (Linux 6.15). Older drivers accept a
/// longer struct and ignore the rest (`ublk_ctrl_set_params` copies the smaller of the two
/// lengths).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Params {
    len: u32,
    types: u32,
    basic: sys::ublk_param_basic,
    discard: sys::ublk_param_discard,
    devt: sys::ublk_param_devt,
    zoned: sys::ublk_param_zoned,
    dma: sys::ublk_param_dma_align,
    pad: u32,
    seg: sys::ublk_param_segment,
}

impl Params {
    /// Parameters with the basic part only.
    #[must_use]
    pub fn new(basic: sys::ublk_param_basic) -> Self {
        Self { len: LEN, types: sys::UBLK_PARAM_TYPE_BASIC, basic, ..Self::default() }
    }

    /// Adds limits for discard and write zeroes.
    #[must_use]
    pub fn with_discard(mut self, discard: sys::ublk_param_discard) -> Self {
        self.types |= sys::UBLK_PARAM_TYPE_DISCARD;
        self.discard = discard;
        self
    }

    /// Adds the alignment of buffers in memory, in bytes: a power of two up to the page size
    /// (Linux 6.15). The driver takes it as a mask (`ublk_validate_params`).
    #[must_use]
    pub fn with_dma_alignment(mut self, bytes: u32) -> Self {
        self.types |= sys::UBLK_PARAM_TYPE_DMA_ALIGN;
        self.dma.alignment = bytes.saturating_sub(1);
        self
    }

    /// Adds the segment limits (Linux 6.15).
    #[must_use]
    pub fn with_segments(mut self, segments: sys::ublk_param_segment) -> Self {
        self.types |= sys::UBLK_PARAM_TYPE_SEGMENT;
        self.seg = segments;
        self
    }

    /// The basic part.
    #[must_use]
    pub const fn basic(&self) -> &sys::ublk_param_basic {
        &self.basic
    }

    /// Limits for discard and write zeroes, if there are any.
    #[must_use]
    pub const fn discard(&self) -> Option<&sys::ublk_param_discard> {
        if self.has(sys::UBLK_PARAM_TYPE_DISCARD) { Some(&self.discard) } else { None }
    }

    /// The alignment of buffers in memory, in bytes (Linux 6.15).
    #[must_use]
    pub const fn dma_alignment(&self) -> Option<u32> {
        let has_it = self.has(sys::UBLK_PARAM_TYPE_DMA_ALIGN);
        if has_it { Some(self.dma.alignment.saturating_add(1)) } else { None }
    }

    /// The segment limits (Linux 6.15).
    #[must_use]
    pub const fn segments(&self) -> Option<&sys::ublk_param_segment> {
        if self.has(sys::UBLK_PARAM_TYPE_SEGMENT) { Some(&self.seg) } else { None }
    }

    const fn has(&self, part: u32) -> bool {
        self.types & part != 0
    }

    /// The device numbers of the nodes; 0 before the device is started.
    #[must_use]
    pub const fn devt(&self) -> &sys::ublk_param_devt {
        &self.devt
    }

    /// An empty struct that `UBLK_U_CMD_GET_PARAMS` fills.
    #[must_use]
    pub fn request() -> Self {
        Self { len: LEN, ..Self::default() }
    }
}

#[cfg(test)]
impl Params {
    /// The offset of each part, with its UAPI name.
    pub(crate) fn offsets() -> [(&'static str, usize); 8] {
        use std::mem::offset_of;
        [
            ("len", offset_of!(Self, len)),
            ("types", offset_of!(Self, types)),
            ("basic", offset_of!(Self, basic)),
            ("discard", offset_of!(Self, discard)),
            ("devt", offset_of!(Self, devt)),
            ("zoned", offset_of!(Self, zoned)),
            ("dma", offset_of!(Self, dma)),
            ("seg", offset_of!(Self, seg)),
        ]
    }
}

/// `sizeof(struct ublk_params)` up to the segment limits. The padding before them is explicit.
const LEN: u32 = 136;
const _: () = assert!(size_of::<Params>() == LEN as usize);
