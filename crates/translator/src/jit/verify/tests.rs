//! Pieces of code that are good, and others that are not.

use super::*;
use crate::jit::asm::reg::{R8, R10, R11, R14, R15, RAX, RCX, RDI, RSP};
use crate::jit::asm::{Asm, At};
use crate::jit::emit::{READ_AHEAD, condition};

const AT: u64 = 0x7000_0000;
const BOUNDS: Bounds<'_> = Bounds {
    known: Known { low: 0x4000_0000, signal: 0x5000_0000 },
    thunks: 0x6fff_0000..0x6fff_1000,
    keeping: [0x6fff_0800; 3],
    distance: 0x1000_0000,
    others: &[],
};
const HOST: At = At::Index(R8, RCX, 0, 0);

fn complaint(build: impl FnOnce(&mut Asm)) -> String {
    let mut asm = Asm::new(AT);
    build(&mut asm);
    asm.jmp_to(BOUNDS.thunks.start);
    check(&[(&asm.finish().unwrap(), AT)], &BOUNDS).err().unwrap_or_default()
}

/// The check of an access at R8, with `access` after it; both go on behind it.
fn checked(asm: &mut Asm, table: u8, ahead: i32, access: impl FnOnce(&mut Asm)) {
    let miss = asm.label();
    asm.extract_bits(RCX, R8, R15);
    asm.load(RCX, At::Index(table, RCX, 3, ahead));
    asm.jrcxz(miss);
    access(asm);
    asm.bind(miss);
}

#[test]
fn checked_accesses_are_good() {
    assert_eq!(complaint(|asm| checked(asm, R15, READ_AHEAD, |asm| asm.load(RAX, HOST))), "");
    assert_eq!(complaint(|asm| checked(asm, R14, WRITE_AHEAD, |asm| asm.store(HOST, RAX))), "");
    let folded = |asm: &mut Asm| {
        asm.lea(R11, HOST);
        asm.store(At::Base(R11, 0), RAX);
    };
    assert_eq!(complaint(|asm| checked(asm, R14, WRITE_AHEAD, folded)), "");
}

#[test]
fn unchecked_accesses_are_not() {
    let wrong = |build: &dyn Fn(&mut Asm)| {
        let complaint = complaint(build);
        assert!(complaint.contains("reaches"), "{complaint:?}");
    };
    wrong(&|asm| checked(asm, R15, READ_AHEAD, |asm| asm.store(HOST, RAX))); // a read entry
    wrong(&|asm| checked(asm, R14, WRITE_AHEAD, |asm| asm.load(RAX, At::Index(R8, RCX, 0, 8)))); // displaced
    wrong(&|asm| asm.load(RAX, HOST));
    wrong(&|asm| asm.load(RAX, At::Base(R8, 0)));
    wrong(&|asm| asm.load(RAX, At::Base(R15, 0))); // a table, but not to be checked
    wrong(&|asm| asm.load(RAX, At::Absolute(0x3fff_fff8)));
    wrong(&|asm| asm.load(RAX, At::Absolute(0x4000_0000 + offset::END - 4)));
    wrong(&|asm| {
        // The index is not kept in the table.
        asm.rotate_right(RCX, R8, 12);
        asm.load(RCX, At::Index(R15, RCX, 3, READ_AHEAD));
    });
    wrong(&|asm| {
        // Where the access missed, it is made as well.
        checked(asm, R14, WRITE_AHEAD, |_| {});
        asm.store(HOST, RAX);
    });
    wrong(&|asm| {
        // The addend is lost on the way.
        checked(asm, R14, WRITE_AHEAD, |asm| {
            asm.lea(RCX, At::Base(RCX, 8));
            asm.lea(RCX, At::Base(RCX, 8));
            asm.store(HOST, RAX);
        });
    });
}

