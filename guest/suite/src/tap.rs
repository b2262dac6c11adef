//! Running tests and reporting them: one line of TAP a test, a diagnostic line for each of its cases that went wrong.
//!
//! Each test starts on a processor put back into its initial state, and an exception outside of a snippet ends the test
//! that caused it, not the run.

use crate::cpu::vector;
use crate::run::{Code, Exit, NO_ERROR, Regs, USER_ALIAS};
use crate::{println, setup};
use core::arch::global_asm;
use core::fmt::{self, Debug, Display, LowerHex};

/// A named test.
pub struct Test {
    pub name: &'static str,
    pub body: fn(&mut T),
}

/// The tests of one area, selected by name on the command line.
pub struct Group {
    pub name: &'static str,
    pub tests: &'static [Test],
}

/// What a test shows of a feature of a paravirtual dialect.
#[derive(Clone, Copy)]
pub enum Case {
    /// It does what it is for.
    Use,
    /// It is not offered, or not accepted, and is used all the same: refused.
    Refusal,
    /// It is given what it does not take: refused, and nothing has changed.
    BadArgument,
    /// It was taken back, and is used all the same: refused.
    Revocation,
}

impl Case {
    /// Tells whoever counts the cases: a line `# case DIALECT FEATURE KIND`. Belongs beside the checks themselves, so that it is
    /// not said of a test that was skipped.
    pub fn of(self, dialect: &str, feature: &str) {
        let kind = match self {
            Self::Use => "use",
            Self::Refusal => "refusal",
            Self::BadArgument => "bad-argument",
            Self::Revocation => "revocation",
        };
        println!("# case {dialect} {feature} {kind}");
    }
}

/// Makes a table of tests from functions, of this module or, in the order that is given, of several.
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => { $crate::tests! { self { $($name),* } } };
    ($($module:ident { $($name:ident),* $(,)? })*) => {
        pub const TESTS: &[$crate::tap::Test] =
            &[$($($crate::tap::Test { name: stringify!($name), body: $module::$name }),*),*];
    };
}

/// A test's record of its checks.
#[derive(Default)]
pub struct T {
    checks: u32,
    failures: u32,
    skip: Option<&'static str>,
}

/// Diagnostics printed for one test; more would only repeat.
const MAX_DIAGNOSTICS: u32 = 12;

impl T {
    /// Records a check, and why it failed.
    pub fn check(&mut self, ok: bool, why: impl FnOnce()) {
        self.checks += 1;
        if !ok {
            self.failures += 1;
            if self.failures <= MAX_DIAGNOSTICS {
                why();
            }
        }
    }

    /// Says that this test does not apply to this machine.
    pub fn skip(&mut self, why: &'static str) {
        self.skip = Some(why);
    }

    /// Checks a truth.
    pub fn is(&mut self, what: impl Display, truth: bool) {
        self.check(truth, || println!("#   {what}: does not hold"));
    }

    /// Checks a value.
    pub fn eq<V: PartialEq + LowerHex>(&mut self, what: impl Display, got: V, want: V) {
        self.check(got == want, || println!("#   {what}: got {got:#x}, want {want:#x}"));
    }

    /// Checks values that are not numbers.
    pub fn same<V: PartialEq + Debug>(&mut self, what: impl Display, got: V, want: V) {
        self.check(got == want, || println!("#   {what}: got {got:?}, want {want:?}"));
    }

    /// Checks that a snippet ran to its end.
    pub fn done(&mut self, what: impl Display, exit: &Exit) {
        self.event(what, exit, Event(vector::DONE, NO_ERROR));
    }

    /// Checks the vector and the error code a snippet ended with.
    pub fn event(&mut self, what: impl Display, exit: &Exit, want: Event) {
        let got = Event(exit.vector, exit.error);
        let at = exit.regs.rip;
        self.check(got == want, || println!("#   {what}: got {got} at {at:#x}, want {want}"));
    }

    /// Checks a fault: vector, error code, and that the saved RIP is that of the instruction in question.
    pub fn fault(&mut self, what: impl Display, code: Code, exit: &Exit, want: Event) {
        self.stopped_at(what, exit, want, code.mark);
    }

    /// Checks a trap: as a fault, but the saved RIP is that of the next instruction.
    pub fn trap(&mut self, what: impl Display, code: Code, exit: &Exit, want: Event) {
        self.stopped_at(what, exit, want, code.next);
    }

    /// Checks vector, error code and saved RIP; an address in the users' mapping counts as the one it stands for.
    pub fn stopped_at(&mut self, what: impl Display, exit: &Exit, want: Event, rip: u64) {
        let got = Event(exit.vector, exit.error);
        let at = if exit.regs.rip & !0x3FFF_FFFF == USER_ALIAS { exit.regs.rip - USER_ALIAS } else { exit.regs.rip };
        self.check(got == want && at == rip, || {
            println!("#   {what}: got {got} at {at:#x}, want {want} at {rip:#x}");
        });
    }

