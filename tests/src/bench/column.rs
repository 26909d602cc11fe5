//! What is done to each device: the columns of the table.

use super::row::Requests;

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    /// What programs call it.
    pub name: &'static str,
    /// What the table calls it, in two lines.
    pub title: [&'static str; 2],
    /// fio's `rw`.
    pub rw: &'static str,
    /// Bytes of a request.
    pub block_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// Requests of a run: so many that a run takes a good part of a second, since fio tells its
    /// time in milliseconds.
    pub requests: u64,
    /// Chunk of a stripe on which requests do not cross a border, in bytes.
    wide_chunk: u64,
    /// Longer than what the backings take.
    pub is_cut: bool,
    /// Chunk of a stripe on which each request crosses one border, and the offset of the first
    /// request at which that is so, in bytes.
    narrow_chunk: (u64, u64),
}

const KIB: u64 = 1 << 10;
/// How much of a device is read or written, in bytes.
pub const SPAN: u64 = 768 << 20;

/// All columns.
pub const COLUMNS: [Column; 5] = [
    small("qd1", ["4 KiB rand.", "read, QD1"], "randread", 1, 32 << 10),
    small("qd32", ["4 KiB rand.", "read, QD32"], "randread", 32, 64 << 10),
    small("qd32-write", ["4 KiB rand.", "write, QD32"], "randwrite", 32, 64 << 10),
    LARGE,
    Column { name: "large-cut", title: ["128 KiB, QD8,", "limit 127 KiB"], is_cut: true, ..LARGE },
];

const LARGE: Column = Column {
    name: "large",
    title: ["128 KiB seq.", "read, QD8"],
    rw: "read",
    block_bytes: 128 * KIB,
    depth: 8,
    requests: 4 * (SPAN / (128 * KIB)),
    wide_chunk: 512 * KIB,
    is_cut: false,
    narrow_chunk: (64 * KIB, 0),
};

const fn small(
    name: &'static str,
    title: [&'static str; 2],
    rw: &'static str,
    depth: u32,
    requests: u64,
) -> Column {
    let (block_bytes, wide_chunk) = (4 * KIB, 64 * KIB);
    let narrow_chunk = (4 * KIB, 2 * KIB);
    let is_cut = false;
    Column { name, title, rw, block_bytes, depth, requests, wide_chunk, is_cut, narrow_chunk }
}

impl Column {
    /// The chunk of a stripe on which requests lie like this, and the offset of the first request,
    /// in bytes.
    pub fn chunk_and_offset(&self, requests: Requests) -> (u64, u64) {
        match requests {
            Requests::Within => (self.wide_chunk, 0),
            Requests::Crossing => self.narrow_chunk,
        }
    }

    /// Requests of a run; of a quick one, an eighth.
    pub fn requests(&self, quick: bool) -> u64 {
        if quick { self.requests / 8 } else { self.requests }
    }

    /// Options of fio for a device, without their dashes.
    pub fn options(&self, device: &str, offset: u64, requests: u64) -> Vec<String> {
        let mut options =
            ["ioengine=io_uring", "direct=1", "registerfiles=1", "fixedbufs=1", "norandommap=1"]
                .map(String::from)
                .to_vec();
        options.extend([
            format!("filename={device}"),
            format!("rw={}", self.rw),
            format!("bs={}", self.block_bytes),
            format!("iodepth={}", self.depth),
            format!("offset={offset}"),
            format!("size={SPAN}"),
            // More than is done: the number of requests is to end the run.
            format!("io_size={}", 2 * requests * self.block_bytes),
            format!("number_ios={requests}"),
        ]);
        options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many chunks the request at an offset touches.
    fn chunks(at: u64, length: u64, chunk: u64) -> u64 {
        (at + length - 1) / chunk - at / chunk + 1
    }

    #[test]
    fn requests_lie_on_chunks_as_it_is_said() {
        for column in COLUMNS {
            for (requests, expected) in [(Requests::Within, 1), (Requests::Crossing, 2)] {
                let (chunk, offset) = column.chunk_and_offset(requests);
                for number in 0..100 {
                    let at = offset + number * column.block_bytes;
                    let touched = chunks(at, column.block_bytes, chunk);
                    assert_eq!(touched, expected, "{} at {at}", column.name);
                }
            }
        }
    }

    #[test]
    fn sequential_runs_cover_the_span_evenly() {
        let large = COLUMNS[3];
        assert_eq!(large.requests * large.block_bytes % SPAN, 0);
        assert_eq!(large.requests(true), large.requests / 8);
    }

    #[test]
    fn the_number_of_requests_ends_a_run() {
        let options = COLUMNS[0].options("/dev/x", 2048, 32768);
        assert!(options.contains(&"number_ios=32768".into()), "{options:?}");
        assert!(options.contains(&"io_size=268435456".into()));
        assert!(options.contains(&"offset=2048".into()));
    }
}
