//! Faults of the simulated kernel, with their rates and counts.

/// Declares the faults, each with its name and its usual rate (out of 1024).
macro_rules! faults {
    ($($(#[$doc:meta])* $kind:ident = $name:literal, $rate:literal;)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault {
            $($(#[$doc])* $kind,)*
        }

        impl Fault {
            /// All kinds.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// Its name in reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }

            /// How often it happens, out of 1024. 0 if it is drawn elsewhere or follows from other
            /// faults.
            pub(crate) const fn rate(self) -> u32 {
                match self {
                    $(Self::$kind => $rate,)*
                }
            }
        }
    };
}

faults! {
    /// A transfer moves fewer sectors than asked for.
    Short = "short transfer, whole sectors", 60;
    /// A transfer moves part of a sector.
    ShortOdd = "short transfer, odd length", 40;
    /// An operation fails with `EAGAIN`.
    OpAgain = "operation EAGAIN", 25;
    /// An operation fails with `EINTR`.
    OpIntr = "operation EINTR", 15;
    /// An operation fails with `ENOMEM`.
    OpNoMem = "operation ENOMEM", 15;
    /// All operations of a request fail with a transient error, for ever.
    OpStorm = "operation transient for ever", 4;
    /// An operation fails for good.
    OpError = "operation error", 12;
    /// A transfer moves nothing.
    OpZero = "transfer of nothing", 8;
    /// A failed transfer has moved some bytes.
    PartialEffect = "error after part was moved", 400;
    /// An operation takes longer than its deadline.
    Delayed = "operation past its deadline", 6;
    /// An operation neither completes nor can be cancelled for a long time.
    Lost = "operation lost for long", 6;
    /// An operation completes after the engine has quarantined its slot.
    LostCompletes = "completion of a lost operation", 0;
    /// An operation is cancelled.
    Cancelled = "operation cancelled", 0;
    /// An operation to be cancelled is running.
    CancelRuns = "cancel EALREADY", 0;
    /// An operation to be cancelled is not found.
    CancelMisses = "cancel ENOENT", 0;
    /// Another queue of the ring has the spare buffer.
    SpareTaken = "spare buffer of the ring taken", 0;
    /// All operations are cancelled by a message of the control plane.
    CancelAll = "everything cancelled", 2;
    /// A completion overtakes another.
    Reordered = "completion reordered", 0;
    /// A completion appears again.
    Duplicated = "completion duplicated", 0;
    /// A completion belongs to an earlier incarnation.
    Ghost = "completion of an earlier life", 0;
    /// A completion with invalid user data.
    Invalid = "invalid completion", 0;
    /// A completion of a command that the engine did not issue.
    Unasked = "answer without a command", 0;
    /// The submission queue has no room.
    QueueFull = "submission queue full", 20;
    /// The kernel takes only part of the submission queue.
    PartialSubmit = "part of the queue submitted", 100;
    /// Automatic registration fails, with fallback.
    AutoRegister = "automatic registration fails", 40;
    /// A fault of the port asks for automatic registration beyond the table.
    AutoRegisterBeyond = "automatic registration beyond the table", 0;
    /// Registration fails with `ENOMEM`.
    RegisterNoMem = "registration ENOMEM", 30;
    /// Registration fails with `EBUSY`.
    RegisterBusy = "registration EBUSY", 15;
    /// Registration fails with `EINVAL`.
    RegisterInvalid = "registration EINVAL", 15;
    /// Registrations of a request fail with a transient error, for ever.
    RegisterStorm = "registration transient for ever", 8;
    /// Unregistration fails with a transient error and the buffer stays.
    UnregisterAgain = "unregistration transient", 25;
    /// Unregistrations of a request fail with a transient error, for ever.
    UnregisterStorm = "unregistration transient for ever", 5;
    /// Unregistration fails and the buffer stays in its slot.
    UnregisterStuck = "unregistration fails, buffer stays", 6;
    /// Unregistration fails though the buffer has left its slot.
    UnregisterLies = "unregistration fails, buffer gone", 10;
    /// A copy moves only part.
    CopyPartial = "copy of part", 120;
    /// A copy fails with `EAGAIN` or `EINTR`.
    CopyTransient = "copy transient", 60;
    /// Copies of a request fail with a transient error, for ever.
    CopyStorm = "copy transient for ever", 4;
    /// A copy fails for good.
    CopyError = "copy error", 15;
    /// A copy moves nothing.
    CopyZero = "copy of nothing", 8;
    /// A descriptor reaches beyond the end of the device.
    BeyondEnd = "descriptor beyond the end", 4;
    /// A read or write is longer than a buffer.
    TooLong = "descriptor too long", 4;
    /// A range is not of whole blocks.
    Unaligned = "descriptor unaligned", 4;
    /// A range is empty.
    Empty = "descriptor of zero length", 4;
    /// A range overflows in bytes.
    Overflow = "descriptor overflows", 4;
    /// An operation is not known.
    Unknown = "unknown operation", 6;
    /// The planner refuses a request, or its later part.
    PlannerRefuses = "planner refuses", 0;
    /// The planner makes no progress with a request.
    PlannerIdles = "planner makes no progress", 0;
    /// The server is killed.
    Kill = "server killed", 0;
    /// An operation has its effect after the death of the server that asked for it.
    EffectAfterDeath = "operation completes after death", 0;
    /// A request fails because its server has died.
    FailedAtDeath = "request failed at death", 0;
    /// A request is given to the next incarnation.
    Reissued = "request reissued", 0;
    /// The ring refuses entries.
    RingBroken = "ring broken", 0;
    /// The driver refuses a commit.
    CommitRefused = "commit refused", 1;
    /// The planner shortens the first transfers of a request.
    PlannedShort = "transfers cut by the planner", 0;
    /// A request is answered with an error of the fault target.
    ErrorAnswer = "error of the fault target", 0;
    /// The planner is replaced while the device is live.
    Replaced = "planner replaced", 0;
    /// A request is held back.
    HeldBack = "request held back", 0;
    /// A request waits for the time that a throttle has given it.
    Throttled = "request throttled", 0;
    /// The planner is replaced while requests are held back.
    ReplacedAmongHeld = "planner replaced while requests were held back", 0;
    /// Requests are released before those that had begun have ended.
    HoldGivenUp = "hold given up", 0;
    /// A fault of the port shortens a transfer.
    PortShort = "transfer shortened by the port", 0;
    /// A fault of the port fails an operation with `EAGAIN`.
    PortAgain = "EAGAIN made by the port", 0;
}

/// How often each fault has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally([u64; Fault::ALL.len()]);

impl Default for Tally {
    fn default() -> Self {
        Self([0; Fault::ALL.len()])
    }
}

impl Tally {
    /// Counts one occurrence.
    pub const fn note(&mut self, fault: Fault) {
        self.0[fault as usize] += 1;
    }

    /// Counts several occurrences.
    pub const fn add(&mut self, fault: Fault, count: u64) {
        self.0[fault as usize] += count;
    }

    /// Adds another tally.
    pub fn merge(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, other)| *mine += other);
    }

    /// How often a fault has happened.
    #[must_use]
    pub const fn count(&self, fault: Fault) -> u64 {
        self.0[fault as usize]
    }

    /// Faults that have never happened.
    pub fn unseen(&self) -> impl Iterator<Item = Fault> + '_ {
        Fault::ALL.iter().copied().filter(|fault| self.count(*fault) == 0)
    }
}

/// The rate of each fault, out of 1024.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rates([u32; Fault::ALL.len()]);

impl Rates {
    /// No faults.
    #[must_use]
    pub const fn none() -> Self {
        Self([0; Fault::ALL.len()])
    }

    /// The usual rates, each multiplied by a `factor`.
    pub fn scaled(mut factor: impl FnMut() -> u32) -> Self {
        let mut rates = Self::none();
        for (rate, fault) in rates.0.iter_mut().zip(Fault::ALL) {
            *rate = (fault.rate() * factor() / 2).min(1024);
        }
        rates
    }

    /// Sets the rate of a fault.
    pub const fn set(&mut self, fault: Fault, rate: u32) {
        self.0[fault as usize] = rate;
    }

    /// The rate of a fault.
    #[must_use]
    pub const fn of(&self, fault: Fault) -> u32 {
        self.0[fault as usize]
    }
}
