use super::*;
use crate::sample;

fn count(page: &str, part: &str) -> usize {
    page.matches(part).count()
}

#[test]
fn the_page_is_whole_and_stands_alone() {
    let results = sample::results(1, 9);
    let page = html(&results).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>"));
    for (id, title) in SECTIONS {
        assert_eq!(count(&page, &format!("id=\"{id}\"")), 1, "{id}");
        assert!(page.contains(title));
    }
    // Six loads with three plots and a table each, and two more tables.
    assert_eq!((count(&page, "<svg"), count(&page, "</svg>")), (18, 18));
    assert_eq!(count(&page, "<table"), 8);
    assert_eq!((count(&page, "<desc id="), count(&page, "role=\"img\"")), (18, 18));
    for not in ["http:", "https:", "<script", "url(", "@import", " src=", "<link", "NaN", "inf\""] {
        assert!(!page.contains(not), "{not}");
    }
}

#[test]
fn only_what_writes_is_warned_of() {
    let mut results = sample::results(1, 2);
    assert!(html(&results).unwrap().contains("It overwrites the backing."));
    let writes = ["randwrite-qd32", "mixed-qd32", "write-1m"];
    results.loads.retain(|load| !writes.contains(&load.name.as_str()));
    results.samples.retain(|sample| !writes.contains(&sample.load.as_str()));
    let page = html(&results).unwrap();
    assert!(!page.contains("It overwrites") && page.contains("it says nothing about writes"));
}

#[test]
fn the_same_results_make_the_same_page() {
    let page = || html(&sample::results(4, 7)).unwrap();
    assert_eq!(page(), page());
}

#[test]
fn all_references_lead_somewhere() {
    let page = html(&sample::results(1, 9)).unwrap();
    let targets = page.split("href=\"#").skip(1).chain(page.split("aria-labelledby=\"").skip(1));
    let mut seen = 0;
    for target in targets {
        for id in target.split('"').next().unwrap().split(' ') {
            assert_eq!(count(&page, &format!(" id=\"{id}\"")), 1, "{id}");
            seen += 1;
        }
    }
    // Links: 7 sections, 18 plots and one to the limits; labels: 7 sections and 2 for each plot.
    assert_eq!(seen, 7 + 18 + 1 + 7 + 36);
}

#[test]
fn words_and_axes_are_explained() {
    let page = html(&sample::results(1, 9)).unwrap();
    assert_eq!(count(&page, "fio 3.39"), 2);
    for word in ["ours", "fused", "QD"] {
        assert_eq!(count(&page, &format!("<dt>{word}</dt>")), 1, "{word}");
    }
    assert_eq!(count(&page, "time that a request takes"), 6);
    let mut old = sample::results(1, 2);
    old.machine.fio = "fio-3.39".into();
    assert_eq!(count(&html(&old).unwrap(), "fio 3.39"), 2);
}

/// Devices are distinguished by the shapes of marks and the dashes of lines.
#[test]
fn devices_are_told_apart_without_colours() {
    let looks = Look::KEY.map(|(look, _)| look);
    let signs: std::collections::BTreeSet<_> = looks.iter().map(|look| look.sign()).collect();
    let marks = looks.map(|look| look.mark("point", 0.0, 0.0, 5.0).into_string());
    let marks: std::collections::BTreeSet<_> = marks.into_iter().collect();
    assert_eq!((signs.len(), marks.len()), (looks.len(), looks.len()));
    let dashes = looks.map(|look| {
        let rule = format!(".{} .curve {{ ", look.class());
        STYLE.split_once(&rule).map(|(_, rest)| rest.split('}').next().unwrap())
    });
    assert!(dashes.iter().all(Option::is_some), "{dashes:?}");
    assert_eq!(dashes.iter().collect::<std::collections::BTreeSet<_>>().len(), looks.len());
    let results = sample::results(1, 2);
    let all = results.subjects.iter().map(Look::of);
    let all: std::collections::HashSet<_> = all.collect();
    assert_eq!(all.len(), looks.len() + 1, "{all:?}");
}

#[test]
fn ratios_are_drawn_where_they_are() {
    let mut results = sample::results(1, 3);
    results.subjects.retain(|subject| ["raw", "fused"].contains(&subject.name.as_str()));
    results.samples.retain(|sample| ["raw", "fused"].contains(&sample.subject.as_str()));
    for sample in &mut results.samples {
        sample.iops = if sample.subject == "raw" { 100.0 } else { 50.0 };
    }
    let page = html(&results).unwrap();
    let scale = scale::Linear::new(1.0, plot::LEFT, plot::RIGHT);
    let half = format!("class=\"median\" cx=\"{}\"", plot::n(scale.at(0.5)));
    assert_eq!(count(&page, &half), 6, "{half}");
    assert_eq!(count(&page, "class=\"round\""), 18);
    assert_eq!(count(&page, ">0.500</text>"), 6);
    assert_eq!(count(&page, "0.500 [0.500–0.500]</td>"), 12, "in two tables");
}

#[test]
fn texts_cannot_become_markup() {
    let evil = "\"><script>alert(1)</script><img src=x onerror='1'>&";
    let mut results = sample::results(1, 3);
    for subject in &mut results.subjects {
        (subject.title, subject.command) = (evil.into(), evil.into());
        (subject.version, subject.skipped) = (Some(evil.into()), Some(evil.into()));
    }
    for load in &mut results.loads {
        (load.title, load.rw) = (evil.into(), evil.into());
    }
    results.arguments = vec![evil.into()];
    results.incomplete = Some(evil.into());
    results.version = evil.into();
    let (machine, backing) = (&mut results.machine, &mut results.backing);
    (machine.kernel, machine.cpu, machine.fio) = (evil.into(), evil.into(), evil.into());
    (machine.virtualization, machine.governor) = (Some(evil.into()), Some(evil.into()));
    (backing.path, backing.kind) = (evil.into(), evil.into());
    (backing.model, backing.scheduler) = (Some(evil.into()), Some(evil.into()));
    results.method.profile = evil.into();
    let page = html(&results).unwrap();
    assert!(!page.contains("<script") && !page.contains("<img"));
    assert!(page.contains("&lt;script&gt;") && page.contains("This run is incomplete"));
    assert!(!page.replace("&quot;", "").contains("\">\">"));
}

#[test]
fn little_and_odd_results_make_a_page() {
    let nothing = html(&sample::results(1, 0)).unwrap();
    assert!(nothing.contains("Too little was measured") && !nothing.contains("<svg"));
    let mut results = sample::results(1, 2);
    results.samples.retain(|sample| sample.subject == "fused");
    let alone = html(&results).unwrap();
    assert_eq!(count(&alone, "<svg"), 12, "no ratios without the raw backing");
    for sample in &mut results.samples {
        (sample.iops, sample.bytes_per_s, sample.cpu) = (0.0, 1e15, Default::default());
        sample.latency.percentiles = vec![(0.0, 0), (100.0, u64::MAX)];
    }
    let odd = html(&results).unwrap();
    assert!(!odd.contains("NaN") && !odd.contains("\"inf\""));
    results.loads.clear();
    assert!(html(&results).is_err(), "samples of unknown loads");
    results.samples.clear();
    results.subjects.clear();
    assert!(html(&results).is_ok());
}
