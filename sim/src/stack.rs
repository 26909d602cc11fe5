//! Devices on devices. Their lanes share the threads of a few processes, with few workers.
//!
//! Each device has a real lane and its own kernel. The operations of a device are requests to the
//! device below. The kernel is sound, so only a deadlock can happen: if nothing progresses while
//! requests are open, the run fails and reports who holds what.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use rand_xoshiro::SplitMix64;
use rand_xoshiro::rand_core::{Rng as _, SeedableRng as _};
use ublk_engine::request::Geometry;
use ublk_engine::route::{DiscardCall, Route};
use ublk_engine::target::{BaseTarget, LoopTarget};

use crate::draw::Draw as _;
use crate::kernel::{EndedRequest, PendingRequest, Phase, StackPart, Workers};
use crate::layout;
use crate::mapping::Mapping;
use crate::setup::{Hostility, Setup};
use crate::world::{Options, World};

/// Which devices may share a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// As in a server: no device waits for another one of the process. A device waits for those
    /// below it, for those that share a process with these, and for what these wait for.
    Apart,
    /// No device is below another one of the process.
    NoneBelow,
    /// Any.
    Any,
}

/// The result of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Requests, including those of upper devices to lower ones.
    pub requests: u64,
    /// Those of upper devices to lower ones.
    pub passed_down: u64,
    /// How many devices are below the highest one.
    pub top: usize,
    /// Devices that share a process with another.
    pub beside: usize,
    /// How often a worker was needed and none was free.
    pub missed: u64,
    /// How often an operation found no free tag of the device below.
    pub punted: u64,
    /// Steps. All checks of the device ran after each.
    pub steps: u64,
}

/// The pages of a device that its clients use.
const OWN_PAGES: u32 = 16;
const PAGE: u64 = 4096;
/// The maximum number of steps until all open requests have ended.
const PATIENCE: u64 = 400_000;

struct Member {
    world: World,
    /// The device below, and the offset of the backing on it.
    on: Option<(usize, u64)>,
    thread: usize,
}

struct Thread {
    process: usize,
    tags: u32,
    workers: Rc<RefCell<Workers>>,
}

/// Devices and threads.
struct Stack {
    rng: SplitMix64,
    members: Vec<Member>,
    threads: Vec<Thread>,
    outcome: Outcome,
}

/// A step of a device.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A client sends a request.
    Ask,
    Submit,
    Start,
    Finish,
    Handle,
    Turn,
    /// An operation tries to become a request of the device below.
    PassDown(PendingRequest),
}

/// Plays a seed.
///
/// # Panics
/// If a check fails, or the stack deadlocks.
#[must_use]
pub fn play(seed: u64, sharing: Sharing, options: &Options) -> Outcome {
    let mut stack = Stack::new(seed, sharing, options);
    for _ in 0..options.steps {
        stack.step();
    }
    stack.end();
    stack.outcome
}

/// The device below each device, if there is one. Lower devices come first.
fn draw_shape(rng: &mut SplitMix64) -> Vec<Option<usize>> {
    let count = 2 + rng.index(5);
    let mut below: Vec<Option<usize>> = vec![None];
    for device in 1..count {
        // The second device is always on the first, so that there is a stack.
        let is_on_drive = device > 1 && rng.chance(350);
        below.push((!is_on_drive).then(|| rng.index(device)));
    }
    below
}

/// How many devices are below the highest one.
fn depth(shape: &[Option<usize>]) -> usize {
    let below = |device: usize| std::iter::successors(shape[device], |it| shape[*it]).count();
    (0..shape.len()).map(below).max().unwrap_or(0)
}

/// The process that serves each device.
fn draw_processes(rng: &mut SplitMix64, shape: &[Option<usize>], sharing: Sharing) -> Vec<usize> {
    let mut processes: Vec<usize> = Vec::new();
    for device in 0..shape.len() {
        let waits_for = waited_for(device, shape, &processes, sharing);
        let is_fit = |process: &usize| {
            let mut served = (0..device).filter(|other| processes[*other] == *process);
            served.all(|other| !waits_for.contains(&other))
        };
        let count = processes.iter().max().map_or(0, |highest| highest + 1);
        let fitting: Vec<_> = (0..count).filter(is_fit).collect();
        let alone = fitting.is_empty() || sharing != Sharing::Any && rng.chance(250);
        processes.push(if alone { count } else { rng.pick(&fitting) });
    }
    processes
}

