//! Compares the structs and numbers of this crate with the kernel's headers, by a C compiler.

use std::fmt::Write as _;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use libublk::sys;

use crate::params::Params;
use crate::ring::{SetupParams, flag};
use crate::{feature, nvme};

/// A C expression and its expected value.
struct Fact(String, u64);

macro_rules! offsets {
    ($facts:ident, $c:literal, $rust:ty, $($field:ident $(=> $c_field:literal)?),* $(,)?) => {
        $facts.push(Fact(concat!("sizeof(struct ", $c, ")").into(), size_of::<$rust>() as u64));
        $($facts.push(Fact(
            format!("offsetof(struct {}, {})", $c, [$($c_field,)? stringify!($field)][0]),
            offset_of!($rust, $field) as u64,
        ));)*
    };
}

macro_rules! constants {
    ($facts:ident, $($name:ident),* $(,)?) => {
        $($facts.push(Fact(stringify!($name).into(), u64::from(sys::$name)));)*
    };
}

fn facts() -> Vec<Fact> {
    let mut facts = Vec::new();
    offsets!(facts, "ublksrv_ctrl_cmd", sys::ublksrv_ctrl_cmd, dev_id, queue_id, len, addr, data);
    offsets!(
        facts,
        "ublksrv_ctrl_dev_info",
        sys::ublksrv_ctrl_dev_info,
        nr_hw_queues,
        queue_depth,
        state,
        max_io_buf_bytes,
        dev_id,
        ublksrv_pid,
        flags
    );
    offsets!(facts, "ublksrv_io_desc", sys::ublksrv_io_desc, op_flags, nr_sectors, start_sector);
    offsets!(facts, "ublksrv_io_cmd", sys::ublksrv_io_cmd, q_id, tag, result, addr);
    offsets!(facts, "ublk_param_basic", sys::ublk_param_basic, attrs, max_sectors, dev_sectors);
    offsets!(
        facts,
        "ublk_param_discard",
        sys::ublk_param_discard,
        discard_granularity,
        max_write_zeroes_sectors,
        max_discard_segments
    );
    offsets!(
        facts,
        "ublk_param_segment",
        sys::ublk_param_segment,
        seg_boundary_mask,
        max_segment_size,
        max_segments
    );
    for (name, offset) in Params::offsets() {
        facts.push(Fact(format!("offsetof(struct ublk_params, {name})"), offset as u64));
    }
    constants!(
        facts,
        UBLK_U_CMD_GET_FEATURES,
        UBLK_U_CMD_ADD_DEV,
        UBLK_U_CMD_DEL_DEV_ASYNC,
        UBLK_U_CMD_START_DEV,
        UBLK_U_CMD_STOP_DEV,
        UBLK_U_CMD_TRY_STOP_DEV,
        UBLK_U_CMD_SET_PARAMS,
        UBLK_U_CMD_GET_PARAMS,
        UBLK_U_CMD_GET_DEV_INFO,
        UBLK_U_CMD_GET_QUEUE_AFFINITY,
        UBLK_U_CMD_START_USER_RECOVERY,
        UBLK_U_CMD_END_USER_RECOVERY,
        UBLK_U_CMD_UPDATE_SIZE,
        UBLK_U_CMD_QUIESCE_DEV,
        UBLK_U_IO_FETCH_REQ,
        UBLK_U_IO_COMMIT_AND_FETCH_REQ,
        UBLK_U_IO_REGISTER_IO_BUF,
        UBLK_U_IO_UNREGISTER_IO_BUF,
        UBLK_IO_F_FUA,
        UBLK_IO_F_NOUNMAP,
        UBLK_IO_F_NEED_REG_BUF,
        UBLK_AUTO_BUF_REG_FALLBACK,
        UBLK_MAX_QUEUE_DEPTH,
        UBLK_MAX_NR_QUEUES,
        UBLK_IO_BUF_BITS,
        UBLK_IO_BUF_BITS_MASK,
        UBLKSRV_IO_BUF_OFFSET,
        UBLK_TAG_OFF,
        UBLK_QID_OFF,
        UBLK_IO_OP_READ,
        UBLK_IO_OP_WRITE,
        UBLK_IO_OP_FLUSH,
        UBLK_IO_OP_DISCARD,
        UBLK_IO_OP_WRITE_ZEROES,
        UBLK_S_DEV_DEAD,
        UBLK_S_DEV_LIVE,
        UBLK_S_DEV_QUIESCED,
        UBLK_S_DEV_FAIL_IO,
        UBLK_ATTR_READ_ONLY,
        UBLK_ATTR_ROTATIONAL,
        UBLK_ATTR_VOLATILE_CACHE,
        UBLK_ATTR_FUA,
        UBLK_MIN_SEGMENT_SIZE,
        UBLK_PARAM_TYPE_BASIC,
        UBLK_PARAM_TYPE_DISCARD,
        UBLK_PARAM_TYPE_DMA_ALIGN,
        UBLK_PARAM_TYPE_SEGMENT,
    );
    // Fields that the builders of `sqe` write by hand.
    facts.push(Fact("offsetof(struct io_uring_sqe, addr3)".into(), 48));
    facts.push(Fact("offsetof(struct io_uring_sqe, cmd)".into(), 48));
    for (field, offset) in SQE_FIELDS {
        facts.push(Fact(format!("offsetof(struct io_uring_sqe, {field})"), offset));
    }
    facts.extend(facts_of_io_uring());
    facts
}

