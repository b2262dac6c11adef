//! A command as a terminal session: its own session, the console as controlling terminal, job control.

use protocol::{CANNOT_EXECUTE, NOT_FOUND, Window};
use rustix::termios::Winsize;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// First argument of the process between fork and the command; then the terminal's path, the program, its arguments.
pub(crate) const SESSION_FLAG: &str = "--session";

/// The command that becomes `argv` in a session on `terminal`.
pub(crate) fn session_command(terminal: &str, argv: &[String]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(SESSION_FLAG).arg(terminal).args(argv);
    command
}

/// Leads a new session on the terminal and becomes the command. Returns only where that fails.
pub(crate) fn become_session(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let (Some(terminal), Some(program)) = (arguments.next(), arguments.next()) else {
        eprintln!("init: {SESSION_FLAG} needs a terminal and a program");
        return ExitCode::FAILURE;
    };
    let error = match lead_session(&terminal) {
        Ok([stdin, stdout, stderr]) => {
            Command::new(&program).args(arguments).stdin(stdin).stdout(stdout).stderr(stderr).exec()
        }
        Err(error) => error,
    };
    eprintln!("{program}: {error}\r");
    ExitCode::from(status_of(&error) as u8)
}

fn lead_session(terminal: &str) -> io::Result<[File; 3]> {
    rustix::process::setsid()?;
    let terminal = File::options().read(true).write(true).open(terminal)?;
    // Opening has made it the controlling terminal where it was nobody's; the call makes sure.
    rustix::process::ioctl_tiocsctty(&terminal)?;
    Ok([terminal.try_clone()?, terminal.try_clone()?, terminal])
}

/// The exit status a shell gives for a command that cannot be started.
pub(crate) fn status_of(error: &io::Error) -> i32 {
    if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_EXECUTE }
}

/// Tells the terminal its size; the kernel tells the foreground processes (SIGWINCH).
pub(crate) fn resize(terminal: &str, window: Window) -> io::Result<()> {
    let size = Winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(open_aside(terminal)?, size)?)
}

/// Waits until the terminal's output has left the guest.
pub(crate) fn drain(terminal: &File) -> io::Result<()> {
    Ok(rustix::termios::tcdrain(terminal)?)
}

/// Opens the terminal without becoming its session.
pub(crate) fn open_aside(terminal: &str) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(terminal, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?.into())
}
