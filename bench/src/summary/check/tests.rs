use super::*;
use crate::sample::results;

fn invalid(change: impl FnOnce(&mut Results)) -> String {
    let mut results = results(1, 2);
    check(&results).unwrap();
    change(&mut results);
    let said = check(&results).unwrap_err().to_string();
    assert!(said.len() < 700 && !said.contains(char::is_control), "{said}");
    said
}

#[test]
fn what_cannot_be_is_told_in_a_line() {
    type Change = fn(&mut Results);
    let table: [(Change, &str); 20] = [
        (|r| r.samples[3].iops = f64::NAN, "iops of sample 3 is NaN, which is invalid"),
        (|r| r.samples[3].iops = -1.0, "iops of sample 3 is -1, "),
        (|r| r.samples[0].bytes_per_s = f64::INFINITY, "bytes_per_s of sample 0 is inf"),
        (|r| r.samples[0].latency.mean_ns = 1e300, "mean_ns of sample 0 is 1000"),
        (|r| r.samples[0].cpu.machine_us = -0.1, "machine_us of sample 0"),
        (|r| r.samples[0].cpu.server_us = Some(f64::NAN), "server_us of sample 0"),
        (|r| r.took_s = f64::NAN, "the time that the run took is NaN"),
        (|r| r.method.sample_s = -1.0, "the time of a sample is -1"),
        (|r| r.samples[9].round = u32::MAX, "the round of sample 9 is 4294967295"),
        (|r| r.samples[7].subject = "x\u{1b}[31m".into(), "sample 7 is of `x [31m`, which is not"),
        (|r| r.samples[7].load = "\n".repeat(9_999), "which is not among the loads"),
        (|r| r.samples[1] = r.samples[0].clone(), "sample 1 is the second of `raw` with `randread"),
        (|r| r.subjects[1].name = "raw".into(), "two subjects are named `raw`"),
        (|r| r.loads[1].name = r.loads[0].name.clone(), "two loads are named"),
        (
            |r| r.subjects[1].title = "t".repeat(9_999_999),
            "has 9999999 characters; it has 1 to 200",
        ),
        (|r| r.loads[1].title = " ".into(), "has 0 characters"),
        (|r| r.incomplete = Some("<".repeat(99_999)), "has 99999 characters"),
        (|r| r.arguments = vec![String::new(); 1001], "there are 1001 arguments"),
        (
            |r| r.samples[2].latency.percentiles.reverse(),
            "percentiles of sample 2 are not in order",
        ),
        (|r| r.samples[2].latency.percentiles[0].0 = f64::NAN, "percentiles of sample 2"),
    ];
    for (change, expected) in table {
        let said = invalid(change);
        assert!(said.contains(expected), "{said}\n  should have {expected}");
    }
    let many = invalid(|results| {
        let load = results.loads[0].clone();
        let another = |n| crate::results::Load { name: format!("load {n}"), ..load.clone() };
        results.loads.extend((0..300).map(another));
    });
    assert!(many.contains("loads, and no run has more than 200"), "{many}");
}

#[test]
fn files_that_are_something_else_are_refused() {
    let whole = serde_json::to_string(&results(1, 1)).unwrap();
    let at = Path::new("a.json");
    let read = parse(at, whole.as_bytes()).unwrap();
    assert!(read.subjects == results(1, 1).subjects && read.loads == results(1, 1).loads);
    assert_eq!(read.samples.len(), results(1, 1).samples.len());
    let table = [
        (String::new(), "a.json is not a file of `ublk-bench run`: EOF"),
        ("[1,2]".into(), "is not a file of"),
        (whole[..whole.len() / 2].to_owned(), "is not a file of"),
        ("{\"format\":-1}".into(), "is not a file of"),
        ("{\"format\":2}".into(), "a.json has format 2, this program reads format 1"),
        ("{\"format\":1}".into(), "missing field"),
        (whole.replacen("\"iops\":", "\"iops\":1e999,\"x\":", 1), "number out of range"),
        (whole.replacen("\"iops\":", "\"iops\":null,\"x\":", 1), "invalid type: null"),
        (whole.replacen("\"iops\":", "\"iops\":-", 1), "a.json: iops of sample 0 is -"),
        (whole.replacen("\"family\":\"raw\"", "\"family\":\"\\n\\u001b\"", 1), "unknown variant"),
    ];
    for (text, expected) in table {
        let said = parse(at, text.as_bytes()).unwrap_err().to_string();
        assert!(said.contains(expected), "{said}\n  should have {expected}");
        assert!(!said.contains(char::is_control), "{said:?}");
    }
}

#[test]
fn files_that_are_not_there_are_named() {
    let said = read(Path::new("/no/such/file")).unwrap_err().to_string();
    assert!(said.starts_with("cannot read /no/such/file: "), "{said}");
    let directory = tempfile::tempdir().unwrap();
    assert!(read(directory.path()).is_err());
}