fn facts_of_io_uring() -> Vec<Fact> {
    let mut facts = Vec::new();
    for (name, value) in SETUP_FLAGS {
        facts.push(Fact(format!("IORING_SETUP_{name}"), value.into()));
    }
    offsets!(facts, "io_uring_params", SetupParams, sq_entries, cq_entries, flags, sq_off, cq_off);
    nvme::facts(|expression, value| facts.push(Fact(expression.into(), value)));
    for (name, value) in RING_CONSTANTS {
        facts.push(Fact(name.into(), value));
    }
    facts.push(Fact("-UBLK_IO_RES_ABORT".into(), 19));
    facts.push(Fact(
        "ublk_auto_buf_reg_to_sqe_addr(&(struct ublk_auto_buf_reg){.index = 7, .flags = 1})".into(),
        0x0001_0007,
    ));
    facts
}

/// Byte offsets of an entry's fields, as the tests of `sqe` and the simulator read them.
const SQE_FIELDS: [(&str, u64); 12] = [
    ("opcode", 0),
    ("flags", 1),
    ("fd", 4),
    ("off", 8),
    ("cmd_op", 8),
    ("addr", 16),
    ("len", 24),
    ("rw_flags", 28),
    ("user_data", 32),
    ("buf_index", 40),
    ("poll32_events", 28),
    ("uring_cmd_flags", 28),
];

/// Opcodes and flags that the tests of `sqe` and the simulator have as literal numbers.
const RING_CONSTANTS: [(&str, u64); 20] = [
    ("IORING_OP_NOP", 0),
    ("IORING_OP_FSYNC", 3),
    ("IORING_OP_READ_FIXED", 4),
    ("IORING_OP_WRITE_FIXED", 5),
    ("IORING_OP_POLL_ADD", 6),
    ("IORING_OP_ASYNC_CANCEL", 14),
    ("IORING_OP_FALLOCATE", 17),
    ("IORING_OP_MSG_RING", 40),
    ("IORING_OP_URING_CMD", 46),
    ("IORING_OP_URING_CMD128", 64),
    ("BLOCK_URING_CMD_DISCARD", 0x1200),
    ("IORING_URING_CMD_FIXED", 1),
    ("IORING_CQE_F_SKIP", 1 << 5),
    ("IORING_CQE_F_32", 1 << 15),
    ("IOSQE_FIXED_FILE", 1),
    ("IOSQE_IO_HARDLINK", 8),
    ("IOSQE_ASYNC", 16),
    ("IOSQE_CQE_SKIP_SUCCESS", 64),
    ("IORING_FSYNC_DATASYNC", 1),
    ("sizeof(struct io_uring_sqe)", 64),
];

