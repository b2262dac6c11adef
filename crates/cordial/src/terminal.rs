//! The user's terminal: raw while the guest has it, restored however the program ends, and the way out.

use protocol::Window;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, Read};

/// Ctrl-], as telnet has it: seldom typed, and unlike Ctrl-A no use in a shell.
const ESCAPE: u8 = 0x1d;

/// How to leave, for the user.
pub const WAY_OUT: &str = "Ctrl-] q ends the machine";

/// The terminal in raw mode, until dropped.
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Raw mode on the terminal of standard input; `None` where that is no terminal.
    pub fn enter() -> Option<Self> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that has gone away needs no restoring.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// The size of the user's terminal.
pub fn window() -> Option<Window> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(Window { rows: size.ws_row, columns: size.ws_col })
}

/// Keys on their way to the guest; the escape sequence ends here.
pub struct Keyboard<R, F> {
    from: R,
    leave: F,
    escaped: bool,
}

impl<R: Read, F: FnMut()> Keyboard<R, F> {
    /// Passes `from` on; calls `leave` when the user wants to.
    pub const fn new(from: R, leave: F) -> Self {
        Self { from, leave, escaped: false }
    }
}

impl<R: Read, F: FnMut()> Read for Keyboard<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A held-back escape may come out before what follows it.
        let Some(room) = buffer.len().checked_sub(1).filter(|room| *room > 0) else { return Ok(0) };
        loop {
            let mut keys = vec![0; room.min(4096)];
            let length = self.from.read(&mut keys)?;
            let mut kept = 0;
            let mut keep = |key| {
                buffer[kept] = key;
                kept += 1;
            };
            for key in &keys[..length] {
                match (std::mem::take(&mut self.escaped), *key) {
                    (true, b'q' | b'Q') => (self.leave)(),
                    (true, ESCAPE) => keep(ESCAPE),
                    (true, key) => {
                        keep(ESCAPE);
                        keep(key);
                    }
                    (false, ESCAPE) => self.escaped = true,
                    (false, key) => keep(key),
                }
            }
            if kept > 0 || length == 0 {
                return Ok(kept);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &[u8]) -> (Vec<u8>, u32) {
        let mut left = 0;
        let mut out = Vec::new();
        Keyboard::new(keys, || left += 1).read_to_end(&mut out).unwrap();
        (out, left)
    }

    #[test]
    fn only_the_escape_sequence_ends_here() {
        assert_eq!(typed(b"ls\r\x03\x01"), (b"ls\r\x03\x01".to_vec(), 0));
        assert_eq!(typed(b"a\x1dq"), (b"a".to_vec(), 1));
        assert_eq!(typed(b"\x1d\x1dq"), (b"\x1dq".to_vec(), 0));
        assert_eq!(typed(b"\x1dx"), (b"\x1dx".to_vec(), 0));
    }
}
