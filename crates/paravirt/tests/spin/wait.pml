/*
 * wait and wake: two vCPUs wait for a permit, a third gives one back, while a timeout and an interrupt come at any moment.
 *
 *     guest: take a permit ── WAIT ──> begin ── wait_call: take bits, look, sleep ──> end ── RAX ──> again
 *     guest: give one back ── WAKE ──> wake ── rouse ──────────────────────^
 *
 * What is mirrored:
 *
 *     begin, is_woken, end, wake    crates/paravirt/src/native/wait.rs (WaitTable)
 *     looks at the deadline         crates/paravirt/src/native/vcpu.rs (Vcpu::asleep)
 *     wait_call                     crates/machine/src/processor.rs (Processor::wait_call)
 *     waiter, releaser              a semaphore without fast paths, on a word, as guests use it
 *
 * Sleeping itself is one step here: signal.pml has the inside of it. Steps of one processor are seen by all others in their
 * order: weaker orders are the business of the loom models. Each -D name is a mistake; main.rs says which property finds it.
 */

/* vCPU 0 waits with a timeout, and may give up when it has passed. vCPU 1 waits for ever. */
#define WAITERS 2
#define PATIENT 1

/* How often each may happen: enough for a second wait behind each way to end a first. */
#define RELEASES 1
#define TIMEOUTS 1
#define INTERRUPTS 1

#define WAKE 1
#define INTERRUPT 2

mtype = { idle, waiting, woken };                       /* wait.rs, State */
mtype = { WOKEN, DIFFERED, TIMED_OUT, INTERRUPTED };    /* contract::native::waited */

byte permits;              /* the guest's word: 0 is what waiters expect */

bit table;                 /* the WaitTable's lock, with what it protects: */
mtype state[WAITERS] = idle;
byte order[4];             /* room for the mistake of leaving somebody in it */
byte length;

byte bits[WAITERS];        /* each vCPU's Signal */
bit expired[WAITERS];      /* the deadline of the present wait has passed */
bit pending[WAITERS];      /* the local APIC has an interrupt */

/* What no code has, for the properties: */
bit in_call[WAITERS];
bit counted[WAITERS];      /* a WAKE has counted this vCPU */
byte first;                /* of those who wait, the one who has for longest */

#define other(vcpu) (1 - vcpu)

/* WaitTable::begin: `joined` says whether the vCPU sleeps. */
inline begin(vcpu) {
#ifdef CHECK_THEN_SLEEP
    joined = (permits == 0);
#endif
    atomic {
        !table;
#ifndef CHECK_THEN_SLEEP
        joined = (permits == 0);
#endif
        if
        :: joined ->
            state[vcpu] = waiting;
            order[length] = vcpu;
            length++;
            first = (state[other(vcpu)] == waiting -> other(vcpu) : vcpu)
        :: else
        fi
    }
}

/* WaitTable::end. `result` comes in as the reason that the processor has. */
inline end(vcpu) {
    atomic {
        !table;
        if
        :: state[vcpu] == waiting ->
#ifndef STAY_IN_LINE
            order[0] = (order[0] == vcpu -> order[1] : order[0]);
            order[1] = 0;
            length--;
#endif
            first = other(vcpu)
#ifndef FORGET_WAKE
        :: state[vcpu] == woken -> result = WOKEN
#endif
        :: else
        fi;
        state[vcpu] = idle
    }
}

#ifdef NEWEST_FIRST
#define candidate order[length - 1 - place]
#else
#define candidate order[place]
#endif
#ifdef ANY_WORD
#define waits_for(vcpu, word) (state[vcpu] == waiting)
#else
#define waits_for(vcpu, word) (state[vcpu] == waiting && word == 0)
#endif

/* WaitTable::wake on a word (0 is the waiters'), of one vCPU at most: who is taken out of the line, */
inline hit_one(word) {
    d_step {
        place = 0;
        hit = WAITERS;
        do
        :: place < length && hit == WAITERS ->
            if
            :: waits_for(candidate, word) -> hit = candidate
            :: else -> place++
            fi
        :: else -> break
        od;
        if
        :: hit < WAITERS ->
            assert(word == 0);              /* waiters hear of their own word's wakes only, */
            assert(hit == first);           /* in the order in which they came, */
            assert(length <= WAITERS);      /* and stand in the line once */
            if
            :: order[0] == hit -> order[0] = order[1]
            :: else
            fi;
            order[1] = order[2];
            order[2] = 0;
            length--;
            state[hit] = woken;
            counted[hit] = 1;
            first = other(hit)
        :: else
        fi;
        place = 0
    }
}

