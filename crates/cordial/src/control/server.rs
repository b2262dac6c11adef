//! The machine's end of the control socket.
//!
//! One thread takes callers, each caller has one for its requests: no vCPU waits for any of them. Callers are bounded in
//! number, in how long they may say nothing, and in how much they say.

use super::place::Place;
use super::wire::{Ask, Facts, LONGEST_REQUEST, Problem, Revoked, asked, reply};
use crate::failure::Failure;
use crate::values::did_you_mean;
use machine::Handle;
use machine::surfaces::NotRevoked;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Callers at once.
const MOST_CALLERS: usize = 16;
/// How long a caller may say nothing, and not take what is said to it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What answers requests.
trait Machine: Send + Sync + 'static {
    fn answer(&self, ask: &Ask) -> Result<Value, Problem>;
}

/// A machine and what it is.
struct Subject {
    facts: Facts,
    handle: Handle,
}

impl Machine for Subject {
    fn answer(&self, ask: &Ask) -> Result<Value, Problem> {
        match ask {
            Ask::Status => {
                let uptime_ms = self.handle.contract().uptime_ms;
                Ok(json!(Facts { uptime_ms, ..self.facts.clone() }))
            }
            Ask::Contract => Ok(json!(self.handle.contract())),
            Ask::Revoke { feature } => match self.handle.revoke(feature) {
                Ok((state, epoch)) => Ok(json!(Revoked { state, epoch })),
                Err(error) => Err(self.refused(feature, &error)),
            },
        }
    }
}

impl Subject {
    fn refused(&self, feature: &str, error: &NotRevoked) -> Problem {
        match error {
            NotRevoked::Unknown { .. } => {
                let contract = self.handle.contract();
                let names = contract.surfaces.iter().map(|surface| &surface.name[..]);
                Problem::new("unknown-feature", format!("{error}{}", did_you_mean(feature, names)))
            }
            NotRevoked::NoHandshake { .. } => Problem::new("no-handshake", error.to_string()),
            NotRevoked::NotOffered { .. } => Problem::new("not-offered", error.to_string()),
        }
    }
}

/// Listens until it is dropped.
pub struct Server {
    ending: Arc<AtomicBool>,
    /// The machine's directory goes with it.
    place: Place,
}

impl Server {
    /// Listens at `place` for those who ask about the machine of `handle`.
    ///
    /// # Errors
    /// The host refuses the socket or a thread.
    pub fn start(place: Place, facts: Facts, handle: Handle) -> Result<Self, Failure> {
        Self::with(place, Subject { facts, handle })
    }

    fn with(place: Place, machine: impl Machine) -> Result<Self, Failure> {
        let (listener, ending) = (place.listen()?, Arc::<AtomicBool>::default());
        let (stop, machine) = (Arc::clone(&ending), Arc::new(machine));
        thread::Builder::new()
            .name("control".into())
            .spawn(move || listen(&listener, &machine, &stop))
            .map_err(|error| Failure::io(format!("listen at {}", place.socket().display()), &error))?;
        Ok(Self { ending, place })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        // Gets the listener out of its wait.
        drop(UnixStream::connect(self.place.socket()));
    }
}

