//! The machine's ends: which stream of ours is which stream of the guest's.
//!
//! ```text
//!   console   COM1 (kernel messages)      hvc0 (port 0)          session's ports
//!   virtio    kept                        terminal               stdin, stdout, stderr
//!   serial    terminal or standard        -                      stdin, stdout, stderr
//!             streams
//!   none      kept                        dropped                stdin, stdout, stderr
//! ```

use super::prepare::Prepared;
use crate::console::ConsoleLog;
use crate::failure::Failure;
use crate::session::{Ends, Notice, Ports, Session};
use crate::terminal::Keyboard;
use crate::values::Console;
use device::virtio::console::PortEnds;
use machine::{Attachments, Event, SerialEnds};
use std::io::{self, PipeReader, Read, Write, pipe};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes kept of each of the command's streams for a JSON document.
const CAPTURE: usize = 1 << 20;

/// A machine's attachments, and this side of them.
pub(super) struct Connected {
    pub(super) attachments: Attachments,
    /// Progress of the machine.
    pub(super) events: Receiver<Event>,
    /// The dialogue with our first process, where it is ours.
    pub(super) session: Option<(Session, Receiver<Notice>)>,
    /// The kernel's console.
    pub(super) console: ConsoleLog,
    /// The command's streams, where they are to be kept.
    pub(super) captured: Option<[Captured; 2]>,
    /// Told when the user wants to leave.
    pub(super) escape: Receiver<()>,
    /// The terminal is the guest's from its first instruction on.
    pub(super) raw_from_start: bool,
}

/// Connects everything.
pub(super) fn connect(prepared: &Prepared, capture: bool) -> Result<Connected, Failure> {
    let (leave, escape) = channel();
    let captured = capture.then(<[Captured; 2]>::default);
    let interactive = prepared.command.as_ref().is_none_or(|command| command.terminal);
    let on_serial = prepared.console == Console::Serial && interactive;
    let output = |index: usize| -> Box<dyn Write + Send> {
        match (&captured, index) {
            (Some(captured), index) => Box::new(captured[index].clone()),
            (None, 0) => Box::new(io::stdout()),
            (None, _) => Box::new(io::stderr()),
        }
    };
    let keyboard = || -> Option<Box<dyn Read + Send>> { Some(keyboard(leave.clone())) };

    let echo: Option<Box<dyn Write + Send>> = if on_serial {
        Some(output(0))
    } else if prepared.options.verbose {
        Some(Box::new(io::stderr()))
    } else {
        None
    };
    let console = ConsoleLog::with_echo(echo);
    let serial = SerialEnds { output: Box::new(console.clone()), input: if on_serial { keyboard() } else { None } };
    let on_virtio = prepared.console == Console::Virtio && interactive;
    let mut ports = vec![PortEnds {
        name: String::new(),
        console: true,
        input: if on_virtio { keyboard() } else { None },
        output: if on_virtio { output(0) } else { Box::new(io::sink()) },
    }];
    let session = match &prepared.command {
        None => None,
        Some(command) => {
            let (more, ends) = session_ports()?;
            ports.extend(more);
            let stdin: Option<Box<dyn Read + Send>> = if interactive { None } else { Some(Box::new(io::stdin())) };
            let ours = Ends { stdin, stdout: output(0), stderr: output(1) };
            Some(Session::start(ends, ours, command.clone()))
        }
    };
    let (events_to, events) = channel();
    let attachments = Attachments { serial, ports, events: Some(events_to) };
    let raw_from_start = on_serial && super::at_terminal();
    Ok(Connected { attachments, events, session, console, captured, escape, raw_from_start })
}

/// Standard input with the way out watched for, where it is a terminal.
fn keyboard(leave: Sender<()>) -> Box<dyn Read + Send> {
    if !super::at_terminal() {
        return Box::new(io::stdin());
    }
    // Nobody listens any more once the machine is ending anyway.
    Box::new(Keyboard::new(io::stdin(), move || _ = leave.send(())))
}

/// The four ports of the session: the machine's ends and the session's.
fn session_ports() -> Result<(Vec<PortEnds>, Ports), Failure> {
    let pipe = || pipe().map_err(|error| Failure::io("make a pipe", &error));
    let (control_in, control_from) = pipe()?;
    let (control_to, control_out) = pipe()?;
    let (stdin_to, stdin) = pipe()?;
    let (stdout, stdout_from) = pipe()?;
    let (stderr, stderr_from) = pipe()?;
    let port = |name: &str, input: Option<PipeReader>, output: Box<dyn Write + Send>| PortEnds {
        name: name.into(),
        console: false,
        input: input.map(|input| Box::new(input) as Box<dyn Read + Send>),
        output,
    };
    let ports = vec![
        port(protocol::CONTROL, Some(control_to), Box::new(control_from)),
        port(protocol::STDIN, Some(stdin_to), Box::new(io::sink())),
        port(protocol::STDOUT, None, Box::new(stdout_from)),
        port(protocol::STDERR, None, Box::new(stderr_from)),
    ];
    let ends = Ports {
        control_in: Box::new(control_in),
        control_out: Box::new(control_out),
        stdin: Box::new(stdin),
        stdout: Box::new(stdout),
        stderr: Box::new(stderr),
    };
    Ok((ports, ends))
}

/// A stream that is kept, up to a limit.
#[derive(Clone, Default)]
pub(super) struct Captured(Arc<Mutex<(Vec<u8>, bool)>>);

impl Captured {
    /// What was kept as text, and whether that is all.
    pub(super) fn text(&self) -> (String, bool) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (String::from_utf8_lossy(&kept.0).into_owned(), !kept.1)
    }
}

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = CAPTURE - kept.0.len();
        kept.0.extend_from_slice(&bytes[..bytes.len().min(room)]);
        kept.1 |= bytes.len() > room;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_captured_stream_is_bounded() {
        let mut captured = Captured::default();
        captured.write_all(b"all\xff").unwrap();
        assert_eq!(captured.text(), ("all\u{fffd}".to_owned(), true));
        captured.write_all(&vec![b'x'; CAPTURE]).unwrap();
        let (text, complete) = captured.text();
        assert!(!complete);
        assert!(text.len() < CAPTURE + 4);
    }
}
