//! Files that are made, replaced, rewritten, appended to and removed, and what of them has to be
//! there after a power cut.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rand_xoshiro::SplitMix64;

use super::writers::Ending;

/// What a name may stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There is no such file.
    Absent,
    /// A file with the contents of a version, so many bytes.
    Whole { version: u64, len: usize },
    /// A file that is being written.
    Anything,
}

impl State {
    fn admits(self, contents: Option<&[u8]>) -> bool {
        match (self, contents) {
            (Self::Absent, None) | (Self::Anything, Some(_)) => true,
            (Self::Whole { version, len }, Some(found)) => {
                found.len() == len && found == contents_of(version, len)
            }
            (Self::Absent | Self::Whole { .. } | Self::Anything, _) => false,
        }
    }
}

/// The contents of a version.
pub fn contents_of(version: u64, len: usize) -> Vec<u8> {
    let words = (0..).map(|number| {
        let mut rng = SplitMix64::seed_from_u64(version << 32 ^ number);
        rng.next_u64().to_le_bytes()
    });
    words.take(len.div_ceil(8)).flatten().take(len).collect()
}

/// What is known of a directory.
#[derive(Debug, Default)]
pub struct Files {
    /// What each name may stand for: first what is durable, then what may have taken its place.
    names: BTreeMap<String, Vec<State>>,
    /// Length of the log, at least and at most, and which log it is.
    log: (usize, usize, u64),
    /// Names of no meaning, to be removed.
    leftovers: Vec<String>,
}

/// What was found after a power cut.
#[derive(Debug, Default)]
pub struct Checked {
    /// Names that were as they had to be.
    pub right: u64,
    /// Of these: changed when the power was cut.
    pub uncertain: u64,
    pub wrong: Vec<String>,
}

const LOG: &str = "log";
const NEW: &str = "new";

impl Files {
    /// A name is about to change.
    fn begin(&mut self, name: &str, state: State) {
        self.names.entry(name.to_owned()).or_insert_with(|| vec![State::Absent]).push(state);
    }

    /// The change is durable.
    fn settle(&mut self, name: &str, state: State) {
        match state {
            State::Absent => drop(self.names.remove(name)),
            State::Whole { .. } | State::Anything => {
                self.names.insert(name.to_owned(), vec![state]);
            }
        }
    }

    /// Compares a directory with what has to be in it, and takes what is there as what has to be
    /// from now on.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn check(&mut self, directory: &Path, into: &mut Checked) -> Result<()> {
        for (name, states) in std::mem::take(&mut self.names) {
            let path = directory.join(&name);
            let found = read(&path)?;
            let Some(state) = states.iter().find(|state| state.admits(found.as_deref())) else {
                let found =
                    found.map_or_else(|| "nothing".into(), |it| format!("{} bytes", it.len()));
                into.wrong.push(format!("{}: {found} instead of {states:?}", path.display()));
                continue;
            };
            into.right += 1;
            into.uncertain += u64::from(states.len() > 1);
            match state {
                State::Whole { .. } => drop(self.names.insert(name, vec![*state])),
                State::Anything => self.leftovers.push(name),
                State::Absent => {}
            }
        }
        let known = |name: &String| self.names.contains_key(name) || self.leftovers.contains(name);
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !known(&name) && name != LOG && name != NEW {
                into.wrong.push(format!("{}/{name} was removed", directory.display()));
            }
        }
        let (least, most, version) = self.log;
        let found = read(&directory.join(LOG))?.unwrap_or_default();
        let expected = contents_of(version, least);
        if found.len() > most || found.get(..least) != Some(&expected[..]) {
            let text = format!("{} bytes instead of {least} to {most}", found.len());
            into.wrong.push(format!("{}/{LOG}: {text}", directory.display()));
        }
        into.right += 1;
        self.log.1 = least;
        Ok(())
    }
}

/// The contents of a file, if there is one.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(contents) => Ok(Some(contents)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Most files in a directory.
const MOST: usize = 48;
/// Bytes that a record of the log has at most.
const RECORD: usize = 700;

/// Changes the files of a directory, and makes each change durable as POSIX has it: the file by
/// `fsync` or `fdatasync`, the name by `fsync` of its directory.
#[derive(Debug)]
pub struct Changer {
    directory: PathBuf,
    /// Open as long as names in it change.
    opened: File,
    pub files: Files,
    ending: Ending,
    rng: SplitMix64,
}

