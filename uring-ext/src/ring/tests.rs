use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use super::*;
use crate::nvme::{Namespace, RetryDelays};
use crate::pool::BufferPool;
use crate::sqe::{FixedBuffer, FixedFile};

/// Pushes one entry and returns the result of its completion.
fn run(queues: &mut Queues<'_>, sqe: Sqe, user_data: u64) -> i32 {
    queues.push(&[sqe.user_data(user_data)]).unwrap();
    let mut cqes = [Cqe::default(); 4];
    loop {
        queues.submit_and_wait().unwrap();
        match queues.reap(&mut cqes) {
            0 => {}
            1 => break,
            more => panic!("{more} completions of one entry"),
        }
    }
    assert_eq!(cqes[0].user_data, user_data);
    cqes[0].res
}

#[test]
fn pool_buffers_move_bytes_through_fixed_files() {
    let mut file: File = tempfile();
    file.write_all(&[7_u8; 8192]).unwrap();
    let mut ring = ring(4, 8);
    let pool = BufferPool::new(2, 4096).unwrap();
    ring.register_empty_files(1).unwrap();
    ring.register_slots(3).unwrap();
    let mut queues = ring.queues();
    queues.set_files(FixedFile(0), &[file.as_raw_fd()]).unwrap();
    queues.set_buffers(1, &pool).unwrap();
    let buffer = FixedBuffer::Pool { slot: 2, addr: pool.addr(1, 0) };
    assert_eq!(run(&mut queues, Sqe::read_fixed(FixedFile(0), buffer, 4096, 0), 1), 4096);
    let write = Sqe::write_fixed(FixedFile(0), buffer, 4096, 8192, true);
    assert_eq!(run(&mut queues, write, 2), 4096);
    assert_eq!(run(&mut queues, Sqe::datasync(FixedFile(0)), 3), 0);
    let mut tail = [0_u8; 4096];
    file.read_exact_at(&mut tail, 8192).unwrap();
    assert!(tail.iter().all(|byte| *byte == 7));
}

#[test]
fn tables_change_while_the_ring_is_in_use() {
    let mut file: File = tempfile();
    file.write_all(&[9_u8; 8192]).unwrap();
    let mut ring = ring(4, 8);
    let pool = BufferPool::new(2, 4096).unwrap();
    ring.register_empty_files(200).unwrap();
    ring.register_slots(100).unwrap();
    let mut queues = ring.queues();
    let index = FixedFile(150);
    let read = |queues: &mut Queues<'_>| {
        let buffer = FixedBuffer::Pool { slot: 71, addr: pool.addr(1, 0) };
        run(queues, Sqe::read_fixed(index, buffer, 4096, 0), 1)
    };
    assert_eq!(read(&mut queues), -libc::EBADF);
    queues.set_files(FixedFile(149), &[file.as_raw_fd(), file.as_raw_fd()]).unwrap();
    assert_eq!(read(&mut queues), -libc::EFAULT);
    queues.set_buffers(70, &pool).unwrap();
    assert_eq!(read(&mut queues), 4096);
    queues.clear_buffers(0, 100).unwrap();
    assert_eq!(read(&mut queues), -libc::EFAULT);
    // More than one system call changes.
    let many = BufferPool::new(80, 4096).unwrap();
    queues.set_buffers(2, &many).unwrap();
    let last = FixedBuffer::Pool { slot: 81, addr: many.addr(79, 0) };
    assert_eq!(run(&mut queues, Sqe::read_fixed(index, last, 4096, 0), 2), 4096);
    queues.set_buffers(70, &pool).unwrap();
    assert_eq!(read(&mut queues), 4096);
    queues.clear_files(FixedFile(0), 200).unwrap();
    assert_eq!(read(&mut queues), -libc::EBADF);
    assert_eq!(queues.clear_files(FixedFile(199), 2), Err(Errno::EINVAL));
    assert_eq!(queues.clear_buffers(99, 2), Err(Errno::EINVAL));
    assert_eq!(queues.set_buffers(99, &pool), Err(Errno::EINVAL));
}

/// The kernel changes the entries before the one that fails, and returns their number.
#[test]
fn a_table_that_changes_in_part_is_an_error() {
    let file: File = tempfile();
    let closed = tempfile().as_raw_fd();
    let mut ring = ring(4, 8);
    ring.register_empty_files(8).unwrap();
    ring.register_slots(8).unwrap();
    let mut queues = ring.queues();
    let open = file.as_raw_fd();
    for files in [&[open, closed][..], &[closed, open], &[open, open, closed, open]] {
        assert_eq!(
            queues.set_files(FixedFile(0), files),
            Err(Errno::new(libc::EBADF)),
            "{files:?}"
        );
    }
    let pool = BufferPool::new(3, 4096).unwrap();
    let second =
        std::ptr::with_exposed_provenance_mut(usize::try_from(pool.addr(1, 0).get()).unwrap());
    // SAFETY: the page is the pool's second buffer, which nothing uses: the kernel refuses to
    // register it.
    assert_eq!(unsafe { libc::munmap(second, 4096) }, 0);
    assert_eq!(queues.set_buffers(0, &pool), Err(Errno::EFAULT));
    queues.clear_buffers(0, 8).unwrap();
}

