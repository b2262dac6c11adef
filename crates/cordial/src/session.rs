//! The host's half of the dialogue with the guest's first process (`protocol` has the words).
//!
//! ```text
//!   guest's ports          threads here                     the caller's ends
//!   cordial.control  <-->  listener: ready, exit     --->   Notice (channel)
//!   cordial.stdin    <---  feeder: records           <---   stdin
//!   cordial.stdout   --->  copier, counting          --->   stdout
//!   cordial.stderr   --->  copier, counting          --->   stderr
//! ```
//!
//! The streams behind the ports are the caller's as well: the machine's console device, or sockets of another monitor.

use protocol::{Command, ToGuest, ToHost, Window};
use std::io::{self, BufReader, Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

/// Signal number of a pipe without a reader.
const SIGPIPE: i32 = 13;

/// The host's ends of the four ports.
pub struct Ports {
    /// From the guest's control port.
    pub control_in: Box<dyn Read + Send>,
    /// To the guest's control port.
    pub control_out: Box<dyn Write + Send>,
    /// To the command's standard input.
    pub stdin: Box<dyn Write + Send>,
    /// From its standard output.
    pub stdout: Box<dyn Read + Send>,
    /// From its standard error.
    pub stderr: Box<dyn Read + Send>,
}

/// Where the command's streams go here.
pub struct Ends {
    /// Its input; `None` is an empty one.
    pub stdin: Option<Box<dyn Read + Send>>,
    /// Its output.
    pub stdout: Box<dyn Write + Send>,
    /// Its errors.
    pub stderr: Box<dyn Write + Send>,
}

/// What happens in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// User space is up.
    Ready {
        /// The kernel's release.
        kernel: String,
    },
    /// The command has ended and all its output is here.
    Exit {
        /// Its status.
        status: i32,
        /// Why it could not be started, if so.
        error: Option<String>,
    },
    /// The guest said something impossible.
    Nonsense(String),
}

/// A dialogue under way.
#[derive(Clone)]
pub struct Session {
    control: Arc<Mutex<Box<dyn Write + Send>>>,
}

impl Session {
    /// Waits, on threads of its own, for the guest to be ready, has it run `command`, and connects the streams.
    pub fn start(ports: Ports, ends: Ends, command: Command) -> (Self, Receiver<Notice>) {
        let session = Self { control: Arc::new(Mutex::new(ports.control_out)) };
        let (notices, received) = channel();
        let stdout = copy(ports.stdout, ends.stdout, session.clone());
        let stderr = copy(ports.stderr, ends.stderr, session.clone());
        let listener = session.clone();
        let streams = Streams { feed: Some((ends.stdin, ports.stdin)), stdout, stderr };
        let control = BufReader::new(ports.control_in);
        thread::spawn(move || listener.listen(control, &command, streams, &notices));
        (session, received)
    }

    /// The terminal has a new size.
    pub fn resize(&self, window: Window) {
        self.say(&ToGuest::Window(window));
    }

    /// Delivers a signal to the command.
    pub fn signal(&self, number: i32) {
        self.say(&ToGuest::Signal(number));
    }

    fn say(&self, message: &ToGuest) {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = protocol::send(&mut *control, message) {
            // A machine that has ended closes the port; its outcome says so.
            tracing::debug!("the guest's control port: {error}");
        }
    }

    fn listen(
        &self,
        mut control: BufReader<Box<dyn Read + Send>>,
        command: &Command,
        mut streams: Streams,
        notices: &Sender<Notice>,
    ) {
        // Held until the dialogue is over.
        let (dialogue, over) = channel();
        let mut over = Some(over);
        loop {
            let notice = match protocol::receive(&mut control) {
                Ok(None) => return,
                Ok(Some(ToHost::Ready { kernel })) => {
                    // Once: a guest that says it again gets no second command.
                    if let Some(((from, to), over)) = streams.feed.take().zip(over.take()) {
                        self.say(&ToGuest::Run(command.clone()));
                        thread::spawn(move || feed(from, to, &over));
                    }
                    Notice::Ready { kernel }
                }
                Ok(Some(ToHost::Exit { status, stdout, stderr, error })) => {
                    streams.stdout.wait_for(stdout);
                    streams.stderr.wait_for(stderr);
                    self.say(&ToGuest::Drained);
                    Notice::Exit { status, error }
                }
                Err(error) => Notice::Nonsense(error.to_string()),
            };
            let last = matches!(notice, Notice::Nonsense(_));
            if notices.send(notice).is_err() || last {
                return drop(dialogue);
            }
        }
    }
}

/// Input, and where it goes.
type Feed = (Option<Box<dyn Read + Send>>, Box<dyn Write + Send>);

struct Streams {
    feed: Option<Feed>,
    stdout: Progress,
    stderr: Progress,
}

/// How far a copier has come.
#[derive(Clone, Default)]
struct Progress(Arc<(Mutex<Copied>, Condvar)>);

#[derive(Default)]
struct Copied {
    bytes: u64,
    ended: bool,
}

