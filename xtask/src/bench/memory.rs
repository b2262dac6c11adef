//! How much memory a process has, and how much of it is a guest's RAM: /proc/PID/status and smaps.

use serde::Serialize;

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Figures {
    /// The most the process ever had in memory (VmHWM).
    pub(super) peak: u64,
    /// What of the guest's RAM is in memory: what the guest, or the loader, ever touched.
    pub(super) guest_touched: u64,
    /// What else is in memory now, each page once, however often it is mapped.
    pub(super) own: u64,
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
    let (guest_touched, own) = parts(&read("smaps")?, ram);
    Some(Figures { peak, guest_touched, own })
}

/// Resident bytes of the mappings whose size is that of the guest's RAM, and those of all others, the latter shared out
/// among the mappings of a page (Pss). Parts of the RAM that Cordial maps once more are neither.
fn parts(smaps: &str, ram: u64) -> (u64, u64) {
    let (mut is_ram, mut again, mut touched, mut own) = (false, false, 0, 0);
    for line in smaps.lines() {
        if let Some(size) = kilobytes(line, "Size:") {
            is_ram = size == ram;
        } else if line.split(' ').next().is_some_and(|range| range.contains('-')) {
            again = line.contains("memfd:guest-ram");
        } else if is_ram && let Some(resident) = kilobytes(line, "Rss:") {
            touched += resident;
        } else if !is_ram
            && !again
            && let Some(share) = kilobytes(line, "Pss:")
        {
            own += share;
        }
    }
    (touched, own)
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
        let smaps = "7f00-7f10 rw-p 0 00:00 0\nSize:       1024 kB\nKernelPageSize: 4 kB\nRss:        12 kB\nPss: 8 kB\n\
                     7f20-7f30 rw-p 0 00:00 0\nSize:       2048 kB\nRss:        500 kB\nPss: 500 kB\n\
                     7f40-7f50 rw-s 0 00:01 9 /memfd:guest-ram (deleted)\nSize:       4 kB\nRss:        4 kB\nPss: 2 kB\n";
        assert_eq!(parts(smaps, 2 << 20), (500 << 10, 8 << 10));
        assert_eq!(parts(smaps, 4 << 20), (0, 508 << 10));
        let this = of_process(std::process::id(), 1).unwrap();
        assert!(this.peak > 100 << 10 && this.own > 100 << 10);
    }
}
