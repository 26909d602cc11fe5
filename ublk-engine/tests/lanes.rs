//! What lanes share, in every order in which their threads can take turns (as far as the memory model
//! lets them differ).

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

/// The atomics of the model checker.
mod atomic {
    pub use loom::sync::atomic::{AtomicUsize, Ordering};
}

/// The code of the program, on these atomics.
#[path = "../src/lane/quorum.rs"]
mod quorum;

use quorum::Quorum;

/// Control sees everything that the lanes did before they became quiet, and each of them sees what
/// control has changed once it is released. Exactly one lane is the last.
#[test]
fn all_lanes_are_quiet_when_the_last_one_has_arrived() {
    for lanes in [2, 3] {
        let mut model = loom::model::Builder::new();
        // With three lanes: all orders in which threads are interrupted at most twice.
        model.preemption_bound = (lanes > 2).then_some(2);
        model.check(move || {
            let quorum = Arc::new(Quorum::of(lanes));
            let work = Arc::new((0..lanes).map(|_| UnsafeCell::new(0)).collect::<Vec<_>>());
            let arrive = |lane: usize| {
                let (quorum, work) = (Arc::clone(&quorum), Arc::clone(&work));
                thread::spawn(move || {
                    // SAFETY: until this lane arrives, nobody else uses its cell. The checker says so
                    // if that is wrong.
                    work[lane].with_mut(|cell| unsafe { *cell = lane + 1 });
                    quorum.arrive()
                })
            };
            let threads: Vec<_> = (0..lanes).map(arrive).collect();
            if quorum.is_complete() {
                // SAFETY: all lanes have arrived, and stay quiet.
                let done = work.iter().map(|cell| cell.with(|cell| unsafe { *cell }));
                assert!(done.eq(1..=lanes), "a lane was not quiet");
            }
            let last = threads.into_iter().map(|it| it.join().unwrap());
            assert_eq!(last.filter(|is_last| *is_last).count(), 1);
            assert!(quorum.is_complete());
        });
    }
}