impl Progress {
    fn change(&self, change: impl FnOnce(&mut Copied)) {
        change(&mut self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.1.notify_all();
    }

    /// Waits until `bytes` have been copied, or no more can come.
    fn wait_for(&self, bytes: u64) {
        let copied = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let short = |copied: &mut Copied| copied.bytes < bytes && !copied.ended;
        drop(self.0.1.wait_while(copied, short));
    }
}

/// Copies one output. A reader that has gone away here is told to the command as a pipe would tell it, and what it
/// still writes is counted and dropped.
fn copy(mut from: Box<dyn Read + Send>, mut to: Box<dyn Write + Send>, session: Session) -> Progress {
    let progress = Progress::default();
    let told = progress.clone();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        let mut broken = false;
        loop {
            let length = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            if !broken && to.write_all(&buffer[..length]).and_then(|()| to.flush()).is_err() {
                broken = true;
                session.signal(SIGPIPE);
            }
            told.change(|copied| copied.bytes += length as u64);
        }
        told.change(|copied| copied.ended = true);
    });
    progress
}

/// Sends the input as records, and its end. The port stays open until the dialogue is over: a port that closes may lose
/// what the guest has not read yet.
fn feed(from: Option<Box<dyn Read + Send>>, mut to: Box<dyn Write + Send>, over: &Receiver<()>) {
    let mut buffer = vec![0; protocol::LONGEST_RECORD];
    let mut from = from.unwrap_or_else(|| Box::new(io::empty()));
    loop {
        let length = match from.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // What cannot be read has ended.
            Err(_) => 0,
        };
        if protocol::send_record(&mut to, &buffer[..length]).is_err() {
            return;
        }
        if length == 0 {
            // Nothing is ever sent on it: this waits for the other end to go.
            let _ = over.recv();
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, PipeWriter, pipe};

    /// The guest's ends of the ports.
    struct Guest {
        control_in: BufReader<PipeReader>,
        control_out: PipeWriter,
        stdin: PipeReader,
        stdout: PipeWriter,
        stderr: PipeWriter,
    }

    fn ports() -> (Ports, Guest) {
        let [a, b, c, d, e] = std::array::from_fn(|_| pipe().unwrap());
        let ports = Ports {
            control_in: Box::new(a.0),
            control_out: Box::new(b.1),
            stdin: Box::new(c.1),
            stdout: Box::new(d.0),
            stderr: Box::new(e.0),
        };
        let guest = Guest { control_in: BufReader::new(b.0), control_out: a.1, stdin: c.0, stdout: d.1, stderr: e.1 };
        (ports, guest)
    }

    fn command() -> Command {
        Command { argv: vec!["cat".into()], env: Vec::new(), cwd: "/".into(), terminal: false, window: None }
    }

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn exit_is_told_once_all_output_is_here() {
        let (ports, mut guest) = ports();
        let out = Kept::default();
        let ends =
            Ends { stdin: Some(Box::new(&b"input"[..])), stdout: Box::new(out.clone()), stderr: Box::new(io::sink()) };
        let (_session, notices) = Session::start(ports, ends, command());
        protocol::send(&mut guest.control_out, &ToHost::Ready { kernel: "6.1".into() }).unwrap();
        assert_eq!(protocol::receive(&mut guest.control_in).unwrap(), Some(ToGuest::Run(command())));
        let mut buffer = Vec::new();
        assert_eq!(protocol::receive_record(&mut guest.stdin, &mut buffer).unwrap(), b"input");
        assert_eq!(protocol::receive_record(&mut guest.stdin, &mut buffer).unwrap(), b"");
        // The exit overtakes the output, as it may.
        let exit = ToHost::Exit { status: 7, stdout: 6, stderr: 3, error: None };
        protocol::send(&mut guest.control_out, &exit).unwrap();
        guest.stderr.write_all(b"err").unwrap();
        guest.stdout.write_all(b"output").unwrap();
        assert_eq!(protocol::receive(&mut guest.control_in).unwrap(), Some(ToGuest::Drained));
        assert_eq!(notices.recv().unwrap(), Notice::Ready { kernel: "6.1".into() });
        assert_eq!(notices.recv().unwrap(), Notice::Exit { status: 7, error: None });
        assert_eq!(*out.0.lock().unwrap(), b"output");
    }

    #[test]
    fn a_reader_that_leaves_is_told_to_the_command() {
        let (ports, mut guest) = ports();
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let ends = Ends { stdin: None, stdout: Box::new(writer), stderr: Box::new(io::sink()) };
        let (_session, _notices) = Session::start(ports, ends, command());
        guest.stdout.write_all(b"x").unwrap();
        assert_eq!(protocol::receive(&mut guest.control_in).unwrap(), Some(ToGuest::Signal(SIGPIPE)));
    }

    #[test]
    fn nonsense_ends_the_dialogue() {
        let (ports, mut guest) = ports();
        let ends = Ends { stdin: None, stdout: Box::new(io::sink()), stderr: Box::new(io::sink()) };
        let (_session, notices) = Session::start(ports, ends, command());
        guest.control_out.write_all(b"\xff\xfe\n").unwrap();
        assert!(matches!(notices.recv().unwrap(), Notice::Nonsense(_)));
        assert!(notices.recv().is_err());
    }
}
