//! Judges the kernel log: which lines mean that the kernel, or a driver under
//! test, went wrong.

use crate::proto::KmsgRecord;

/// A kind of trouble, and how the kernel words it.
struct Pattern {
    name: &'static str,
    matches: fn(&str) -> bool,
}

/// Wording as in `kernel/panic.c`, `kernel/hung_task.c`, `kernel/rcu/`,
/// `kernel/locking/lockdep.c`, `lib/refcount.c`, `mm/kasan/`, `lib/ubsan.c`,
/// `block/`, `drivers/nvme/host/`.
const PATTERNS: &[Pattern] = &[
    Pattern { name: "panic", matches: |t| t.starts_with("Kernel panic") },
    Pattern { name: "oops", matches: is_oops },
    Pattern { name: "warning", matches: is_warning },
    Pattern { name: "hung task", matches: |t| t.contains("blocked for more than ") },
    Pattern { name: "RCU stall", matches: is_rcu_stall },
    Pattern {
        name: "lockup",
        matches: |t| t.contains("BUG: soft lockup") || t.contains("hard LOCKUP"),
    },
    Pattern { name: "bug", matches: |t| t.starts_with("BUG: ") || t.starts_with("kernel BUG at ") },
    Pattern { name: "lockdep", matches: is_lockdep },
    Pattern { name: "reference count", matches: |t| t.starts_with("refcount_t: ") },
    Pattern { name: "UBSAN", matches: |t| t.starts_with("UBSAN: ") },
    Pattern {
        name: "memory",
        matches: |t| t.starts_with("Out of memory: ") || t.contains("page allocation failure"),
    },
    Pattern { name: "I/O hang", matches: is_io_hang },
];

fn is_oops(text: &str) -> bool {
    text.starts_with("Oops: ")
        || text.starts_with("general protection fault")
        || text.contains("unable to handle page fault")
        || text.contains("kernel NULL pointer dereference")
}

/// `WARNING: CPU: 1 PID: 2 at file.c:3 function+…`, or without the processor
/// in newer kernels, but not `WARNING:` as a word in some driver's advice.
fn is_warning(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("WARNING: ") else { return false };
    rest.starts_with("CPU: ")
        || rest.starts_with("possible ")
        || rest.starts_with("suspicious RCU usage")
        || rest.starts_with("inconsistent lock state")
        || rest.starts_with("bad unlock balance")
        || rest.split(' ').next().is_some_and(is_source_place)
}

/// `kernel/fork.c:123`
fn is_source_place(word: &str) -> bool {
    word.rsplit_once(':').is_some_and(|(file, line)| {
        (file.ends_with(".c") || file.ends_with(".h"))
            && !line.is_empty()
            && line.bytes().all(|byte| byte.is_ascii_digit())
    })
}

fn is_rcu_stall(text: &str) -> bool {
    text.starts_with("rcu: INFO: ")
        && (text.contains("self-detected stall") || text.contains("detected stall"))
        || text.starts_with("rcu: INFO: ") && text.contains("detected expedited stalls")
}

fn is_lockdep(text: &str) -> bool {
    text.starts_with("BUG: sleeping function called")
        || text.starts_with("BUG: scheduling while atomic")
        || text.contains("possible circular locking dependency detected")
        || text.contains("possible recursive locking detected")
        || text.starts_with("DEBUG_LOCKS_WARN_ON")
}

fn is_io_hang(text: &str) -> bool {
    let nvme = text.starts_with("nvme ") || text.starts_with("nvme:");
    (nvme && text.contains("timeout, ") && (text.contains("aborting") || text.contains("reset")))
        || text.contains("controller is down; will reset")
}

/// One record that means trouble.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What kind of trouble.
    pub kind: &'static str,
    /// The record's text.
    pub text: String,
    /// The record and what followed, for the report.
    pub context: Vec<String>,
}

/// Records of context shown with a finding.
const CONTEXT: usize = 30;

/// Finds the records that mean trouble, but for those that contain one of the
/// `allowed` texts.
pub fn findings(records: &[KmsgRecord], allowed: &[&str]) -> Vec<Finding> {
    let mut found = Vec::new();
    for (n, record) in records.iter().enumerate() {
        let text = record.text.trim_start();
        let Some(pattern) = PATTERNS.iter().find(|pattern| (pattern.matches)(text)) else {
            continue;
        };
        if allowed.iter().any(|allowed| text.contains(allowed)) {
            continue;
        }
        let context = records[n..].iter().take(CONTEXT).map(line).collect();
        found.push(Finding { kind: pattern.name, text: text.to_owned(), context });
    }
    found
}

