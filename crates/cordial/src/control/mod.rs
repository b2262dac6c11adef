//! Machines that run, reached from other processes of the same user.
//!
//! ```text
//!   cordial run                                         cordial ps, cordial contract ...
//!     Place: RUNTIME/NAME/, locked while it runs          Running: every NAME whose lock is held
//!     Server ──> control.sock  <──── one JSON object a line ────  Client
//!       └──> machine::Handle
//! ```
//!
//! RUNTIME is `$XDG_RUNTIME_DIR/cordial`, or else `/tmp/cordial-UID`; nobody but the user may enter it. Who holds the lock
//! of a NAME owns what is in it; what a dead process has left behind is taken away by whoever finds it. docs/control.md has
//! the words of the dialogue.

mod client;
mod place;
mod server;
mod wire;

pub use client::Client;
pub use place::{Place, Running, check_name, find, running};
pub use server::Server;
pub use wire::{Ask, Facts, Problem, Revoked};
