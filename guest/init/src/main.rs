//! The first process of a Linux guest: brings user space up, runs what the host asks for, reports, powers off.
//!
//! ```text
//!   setup     mounts, kernel modules, the ports by name
//!     |
//!   session   ready -> run -> (streams or terminal) -> exit -> drained
//!     |
//!   power_off everything killed, file systems unmounted, sync, reboot(POWER_OFF)
//! ```
//!
//! Neighbours: `protocol` has the words spoken with the host; `cordial` speaks the other half. Where the host offers
//! no ports (an unaware machine), a shell on the console is what is left, and is what the user gets.
//!
//! There is deliberately no service supervision, no network and no file in `/etc` to read: what to run comes from the
//! host. There is no unsafe code: what must happen between fork and exec (a new session, the controlling terminal)
//! happens in this same program, started again as `init --session`.

mod session;
mod setup;
mod terminal;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(terminal::SESSION_FLAG) {
        return terminal::become_session(arguments);
    }
    if std::process::id() != 1 {
        eprintln!("init: this is the first process of a cordial guest; it does nothing elsewhere");
        return ExitCode::FAILURE;
    }
    if let Err(error) = life() {
        eprintln!("init: {error}");
    }
    power_off()
}

/// Everything from the first mount to the last byte.
fn life() -> Result<(), setup::Error> {
    setup::mount_everything()?;
    let options = setup::Options::of_kernel()?;
    setup::load_modules();
    match setup::Ports::open(&options) {
        Ok(Some(ports)) => session::serve(ports, &options),
        Ok(None) => session::lone_shell(&options),
        Err(error) => {
            eprintln!("init: {error}; a shell on {} is what is left", options.console);
            session::lone_shell(&options);
        }
    }
    Ok(())
}

/// Leaves nothing unwritten behind and ends the machine. Does not return unless the kernel refuses.
fn power_off() -> ExitCode {
    session::end_all_processes();
    setup::unmount_disks();
    rustix::fs::sync();
    if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        eprintln!("init: cannot power off: {error}");
    }
    ExitCode::FAILURE
}