/// The devices that this one has to wait for, as far as `sharing` forbids them.
fn waited_for(
    device: usize,
    shape: &[Option<usize>],
    processes: &[usize],
    sharing: Sharing,
) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let mut to_do: Vec<usize> = shape[device].into_iter().collect();
    while let Some(below) = to_do.pop().filter(|_| sharing != Sharing::Any) {
        if found.insert(below) {
            to_do.extend(shape[below]);
            let beside = |other: &usize| processes[*other] == processes[below];
            let all = (0..processes.len()).filter(beside);
            to_do.extend(all.filter(|_| sharing == Sharing::Apart));
        }
    }
    found
}

impl Stack {
    fn new(seed: u64, sharing: Sharing, options: &Options) -> Self {
        let mut rng = SplitMix64::seed_from_u64(seed ^ 0x57ac_57ac_57ac_57ac);
        let shape = draw_shape(&mut rng);
        let block = rng.pick(&[512, 512, 4096]);
        let own: Vec<_> =
            shape.iter().map(|_| u64::from(OWN_PAGES + rng.below(16)) * PAGE).collect();
        // The bytes of devices above come after the device's own.
        let mut sizes = own.clone();
        let mut on = vec![None; shape.len()];
        for device in (0..shape.len()).rev() {
            if let Some(below) = shape[device] {
                on[device] = Some((below, sizes[below]));
                sizes[below] += sizes[device];
            }
        }
        let mut stack = Self {
            rng: SplitMix64::seed_from_u64(seed),
            members: Vec::new(),
            threads: Vec::new(),
            outcome: Outcome::default(),
        };
        let processes = draw_processes(&mut rng, &shape, sharing);
        let (limit, workers) = (1 + rng.index(2), 1 + rng.index(3));
        for device in 0..shape.len() {
            let setup = draw_setup(&mut rng, sizes[device], block);
            let tags = u32::from(setup.depth);
            let thread = stack.thread_for(processes[device], tags, limit, workers);
            let world = World::new(rng.next_u64(), setup, options);
            let workers = Rc::clone(&stack.threads[thread].workers);
            let part = StackPart::new(device, workers, 0..own[device], on[device].is_some());
            world.kernel.borrow_mut().part = Some(part);
            stack.members.push(Member { world, on: on[device], thread });
        }
        stack.outcome.top = depth(&shape);
        let is_beside = |it: &&usize| processes.iter().filter(|other| other == it).count() > 1;
        stack.outcome.beside = processes.iter().filter(is_beside).count();
        stack
    }

    /// The least loaded thread of this process, or a new one.
    fn thread_for(&mut self, process: usize, tags: u32, limit: usize, workers: usize) -> usize {
        let is_fit = |at: &usize| self.threads[*at].process == process;
        let fitting = (0..self.threads.len()).filter(is_fit);
        let least = fitting.clone().min_by_key(|at| self.threads[*at].tags);
        if let Some(at) = least.filter(|_| fitting.count() >= limit) {
            self.threads[at].tags += tags;
            return at;
        }
        let workers = Workers { count: workers, held_by: Vec::new(), missed: 0 };
        self.threads.push(Thread { process, tags, workers: Rc::new(RefCell::new(workers)) });
        self.threads.len() - 1
    }

    /// One step of one device.
    fn step(&mut self) {
        let mut steps = self.steps();
        if !steps.iter().any(|(_, step)| step.is_progress()) {
            // Each lane may have entries to push.
            (0..self.members.len()).for_each(|device| self.take(device, Step::Turn));
            steps = self.steps();
            let moves = steps.iter().any(|(_, step)| step.is_progress());
            assert!(moves || self.is_quiet(), "{}", self.deadlock());
        }
        if let Some((device, step)) = (!steps.is_empty()).then(|| self.rng.pick(&steps)) {
            self.take(device, step);
        }
    }

