//! Reads what `cargo test` prints, standard output and error in one stream,
//! and makes one result of each test.

use std::collections::BTreeMap;

/// How a test went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It passed.
    Passed,
    /// It failed; its output.
    Failed(String),
    /// It is marked `#[ignore]`; the reason, or nothing.
    Ignored(String),
}

/// One test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestResult {
    /// The crate or test binary, then the test's path.
    pub name: String,
    /// How it went.
    pub verdict: Verdict,
}

/// Collects results line by line.
#[derive(Debug, Default)]
pub struct Parser {
    binary: String,
    results: Vec<TestResult>,
    /// Results of the binary at hand.
    current: Vec<TestResult>,
    /// Output of failed tests of the binary at hand.
    outputs: BTreeMap<String, String>,
    /// The failed test whose output is being read.
    section: Option<String>,
    /// A test whose name was printed but not its result (one test thread).
    begun: Option<String>,
    announced: Option<usize>,
    /// What a binary printed outside of tests, for a crash's report.
    stray: Vec<String>,
}

impl Parser {
    /// Takes one line; returns the test that it finished, if any.
    pub fn line(&mut self, line: &str) -> Option<&TestResult> {
        let text = line.trim_end();
        if let Some(binary) = binary_of(text) {
            self.finish_binary();
            self.binary = binary;
            return None;
        }
        if let Some(name) = text.strip_prefix("---- ").and_then(|t| t.strip_suffix(" stdout ----"))
        {
            self.section = Some(name.to_owned());
            return None;
        }
        if text == "failures:" {
            self.section = None; // the list of names, after the outputs
            return None;
        }
        if let Some(section) = &self.section {
            let output = self.outputs.entry(section.clone()).or_default();
            output.push_str(text);
            output.push('\n');
            return None;
        }
        if let Some(count) = announced(text) {
            self.announced = Some(count);
            return None;
        }
        if text.starts_with("test result: ") {
            self.check_summary(text);
            return None;
        }
        if let Some(verdict) = self.verdict(text) {
            self.current.push(verdict);
            return self.current.last();
        }
        if self.announced.is_some() && !text.is_empty() {
            self.stray.push(text.to_owned());
        }
        None
    }

    /// `test name ... ok`, at once or with the test's own output between.
    fn verdict(&mut self, text: &str) -> Option<TestResult> {
        let (name, result) = match text.strip_prefix("test ").and_then(|t| t.split_once(" ... ")) {
            Some((name, result)) => (name.to_owned(), result),
            None => {
                if let Some(name) = text.strip_prefix("test ").and_then(|t| t.strip_suffix(" ..."))
                {
                    self.begun = Some(name.to_owned());
                    return None;
                }
                (self.begun.clone()?, text)
            }
        };
        let verdict = if result.ends_with("ok") {
            Verdict::Passed
        } else if result.ends_with("FAILED") {
            Verdict::Failed(String::new())
        } else if let Some(reason) = result.strip_prefix("ignored") {
            Verdict::Ignored(reason.trim_start_matches([',', ' ']).to_owned())
        } else {
            self.begun = Some(name);
            return None;
        };
        self.begun = None;
        Some(TestResult { name: self.full_name(&name), verdict })
    }

    fn full_name(&self, test: &str) -> String {
        // Doc tests are named by their file, and say nothing of the mode.
        let test = test.trim_end_matches(" - should panic");
        format!("{}: {test}", self.binary)
    }

    fn check_summary(&mut self, text: &str) {
        let count = |word: &str| -> usize {
            text.split(['.', ';'])
                .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
                .unwrap_or(0)
        };
        let told = count("passed") + count("failed") + count("ignored");
        if told != self.current.len() {
            let read = self.current.len();
            let output = format!("libtest counts {told} tests, {read} were understood");
            self.fail_binary("(summary)", output);
        }
        self.announced = None;
        self.finish_binary();
    }

    fn fail_binary(&mut self, what: &str, output: String) {
        let name = self.full_name(what);
        self.current.push(TestResult { name, verdict: Verdict::Failed(output) });
    }

    /// Ends the binary at hand. One that announced tests and gave no summary
    /// has crashed.
    fn finish_binary(&mut self) {
        if let Some(count) = self.announced.take() {
            let done = self.current.len();
            let mut output = format!("ended after {done} of {count} tests");
            if let Some(name) = &self.begun {
                output.push_str(&format!(", in {name}"));
            }
            for line in &self.stray {
                output.push_str(&format!("\n{line}"));
            }
            self.fail_binary("(crashed)", output);
        }
        for mut result in std::mem::take(&mut self.current) {
            if let Verdict::Failed(output) = &mut result.verdict {
                let test = result.name.split_once(": ").map_or("", |(_, test)| test);
                if let Some(text) = self.outputs.remove(test) {
                    *output = text.trim_end().to_owned();
                }
            }
            self.results.push(result);
        }
        self.outputs.clear();
        self.stray.clear();
        self.section = None;
        self.begun = None;
    }

