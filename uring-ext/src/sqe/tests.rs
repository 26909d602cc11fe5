use super::*;

/// Layout of `struct io_uring_sqe` (`include/uapi/linux/io_uring.h`), byte offsets.
fn bytes(sqe: &Sqe) -> [u8; 64] {
    *sqe.as_bytes()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap())
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

const URING_CMD: u8 = 46;
const FIXED_FILE: u8 = 1;

#[test]
fn a_fetch_asks_for_automatic_registration_with_fallback() {
    let sqe = Sqe::fetch(FixedFile(0), 3, 17, Delivery::AutoRegister { slot: 0x1234 });
    let raw = bytes(&sqe.user_data(99));
    assert_eq!((raw[0], raw[1]), (URING_CMD, FIXED_FILE));
    assert_eq!(u32_at(&raw, 8), 0xc010_7520, "_IOWR('u', 0x20, 16 bytes)");
    assert_eq!(u64_at(&raw, 16), 0x0001_1234, "slot, and FALLBACK in bit 16");
    assert_eq!(u64_at(&raw, 32), 99);
    assert_eq!((u16_at(&raw, 48), u16_at(&raw, 50)), (3, 17));
    assert_eq!(u64_at(&raw, 56), 0);
}

#[test]
fn a_commit_carries_the_result_and_the_copy_address() {
    let pool = crate::pool::BufferPool::new(2, 4096).unwrap();
    let addr = pool.addr(1, 0);
    let sqe = Sqe::commit_and_fetch(FixedFile(0), 1, 2, -5, Delivery::Copy(addr));
    let raw = bytes(&sqe);
    assert_eq!(u32_at(&raw, 8), 0xc010_7521);
    assert_eq!(u64_at(&raw, 16), 0);
    assert_eq!(u32_at(&raw, 52), u32::MAX - 4);
    assert_eq!(u64_at(&raw, 56), addr.get());
}

#[test]
fn registration_names_request_and_slot() {
    let raw = bytes(&Sqe::register_buffer(FixedFile(0), 1, 2, 7));
    assert_eq!(u32_at(&raw, 8), 0xc010_7523);
    assert_eq!((u16_at(&raw, 48), u16_at(&raw, 50), u64_at(&raw, 56)), (1, 2, 7));
    let raw = bytes(&Sqe::unregister_buffer(FixedFile(0), 1, 2, 7));
    assert_eq!(u32_at(&raw, 8), 0xc010_7524);
}

#[test]
fn a_lent_buffer_is_addressed_by_offset() {
    let lent = FixedBuffer::Lent { slot: 5, offset: 512 };
    let raw = bytes(&Sqe::write_fixed(FixedFile(1), lent, 4096, 1 << 40, true));
    assert_eq!((raw[0], raw[1]), (5, FIXED_FILE), "IORING_OP_WRITE_FIXED");
    assert_eq!((u64_at(&raw, 8), u64_at(&raw, 16), u32_at(&raw, 24)), (1 << 40, 512, 4096));
    assert_eq!(u32_at(&raw, 28), 2, "RWF_DSYNC");
    assert_eq!(u16_at(&raw, 40), 5);
    let raw = bytes(&Sqe::read_fixed(FixedFile(1), lent, 4096, 0));
    assert_eq!((raw[0], u32_at(&raw, 28)), (4, 0), "IORING_OP_READ_FIXED");
}

#[test]
fn a_discard_has_start_and_length() {
    let raw = bytes(&Sqe::discard(FixedFile(1), 1 << 20, 1 << 16));
    assert_eq!((raw[0], u32_at(&raw, 8)), (URING_CMD, 0x1200));
    assert_eq!((u64_at(&raw, 16), u64_at(&raw, 48)), (1 << 20, 1 << 16));
    assert_eq!(raw[1], FIXED_FILE | 1 << 4, "IOSQE_ASYNC");
}