/// A record as `dmesg` shows it.
pub fn line(record: &KmsgRecord) -> String {
    let (seconds, rest) = (record.time_us / 1_000_000, record.time_us % 1_000_000);
    format!("[{seconds:5}.{rest:06}] {}", record.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(texts: &[&str]) -> Vec<KmsgRecord> {
        let record = |(seq, text): (u64, &&str)| KmsgRecord {
            seq,
            time_us: 1_500_000,
            level: 4,
            text: (*text).to_owned(),
        };
        (0..).zip(texts).map(record).collect()
    }

    #[test]
    fn trouble_is_recognised_by_kind() {
        for (text, kind) in [
            ("WARNING: CPU: 0 PID: 12 at block/blk-mq.c:345 blk_mq_x+0x12/0x30", "warning"),
            ("WARNING: block/blk-mq.c:345 at blk_mq_x+0x12/0x30, CPU#1: fio/77", "warning"),
            ("WARNING: possible circular locking dependency detected", "warning"),
            ("BUG: kernel NULL pointer dereference, address: 0000000000000008", "oops"),
            ("BUG: unable to handle page fault for address: ffff8", "oops"),
            ("Oops: Oops: 0002 [#1] SMP NOPTI", "oops"),
            ("general protection fault, probably for non-canonical address 0xdead", "oops"),
            ("Kernel panic - not syncing: Fatal exception", "panic"),
            ("INFO: task kworker/u4:1:77 blocked for more than 60 seconds.", "hung task"),
            ("rcu: INFO: rcu_preempt self-detected stall on CPU", "RCU stall"),
            ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "RCU stall"),
            (
                "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... }",
                "RCU stall",
            ),
            ("watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [fio:812]", "lockup"),
            ("BUG: KASAN: slab-use-after-free in ublk_ch_uring_cmd+0x1/0x2", "bug"),
            ("BUG: sleeping function called from invalid context at mm/x.c:1", "bug"),
            ("kernel BUG at drivers/block/ublk_drv.c:1200!", "bug"),
            ("refcount_t: underflow; use-after-free.", "reference count"),
            ("UBSAN: array-index-out-of-bounds in drivers/x.c:1:2", "UBSAN"),
            ("fio: page allocation failure: order:5, mode:0x40dc0", "memory"),
            (
                "nvme nvme0: I/O tag 12 (100c) opcode 0x2 (I/O Cmd) QID 1 timeout, aborting req_op:READ(0) size:4096",
                "I/O hang",
            ),
        ] {
            let found = findings(&records(&[text]), &[]);
            assert_eq!(found.len(), 1, "{text}");
            assert_eq!(found[0].kind, kind, "{text}");
        }
    }

    #[test]
    fn harmless_texts_are_left_alone() {
        let harmless = records(&[
            "Warning: unable to open an initial console.",
            "WARNING: Unprivileged eBPF is enabled with eIBRS on",
            "nvme nvme0: 2/0/0 default/read/poll queues",
            "nvme nvme1: I/O timeout set to 30 s",
            "ublk_drv: module verification failed: signature and/or required key missing",
            "rcu: INFO: something else",
            "block: the device was blocked for maintenance",
            "EXT4-fs (nvme0n1p1): mounted filesystem without journal. Opts: (null)",
            "Debug: BUG: in the middle of a text",
            "x86/cpu: kernel BUG-free",
        ]);
        assert_eq!(findings(&harmless, &[]), []);
    }

    #[test]
    fn allowed_texts_pass_and_others_do_not() {
        let log = records(&[
            "INFO: task mkfs:1 blocked for more than 60 seconds.",
            "INFO: task ublk:2 blocked for more than 60 seconds.",
        ]);
        let found = findings(&log, &["task mkfs:"]);
        assert_eq!(found.len(), 1);
        assert!(found[0].text.contains("ublk:2"));
    }

    #[test]
    fn context_follows_the_finding() {
        let mut texts = vec!["before", "kernel BUG at a.c:1!", "RIP: 0010:f+0x1/0x2"];
        texts.extend(std::iter::repeat_n("more", 100));
        let found = findings(&records(&texts), &[]);
        assert_eq!(found[0].context.len(), CONTEXT);
        assert_eq!(found[0].context[1], "[    1.500000] RIP: 0010:f+0x1/0x2");
    }
}