    /// All possible steps.
    fn steps(&self) -> Vec<(usize, Step)> {
        let mut steps = Vec::new();
        for (device, member) in self.members.iter().enumerate() {
            let kernel = member.world.kernel.borrow();
            let mut may = |is_possible: bool, step| {
                steps.extend(is_possible.then_some((device, step)));
            };
            may(!kernel.closing && kernel.free_tag().is_some(), Step::Ask);
            may(kernel.pushed().next().is_some(), Step::Submit);
            may(kernel.can_start(), Step::Start);
            may(kernel.running.iter().any(|flight| flight.held_until <= kernel.now), Step::Finish);
            may(!kernel.posted.is_empty(), Step::Handle);
            may(true, Step::Turn);
            let Some((part, (below, _))) = kernel.part.as_ref().zip(member.on) else { continue };
            let has_tag = self.members[below].world.kernel.borrow().free_tag().is_some();
            let has_free = part.workers.borrow().has_free();
            for wanted in &part.wanted {
                let has_worker = kernel.has_worker(wanted.ticket);
                let moves = match (has_worker, wanted.is_punted) {
                    (true, _) => has_tag,
                    (false, true) => has_free,
                    (false, false) => true,
                };
                may(moves, Step::PassDown(*wanted));
            }
        }
        steps
    }

    fn take(&mut self, device: usize, step: Step) {
        let world = &mut self.members[device].world;
        let shared = Rc::clone(&world.kernel);
        let mut kernel = shared.borrow_mut();
        kernel.now += 500 + (kernel.rng.next_u64() & 0xfff);
        kernel.trace.note(|| format!("device {device}: {step:?}"));
        match step {
            Step::Ask => {
                let waiting = |tag: &u16| kernel.tags[usize::from(*tag)].phase == Phase::Waiting;
                if let Some(tag) = kernel.free_tag().filter(waiting) {
                    kernel.deliver(tag);
                }
                drop(kernel);
            }
            Step::Submit => {
                kernel.submit();
                drop(kernel);
            }
            Step::Start => {
                kernel.start_one();
                drop(kernel);
            }
            Step::Finish => {
                let now = kernel.now;
                let ready = |flight: &crate::kernel::Flight| flight.held_until <= now;
                let count = kernel.running.iter().filter(|flight| ready(flight)).count();
                let number = kernel.rng.index(count);
                let all = kernel.running.iter().enumerate().filter(|(_, flight)| ready(flight));
                let at = all.map(|(at, _)| at).nth(number);
                at.into_iter().for_each(|at| kernel.finish(at));
                drop(kernel);
            }
            Step::Handle => {
                drop(kernel);
                world.handle();
            }
            Step::Turn => {
                drop(kernel);
                world.turn();
            }
            Step::PassDown(wanted) => {
                drop(kernel);
                self.pass_down(device, wanted);
            }
        }
        self.report_above(device);
        self.members[device].world.look(matches!(step, Step::Turn));
        self.outcome.steps += 1;
    }

    /// Gives an operation a tag of the device below. If none is free, a worker waits for one.
    fn pass_down(&mut self, device: usize, wanted: PendingRequest) {
        let Some((below, offset)) = self.members[device].on else { return };
        let mut upper = self.members[device].world.kernel.borrow_mut();
        let mut lower = self.members[below].world.kernel.borrow_mut();
        let free =
            lower.free_tag().filter(|_| upper.has_worker(wanted.ticket) || !wanted.is_punted);
        let Some(part) = upper.part.as_mut() else { return };
        let Some(tag) = free else {
            let waiting = part.wanted.iter_mut().find(|it| it.ticket == wanted.ticket);
            waiting.into_iter().for_each(|it| it.is_punted = true);
            self.outcome.punted += u64::from(!wanted.is_punted);
            if wanted.is_punted {
                let _ = upper.punt(wanted.ticket);
            }
            return;
        };
        part.wanted.retain(|it| it.ticket != wanted.ticket);
        let (request, data) = upper.request_below(wanted.ticket, offset);
        lower.deliver_from_above(tag, request, data.as_deref(), (device, wanted.ticket));
        self.outcome.passed_down += 1;
    }