impl Changer {
    /// Makes the directory if need be, and removes what the cut before has left half done.
    ///
    /// # Errors
    /// Of the file system.
    pub fn new(
        directory: PathBuf,
        mut files: Files,
        ending: Ending,
        rng: SplitMix64,
    ) -> Result<Self> {
        if !directory.exists() {
            fs::create_dir(&directory)?;
            File::open(directory.parent().context("a parent")?)?.sync_all()?;
        }
        for name in files.leftovers.drain(..).chain([NEW.to_owned()]) {
            if directory.join(&name).exists() {
                fs::remove_file(directory.join(&name))?;
            }
        }
        let log = File::options().create(true).append(true).open(directory.join(LOG))?;
        // What follows the part that was durable was not promised to be anything.
        log.set_len(u64::try_from(files.log.0)?)?;
        log.sync_all()?;
        let opened = File::open(&directory)?;
        opened.sync_all()?;
        Ok(Self { directory, opened, files, ending, rng })
    }

    /// Changes something. When this returns, it is durable.
    ///
    /// # Errors
    /// Of the file system.
    pub fn change(&mut self) -> Result<()> {
        let count = self.files.names.len();
        let chosen = (count > 0).then(|| self.rng.random_range(0..count));
        let name = chosen.and_then(|chosen| self.files.names.keys().nth(chosen).cloned());
        match (self.rng.random_range(0..8), name) {
            (0, Some(name)) => self.remove(&name),
            (_, Some(name)) if count >= MOST => self.remove(&name),
            (1 | 2, Some(name)) => self.replace(&name),
            (3, Some(name)) => self.rewrite(&name),
            (4 | 5, _) => self.append(),
            (_, _) => self.create(),
        }
    }

    /// A name has changed, and the file system says that this is durable.
    fn settle(&mut self, name: &str, state: State) -> Result<()> {
        self.ending.ensure_promised()?;
        self.files.settle(name, state);
        Ok(())
    }

    fn draw(&mut self) -> (u64, usize) {
        let version = self.rng.next_u64() >> 32;
        let most = if self.rng.random_ratio(1, 8) { 128 << 10 } else { 12 << 10 };
        (version, self.rng.random_range(1..=most))
    }

    fn create(&mut self) -> Result<()> {
        let (version, len) = self.draw();
        let name = format!("{version:08x}");
        if self.files.names.contains_key(&name) {
            return Ok(());
        }
        self.files.begin(&name, State::Anything);
        let mut file = File::create_new(self.directory.join(&name))?;
        file.write_all(&contents_of(version, len))?;
        file.sync_all()?;
        self.opened.sync_all()?;
        self.settle(&name, State::Whole { version, len })
    }

    /// What editors do: either the old file is there or the new one.
    fn replace(&mut self, name: &str) -> Result<()> {
        let (version, len) = self.draw();
        let new = self.directory.join(NEW);
        let mut file = File::create(&new)?;
        file.write_all(&contents_of(version, len))?;
        file.sync_all()?;
        let state = State::Whole { version, len };
        self.files.begin(name, state);
        fs::rename(&new, self.directory.join(name))?;
        self.opened.sync_all()?;
        self.settle(name, state)
    }

    fn rewrite(&mut self, name: &str) -> Result<()> {
        let (version, _) = self.draw();
        let path = self.directory.join(name);
        let len = usize::try_from(fs::metadata(&path)?.len())?;
        self.files.begin(name, State::Anything);
        let mut file = File::options().write(true).open(&path)?;
        file.write_all(&contents_of(version, len))?;
        file.sync_data()?;
        self.settle(name, State::Whole { version, len })
    }