/// The check that a page at R8 is in the window, with an access after it.
fn near(asm: &mut Asm, table: u8, ahead: i32, access: impl FnOnce(&mut Asm)) {
    let far = asm.label();
    asm.lea(RCX, At::Index(R8, RAX, 3, 15));
    asm.extract_bits(RCX, RCX, R15);
    asm.compare_at(At::Index(table, RCX, 3, ahead), BOUNDS.distance as i32);
    asm.jcc(condition::NOT_ZERO, far);
    access(asm);
    asm.bind(far);
}

#[test]
fn accesses_in_the_window_follow_the_comparison_of_their_own_address() {
    let at = |distance: i32| At::Index(R8, RAX, 3, BOUNDS.distance as i32 + distance);
    assert_eq!(complaint(|asm| near(asm, R15, READ_AHEAD, |asm| asm.load(RAX, at(8)))), "");
    assert_eq!(complaint(|asm| near(asm, R14, WRITE_AHEAD, |asm| asm.store(at(15), R11))), "");
    let wrong = |build: &dyn Fn(&mut Asm)| {
        let complaint = complaint(build);
        assert!(complaint.contains("reaches"), "{complaint:?}");
    };
    wrong(&|asm| near(asm, R15, READ_AHEAD, |asm| asm.store(at(8), R11))); // a read entry
    wrong(&|asm| near(asm, R14, WRITE_AHEAD, |asm| asm.load(R11, at(0x100)))); // too far away
    wrong(&|asm| near(asm, R14, WRITE_AHEAD, |asm| asm.load(R11, At::Index(R8, RAX, 2, BOUNDS.distance as i32))));
    wrong(&|asm| near(asm, R14, WRITE_AHEAD, |asm| asm.load(R11, At::Index(R8, RAX, 3, 8)))); // without the distance
    wrong(&|asm| {
        near(asm, R14, WRITE_AHEAD, |asm| {
            asm.lea(RAX, At::Base(RAX, 8)); // another address since
            asm.load(R11, at(8));
        });
    });
    wrong(&|asm| {
        near(asm, R14, WRITE_AHEAD, |_| {});
        asm.load(R11, at(8)); // whatever came of it
    });
}

#[test]
fn so_do_they_where_flags_are_kept() {
    let at = |distance: i32| At::Index(R8, RAX, 3, BOUNDS.distance as i32 + distance);
    let kept = |table: u8, ahead: i32, less: i32, access: &dyn Fn(&mut Asm), otherwise: &dyn Fn(&mut Asm)| {
        complaint(|asm| {
            let (near, behind) = (asm.label(), asm.label());
            asm.lea(RCX, At::Index(R8, RAX, 3, 15));
            asm.extract_at(RCX, RCX, At::Absolute(BOUNDS.known.low + offset::INDEX_BITS));
            asm.load(RCX, At::Index(table, RCX, 3, ahead));
            asm.lea(RCX, At::Base(RCX, -less));
            asm.jrcxz(near);
            otherwise(asm);
            asm.jmp(behind);
            asm.bind(near);
            access(asm);
            asm.bind(behind);
        })
    };
    let distance = BOUNDS.distance as i32;
    let nothing = |_: &mut Asm| {};
    assert_eq!(kept(R15, READ_AHEAD, distance, &|asm| asm.load(RAX, at(8)), &nothing), "");
    assert_eq!(kept(R14, WRITE_AHEAD, distance, &|asm| asm.store(at(15), R11), &nothing), "");
    let wrong = [
        kept(R15, READ_AHEAD, distance, &|asm| asm.store(at(8), R11), &nothing), // a read entry
        kept(R14, WRITE_AHEAD, distance, &|asm| asm.load(R11, at(0x100)), &nothing), // too far away
        kept(R14, WRITE_AHEAD, distance, &nothing, &|asm| asm.load(R11, at(8))), // where it is not there
        kept(R14, WRITE_AHEAD, 0, &|asm| asm.load(R11, at(8)), &nothing),        // where there is no entry
        kept(R14, WRITE_AHEAD, distance, &|asm| asm.load(R11, At::Index(R8, RCX, 0, 0)), &nothing),
    ];
    assert!(wrong.iter().all(|complaint| complaint.contains("reaches")), "{wrong:?}");
}