fn listen(listener: &UnixListener, machine: &Arc<impl Machine>, ending: &AtomicBool) {
    let callers = Arc::<AtomicUsize>::default();
    for caller in listener.incoming() {
        if ending.load(Ordering::SeqCst) {
            return;
        }
        let Ok(caller) = caller else {
            // Out of descriptors, perhaps: asking again at once would be a busy loop.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        let timeouts = [caller.set_read_timeout(Some(PATIENCE)), caller.set_write_timeout(Some(PATIENCE))];
        if timeouts.into_iter().any(|set| set.is_err()) {
            continue;
        }
        if callers.fetch_add(1, Ordering::SeqCst) >= MOST_CALLERS {
            callers.fetch_sub(1, Ordering::SeqCst);
            let problem = Problem::new("too-many", format!("{MOST_CALLERS} callers are connected already"));
            let _ = (&caller).write_all(reply(&Err(problem)).as_bytes());
            continue;
        }
        let (machine, present) = (Arc::clone(machine), Present(Arc::clone(&callers)));
        let serve = move || {
            let _present = present;
            serve(&caller, &*machine);
        };
        // Where the host has no thread left, the caller is let go.
        let _ = thread::Builder::new().name("control-caller".into()).spawn(serve);
    }
}

/// A caller counts while it is there.
struct Present(Arc<AtomicUsize>);

impl Drop for Present {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Answers a caller until it goes, says nothing for too long, or says too much.
fn serve(mut caller: &UnixStream, machine: &impl Machine) {
    let mut lines = BufReader::new(caller);
    let mut line = Vec::new();
    loop {
        line.clear();
        match lines.by_ref().take(LONGEST_REQUEST as u64).read_until(b'\n', &mut line) {
            Ok(1..) => {}
            _ => return,
        }
        let whole = line.ends_with(b"\n");
        let answer = if whole {
            asked(&line).and_then(|ask| machine.answer(&ask))
        } else {
            Err(Problem::new("bad-request", format!("a request is one line of at most {LONGEST_REQUEST} bytes")))
        };
        if caller.write_all(reply(&answer).as_bytes()).is_err() || !whole {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Client;
    use super::*;

    struct Echo;

    impl Machine for Echo {
        fn answer(&self, ask: &Ask) -> Result<Value, Problem> {
            match ask {
                Ask::Revoke { feature } => Err(Problem::new("not-offered", feature.clone())),
                ask => Ok(json!(ask)),
            }
        }
    }

    fn server(root: &tempfile::TempDir) -> Server {
        Server::with(Place::take_in(root.path(), "vm").unwrap(), Echo).unwrap()
    }

    fn private() -> tempfile::TempDir {
        use std::os::unix::fs::PermissionsExt;
        tempfile::Builder::new().permissions(std::fs::Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    fn say(server: &Server, bytes: &[u8]) -> String {
        let mut caller = UnixStream::connect(server.place.socket()).unwrap();
        // A caller that says too much may find nobody there to hear the rest.
        let _ = caller.write_all(bytes);
        let _ = caller.shutdown(std::net::Shutdown::Write);
        let mut text = String::new();
        let _ = caller.read_to_string(&mut text);
        text
    }

    #[test]
    fn callers_are_answered_in_turn_until_they_go() {
        let root = private();
        let server = server(&root);
        let mut client = Client::connect(server.place.socket()).unwrap();
        for _ in 0..3 {
            assert_eq!(client.ask::<Value>(&Ask::Contract), Ok(json!({ "ask": "contract" })));
            let problem = client.ask::<Value>(&Ask::Revoke { feature: "x".into() }).unwrap_err();
            assert_eq!((&problem.kind[..], &problem.message[..]), ("not-offered", "x"));
        }
        let socket = server.place.socket();
        drop(server);
        assert!(!socket.exists() && UnixStream::connect(&socket).is_err());
    }

    #[test]
    fn nonsense_is_answered_and_too_much_of_it_ends_the_call() {
        let root = private();
        let server = server(&root);
        assert_eq!(say(&server, b""), "");
        assert!(say(&server, b"{}\n\n[1]\n").lines().all(|line| line.contains("bad-request")));
        assert_eq!(say(&server, b"{}\n\n[1]\n").lines().count(), 3);
        assert!(say(&server, b"{\"half\"").contains("one line of at most 4096 bytes"));
        assert_eq!(say(&server, &[b'x'; 10_000]).lines().count(), 1, "and nothing for the rest");
        assert_eq!(say(&server, &[0xff; 4095]).lines().count(), 1);
    }

    #[test]
    fn callers_beyond_the_limit_are_told_so_and_the_next_one_is_served() {
        let root = private();
        let server = server(&root);
        let mut callers: Vec<_> = (0..MOST_CALLERS).map(|_| Client::connect(server.place.socket()).unwrap()).collect();
        for caller in &mut callers {
            assert!(caller.ask::<Value>(&Ask::Status).is_ok());
        }
        assert!(say(&server, b"").contains("too-many"));
        let refused = Client::connect(server.place.socket()).unwrap().ask::<Value>(&Ask::Status).unwrap_err();
        assert_eq!(refused.kind, "too-many");
        drop(callers);
        // Their threads see it in their own time.
        while Client::connect(server.place.socket()).unwrap().ask::<Value>(&Ask::Status).is_err() {
            thread::yield_now();
        }
    }
}