#[test]
fn a_chain_is_hard_linked_and_silent_where_asked() {
    const HARDLINK: u8 = 1 << 3;
    const SKIP_SUCCESS: u8 = 1 << 6;
    let register = Sqe::register_buffer(FixedFile(0), 1, 2, 7).skip_success().hard_link();
    assert_eq!(bytes(&register)[1], FIXED_FILE | HARDLINK | SKIP_SUCCESS);
    assert!(register.is_linked() && !Sqe::nop().is_linked());
    let cancel = bytes(&Sqe::cancel(0x77).user_data(9));
    assert_eq!((cancel[0], u64_at(&cancel, 16), u64_at(&cancel, 32)), (14, 0x77, 9));
    let delay = Sqe::delay(0x1234_5678_9abc).user_data(3);
    assert_eq!((bytes(&delay)[0], bytes(&delay)[1]), (12, 0), "not a timeout with an address yet");
    assert_eq!((delay.delay_ns(), Sqe::nop().delay_ns()), (Some(0x1234_5678_9abc), None));
    let poll = bytes(&Sqe::poll_readable(FixedFile(3)));
    assert_eq!((poll[0], poll[1], u32_at(&poll, 28)), (6, FIXED_FILE, 1));
    let message = bytes(&Sqe::message(5, 0x99));
    assert_eq!((message[0], message[1], u32_at(&message, 4)), (40, SKIP_SUCCESS, 5));
    assert_eq!(u64_at(&message, 8), 0x99, "the other ring's user data");
    assert_eq!(bytes(&Sqe::nop())[0], 0);
}

#[test]
fn flush_and_fallocate() {
    let raw = bytes(&Sqe::datasync(FixedFile(1)));
    assert_eq!((raw[0], u32_at(&raw, 28)), (3, 1), "IORING_OP_FSYNC, IORING_FSYNC_DATASYNC");
    let raw = bytes(&Sqe::fallocate(FixedFile(1), 3, 8192, 4096));
    assert_eq!(raw[0], 17, "IORING_OP_FALLOCATE");
    assert_eq!((u64_at(&raw, 8), u64_at(&raw, 16), u32_at(&raw, 24)), (8192, 4096, 3));
}

#[test]
fn entries_made_by_hand_are_those_of_the_builders() {
    use io_uring::{opcode, types};
    let pool = crate::pool::BufferPool::new(2, 4096).unwrap();
    let addr = pool.addr(1, 512);
    let of_pool = FixedBuffer::Pool { slot: 0x0102, addr };
    for buffer in [FixedBuffer::Lent { slot: 0xfedc, offset: 0x1234_5600 }, of_pool] {
        let pointer =
            std::ptr::with_exposed_provenance_mut(usize::try_from(buffer.addr()).unwrap());
        let (file, len, offset) = (types::Fixed(0x0a0b_0c0d), 0xfedc_ba98, 0x0123_4567_89ab_cdef);
        let slot = buffer.slot();
        let read = opcode::ReadFixed::new(file, pointer, len, slot).offset(offset).build();
        assert_eq!(
            bytes(&Sqe::read_fixed(FixedFile(file.0), buffer, len, offset)),
            bytes(&Sqe(read))
        );
        for dsync in [false, true] {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            let write = opcode::WriteFixed::new(file, pointer.cast_const(), len, slot);
            let write = write.offset(offset).rw_flags(flags).build();
            let ours = Sqe::write_fixed(FixedFile(file.0), buffer, len, offset, dsync);
            assert_eq!(bytes(&ours), bytes(&Sqe(write)), "dsync: {dsync}");
        }
    }
    for delivery in
        [Delivery::AutoRegister { slot: 0x1234 }, Delivery::Copy(addr), Delivery::ByServer]
    {
        let cmd = io_cmd(0x0102, 0x0304, -5, delivery.cmd_addr());
        let built =
            ublk(FixedFile(7), sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, cmd, delivery.sqe_addr());
        let ours = Sqe::commit_and_fetch(FixedFile(7), 0x0102, 0x0304, -5, delivery);
        assert_eq!(bytes(&ours), bytes(&built), "{delivery:?}");
    }
}
