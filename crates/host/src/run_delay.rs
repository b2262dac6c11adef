//! How long a thread could have run and had no processor.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread::ThreadId;

/// What the host's scheduler makes one thread wait, for whoever runs on it.
pub trait RunDelay: Send {
    /// Nanoseconds in which the thread that asks has been runnable without a processor, since the first question. Never
    /// goes back; where another thread asks than before, what either waited meanwhile is not counted.
    fn waited_ns(&mut self) -> u64;
}

/// What the host's kernel says of its threads: the second number in `/proc/thread-self/schedstat` (Linux,
/// Documentation/scheduler/sched-stats.rst). The file is kept open: a question is one system call. A kernel without it
/// (`CONFIG_SCHED_INFO`) makes this zero for ever.
#[derive(Debug, Default)]
pub struct ThreadRunDelay {
    asked: Option<(ThreadId, Option<File>)>,
    /// What the file said last.
    said: u64,
    waited: u64,
}

/// Longer than three numbers of 64 bits.
const LONGEST: usize = 80;

impl RunDelay for ThreadRunDelay {
    fn waited_ns(&mut self) -> u64 {
        let thread = std::thread::current().id();
        match &self.asked {
            Some((asked, file)) if *asked == thread => {
                let said = file.as_ref().and_then(read).unwrap_or(self.said);
                self.waited += said.saturating_sub(self.said);
                self.said = said;
            }
            _ => {
                let file = File::open("/proc/thread-self/schedstat").ok();
                self.said = file.as_ref().and_then(read).unwrap_or(0);
                self.asked = Some((thread, file));
            }
        }
        self.waited
    }
}

fn read(file: &File) -> Option<u64> {
    let mut text = [0; LONGEST];
    let length = file.read_at(&mut text, 0).ok()?;
    run_delay(std::str::from_utf8(text.get(..length)?).ok()?)
}

/// Time on a processor, time waiting for one, how many stretches.
fn run_delay(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_number_is_the_delay() {
        assert_eq!(run_delay("354775 71084 2\n"), Some(71084));
        assert_eq!(run_delay("18446744073709551615 18446744073709551615 9"), Some(u64::MAX));
        assert_eq!([run_delay(""), run_delay("7"), run_delay("7 x 2")], [None; 3]);
    }

    #[test]
    fn each_thread_counts_from_its_first_question() {
        let mut delay = ThreadRunDelay::default();
        assert_eq!(delay.waited_ns(), 0);
        let first = delay.waited_ns();
        let mut delay = std::thread::scope(|scope| {
            let ask = scope.spawn(move || {
                assert_eq!(delay.waited_ns(), first, "what the other thread waited is not ours");
                delay
            });
            ask.join().unwrap()
        });
        assert_eq!(delay.waited_ns(), first);
        assert!(delay.waited_ns() >= first);
    }
}
