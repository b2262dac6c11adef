//! How much memory a process has, and how much of it is a guest's RAM: /proc/PID/status and smaps.

use serde::Serialize;

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Figures {
    /// The most the process ever had in memory (VmHWM).
    pub(super) peak: u64,
    /// What of the guest's RAM is in memory: what the guest, or the loader, ever touched.
    pub(super) guest_touched: u64,
}

impl Figures {
    /// The monitor's own.
    pub(super) fn overhead(&self) -> u64 {
        self.peak.saturating_sub(self.guest_touched)
    }
}

/// Those of a running process whose guest has `ram` bytes; `None` where it has ended.
pub(super) fn of_process(id: u32, ram: u64) -> Option<Figures> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{id}/{name}")).ok();
    let peak = kilobytes(&read("status")?, "VmHWM:")?;
    Some(Figures { peak, guest_touched: touched(&read("smaps")?, ram) })
}

/// Resident bytes of the mapping whose size is that of the guest's RAM.
fn touched(smaps: &str, ram: u64) -> u64 {
    let (mut is_ram, mut sum) = (false, 0);
    for line in smaps.lines() {
        if let Some(size) = kilobytes(line, "Size:") {
            is_ram = size == ram;
        } else if is_ram && let Some(resident) = kilobytes(line, "Rss:") {
            sum += resident;
        }
    }
    sum
}

/// The number behind a line's name, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_found_by_its_size() {
        let smaps = "7f00-7f10 rw-p 0 00:00 0\nSize:       1024 kB\nKernelPageSize: 4 kB\nRss:        12 kB\n\
                     7f20-7f30 rw-p 0 00:00 0\nSize:       2048 kB\nRss:        500 kB\nPss: 500 kB\n";
        assert_eq!(touched(smaps, 2 << 20), 500 << 10);
        assert_eq!(touched(smaps, 4 << 20), 0);
        assert!(of_process(std::process::id(), 1).unwrap().peak > 100 << 10);
    }
}
