/*
 * Revocation: the host takes back two features, on two threads, from a guest that uses them, answers or falls silent, and
 * tries to accept one of them again.
 *
 *     host:  revoke ──> page ──> event          timer: expire ──> page
 *     guest: event ──> page ──> give up ──> REVOKE_ACK ──> page
 *
 * What is mirrored:
 *
 *     accept, revoke, acknowledge, expire    crates/paravirt/src/native/agreement.rs (Agreement)
 *     honours                                the same, without the lock
 *     publish                                crates/paravirt/src/native/pages.rs (VmPages::write_terms), the version as seqlock.rs has it
 *     arming, ringing                        crates/paravirt/src/native/vm.rs (Vm::revoke, Vm::overdue)
 *     handler                                guest/kit/src/vm.rs (Contract::handle_revocation)
 *     user                                   guest/kit/src/vm.rs (Contract::uses, and then a call)
 *
 * Each -D name is a mistake; main.rs says which property finds it.
 */

#define FIRST 1
#define SECOND 2
#define BOTH 3

bit agreement;                  /* the Agreement's lock, with its Terms: */
byte offered = BOTH;
byte accepted = BOTH;
byte revoking;
byte epoch;
bit overdue;

byte honoured = BOTH;           /* looked at without the lock */

bit pages;                      /* the lock of who writes the VM page, which has: */
byte version;
byte page_epoch;
byte page_revoking;
bit page_overdue;

bit armed;                      /* the host's timer for answers */
bit elapsed;                    /* the time that it is armed for, or was last, has come */

bit event;                      /* the notification event */
byte used = BOTH;               /* the guest's own note: accepted, and not given up */

/* What no code has, for the properties: */
bit silent = 1;                 /* this guest does not answer: it never does, or begins to at any moment */
byte acknowledged;              /* what acknowledgements have ended, as the guest was told */

inline acquire(mutex) { atomic { !mutex -> mutex = 1 } }
inline release(mutex) { mutex = 0 }

/* Whatever changes the terms ends with this: what the lock-free look sees, and what is to be published. */
inline settle() {
    honoured = accepted;
    assert((accepted & ~(offered | revoking)) == 0);    /* nothing is accepted that is neither offered nor on its way out */
    next_epoch = epoch;
    next_revoking = revoking;
    next_overdue = overdue
}

inline publish() {
    acquire(pages);
#ifndef NO_VERSION
    version++;
#endif
    page_epoch = next_epoch;
    page_revoking = next_revoking;
    page_overdue = next_overdue;
#ifndef NO_VERSION
    version++;
#endif
    release(pages)
}

/* The end of a change: under the lock, so that the page says last what holds last. */
inline publish_and_release() {
#ifdef PUBLISH_BEHIND_THE_LOCK
    release(agreement);
    publish()
#else
    publish();
    release(agreement)
#endif
}

/* Vm::revoke, on two threads of the host's: the first features to be, by their process numbers */
active [2] proctype revoker() {
    byte feature = _pid + 1, next_epoch, next_revoking;
    bit next_overdue;
#ifdef NOTIFY_FIRST
    event = 1;
#endif
    acquire(agreement);
    d_step {
        offered = offered & ~feature;
        revoking = revoking | (feature & accepted);
#ifdef AT_ONCE
        accepted = accepted & ~feature;
#endif
        epoch++;
        overdue = 0;
        settle();
        armed = 1;
        elapsed = 0
    };
    publish_and_release();
#ifndef NOTIFY_FIRST
    event = 1
#endif
}

/* The timer rings, Vm::overdue */
active proctype timer() {
    byte next_epoch, next_revoking, seen;
    bit next_overdue;
end:
    do
    :: atomic { armed -> armed = 0; elapsed = 1 };
        atomic { !agreement -> seen = epoch };
        if
        :: !elapsed                                     /* it rang for an earlier revocation */
        :: else ->
            acquire(agreement);
            if
#ifdef EXPIRE_ANY_EPOCH
            :: revoking ->
#else
            :: revoking && epoch == seen ->
#endif
                d_step {
                    assert(elapsed);                    /* nobody is overdue before the time is over */
                    overdue = 1;
                    settle()
                };
#ifdef UNSEEN
                release(agreement)
#else
                publish_and_release()
#endif
            :: else -> release(agreement)
            fi
        fi
    od
}

/* Contract::handle_revocation, at each event */
active proctype handler() {
    byte next_epoch, next_revoking, seen, read_epoch, read_revoking;
    bit next_overdue;
    if
    :: silent = 0
    :: goto gone
    fi;
end:
    do
    :: atomic { event -> event = 0 };
        do
        :: true ->
            /* Contract::terms: two equal, even versions around the body */
            do
            :: seen = version;
                read_epoch = page_epoch;
                read_revoking = page_revoking;
                if
                :: seen == version && !(seen & 1) -> break
                :: else
                fi
            od;
            if
            :: read_revoking == 0 -> break
            :: else
            fi;
#ifndef GIVE_UP_LATE
            used = used & ~read_revoking;
#endif
            /* Agreement::acknowledge */
            acquire(agreement);
            if
#ifdef ANY_EPOCH
            :: true ->
#else
            :: read_epoch == epoch ->
#endif
                d_step {
                    armed = 0;
#ifndef KEEP_HONOURING
                    accepted = accepted & ~revoking;
#endif
                    acknowledged = acknowledged | revoking;
                    revoking = 0;
                    overdue = 0;
#ifdef KEEP_HONOURING
                    next_epoch = epoch;
                    next_revoking = revoking;
                    next_overdue = overdue
#else
                    settle()
#endif
                };
                publish_and_release()
#ifndef ANY_EPOCH
            :: else -> release(agreement)               /* STALE_EPOCH: the page is read again */
#endif
            fi;
#ifdef GIVE_UP_LATE
            used = used & ~read_revoking;
#endif
            d_step { seen = 0; read_epoch = 0; read_revoking = 0; next_epoch = 0; next_revoking = 0; next_overdue = 0 }
        od;
        atomic { seen = 0; read_epoch = 0 }
    od;
gone:
    skip
}

/* Uses the features, by calls, for ever. */
active proctype user() {
end:
    do
    :: atomic {
            /* Honoured for as long as the guest uses it, and not behind the acknowledgement. */
            assert((used & ~honoured) == 0);
            assert((acknowledged & honoured) == 0)
        }
    od
}

/* Accepts the first feature once more, at any moment. */
active proctype accepter() {
    byte next_epoch, next_revoking;
    bit next_overdue;
    acquire(agreement);
    if
#ifdef ACCEPT_ANYTHING
    :: true ->
#else
    :: FIRST & offered & ~revoking ->
#endif
        d_step { accepted = accepted | FIRST; settle() };
        publish_and_release()
    :: else -> release(agreement)
    fi
}

/* A guest that answers ends each revocation. */
ltl an_answer_ends_it { [] ((revoking != 0 && !silent) -> <> (revoking == 0)) }

/* One that does not is there for all to see. */
ltl silence_is_seen { [] (revoking != 0 -> <> (page_overdue || revoking == 0)) }
