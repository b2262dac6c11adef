//! What the host says about this process.

/// Bytes of memory the host holds for this process, guest RAM included, each page once however often it is mapped; 0 where
/// the host does not say (`Pss` of `/proc/self/smaps_rollup`, proc(5); before Linux 4.14 `VmRSS`, which counts mappings).
pub fn resident_bytes() -> u64 {
    let said = |file: &str, name: &str| {
        let text = std::fs::read_to_string(file).ok()?;
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let kib = said("/proc/self/smaps_rollup", "Pss:").or_else(|| said("/proc/self/status", "VmRSS:"));
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_has_memory() {
        assert!(super::resident_bytes() > 100 << 10);
    }
}
