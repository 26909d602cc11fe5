use super::*;

/// As /proc/kallsyms of Linux 6.12, 7.2 and 7.3 has them.
const LINUX_6_12: &str = "0000000000000000 t ublk_copy_user_pages\t[ublk_drv]\n\
                          0000000000000000 T io_register_rsrc\n";
const LINUX_7_2: &str = "0000000000000000 T io_buffer_register_bvec\n\
                         0000000000000000 t ublk_copy_user_pages.isra.0\t[ublk_drv]\n\
                         0000000000000000 t ublk_copy_user_pages.isra.0.cold\t[ublk_drv]\n";
const LINUX_7_3: &str = "0000000000000000 T io_buffer_register_bvec\n\
                         0000000000000000 T io_buffer_register_request\n\
                         0000000000000000 d io_buffer_register_request\n\
                         0000000000000000 T io_buffer_register_request_all\n\
                         0000000000000000 t ublk_copy_user_pages\t[ublk_drv]\n\
                         0000000000000000 t ublk_copy_user_pages.part.0\t[ublk_drv]\n";

fn symbols(act: &Act, kernel: &str) -> Vec<String> {
    act.find_in(kernel).into_iter().map(|found| found.symbol).collect()
}

#[test]
fn whichever_function_a_kernel_has_is_taken() {
    for (kernel, copies, lends) in [
        (LINUX_6_12, "ublk_copy_user_pages", &[][..]),
        (LINUX_7_2, "ublk_copy_user_pages.isra.0", &["io_buffer_register_bvec"]),
        (
            LINUX_7_3,
            "ublk_copy_user_pages",
            &["io_buffer_register_request", "io_buffer_register_bvec"],
        ),
    ] {
        assert_eq!(symbols(&COPY, kernel), [copies]);
        assert_eq!(symbols(&LEND, kernel), lends);
    }
    assert_eq!(COPY.find_in(LINUX_7_2)[0].function, "ublk_copy_user_pages");
}

#[test]
fn a_kernel_without_a_known_function_is_told_in_a_line() {
    let mut kernel =
        Kernel { release: "7.9.1-cloud".into(), symbols: LINUX_6_12.into(), has_driver: true };
    assert!(COPY.find_on(&kernel).is_ok());
    let line = LEND.find_on(&kernel).unwrap_err().to_string();
    for part in [
        "Linux 7.9.1-cloud",
        "/proc/kallsyms",
        "io_buffer_register_request (Linux 7.3), io_buffer_register_bvec (Linux 6.15 to 7.2)",
        "`ublk_register_io_buf`",
        "add it to `LEND` in tests/src/witness/mod.rs",
    ] {
        assert!(line.contains(part), "no {part} in {line}");
    }
    assert_eq!(line.lines().count(), 1);
    kernel.has_driver = false;
    kernel.symbols.clear();
    assert!(COPY.find_on(&kernel).unwrap_err().to_string().contains("modprobe ublk_drv"));
}

fn counts(copies: u64, by_request: u64, by_bvec: u64) -> Counts {
    let [request, bvec] = [0, 1].map(|number: usize| LEND.functions[number].name);
    Counts {
        release: "7.3.4".into(),
        copies: Count { act: &COPY, calls: vec![(COPY.functions[0].name, copies)] },
        loans: Count { act: &LEND, calls: vec![(request, by_request), (bvec, by_bvec)] },
    }
}

#[test]
fn all_requests_were_lent_or_all_copied() {
    assert!(counts(0, 2048, 0).ensure_lent(2048).is_ok());
    assert!(counts(0, 48, 2000).ensure_lent(2048).is_ok());
    assert!(counts(2050, 0, 0).ensure_copied(2048).is_ok());
    let wrong = |result: Result<()>| result.unwrap_err().to_string();
    let copied = wrong(counts(3, 2048, 0).ensure_lent(2048));
    assert!(copied.contains("the driver copies a request's data"), "{copied}");
    let lent = wrong(counts(2048, 0, 1).ensure_copied(2048));
    assert!(lent.contains("the driver lends a request's pages"), "{lent}");
    // A witness that has seen nothing proves nothing.
    let unseen = wrong(counts(0, 0, 0).ensure_lent(2048));
    assert!(unseen.contains("on Linux 7.3.4") && unseen.contains("add it to `LEND`"), "{unseen}");
    let unseen = wrong(counts(0, 0, 0).ensure_copied(2048));
    assert!(unseen.contains("add it to `COPY`"), "{unseen}");
}

#[test]
fn counts_name_the_functions() {
    let counts = counts(0, 2048, 0);
    assert_eq!(
        counts.to_string(),
        "0 copies (0 ublk_copy_user_pages), 2048 buffers lent (2048 io_buffer_register_request, \
         0 io_buffer_register_bvec)"
    );
    assert_eq!(counts.loans.called(), ["io_buffer_register_request"]);
    assert!(counts.copies.called().is_empty());
}
