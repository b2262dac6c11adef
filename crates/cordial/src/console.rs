//! What the guest printed: kept, bounded, and watched for a panic.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Lines kept.
const LINES: usize = 200;
/// Bytes kept of one line.
const LINE: usize = 512;

/// A guest's console output. Clones share it; writing never fails.
#[derive(Clone, Default)]
pub struct ConsoleLog(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    lines: VecDeque<String>,
    current: Vec<u8>,
    panic: Option<String>,
    echo: Option<Box<dyn Write + Send>>,
}

impl ConsoleLog {
    /// A log that also passes every byte on to `echo`.
    pub fn with_echo(echo: Option<Box<dyn Write + Send>>) -> Self {
        Self(Arc::new(Mutex::new(Kept { echo, ..Kept::default() })))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last lines, the oldest first, without control characters.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let kept = self.kept();
        let unfinished = (!kept.current.is_empty()).then(|| readable(&kept.current));
        let lines: Vec<_> = kept.lines.iter().cloned().chain(unfinished).collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }

    /// What a Linux kernel said when it panicked.
    pub fn panic(&self) -> Option<String> {
        self.kept().panic.clone()
    }
}

impl Kept {
    fn end_line(&mut self) {
        let line = readable(&self.current);
        self.current.clear();
        // kernel/panic.c: "Kernel panic - not syncing: %s". The line that ends the report repeats it.
        if let Some((_, reason)) = line.split_once("Kernel panic - not syncing: ") {
            self.panic.get_or_insert_with(|| reason.to_owned());
        }
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

/// A line fit for a terminal and a log.
fn readable(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().filter(|character| *character == '\t' || !character.is_control()).collect()
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.kept();
        for byte in bytes {
            match byte {
                b'\n' => kept.end_line(),
                byte if kept.current.len() < LINE => kept.current.push(*byte),
                _ => {}
            }
        }
        if kept.echo.as_mut().is_some_and(|echo| echo.write_all(bytes).and_then(|()| echo.flush()).is_err()) {
            kept.echo = None;
        }
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
    fn the_tail_is_bounded_and_readable() {
        let mut log = ConsoleLog::default();
        for line in 0..1000 {
            write!(log, "line {line}\r\n").unwrap();
        }
        log.write_all(b"\x1b[1mhalf").unwrap();
        assert_eq!(log.tail(3), ["line 998", "line 999", "[1mhalf"]);
        assert_eq!(log.tail(10_000).len(), LINES + 1);
        log.write_all(&vec![b'x'; 1 << 20]).unwrap();
        assert!(log.tail(1)[0].len() <= LINE);
    }

    #[test]
    fn a_panic_is_recognised_across_writes() {
        let mut log = ConsoleLog::default();
        log.write_all(b"[    1.0] Kernel panic - not sync").unwrap();
        assert_eq!(log.panic(), None);
        log.write_all(b"ing: VFS: no root\r\n---[ end Kernel panic - not syncing: VFS: no root ]---\r\n").unwrap();
        assert_eq!(log.panic().as_deref(), Some("VFS: no root"));
    }
}