/* and then roused, which others see before the lock is free. */
inline wake(word) {
    atomic { !table -> table = 1; hit_one(word) };
    atomic {
        if
#ifndef NOT_ROUSED
        :: hit < WAITERS -> bits[hit] = bits[hit] | WAKE
#endif
        :: else
        fi;
        hit = 0
    };
    table = 0
}

inline take_bits(vcpu) {
    atomic { owed = owed | (bits[vcpu] & INTERRUPT); bits[vcpu] = 0 }
}

/* Processor::wait_call, with Vcpu::asleep in it */
inline wait_call(vcpu) {
    do
    :: true ->
#ifndef TAKE_BEHIND_THE_LOOK
        take_bits(vcpu);
#endif
        deliverable = pending[vcpu];
        if
        :: atomic { !table && state[vcpu] == woken -> result = INTERRUPTED; break }
        :: atomic { !table && state[vcpu] != woken }
        fi;
        if
        :: atomic { expired[vcpu] -> result = TIMED_OUT; break }
        :: atomic { !expired[vcpu] && deliverable -> result = INTERRUPTED; break }
        :: atomic { !expired[vcpu] && !deliverable }
        fi;
#ifdef TAKE_BEHIND_THE_LOOK
        take_bits(vcpu);
#endif
        /* sleeps */
#ifdef DEAF_TO_INTERRUPTS
        (bits[vcpu] & WAKE) || expired[vcpu]
#elif defined(DEAF_TO_TIMEOUTS)
        bits[vcpu]
#else
        bits[vcpu] || expired[vcpu]
#endif
    od;
    end(vcpu);
    atomic { bits[vcpu] = bits[vcpu] & INTERRUPT | owed; owed = 0; deliverable = 0 }
}

proctype waiter(byte vcpu) {
    bit joined, deliverable;
    byte owed;
    mtype result;
    do
    :: atomic { permits > 0 -> permits--; break }
    :: atomic { permits == 0 -> expired[vcpu] = 0; in_call[vcpu] = 1; result = DIFFERED };
        begin(vcpu);
        if
        :: joined -> wait_call(vcpu)
        :: else
        fi;
        atomic {
            assert(counted[vcpu] == (result == WOKEN));     /* who was counted hears of it, and nobody else */
            counted[vcpu] = 0;
            in_call[vcpu] = 0;
            joined = 0
        };
        atomic { pending[vcpu] = 0; bits[vcpu] = 0 };       /* the interrupt is delivered behind the call */
        if
        :: vcpu != PATIENT && result == TIMED_OUT -> break
        :: true
        fi
    od
}

/* Gives a permit back, or stops at any moment: then no later release makes a lost one good. */
proctype releaser() {
    byte given, place, hit;
    do
    :: given < RELEASES ->
        atomic { permits++; given++ };
        wake(0)
    :: wake(1); break
    :: break
    od
}

/* The deadline and the interrupt come, or do not. */
proctype environment() {
    byte timeouts, interrupts;
    do
    :: atomic { timeouts < TIMEOUTS && in_call[0] && !expired[0] -> expired[0] = 1; timeouts++ }
    :: atomic { interrupts < INTERRUPTS -> pending[PATIENT] = 1; interrupts++ };
        bits[PATIENT] = bits[PATIENT] | INTERRUPT
    :: break
    od
}

init { atomic { run waiter(0); run waiter(1); run releaser(); run environment() } }

/* Nobody sleeps for ever beside a permit that is there. */
#define sleeps_beside_permit(vcpu) (in_call[vcpu] && permits > 0)
ltl no_wake_is_lost {
    [] (sleeps_beside_permit(0) -> <> !sleeps_beside_permit(0)) &&
    [] (sleeps_beside_permit(1) -> <> !sleeps_beside_permit(1))
}

/* A deadline that has passed ends a wait, and so does an interrupt that can be delivered. */
ltl timeouts_and_interrupts_end_waits {
    [] ((in_call[0] && expired[0]) -> <> !in_call[0]) &&
    [] ((in_call[PATIENT] && pending[PATIENT]) -> <> !in_call[PATIENT])
}