#[test]
fn a_check_is_good_for_what_lies_before_its_byte() {
    let slot = At::Absolute(BOUNDS.known.low + offset::GPR + 8 * 12);
    let at = |distance: i32| At::Base(R11, BOUNDS.distance as i32 + distance);
    // mov r11, [slot]; the check of what is 40 bytes further on; the access, with the register fetched anew
    let group = |asm: &mut Asm, between: &dyn Fn(&mut Asm), at: At| {
        let far = asm.label();
        asm.load(R11, slot);
        asm.lea(RCX, At::Base(R11, 40));
        asm.extract_bits(RCX, RCX, R15);
        asm.compare_at(At::Index(R15, RCX, 3, READ_AHEAD), BOUNDS.distance as i32);
        asm.jcc(condition::NOT_ZERO, far);
        asm.load(R11, At::Absolute(BOUNDS.known.low + offset::GPR));
        between(asm);
        asm.load(R11, slot);
        asm.load(RAX, at);
        asm.bind(far);
    };
    let nothing = |_: &mut Asm| {};
    for good in [33, 0, -0x800] {
        assert_eq!(complaint(|asm| group(asm, &nothing, at(good))), "", "{good}");
    }
    for bad in [34, 41, -0x1000] {
        assert!(complaint(|asm| group(asm, &nothing, at(bad))).contains("reaches"), "{bad}");
    }
    // The guest's register is another one since.
    assert!(complaint(|asm| group(asm, &|asm| asm.store(slot, RAX), at(0))).contains("reaches"));
    assert!(complaint(|asm| group(asm, &|asm| asm.store_constant(slot, 1), at(0))).contains("reaches"));
}

#[test]
fn the_guests_own_test_of_an_address_is_no_groups_check() {
    let access = |base: u8| {
        complaint(|asm| {
            let apart = asm.label();
            asm.lea(R11, At::Base(R8, -1));
            asm.extract_bits(RCX, R11, R15);
            asm.load(R10, At::Index(R14, RCX, 3, WRITE_AHEAD));
            asm.test_32(R11, 0xf80);
            asm.jcc(condition::ZERO, apart);
            asm.test(R10, R10);
            asm.jcc(condition::ZERO, apart);
            asm.test_32(RDI, 0xfff);
            asm.jcc(condition::ZERO, apart);
            asm.store(At::Index(base, R10, 0, -8), RAX);
            asm.bind(apart);
        })
    };
    assert_eq!(access(R8), "");
    assert!(access(RDI).contains("reaches"));
}

#[test]
fn a_check_follows_a_register_that_moves_by_a_constant() {
    let moves: [(&[u8], i32); 8] = [
        (&[0x48, 0x83, 0xc0, 0x20], 0x20),                  // add rax, 0x20
        (&[0x48, 0x05, 0x90, 0, 0, 0], 0x90),               // add rax, 0x90
        (&[0x48, 0x81, 0xc0, 0x90, 0, 0, 0], 0x90),         // the same, encoded otherwise
        (&[0x48, 0x2d, 0x90, 0, 0, 0], -0x90),              // sub rax, 0x90
        (&[0x48, 0x83, 0xe8, 0x20], -0x20),                 // sub rax, 0x20
        (&[0x48, 0xff, 0xc0], 1),                           // inc rax
        (&[0x48, 0xff, 0xc8], -1),                          // dec rax
        (&[0x48, 0x8d, 0x80, 0, 0xff, 0xff, 0xff], -0x100), // lea rax, [rax - 0x100]
    ];
    // The check of what is at RAX; the move; a byte that is as far from there as it was, or one further on.
    let with = |code: &[u8], at: i32| {
        complaint(|asm| {
            let far = asm.label();
            asm.extract_bits(RCX, RAX, R15);
            asm.compare_at(At::Index(R15, RCX, 3, READ_AHEAD), BOUNDS.distance as i32);
            asm.jcc(condition::NOT_ZERO, far);
            asm.raw(code);
            asm.raw(&[0xf6, 0x80]); // test byte [rax + distance + at], 1
            asm.raw(&(BOUNDS.distance as i32 + at).to_le_bytes());
            asm.byte(1);
            asm.bind(far);
        })
    };
    for (code, by) in moves {
        assert_eq!(with(code, -by), "", "{code:x?}");
        assert!(with(code, 1 - by).contains("reaches"), "{code:x?}");
    }
    // add rax, rdx; add eax, 1; xor rax, 1
    for code in [&[0x48, 0x01, 0xd0][..], &[0x83, 0xc0, 1], &[0x48, 0x83, 0xf0, 1]] {
        assert!(with(code, -0x800).contains("reaches"), "{code:x?}");
    }
}

