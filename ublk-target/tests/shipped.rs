//! What users get cannot be told to break promises, nor to send signals.

const HOOKS: [&str; 2] = ["UBLK_TARGET_FAULT", "UBLK_TARGET_STEP"];

#[test]
fn hooks_are_in_the_program_of_tests_only() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_ublk-target")).unwrap();
    let has = |text: &str| program.windows(text.len()).any(|bytes| bytes == text.as_bytes());
    assert!(has("/run/ublk-target"), "texts of the program are found");
    for hook in HOOKS {
        assert_eq!(has(hook), cfg!(feature = "test-hooks"), "{hook}");
    }
}