const SETUP_FLAGS: [(&str, u32); 12] = [
    ("IOPOLL", flag::IOPOLL),
    ("CQSIZE", flag::CQSIZE),
    ("CLAMP", flag::CLAMP),
    ("SUBMIT_ALL", flag::SUBMIT_ALL),
    ("COOP_TASKRUN", flag::COOP_TASKRUN),
    ("TASKRUN_FLAG", flag::TASKRUN_FLAG),
    ("SINGLE_ISSUER", flag::SINGLE_ISSUER),
    ("DEFER_TASKRUN", flag::DEFER_TASKRUN),
    ("NO_SQARRAY", flag::NO_SQARRAY),
    ("HYBRID_IOPOLL", flag::HYBRID_IOPOLL),
    ("CQE_MIXED", flag::CQE_MIXED),
    ("SQE_MIXED", flag::SQE_MIXED),
];

const INCLUDES: [&str; 8] = [
    "errno.h",
    "stddef.h",
    "stdio.h",
    "linux/version.h",
    "linux/blkdev.h",
    "linux/ublk_cmd.h",
    "linux/io_uring.h",
    "linux/nvme_ioctl.h",
];

/// A program that prints the wrong facts, and fails if there are any.
fn program(facts: &[Fact]) -> String {
    let mut text = INCLUDES.map(|header| format!("#include <{header}>\n")).concat();
    text += "int main(void) {\n\tint wrong = 0;\n";
    for fact in facts {
        check(&mut text, fact);
    }
    for feature in feature::ALL {
        check_feature(&mut text, feature);
    }
    text + "\treturn wrong != 0;\n}\n"
}

fn check(text: &mut String, Fact(expression, value): &Fact) {
    let _ = writeln!(
        text,
        "\tif ((unsigned long long)({expression}) != {value}ULL) {{ wrong++; \
         printf(\"%s is %llu here, {value} in Rust\\n\", {expression:?}, \
         (unsigned long long)({expression})); }}"
    );
}

/// Headers that are older than the feature must lack it.
fn check_feature(text: &mut String, feature: &feature::Feature) {
    let name = format!("UBLK_F_{}", feature.name);
    let since = feature.since.replace('.', ", ");
    let _ = writeln!(text, "#ifdef {name}");
    check(text, &Fact(name.clone(), feature.bit));
    let _ = writeln!(
        text,
        "#elif LINUX_VERSION_CODE >= KERNEL_VERSION({since}, 0)\n\
         \twrong++; puts(\"no {name} here, though Linux {} has it in Rust\");\n#endif",
        feature.since
    );
}

#[test]
#[ignore = "needs the UAPI headers of Linux 7.1 or newer in UBLK_UAPI_HEADERS; cargo vmtest has them"]
fn structs_and_numbers_are_those_of_the_kernels_headers() {
    let headers = std::env::var("UBLK_UAPI_HEADERS").expect("UBLK_UAPI_HEADERS names a directory");
    assert!(Path::new(&headers).join("linux/ublk_cmd.h").exists(), "no headers in {headers}");
    let directory = std::env::temp_dir().join(format!("ublk-uapi-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let (source, binary) = (directory.join("facts.c"), directory.join("facts"));
    std::fs::write(&source, program(&facts())).unwrap();
    let compiled = Command::new("cc")
        .args(["-Wall", "-Wextra", "-I"])
        .arg(&headers)
        .arg(&source)
        .arg("-o")
        .arg(&binary)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let run = Command::new(&binary).output().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
}