    /// Runs a snippet at privilege level 0 and checks that it faults at its mark.
    pub fn faults(&mut self, what: impl Display, code: Code, want: Event) {
        let exit = code.kernel().run();
        self.fault(what, code, &exit, want);
    }

    /// The same at privilege level 3.
    pub fn user_faults(&mut self, what: impl Display, code: Code, want: Event) {
        let exit = code.user().run();
        self.fault(what, code, &exit, want);
    }

    /// Runs with these registers and checks that the closing instruction was reached.
    pub fn runs(&mut self, what: impl Display, regs: &Regs) -> Exit {
        let exit = regs.run();
        self.done(what, &exit);
        exit
    }
}

/// A vector and its error code, printed as the manuals write them.
#[derive(Clone, Copy, PartialEq)]
pub struct Event(pub u64, pub u64);

/// An event without error code.
pub const fn plain(vector: u64) -> Event {
    Event(vector, NO_ERROR)
}

/// #GP with its error code.
pub const fn gp(error: u64) -> Event {
    Event(vector::GP, error)
}

/// #PF with its error code.
pub const fn pf(error: u64) -> Event {
    Event(vector::PF, error)
}

/// #UD.
pub const UD: Event = plain(vector::UD);
/// #NM.
pub const NM: Event = plain(vector::NM);
/// #DB.
pub const DB: Event = plain(vector::DB);
/// The end of a snippet.
pub const DONE: Event = plain(vector::DONE);

impl Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        const NAMES: [&str; 20] = [
            "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP", "#PF",
            "15", "#MF", "#AC", "#MC", "#XM",
        ];
        match (self.0, NAMES.get(self.0 as usize)) {
            (vector::DONE, _) => f.write_str("completion")?,
            (_, Some(name)) => f.write_str(name)?,
            (vector, None) => write!(f, "vector {vector:#x}")?,
        }
        if self.1 != NO_ERROR { write!(f, "({:#x})", self.1) } else { Ok(()) }
    }
}

unsafe extern "C" {
    /// Calls `body(argument)`. Returns 0, or 1 if [`abandon`] cut it short.
    fn attempt(body: extern "C" fn(*mut u8), argument: *mut u8) -> u64;
    fn abandon() -> !;
}

global_asm!(
    r#"
    .section .bss.attempt, "aw", @nobits
    .balign 8
attempt_rsp: .skip 8
    .section .data.attempt, "aw"
attempt_body: .quad 0
    .text
    .global attempt, abandon
attempt:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rax                                // alignment
    mov [rip + attempt_rsp], rsp
    mov rax, rdi
    mov rdi, rsi
    call rax
    xor eax, eax
2:  pop rbx
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
abandon:
    mov rsp, [rip + attempt_rsp]
    mov eax, 1
    jmp 2b
"#
);

/// Leaves the running test for the next one.
pub fn abandon_test() -> ! {
    // SAFETY: called in a test only, so `attempt` is on the stack; what is left behind owns nothing.
    unsafe { abandon() }
}

static mut BODY: fn(&mut T) = |_| {};

extern "C" fn call_body(t: *mut u8) {
    // SAFETY: `t` is the one `run` passes, and nobody else uses it meanwhile.
    unsafe { BODY(&mut *t.cast()) }
}

/// Runs the tests whose group and name `selected` accepts. Returns the number of failed tests.
pub fn run_groups(groups: &[Group], selected: impl Fn(&str, &str) -> bool) -> u32 {
    let total: usize = groups.iter().map(|g| g.tests.iter().filter(|test| selected(g.name, test.name)).count()).sum();
    println!("TAP version 13");
    println!("1..{total}");
    let (mut number, mut failed) = (0, 0);
    for group in groups {
        for test in group.tests.iter().filter(|test| selected(group.name, test.name)) {
            number += 1;
            let mut t = T::default();
            setup::reset_cpu();
            // SAFETY: the first processor alone runs tests.
            unsafe { BODY = test.body };
            // SAFETY: `call_body` takes what is passed here.
            let abandoned = unsafe { attempt(call_body, (&raw mut t).cast()) } != 0;
            setup::reset_cpu();
            let name = format_args!("{number} - {}: {}", group.name, test.name);
            if abandoned || t.failures > 0 || (t.checks == 0 && t.skip.is_none()) {
                failed += 1;
                println!("not ok {name} # {} of {} checks failed", t.failures, t.checks);
            } else if let (0, Some(why)) = (t.checks, t.skip) {
                println!("ok {name} # SKIP {why}");
            } else {
                println!("ok {name} # {} checks", t.checks);
            }
        }
    }
    failed
}