type Emits<'a> = &'a dyn Fn(&mut Asm);

#[test]
fn a_check_is_good_for_a_copy_of_the_register_too() {
    let [slot, copy] = [12, 13].map(|number| At::Absolute(BOUNDS.known.low + offset::GPR + 8 * number));
    let here = At::Base(R11, BOUNDS.distance as i32);
    // The check of what is at [slot]; the copy of that; what is between; the access at [from].
    let with = |between: Emits<'_>, from: Emits<'_>| {
        complaint(|asm| {
            let far = asm.label();
            asm.load(R11, slot);
            asm.extract_bits(RCX, R11, R15);
            asm.compare_at(At::Index(R15, RCX, 3, READ_AHEAD), BOUNDS.distance as i32);
            asm.jcc(condition::NOT_ZERO, far);
            asm.load(R10, slot);
            asm.store(copy, R10);
            between(asm);
            from(asm);
            asm.load_32(RAX, here);
            asm.bind(far);
        })
    };
    let [in_slot, in_copy] = [slot, copy].map(|at| move |asm: &mut Asm| asm.load(R11, at));
    let [slot_changes, copy_changes] = [slot, copy].map(|at| move |asm: &mut Asm| asm.store(at, RAX));
    let in_register = |asm: &mut Asm| asm.mov(R11, R10);
    let nothing = |_: &mut Asm| {};
    let miss = |asm: &mut Asm| asm.call_to(BOUNDS.keeping[0]);
    let good: [[Emits<'_>; 2]; 9] = [
        [&miss, &in_slot],
        [&miss, &in_copy],
        [&miss, &in_register],
        [&nothing, &in_slot],
        [&nothing, &in_copy],
        [&nothing, &in_register],
        [&slot_changes, &in_copy],
        [&copy_changes, &in_slot],
        [&copy_changes, &in_register],
    ];
    for [between, from] in good {
        assert_eq!(with(between, from), "");
    }
    assert!(with(&slot_changes, &in_slot).contains("reaches"));
    assert!(with(&copy_changes, &in_copy).contains("reaches"));
}

#[test]
fn jumps_stay_inside_and_the_monitors_registers_stay() {
    assert!(complaint(|asm| asm.jmp_to(AT + 0x1000)).contains("goes to 0x70001000"));
    assert!(complaint(|asm| asm.jmp_to(AT + 1)).contains("goes to 0x70000001"));
    let unended = [0x90];
    assert!(check(&[(&unended, AT)], &BOUNDS).is_err_and(|complaint| complaint.contains("runs over its end")));
    let elsewhere = [(&unended[..], AT), (&[0xe9, 0, 0, 0, 0][..], AT + 0x100)];
    assert!(check(&elsewhere, &BOUNDS).is_err_and(|complaint| complaint.contains("runs over its end")));
    for change in [RSP, R14, R15] {
        let said = complaint(|asm| asm.mov(change, RAX));
        assert!(said.contains("changes R"), "{said}");
    }
    // syscall, wrfsbase, mov rax from fs, push, popfq
    for bytes in [&[0x0f, 0x05][..], &[0xf3, 0x48, 0x0f, 0xae, 0xd0], &[0x64, 0x48, 0x8b, 0x00], &[0x50], &[0x9d]] {
        assert!(!complaint(|asm| asm.raw(bytes)).is_empty(), "{bytes:x?}");
    }
}
