//! `cordial run` at a terminal: an interactive shell.

use tests::Cordial;

#[test]
fn an_interactive_shell_is_at_home_on_the_users_terminal() {
    let mut terminal = Cordial::run(&["--timeout", "300"]).at_terminal();
    terminal.wait_for("# ");
    assert!(!terminal.is_cooked(), "every key is the guest's");
    terminal.press("stty size; tty\n");
    terminal.wait_for("33 99");
    terminal.wait_for("/dev/hvc0");

    // Ctrl-C and Ctrl-Z reach the foreground job, not the shell. What is typed is echoed, so it must not look like the
    // answer.
    let job = "sh -c 'echo run''ning; exec sleep 1000'\n";
    terminal.press(job);
    terminal.wait_for("running");
    terminal.press("\x03");
    terminal.wait_for("# ");
    terminal.press(job);
    terminal.wait_for("running");
    terminal.press("\x1a");
    terminal.wait_for("Stopped");
    terminal.press("kill -9 %1; sleep 1\n");
    terminal.wait_for("Killed");

    terminal.resize(44, 88);
    terminal.press("until [ \"$(stty size)\" = '44 88' ]; do sleep 0.1; done; echo chan''ged\n");
    terminal.wait_for("changed");
    terminal.press("exit 5\n");
    assert_eq!(terminal.status(), Some(5));
    assert!(terminal.is_cooked(), "the terminal is as it was");
}

#[test]
fn the_escape_keys_end_the_machine() {
    let mut terminal = Cordial::run(&["--timeout", "300"]).at_terminal();
    terminal.wait_for("# ");
    terminal.press("\x1dq");
    assert_ne!(terminal.status(), Some(0));
    assert!(terminal.is_cooked(), "the terminal is as it was");
}
