//! The asking end of a control socket.

use super::place::Running;
use super::wire::{Ask, LONGEST_REPLY, Problem, replied, request};
use crate::failure::Failure;
use serde::de::DeserializeOwned;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A call to one machine.
#[derive(Debug)]
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Calls a machine.
    ///
    /// # Errors
    /// It does not take calls.
    pub fn to(machine: &Running) -> Result<Self, Failure> {
        Self::connect(&machine.socket).map_err(|error| Failure::io(format!("reach {}", machine.name), &error))
    }

    pub(super) fn connect(socket: impl AsRef<Path>) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The machine's, or that it went away.
    pub fn ask<T: DeserializeOwned>(&mut self, ask: &Ask) -> Result<T, Problem> {
        let lost = |error: io::Error| Problem { kind: "lost".into(), message: format!("no answer: {error}") };
        // Those who are not let in are told so at once: the reply may be there where the request has nowhere to go.
        let sent = self.0.get_mut().write_all(request(ask).as_bytes());
        let mut line = Vec::new();
        self.0.by_ref().take(LONGEST_REPLY as u64).read_until(b'\n', &mut line).map_err(lost)?;
        if line.is_empty() {
            return Err(lost(sent.err().unwrap_or_else(|| io::Error::other("the machine has ended"))));
        }
        let value = replied(&line)?;
        serde_json::from_value(value).map_err(|error| lost(io::Error::other(error)))
    }
}