    /// Reports ended operations to the devices above.
    fn report_above(&self, device: usize) {
        let mut kernel = self.members[device].world.kernel.borrow_mut();
        let ended: Vec<EndedRequest> =
            kernel.part.as_mut().map_or_else(Vec::new, |it| it.ended.split_off(0));
        drop(kernel);
        for ended in ended {
            let above = &self.members[ended.of.0].world;
            above.kernel.borrow_mut().complete_below(&ended);
        }
    }

    fn is_quiet(&self) -> bool {
        self.members.iter().all(|member| member.world.kernel.borrow().is_quiet(false))
    }

    /// A report on a deadlock: who holds what, and who waits for it.
    fn deadlock(&self) -> String {
        let mut said = vec![format!("deadlock after {} steps", self.outcome.steps)];
        for (number, thread) in self.threads.iter().enumerate() {
            let workers = thread.workers.borrow();
            let mut serves = Vec::new();
            for (device, member) in
                self.members.iter().enumerate().filter(|(_, it)| it.thread == number)
            {
                let held = workers.held_by.iter().filter(|holder| **holder == device).count();
                let kernel = member.world.kernel.borrow();
                let waiting = kernel.queued.len();
                let wanted = kernel.part.as_ref().map_or(0, |part| part.wanted.len());
                let on =
                    member.on.map_or("a drive".to_owned(), |(below, _)| format!("device {below}"));
                serves.push(format!(
                    "device {device} on {on} holds {held}, and has {waiting} operations that wait for one \
                     and {wanted} that wait for a tag below"
                ));
            }
            said.push(format!(
                "of {} workers of thread {number} of process {}: {}",
                workers.count,
                thread.process,
                serves.join("; ")
            ));
        }
        said.join("\n")
    }

    /// Ends the run: open requests end, and then the devices, from the top.
    fn end(&mut self) {
        for member in &self.members {
            member.world.kernel.borrow_mut().closing = true;
        }
        self.run_until_quiet("requests come to an end");
        for device in (0..self.members.len()).rev() {
            self.members[device].world.kernel.borrow_mut().stop();
        }
        self.run_until_quiet("fetches come to an end");
        for thread in &self.threads {
            let workers = thread.workers.borrow();
            assert!(workers.held_by.is_empty(), "workers are left without an operation");
            self.outcome.missed += workers.missed;
        }
        for member in &mut self.members {
            let engine = member.world.lane.engine();
            assert!(engine.is_finished(), "all fetches have ended");
            let (stats, kernel) = (engine.stats(), member.world.kernel.borrow());
            assert_eq!(
                (kernel.asked, kernel.asked),
                (kernel.answered, kernel.succeeded),
                "answers"
            );
            assert_eq!((stats.failed, stats.unexpected, stats.stale), (0, 0, 0), "{stats}");
            self.outcome.requests += kernel.asked;
            drop(kernel);
            member.world.settle_accounts();
        }
    }

    fn run_until_quiet(&mut self, what: &str) {
        let limit = self.outcome.steps + PATIENCE;
        while !self.is_quiet() {
            assert!(self.outcome.steps < limit, "{what} never");
            self.step();
        }
    }
}

impl Step {
    /// Whether the step brings an open request closer to its end.
    const fn is_progress(self) -> bool {
        !matches!(self, Self::Ask | Self::Turn)
    }
}

/// The configuration of a device of this size on one backing, with a sound kernel.
fn draw_setup(rng: &mut SplitMix64, size: u64, block: u32) -> Setup {
    let drawn = Setup::of(rng.next_u64(), Hostility::None);
    let target = LoopTarget::new(size).within(layout::transfer_limit(rng));
    let mut slots = drawn.slots;
    slots.scratch = 0;
    let discard = rng.pick(&[DiscardCall::BlockCommand, DiscardCall::PunchHole]);
    Setup {
        slots,
        mapping: Mapping::Target(BaseTarget::Loop(target).into()),
        backings: vec![size],
        geometry: Geometry { size, block, ..drawn.geometry },
        // Devices with an I/O lane do not share lanes.
        io_lane: false,
        polled: false,
        routes: vec![Route::File(discard)],
        swaps: false,
        ..drawn
    }
}
