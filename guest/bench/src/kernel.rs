//! What a kernel does for a program: system calls, faults, switches, processes.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, PipeReader, PipeWriter, Read, Write, pipe};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::measure::{Kind, Unit, Workload};
use crate::{NOTHING, sys};

const fn row(name: &'static str, batch: u64, start: fn() -> io::Result<Unit>, what: &'static str) -> Workload {
    Workload { name, kind: Kind::Kernel, what, batch, start }
}

pub(crate) const WORKLOADS: &[Workload] = &[
    row("getppid", 256, getppid, "the cheapest system call"),
    row("clock", 256, clock, "clock_gettime, through the vDSO where there is one"),
    row("read0", 16, read_zeros, "a read of 4 KiB from /dev/zero"),
    row("stat", 16, stat, "a file's status, by its path"),
    row("signal", 16, signal, "a signal to oneself, handler and return"),
    row("file", 1, file, "a file on a tmpfs: made, 4 KiB written, read back, removed"),
    row("mmap", 1, mmap, "1 MiB mapped, its 256 pages touched, unmapped"),
    row("pipe", 16, ping_pong, "a byte to another process and back, through two pipes"),
    row("futex", 16, futex, "a wake-up of another thread and back"),
    row("switch", 64, switch, "sched_yield, another process being ready"),
    row("fork", 1, fork, "a process forked, ended and waited for"),
    row("forkexec", 1, fork_exec, "a process forked, this program executed, ended and waited for"),
];

fn getppid() -> io::Result<Unit> {
    let parent = sys::getppid();
    Ok(Box::new(move || Ok((0..256).filter(|_| sys::getppid() == parent).count() as u64)))
}

fn clock() -> io::Result<Unit> {
    Ok(Box::new(|| {
        let mut last = 0;
        let mut forward = 0;
        for _ in 0..256 {
            let now = sys::monotonic_ns();
            forward += u64::from(now >= last);
            last = now;
        }
        Ok(forward)
    }))
}

fn read_zeros() -> io::Result<Unit> {
    let mut zeros = File::open("/dev/zero")?;
    let mut buffer = vec![1; 4096];
    Ok(Box::new(move || {
        for _ in 0..16 {
            zeros.read_exact(&mut buffer)?;
        }
        Ok(buffer.iter().map(|byte| u64::from(*byte)).sum())
    }))
}

fn stat() -> io::Result<Unit> {
    let path = Path::new("/dev/null");
    let length = path.metadata()?.len();
    Ok(Box::new(move || {
        let mut same = 0;
        for _ in 0..16 {
            same += u64::from(path.metadata()?.len() == length);
        }
        Ok(same)
    }))
}

fn signal() -> io::Result<Unit> {
    sys::count_signals()?;
    Ok(Box::new(|| {
        let before = sys::signals();
        for _ in 0..16 {
            sys::signal_self()?;
        }
        Ok(sys::signals() - before)
    }))
}

fn file() -> io::Result<Unit> {
    // A tmpfs on nearly every Linux.
    let folder = ["/dev/shm", "/tmp", "."].iter().map(Path::new).find(|folder| folder.is_dir());
    let path: PathBuf = folder.unwrap_or(Path::new(".")).join(format!("bench-{}", std::process::id()));
    let (written, mut read) = (vec![7_u8; 4096], Vec::with_capacity(8192));
    Ok(Box::new(move || {
        File::create(&path)?.write_all(&written)?;
        read.clear();
        File::open(&path)?.read_to_end(&mut read)?;
        std::fs::remove_file(&path)?;
        Ok(read.iter().map(|byte| u64::from(*byte)).sum())
    }))
}

fn mmap() -> io::Result<Unit> {
    Ok(Box::new(|| sys::map_and_touch(1 << 20)))
}

/// Sends each byte back.
fn echo(mut from: PipeReader, mut to: PipeWriter) -> i32 {
    let mut byte = [0];
    while from.read_exact(&mut byte).and_then(|()| to.write_all(&byte)).is_ok() {}
    0
}

fn ping_pong() -> io::Result<Unit> {
    let ((there_end, mut there), (mut back, back_end)) = (pipe()?, pipe()?);
    let child = sys::fork(move || echo(there_end, back_end))?;
    Ok(Box::new(move || {
        let (mut sum, mut byte) = (0, [0]);
        for number in 0..16_u8 {
            there.write_all(&[number])?;
            back.read_exact(&mut byte)?;
            sum += u64::from(byte[0]);
        }
        black_box(&child);
        Ok(sum)
    }))
}

/// Whose turn it is, in a futex word.
struct Turn(AtomicU32);

impl Turn {
    const OURS: u32 = 0;
    const THEIRS: u32 = 1;

    fn give(&self, to: u32) -> io::Result<()> {
        self.0.store(to, Ordering::SeqCst);
        sys::futex_wake(&self.0)
    }

    fn wait_for(&self, turn: u32) -> io::Result<()> {
        loop {
            let now = self.0.load(Ordering::SeqCst);
            if now == turn {
                return Ok(());
            }
            sys::futex_wait(&self.0, now)?;
        }
    }
}

fn futex() -> io::Result<Unit> {
    let turn = Arc::new(Turn(AtomicU32::new(Turn::OURS)));
    let other = Arc::clone(&turn);
    // It ends with the process, or with the first error.
    std::thread::spawn(move || while other.wait_for(Turn::THEIRS).and_then(|()| other.give(Turn::OURS)).is_ok() {});
    Ok(Box::new(move || {
        for _ in 0..16 {
            turn.give(Turn::THEIRS)?;
            turn.wait_for(Turn::OURS)?;
        }
        Ok(16)
    }))
}

fn switch() -> io::Result<Unit> {
    // It is killed with its guard.
    let child = sys::fork(|| {
        loop {
            sys::yield_now();
        }
    })?;
    Ok(Box::new(move || {
        (0..64).for_each(|_| sys::yield_now());
        black_box(&child);
        Ok(64)
    }))
}

fn fork() -> io::Result<Unit> {
    Ok(Box::new(|| sys::fork(|| 7)?.wait().map(|status| status as u64)))
}

fn fork_exec() -> io::Result<Unit> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(NOTHING);
    Ok(Box::new(move || Ok(u64::from(command.status()?.success()))))
}
