//! Parser of the kernel's trace.

/// The numbers of a block device: major and minor.
pub type DeviceNumber = (u32, u32);

/// An event of the trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The time, in microseconds of the monotonic clock.
    pub at_us: u64,
    /// The thread in whose context it happened.
    pub thread: u32,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// `block_rq_issue`: a request was passed to a driver.
    Issued(Request),
    /// `block_rq_complete`: a driver completed it, or a part of it.
    Completed(Request),
    /// `sched_switch`: a processor switches to this thread.
    Runs(u32),
}

/// A request to a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The device; for a partition, its disk.
    pub device: DeviceNumber,
    /// The first sector, of 512 bytes.
    pub sector: u64,
    /// How many sectors.
    pub sectors: u64,
}

/// The contents of a trace.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The known events, in order of time.
    pub events: Vec<Event>,
    /// Whether the kernel reports lost events.
    pub lost: bool,
}

/// Parses the file `trace` of tracefs. Skips other events and lines without an event.
#[must_use]
pub fn parse(text: &str) -> Trace {
    let mut trace = Trace { events: text.lines().filter_map(line).collect(), lost: false };
    trace.lost = text.lines().any(|line| line.starts_with("CPU:") && line.contains("LOST"));
    trace.events.sort_by_key(|event| event.at_us);
    trace
}

/// ` comm-172 [001] d..2. 5.236476: sched_switch: prev_comm=…`, where the name of the thread may
/// contain anything except a newline.
fn line(line: &str) -> Option<Event> {
    let (thread, rest) = split_at_cpu(line)?;
    let thread = thread.trim_end().rsplit_once('-')?.1.parse().ok()?;
    let (_flags, rest) = rest.split_once(' ')?;
    let (at, rest) = rest.split_once(": ")?;
    let (name, arguments) = rest.split_once(": ")?;
    let what = match name {
        "block_rq_issue" => What::Issued(request(arguments)?),
        "block_rq_complete" => What::Completed(request(arguments)?),
        "sched_switch" => What::Runs(next_thread(arguments)?),
        _ => return None,
    };
    Some(Event { at_us: microseconds(at)?, thread, what })
}

/// The text before and after the processor number in brackets, which has at least three digits.
fn split_at_cpu(line: &str) -> Option<(&str, &str)> {
    let mut from = 0;
    while let Some(found) = line[from..].find(" [") {
        let open = from + found + 2;
        let close = open + line[open..].find(']')?;
        let is_number = close >= open + 3 && line[open..close].bytes().all(|b| b.is_ascii_digit());
        if is_number && line[close + 1..].starts_with(' ') {
            return Some((&line[..open - 2], &line[close + 2..]));
        }
        from = open;
    }
    None
}

/// `5.236476`: seconds with six decimal digits.
fn microseconds(text: &str) -> Option<u64> {
    let (seconds, micros) = text.trim().split_once('.')?;
    if micros.len() != 6 {
        return None;
    }
    let seconds: u64 = seconds.parse().ok()?;
    seconds.checked_mul(1_000_000)?.checked_add(micros.parse().ok()?)
}

/// `259,5 RS 4096 () 8000 + 8 be,0,4 [dd]`; a completion has no number of bytes.
fn request(arguments: &str) -> Option<Request> {
    let (device, rest) = arguments.split_once(' ')?;
    let (major, minor) = device.split_once(',')?;
    let mut words = rest.split_once(") ")?.1.split(' ');
    let sector = words.next()?;
    if words.next()? != "+" {
        return None;
    }
    Some(Request {
        device: (major.parse().ok()?, minor.parse().ok()?),
        sector: sector.parse().ok()?,
        sectors: words.next()?.parse().ok()?,
    })
}

/// `… ==> next_comm=ublkb0-q0 next_pid=172 next_prio=120`
fn next_thread(arguments: &str) -> Option<u32> {
    let rest = arguments.rsplit_once(" next_pid=")?.1;
    rest.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request = Request { device: (259, 5), sector: 8008, sectors: 8 };

    #[test]
    fn lines_are_events() {
        let table: [(&str, Option<Event>); 12] = [
            (
                "              dd-186     [000] .....     5.237144: block_rq_issue: 259,5 RS 4096 () 8008 + 8 be,0,4 [dd]",
                Some(Event { at_us: 5_237_144, thread: 186, what: What::Issued(REQUEST) }),
            ),
            (
                "          <idle>-0       [001] d.h1. 12345.000001: block_rq_complete: 259,5 R () 8008 + 8 be,0,4 [0]",
                Some(Event { at_us: 12_345_000_001, thread: 0, what: What::Completed(REQUEST) }),
            ),
            (
                "     kworker/0:1-11      [000] d..2.     5.245062: sched_switch: prev_comm=kworker/0:1 prev_pid=11 prev_prio=120 prev_state=I ==> next_comm=ublkb0-q0 next_pid=172 next_prio=120",
                Some(Event { at_us: 5_245_062, thread: 11, what: What::Runs(172) }),
            ),
            (
                // Users choose the names of threads.
                "a [1] x: y-z-11      [123] d..2.     5.245062: sched_switch: prev_comm=a next_pid=9 prev_pid=11 ==> next_comm= next_pid=1 x next_pid=7 next_prio=120",
                Some(Event { at_us: 5_245_062, thread: 11, what: What::Runs(7) }),
            ),
            (
                " x-1 [000] ..... 5.000000: block_rq_issue: 8,0 N 16 (12 00 00) 0 + 0 none,0,0 [a) 1 + 2]",
                Some(Event {
                    at_us: 5_000_000,
                    thread: 1,
                    what: What::Issued(Request { device: (8, 0), sector: 0, sectors: 0 }),
                }),
            ),
            ("# tracer: nop", None),
            ("", None),
            (" x-1 [000] ..... 5.000000: sched_waking: comm=dd pid=186", None),
            (" x-1 [000] ..... 5.00: sched_switch: next_pid=1", None),
            (" x-1 [000] ..... 99999999999999999999.000000: sched_switch: a next_pid=1", None),
            (" x-1 [000] ..... 5.000000: block_rq_issue: 259,5 RS 4096 () 8008 - 8", None),
            (" x-y [000] ..... 5.000000: sched_switch: a next_pid=1 b", None),
        ];
        for (text, expected) in table {
            assert_eq!(line(text), expected, "{text}");
        }
    }

    #[test]
    fn a_trace_is_in_the_order_of_time_and_says_what_it_lost() {
        let text = "# entries-in-buffer: 2\n\
                    x-1 [000] ..... 5.000009: sched_switch: a next_pid=1 b\n\
                    CPU:1 [LOST 23 EVENTS]\n\
                    x-1 [001] ..... 5.000003: sched_switch: a next_pid=2 b\n";
        let trace = parse(text);
        assert!(trace.lost);
        let order: Vec<_> = trace.events.iter().map(|event| event.at_us).collect();
        assert_eq!(order, [5_000_003, 5_000_009]);
        assert!(!parse("x [LOST-1 [000] ..... 5.000009: sched_switch: a next_pid=1 b").lost);
    }

    proptest::proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "(\\PC|\n| \\[0\\] |: |-|\\) |,){0,60}") {
            let events = parse(&text).events;
            proptest::prop_assert!(events.is_sorted_by_key(|event| event.at_us));
        }
    }
}