    /// All results, failed ones with their output.
    pub fn finish(mut self) -> Vec<TestResult> {
        self.finish_binary();
        self.results
    }
}

/// `     Running unittests src/lib.rs (target/debug/deps/bufreg-0123456789abcdef)`
/// or `   Doc-tests bufreg`.
fn binary_of(text: &str) -> Option<String> {
    let text = text.trim_start();
    if let Some(name) = text.strip_prefix("Doc-tests ") {
        return Some(format!("{name} (doc)"));
    }
    let (_, path) = text.strip_prefix("Running ")?.strip_suffix(')')?.rsplit_once('(')?;
    let file = path.rsplit('/').next()?;
    Some(file.rsplit_once('-').map_or(file, |(name, _)| name).to_owned())
}

fn announced(text: &str) -> Option<usize> {
    let rest = text.strip_prefix("running ")?;
    rest.strip_suffix(" tests").or_else(|| rest.strip_suffix(" test"))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<TestResult> {
        let mut parser = Parser::default();
        for line in text.lines() {
            parser.line(line);
        }
        parser.finish()
    }

    fn result(name: &str, verdict: Verdict) -> TestResult {
        TestResult { name: name.into(), verdict }
    }

    const MIXED: &str = "
     Running unittests src/lib.rs (target/debug/deps/bufreg-0123456789abcdef)

running 4 tests
test slot::tests::reuse ... ok
test slot::tests::slow ... ignored, takes a minute
test slot::tests::bad ... FAILED
test slot::tests::panics - should panic ... ok

failures:

---- slot::tests::bad stdout ----

thread 'slot::tests::bad' panicked at bufreg/src/slot.rs:9:9:
left: 1

failures:
    slot::tests::bad

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: test failed, to rerun pass `-p bufreg --lib`
   Doc-tests bufreg

running 1 test
test bufreg/src/lib.rs - Registry (line 12) ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.31s
";

    #[test]
    fn results_have_names_reasons_and_output() {
        let output = "\nthread 'slot::tests::bad' panicked at bufreg/src/slot.rs:9:9:\nleft: 1";
        assert_eq!(
            parse(MIXED),
            [
                result("bufreg: slot::tests::reuse", Verdict::Passed),
                result("bufreg: slot::tests::slow", Verdict::Ignored("takes a minute".into())),
                result("bufreg: slot::tests::bad", Verdict::Failed(output.into())),
                result("bufreg: slot::tests::panics", Verdict::Passed),
                result("bufreg (doc): bufreg/src/lib.rs - Registry (line 12)", Verdict::Passed),
            ]
        );
    }

    #[test]
    fn a_crashed_binary_is_a_failure() {
        let text = "     Running tests/a.rs (target/debug/deps/a-00ff)\nrunning 3 tests\n\
             test one ... ok\ntest two ... boom\nerror: test failed, to rerun pass `--test a`\n\
             Caused by:\n  process didn't exit successfully (signal: 11, SIGSEGV)\n\
             \x20    Running tests/b.rs (target/debug/deps/b-00ff)\nrunning 0 tests\n\n\
             test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let results = parse(text);
        assert_eq!(results.len(), 2);
        assert_eq!(results[1].name, "a: (crashed)");
        let Verdict::Failed(output) = &results[1].verdict else { panic!("not failed") };
        assert!(output.contains("1 of 3") && output.contains("in two"), "{output}");
        assert!(output.contains("SIGSEGV"), "{output}");
    }

    #[test]
    fn a_summary_that_does_not_fit_is_a_failure() {
        let text = "     Running unittests src/lib.rs (target/debug/deps/x-00ff)\n\
             running 2 tests\ntest one ... ok\ntest two: unreadable\n\
             test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert!(parse(text).iter().any(|r| r.name == "x: (summary)"));
    }

    #[test]
    fn output_between_name_and_result_is_skipped() {
        let text = "     Running unittests src/lib.rs (target/debug/deps/x-00ff)\n\
             running 1 test\ntest one ... noise of a child\nmore noise\nok\n\
             test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(parse(text), [result("x: one", Verdict::Passed)]);
    }

    #[test]
    fn results_are_told_as_they_come() {
        let mut parser = Parser::default();
        assert_eq!(parser.line("   Doc-tests a"), None);
        assert_eq!(parser.line("running 1 test"), None);
        let told = parser.line("test a.rs - (line 1) - compile ... ok").map(|r| r.name.clone());
        assert_eq!(told.as_deref(), Some("a (doc): a.rs - (line 1) - compile"));
    }
}
