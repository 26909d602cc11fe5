use super::*;

const DEVICE: DeviceNumber = (259, 5);
const DRIVE: DeviceNumber = (259, 2);
const SERVER: u32 = 172;
const CLIENT: u32 = 186;

fn parties() -> Parties {
    let (server, backings) = (vec![171, SERVER], vec![DRIVE, (259, 9)]);
    Parties { device: DEVICE, backings, server, client: CLIENT, sectors: 8 }
}

fn at(at_us: u64, what: What) -> Event {
    Event { at_us, thread: 0, what }
}

fn issued(at_us: u64, device: DeviceNumber, sector: u64) -> Event {
    at(at_us, What::Issued(Request { device, sector, sectors: 8 }))
}

fn completed(at_us: u64, device: DeviceNumber, sector: u64) -> Event {
    at(at_us, What::Completed(Request { device, sector, sectors: 8 }))
}

fn runs(at_us: u64, thread: u32) -> Event {
    at(at_us, What::Runs(thread))
}

/// All events of a read.
fn whole() -> Vec<Event> {
    vec![
        runs(5, SERVER),
        issued(110, DEVICE, 8000),
        runs(111, 1),
        runs(125, SERVER),
        issued(140, DRIVE, 16000),
        runs(150, 0),
        completed(200, DRIVE, 16000),
        runs(222, SERVER),
        completed(230, DEVICE, 8000),
        runs(260, CLIENT),
        issued(350, DEVICE, 8008),
    ]
}

const READ: Read = Read { sector: 8000, began_us: 100, ended_us: 300 };

#[test]
fn a_read_is_divided_into_stages_that_add_up() {
    let division = divide(&[READ], &whole(), &parties());
    assert_eq!(division.stages, WITH_DRIVE);
    assert_eq!(division.reads, [vec![10, 15, 15, 60, 22, 8, 30, 40]]);
    assert_eq!(division.left_out, 0);
}

#[test]
fn a_server_that_does_not_sleep_is_not_woken() {
    let awake: Vec<Event> = whole().into_iter().filter(|e| e.what != What::Runs(SERVER)).collect();
    let division = divide(&[READ], &awake, &parties());
    assert_eq!(division.reads, [vec![10, 0, 30, 60, 0, 30, 30, 40]]);
    let polls: Vec<Event> = awake.into_iter().filter(|e| e.what != What::Runs(CLIENT)).collect();
    let division = divide(&[READ], &polls, &parties());
    assert_eq!(division.reads, [vec![10, 0, 30, 60, 0, 30, 0, 70]]);
}

#[test]
fn a_read_over_two_drives_lasts_from_the_first_to_the_last() {
    let mut events = whole();
    events.insert(5, issued(145, (259, 9), 0));
    events.insert(8, completed(215, (259, 9), 0));
    let division = divide(&[READ], &events, &parties());
    assert_eq!(division.reads, [vec![10, 15, 15, 75, 7, 8, 30, 40]]);
}

#[test]
fn without_events_of_a_drive_the_server_is_one_stage() {
    let blind = Parties { backings: Vec::new(), ..parties() };
    let division = divide(&[READ], &whole(), &blind);
    assert_eq!(division.stages, WITHOUT_DRIVE);
    assert_eq!(division.reads, [vec![10, 15, 105, 30, 40]]);
}

#[test]
fn reads_whose_events_do_not_fit_are_left_out() {
    let unseen = Read { sector: 1, ..READ };
    let too_short = Read { ended_us: 210, ..READ };
    let backwards = Read { began_us: 300, ended_us: 100, ..READ };
    let division = divide(&[READ, unseen, too_short, backwards], &whole(), &parties());
    assert_eq!((division.reads.len(), division.left_out), (1, 3));
    let nothing = divide(&[], &[], &parties());
    assert_eq!((nothing.reads.len(), nothing.left_out), (0, 0));
    // One read without events of the drive, among others with them.
    let mut events = whole();
    for event in whole().into_iter().skip(1).take(9) {
        let on_drive =
            matches!(event.what, What::Issued(r) | What::Completed(r) if r.device == DRIVE);
        if !on_drive {
            events.push(Event { at_us: event.at_us + 1000, ..event });
        }
        events.push(Event { at_us: event.at_us + 2000, ..event });
    }
    events.sort_by_key(|event| event.at_us);
    let later = |by: u64| Read { began_us: 100 + by, ended_us: 300 + by, ..READ };
    let division = divide(&[READ, later(1000), later(2000)], &events, &parties());
    assert_eq!((division.stages.len(), division.reads.len(), division.left_out), (8, 2, 1));
}

proptest::proptest! {
    #[test]
    fn stages_always_add_up(
        times in proptest::collection::vec((0_u64..400, 0_usize..11), 0..40),
        began_us in 0_u64..400,
        length in 0_u64..400,
    ) {
        let kinds = whole();
        let mut events: Vec<Event> =
            times.iter().map(|(at_us, kind)| Event { at_us: *at_us, ..kinds[*kind] }).collect();
        events.sort_by_key(|event| event.at_us);
        let read = Read { sector: 8000, began_us, ended_us: began_us + length };
        let division = divide(&[read], &events, &parties());
        for stages in &division.reads {
            proptest::prop_assert_eq!(stages.iter().sum::<u64>(), length);
            proptest::prop_assert_eq!(stages.len(), division.stages.len());
        }
        proptest::prop_assert_eq!(division.reads.len() + division.left_out, 1);
    }
}