#[test]
fn an_empty_slot_is_an_error_of_the_operation() {
    let file = tempfile();
    let mut ring = ring(4, 8);
    ring.register_empty_files(1).unwrap();
    ring.register_slots(4).unwrap();
    let mut queues = ring.queues();
    queues.set_files(FixedFile(0), &[file.as_raw_fd()]).unwrap();
    let lent = FixedBuffer::Lent { slot: 2, offset: 0 };
    let res = run(&mut queues, Sqe::read_fixed(FixedFile(0), lent, 4096, 0), 1);
    assert_eq!(res, -libc::EFAULT);
}

#[test]
fn a_full_queue_is_submitted_and_nothing_is_lost() {
    let file = tempfile();
    let mut ring = ring(2, 64);
    ring.register_empty_files(1).unwrap();
    let mut queues = ring.queues();
    queues.set_files(FixedFile(0), &[file.as_raw_fd()]).unwrap();
    for user_data in 0..20 {
        queues.push(&[Sqe::datasync(FixedFile(0)).user_data(user_data)]).unwrap();
    }
    let mut seen = [false; 20];
    let mut cqes = [Cqe::default(); 8];
    while seen.contains(&false) {
        queues.submit_and_wait().unwrap();
        let count = queues.reap(&mut cqes);
        for cqe in &cqes[..count] {
            assert_eq!(cqe.res, 0);
            let index = usize::try_from(cqe.user_data).unwrap();
            assert!(!std::mem::replace(&mut seen[index], true));
        }
    }
}

#[test]
fn double_entries_do_not_lie_across_the_end() {
    let [first, second] =
        Namespace { nsid: 1, block_shift: 9, retry_delays: RetryDelays::default() }
            .flush(FixedFile(1));
    let double = vec![first.clone(), second.clone()];
    let chain = vec![Sqe::nop().hard_link(), first.hard_link(), second, Sqe::nop()];
    let singles = vec![Sqe::nop(), Sqe::nop(), Sqe::nop()];
    let table = [
        (&singles, 7, 0),
        (&double, 6, 0),
        (&double, 7, 1),
        (&double, 15, 1),
        (&double, 8, 0),
        (&chain, 4, 0),
        // Its double entry would begin at the last entry of the array.
        (&chain, 6, 2),
        (&chain, 5, 0),
        (&chain, 7, 0),
    ];
    for (sqes, pushed, expected) in table {
        assert_eq!(padding(sqes, 8, pushed), expected, "{} after {pushed}", sqes.len());
    }
}

#[test]
fn delays_take_their_time_and_can_be_cancelled() {
    let mut ring = ring(2, 64);
    let mut queues = ring.queues();
    let began = std::time::Instant::now();
    // More than the queue can hold. They may end in another order on a machine that is busy.
    let times = [90, 70, 50, 30, 10];
    for (user_data, ms) in (0..).zip(times) {
        queues.push(&[Sqe::delay(ms * 1_000_000).user_data(user_data)]).unwrap();
    }
    queues.push(&[Sqe::delay(3600 * 1_000_000_000).user_data(9)]).unwrap();
    queues.push(&[Sqe::cancel(9).user_data(8)]).unwrap();
    let (mut seen, mut cqes) = (Vec::new(), [Cqe::default(); 8]);
    while seen.len() < times.len() + 2 {
        queues.submit_and_wait().unwrap();
        let count = queues.reap(&mut cqes);
        for cqe in &cqes[..count] {
            seen.push((cqe.user_data, cqe.res));
            if let Some(ms) = usize::try_from(cqe.user_data).ok().and_then(|n| times.get(n)) {
                assert!(began.elapsed() >= Duration::from_millis(*ms), "{cqe:?}");
            }
        }
    }
    seen.sort_unstable();
    let over = [0, 1, 2, 3, 4].map(|user_data| (user_data, -libc::ETIME));
    assert_eq!(seen, [&over[..], &[(8, 0), (9, -libc::ECANCELED)]].concat());
}

#[test]
fn settling_leaves_no_work_undone() {
    // More than the kernel runs in one call that does not ask for more.
    const ENTRIES: usize = 100;
    let setup = RingSetup { sq_entries: 128, cq_entries: 128, ..RingSetup::default() };
    let mut ring = Ring::new(&RingSetup { polling: Polling::Busy, ..setup }).unwrap();
    let mut queues = ring.queues();
    let mut cqes = [Cqe::default(); ENTRIES + 1];
    queues.submit_and_settle().unwrap();
    assert_eq!(queues.reap(&mut cqes), 0, "there is no work, and the call does not wait");
    for _ in 0..ENTRIES {
        queues.push(&[Sqe::nop_as_work()]).unwrap();
    }
    queues.submit_and_settle().unwrap();
    assert_eq!(queues.reap(&mut cqes), ENTRIES);
}

fn ring(sq_entries: u32, cq_entries: u32) -> Ring {
    Ring::new(&RingSetup { sq_entries, cq_entries, ..RingSetup::default() }).unwrap()
}

fn tempfile() -> File {
    let directory = std::env::temp_dir();
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags_tmpfile()
        .open(directory)
        .unwrap()
}

trait TmpFile {
    fn custom_flags_tmpfile(&mut self) -> &mut Self;
}

impl TmpFile for std::fs::OpenOptions {
    fn custom_flags_tmpfile(&mut self) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, libc::O_TMPFILE)
    }
}