    fn append(&mut self) -> Result<()> {
        let (least, _, version) = self.files.log;
        let most = least + self.rng.random_range(1..=RECORD);
        self.files.log.1 = most;
        let mut file = File::options().append(true).open(self.directory.join(LOG))?;
        file.write_all(&contents_of(version, most)[least..])?;
        file.sync_data()?;
        self.ending.ensure_promised()?;
        self.files.log.0 = most;
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<()> {
        self.files.begin(name, State::Absent);
        fs::remove_file(self.directory.join(name))?;
        self.opened.sync_all()?;
        self.settle(name, State::Absent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: State = State::Whole { version: 1, len: 100 };
    const NEXT: State = State::Whole { version: 2, len: 60 };

    fn checked(files: &mut Files, directory: &Path) -> (u64, Vec<String>) {
        let mut checked = Checked::default();
        files.check(directory, &mut checked).unwrap();
        (checked.uncertain, checked.wrong)
    }

    #[test]
    fn contents_follow_from_the_version_and_begin_alike() {
        assert_eq!(contents_of(7, 20)[..13], contents_of(7, 13));
        assert_ne!(contents_of(7, 13), contents_of(8, 13));
        assert!(contents_of(7, 0).is_empty());
    }

    #[test]
    fn what_is_durable_has_to_be_there_or_what_was_to_take_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let put = |state| match state {
            State::Whole { version, len } => fs::write(&path, contents_of(version, len)).unwrap(),
            State::Anything => fs::write(&path, "?").unwrap(),
            State::Absent => drop(fs::remove_file(&path)),
        };
        let all = [State::Absent, OLD, NEXT, State::Anything];
        let rows: [(&[State], [bool; 4]); 5] = [
            (&[OLD], [false, true, false, false]),
            (&[OLD, NEXT], [false, true, true, false]),
            (&[OLD, State::Absent], [true, true, false, false]),
            (&[OLD, State::Anything], [false, true, true, true]),
            (&[State::Absent, State::Anything], [true, true, true, true]),
        ];
        for (states, allowed) in rows {
            for (found, allowed) in all.into_iter().zip(allowed) {
                put(found);
                let mut files = Files::default();
                files.names.insert("a".into(), states.to_vec());
                let (uncertain, wrong) = checked(&mut files, directory.path());
                assert_eq!(wrong.is_empty(), allowed, "{found:?} of {states:?}: {wrong:?}");
                assert_eq!(uncertain, u64::from(allowed && states.len() > 1));
                let (uncertain, wrong) = checked(&mut files, directory.path());
                assert!(uncertain == 0 && (wrong.is_empty() || !allowed), "it is adopted");
            }
        }
    }

    #[test]
    fn files_that_were_removed_must_not_come_back() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a"), "x").unwrap();
        let mut files = Files::default();
        files.begin("a", State::Anything);
        files.settle("a", State::Absent);
        assert_eq!(checked(&mut files, directory.path()).1.len(), 1);
    }

    #[test]
    fn a_log_may_be_longer_than_is_durable_but_not_shorter_or_other() {
        let directory = tempfile::tempdir().unwrap();
        for (len, version, allowed) in
            [(9, 0, false), (10, 0, true), (15, 0, true), (16, 0, false), (10, 1, false)]
        {
            fs::write(directory.path().join(LOG), contents_of(version, len)).unwrap();
            let mut files = Files { log: (10, 15, 0), ..Files::default() };
            let wrong = checked(&mut files, directory.path()).1;
            assert_eq!(wrong.is_empty(), allowed, "{len} bytes: {wrong:?}");
        }
    }

    #[test]
    fn what_a_file_system_says_after_the_cut_is_no_promise() {
        let directory = tempfile::tempdir().unwrap();
        let (own, ending) = (directory.path().join("own"), Ending::default());
        let files = Files::default();
        let mut changer =
            Changer::new(own.clone(), files, ending.clone(), SplitMix64::seed_from_u64(1)).unwrap();
        changer.create().unwrap();
        let name = changer.files.names.keys().next().unwrap().clone();
        ending.expect_cut();
        assert!(changer.remove(&name).is_err());
        let mut files = changer.files;
        assert_eq!(files.names[&name].len(), 2, "it may be there or not");
        assert_eq!(checked(&mut files, &own), (1, Vec::new()));
    }

    #[test]
    fn changes_leave_what_they_say() {
        let directory = tempfile::tempdir().unwrap();
        let own = directory.path().join("own");
        let mut files = Files::default();
        for seed in 0..3 {
            let mut changer = Changer::new(
                own.clone(),
                files,
                Ending::default(),
                SplitMix64::seed_from_u64(seed),
            )
            .unwrap();
            (0..100).for_each(|_| changer.change().unwrap());
            files = changer.files;
            assert_eq!(checked(&mut files, &own), (0, Vec::new()));
        }
        assert!(files.names.len() > 5 && files.log.0 > 1000, "{files:?}");
    }
}
