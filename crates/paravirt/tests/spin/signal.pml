/*
 * A vCPU's sleep: two others raise bits, once each, while it takes them and sleeps; a timeout comes or does not.
 *
 *     raise: bits, then whether anyone sleeps ──> lock, notify
 *     wait:  lock, "I sleep", then bits ──> condition
 *
 * Mirrored: Signal::raise and Signal::wait of crates/engine/src/signal.rs, the condition variable with what POSIX says of it
 * (to wait is to give up the lock and to be notifiable in one step). wait.pml takes a Signal for granted.
 */

bit bits[2];
bit lock;
bit asleep;
bit in_condition;
byte taken;

inline acquire() { atomic { !lock -> lock = 1 } }

proctype raiser(byte which) {
    bits[which] = 1;
    if
    :: asleep ->
#ifndef NOTIFY_WITHOUT_LOCK
        acquire();
#endif
        in_condition = 0;
#ifndef NOTIFY_WITHOUT_LOCK
        lock = 0
#endif
    :: else
    fi
}

proctype sleeper() {
    do
    :: taken < 2 ->
        acquire();
#ifndef LOOK_BEFORE_LYING_DOWN
        asleep = 1;
#endif
        do
        :: bits[0] || bits[1] -> break
        :: else ->
#ifdef LOOK_BEFORE_LYING_DOWN
            asleep = 1;
#endif
            atomic { in_condition = 1; lock = 0 };
            !in_condition;
            acquire()
        od;
        asleep = 0;
        lock = 0;
        if
        :: atomic { bits[0] -> bits[0] = 0; taken++ }
        :: atomic { bits[1] -> bits[1] = 0; taken++ }
        fi
    :: else -> break
    od
}

init { atomic { run raiser(0); run raiser(1); run sleeper() } }

/* What is raised is seen, whenever it is raised. */
ltl everything_raised_is_taken { <> (taken == 2) }
