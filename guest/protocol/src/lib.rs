//! What `cordial` and the first process of its Linux guests (`init`) say to each other.
//!
//! Four virtio-console ports carry it, each found by its name:
//!
//! ```text
//!            host (cordial)                                     guest (init, PID 1)
//!   cordial.control   <───── ToHost, one JSON object a line ──────  ready, exit
//!                     ────── ToGuest, one JSON object a line ─────> run, window, signal, drained
//!   cordial.stdin     ────── records: length (u32 LE), bytes ─────> the command's standard input; length 0 ends it
//!   cordial.stdout    <───── bytes ───────────────────────────────  the command's standard output
//!   cordial.stderr    <───── bytes ───────────────────────────────  the command's standard error
//! ```
//!
//! The ports are separate virtqueues, so nothing orders one against another. That is why the end of standard input
//! travels in its own stream, and why `exit` tells how many bytes the two output streams carried: the host answers
//! `drained` once it has them all, and only then does the guest power off.

use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Read, Write};

/// Port of [`ToGuest`] and [`ToHost`].
pub const CONTROL: &str = "cordial.control";
/// Port of the command's standard input.
pub const STDIN: &str = "cordial.stdin";
/// Port of the command's standard output.
pub const STDOUT: &str = "cordial.stdout";
/// Port of the command's standard error.
pub const STDERR: &str = "cordial.stderr";
/// All ports, in the order the machine numbers them.
pub const PORTS: [&str; 4] = [CONTROL, STDIN, STDOUT, STDERR];

/// Kernel command line: `cordial.agent=virtio` where the ports above exist, `none` where they do not.
pub const AGENT_OPTION: &str = "cordial.agent";
/// Kernel command line: the terminal device for an interactive session, such as `hvc0`.
pub const CONSOLE_OPTION: &str = "cordial.console";

/// Where the initramfs lists the kernel modules to load: one path a line, in order.
pub const MODULES_FILE: &str = "/etc/cordial/modules";

/// Exit status where the command was found but could not be started (POSIX XCU 2.8.2).
pub const CANNOT_EXECUTE: i32 = 126;
/// Exit status where the command was not found (POSIX XCU 2.8.2).
pub const NOT_FOUND: i32 = 127;

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// What the guest shall run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments; the program is looked up in the `PATH` of `env`.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// On the console as a terminal session with job control, instead of on the three streams.
    pub terminal: bool,
    /// The terminal's size at the start, where there is one.
    pub window: Option<Window>,
}

/// Host to guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToGuest {
    /// Run this. Sent once, after [`ToHost::Ready`].
    Run(Command),
    /// The host's terminal has changed its size.
    Window(Window),
    /// Deliver this signal to the command.
    Signal(i32),
    /// Every byte that [`ToHost::Exit`] announced has arrived: power off.
    Drained,
}

/// Guest to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToHost {
    /// User space is up, the ports are open.
    Ready {
        /// The kernel's release, as `uname -r` prints it.
        kernel: String,
    },
    /// The command has ended and nothing it started is left.
    Exit {
        /// Its status; 128 + the signal's number where a signal ended it; 126 and 127 as a shell means them.
        status: i32,
        /// Bytes written to the standard output port.
        stdout: u64,
        /// Bytes written to the standard error port.
        stderr: u64,
        /// Why the command could not be started, if so.
        error: Option<String>,
    },
}

/// Writes one message and its line end in a single write.
///
/// # Errors
/// Those of `to`.
pub fn send<T: Serialize>(to: &mut impl Write, message: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Reads one message; `None` at the end of the stream.
///
/// # Errors
/// Those of `from`; [`io::ErrorKind::InvalidData`] for a line that is not such a message.
pub fn receive<T: for<'a> Deserialize<'a>>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    // A guest must not make the host collect an endless line.
    let length = from.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line)?;
    if length == 0 {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Bytes of the longest control message: an argument list and environment as Linux limits them, quoted.
const LONGEST_LINE: u64 = 8 << 20;

/// Bytes a record of the standard input stream holds at most.
pub const LONGEST_RECORD: usize = 32 << 10;

/// Writes one record of the standard input stream; an empty one ends the stream.
///
/// # Errors
/// Those of `to`.
pub fn send_record(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    let mut record = Vec::with_capacity(bytes.len() + 4);
    record.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    record.extend_from_slice(bytes);
    to.write_all(&record)?;
    to.flush()
}

/// Reads one record of the standard input stream into `buffer`; empty at its end.
///
/// # Errors
/// Those of `from`; [`io::ErrorKind::InvalidData`] for a record longer than [`LONGEST_RECORD`].
pub fn receive_record<'a>(from: &mut impl Read, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST_RECORD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a record of {length} bytes")));
    }
    buffer.resize(length, 0);
    from.read_exact(buffer)?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_line() {
        let messages = [
            ToHost::Ready { kernel: "6.1".into() },
            ToHost::Exit { status: 7, stdout: 4, stderr: 0, error: Some("line\nend".into()) },
        ];
        let mut stream = Vec::new();
        for message in &messages {
            send(&mut stream, message).unwrap();
        }
        assert_eq!(stream.iter().filter(|byte| **byte == b'\n').count(), 2);
        let mut from = stream.as_slice();
        for message in messages {
            assert_eq!(receive(&mut from).unwrap(), Some(message));
        }
        assert_eq!(receive::<ToHost>(&mut from).unwrap(), None);
        assert!(receive::<ToHost>(&mut b"{}\n".as_slice()).is_err());
    }

    #[test]
    fn records_end_with_an_empty_one() {
        let mut stream = Vec::new();
        send_record(&mut stream, b"abc").unwrap();
        send_record(&mut stream, b"").unwrap();
        let (mut from, mut buffer) = (stream.as_slice(), Vec::new());
        assert_eq!(receive_record(&mut from, &mut buffer).unwrap(), b"abc");
        assert_eq!(receive_record(&mut from, &mut buffer).unwrap(), b"");
        assert!(receive_record(&mut u32::MAX.to_le_bytes().as_slice(), &mut buffer).is_err());
    }
}
