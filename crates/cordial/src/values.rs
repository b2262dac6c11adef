//! Text to typed values. Each error says what was written, where, and what would do.

use crate::control::check_name;
use crate::failure::Failure;
use crate::settings::{Setting, Settings};
use machine::plan::{CallRate, Dialects, DiskMode, DiskPlan, EngineCheck, EngineChoice, TimePolicy, Virt, Without};
use std::path::PathBuf;
use std::time::Duration;

/// Where the guest's console is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// virtio for our own Linux guests, serial for everything else.
    Auto,
    /// hvc0.
    Virtio,
    /// COM1.
    Serial,
    /// Nowhere: nothing is shown, nothing is read.
    None,
}

/// "; did you mean ...?" where a known word is near.
pub fn did_you_mean<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    known
        .map(|name| (strsim::damerau_levenshtein(word, name), name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4)
        .min()
        .map_or_else(String::new, |(_, name)| format!("; did you mean \"{name}\"?"))
}

/// Reads one key with `parse`, which says what would have been right.
fn read<T>(settings: &Settings, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, Failure> {
    let Setting { values, origin } = settings.get(key);
    values
        .last()
        .map(|text| parse(text).map_err(|wanted| Failure::usage(format!("{key} \"{text}\" ({origin}): {wanted}"))))
        .transpose()
}

fn one_of<T: Copy>(text: &str, known: &[(&'static str, T)]) -> Result<T, String> {
    known.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        format!("not one of {}{}", names.join(", "), did_you_mean(text, names.iter().copied()))
    })
}

/// How many vCPUs.
///
/// # Errors
/// Not a number, 0, or more than eight for each of the host's.
pub fn cpus(settings: &Settings, host: u32) -> Result<u32, Failure> {
    let most = (host * 8).min(machine::plan::MAX_CPUS);
    let parse = |text: &str| match text.parse::<u32>() {
        Ok(count) if (1..=most).contains(&count) => Ok(count),
        Ok(_) => Err(format!("a machine has at least 1 and here, with {host} host CPUs, at most {most}")),
        Err(_) => Err(format!("not a count between 1 and {most}")),
    };
    Ok(read(settings, "cpus", parse)?.unwrap_or_else(|| host.clamp(1, 2)))
}

/// How much memory, bytes. `host` is what the host has.
///
/// # Errors
/// Not a size, out of a machine's range, or more than the host has.
pub fn memory(settings: &Settings, host: u64) -> Result<u64, Failure> {
    let parse = |text: &str| {
        let bytes = size(text)?;
        if bytes < machine::plan::MIN_MEMORY {
            return Err(format!("too little; a machine has at least {}", human(machine::plan::MIN_MEMORY)));
        }
        if bytes > host || bytes > machine::plan::MAX_MEMORY {
            return Err(format!("more than there is; the host has {}", human(host)));
        }
        if !bytes.is_multiple_of(4096) {
            return Err("not a multiple of 4 KiB".into());
        }
        Ok(bytes)
    };
    Ok(read(settings, "mem", parse)?.unwrap_or(1 << 30))
}

/// A size: a number with K, M, G or T behind it (1024 each); a plain number is MiB.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || "not a size such as 512M or 2G".to_owned();
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" if text.len() > digits.len() => 0,
        "K" => 10,
        "" | "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_shl(shift).filter(|bytes| bytes >> shift == number).ok_or_else(wrong)
}

/// 1.5 GiB and the like.
pub fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if value.fract() == 0.0 { format!("{value} {unit}") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// Which engine.
///
/// # Errors
/// An unknown name.
pub fn engine(settings: &Settings) -> Result<EngineChoice, Failure> {
    let known = [
        ("auto", EngineChoice::Auto),
        ("translate", EngineChoice::Translate),
        ("kvm", EngineChoice::Kvm),
        ("kvm-unprobed", EngineChoice::KvmUnprobed),
    ];
    Ok(read(settings, "engine", |text| one_of(text, &known))?.unwrap_or_default())
}

/// Bytes of translated code that each vCPU keeps.
///
/// # Errors
/// Not a size, or out of range.
pub fn code_cache(settings: &Settings) -> Result<u64, Failure> {
    use machine::plan::{LEAST_CODE_CACHE, MOST_CODE_CACHE};
    let parse = |text: &str| match size(text)? {
        bytes if (LEAST_CODE_CACHE..=MOST_CODE_CACHE).contains(&bytes) => Ok(bytes),
        _ => Err(format!("not between {} and {}", human(LEAST_CODE_CACHE), human(MOST_CODE_CACHE))),
    };
    Ok(read(settings, "code-cache", parse)?.unwrap_or(128 << 20))
}

/// What the engine checks of itself.
///
/// # Errors
/// An unknown name.
pub fn engine_check(settings: &Settings) -> Result<EngineCheck, Failure> {
    let known = [("off", EngineCheck::Off), ("interpret", EngineCheck::Interpret), ("lockstep", EngineCheck::Lockstep)];
    Ok(read(settings, "engine-check", |text| one_of(text, &known))?.unwrap_or_default())
}

/// What sensitive instructions of kernels are.
///
/// # Errors
/// An unknown name.
pub fn virt(settings: &Settings) -> Result<Virt, Failure> {
    let known = [("para", Virt::Para), ("classic", Virt::Classic)];
    Ok(read(settings, "virt", |text| one_of(text, &known))?.unwrap_or_default())
}

/// Which dialects, and what of them is left out.
///
/// # Errors
/// An unknown name.
pub fn dialects(settings: &Settings) -> Result<Dialects, Failure> {
    let parse = |text: &str| {
        let mut dialects = Dialects::NONE;
        for word in text.split(',') {
            match word {
                "kvm" => dialects.kvm = true,
                "cordial" => dialects.cordial = true,
                "none" if text == "none" => {}
                "none" => return Err("none stands alone".into()),
                _ => return one_of(word, &[("kvm", dialects), ("cordial", dialects), ("none", dialects)]),
            }
        }
        Ok(dialects)
    };
    let without = left_out(settings)?;
    Ok(Dialects { without, ..read(settings, "dialect", parse)?.unwrap_or_default() })
}

/// The features that `pv` takes away: -NAME, several with commas between them.
fn left_out(settings: &Settings) -> Result<Without, Failure> {
    let mut without = Without::NOTHING;
    let setting = settings.get("pv");
    for word in setting.values.iter().flat_map(|value| value.split(',')) {
        let wrong = |why: String| Failure::usage(format!("pv \"{word}\" ({}): {why}", setting.origin));
        let Some(name) = word.strip_prefix('-') else {
            return Err(wrong(format!("features are offered unless they are taken away: write -{word}")));
        };
        if !without.leave_out(name) {
            let known: Vec<(&str, ())> = Without::names().map(|name| (name, ())).collect();
            return Err(wrong(one_of(name, &known).err().unwrap_or_default()));
        }
    }
    Ok(without)
}

/// Where the console goes.
///
/// # Errors
/// An unknown name.
pub fn console(settings: &Settings) -> Result<Console, Failure> {
    let known =
        [("auto", Console::Auto), ("virtio", Console::Virtio), ("serial", Console::Serial), ("none", Console::None)];
    Ok(read(settings, "console", |text| one_of(text, &known))?.unwrap_or(Console::Auto))
}

/// What other verbs call the machine.
///
/// # Errors
/// No name that a machine can have.
pub fn name(settings: &Settings) -> Result<Option<String>, Failure> {
    read(settings, "name", |text| check_name(text).map(|()| text.to_owned()))
}

/// After how long to stop.
///
/// # Errors
/// Not a duration, or none at all.
pub fn timeout(settings: &Settings) -> Result<Option<Duration>, Failure> {
    let parse = |text: &str| duration(text).ok_or_else(|| "not a duration such as 30, 500ms, 5m or 1h".to_owned());
    read(settings, "timeout", parse)
}

/// A duration that is not zero: a number with us, ms, s, m or h behind it; a plain number is seconds.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "us" => 0.000_001,
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let seconds = digits.parse::<f64>().ok()? * unit;
    Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero())
}

/// How finely the guest may measure time.
///
/// # Errors
/// Neither exact nor coarse, or a quantum that is none.
pub fn time_policy(settings: &Settings) -> Result<TimePolicy, Failure> {
    use machine::plan::{LEAST_QUANTUM_NS, MOST_QUANTUM_NS};
    let parse = |text: &str| match text.split_once('=') {
        Some(("coarse", quantum)) => match duration(quantum).map(|quantum| u32::try_from(quantum.as_nanos())) {
            Some(Ok(ns @ LEAST_QUANTUM_NS..=MOST_QUANTUM_NS)) => Ok(TimePolicy::Coarse(ns)),
            Some(_) => Err("a quantum is between 1us and 100ms".into()),
            None => Err("not a quantum such as 50us or 1ms".into()),
        },
        None if text == "coarse" => Err("coarse by how much? Write coarse=1ms".into()),
        _ => one_of(text, &[("exact", TimePolicy::Exact)]).map_err(|_| "neither exact nor coarse=QUANTUM".into()),
    };
    Ok(read(settings, "time-policy", parse)?.unwrap_or_default())
}

/// How often the guest may ask for the time of day.
///
/// # Errors
/// Not of the form N/s\[:BURST\], or out of range.
pub fn time_of_day_rate(settings: &Settings) -> Result<CallRate, Failure> {
    let number = |text: &str| match text.parse() {
        Ok(count @ 1..=machine::plan::MOST_CALLS) => Ok(count),
        Ok(_) | Err(_) => Err(format!("\"{text}\" is not a count between 1 and {}", machine::plan::MOST_CALLS)),
    };
    let parse = |text: &str| {
        let (rate, burst) = text.split_once(':').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
        let per_s = number(rate.strip_suffix("/s").ok_or("not a rate such as 1000/s or 1000/s:10")?)?;
        let burst = burst.map_or(Ok(CallRate::default().burst), number)?;
        Ok(CallRate { per_s, burst })
    };
    Ok(read(settings, "time-of-day-rate", parse)?.unwrap_or_default())
}

/// The disks in order.
///
/// # Errors
/// A path that is no readable (and, where the guest may write, writable) file or block device.
pub fn disks(settings: &Settings) -> Result<Vec<DiskPlan>, Failure> {
    let Setting { values, origin } = settings.get("disk");
    let wrong = |text: &str, reason: &str| Failure::usage(format!("disk \"{text}\" ({origin}): {reason}"));
    let mut disks = Vec::new();
    for text in &values {
        let (path, mode) = match text.rsplit_once(':') {
            Some((path, "ro")) => (path, DiskMode::ReadOnly),
            Some((path, "rw")) => (path, DiskMode::ReadWrite),
            Some((_, "snap")) => return Err(wrong(text, "snapshot disks are not part of this version; use :ro")),
            _ => (text.as_str(), DiskMode::ReadWrite),
        };
        let path = PathBuf::from(path);
        let information = std::fs::metadata(&path).map_err(|error| wrong(text, &error.to_string()))?;
        if information.is_dir() {
            return Err(wrong(text, "is a directory; a disk is a raw image or a block device"));
        }
        let opened = std::fs::File::options().read(true).write(mode == DiskMode::ReadWrite).open(&path);
        opened.map_err(|error| {
            let advice = if mode == DiskMode::ReadWrite { "; add :ro to only read it" } else { "" };
            wrong(text, &format!("{error}{advice}"))
        })?;
        disks.push(DiskPlan { path, mode, serial: None });
    }
    Ok(disks)
}

/// A switch.
///
/// # Errors
/// Neither true nor false.
pub fn switch(settings: &Settings, key: &str) -> Result<bool, Failure> {
    let known = [("true", true), ("1", true), ("yes", true), ("false", false), ("0", false), ("no", false)];
    Ok(read(settings, key, |text| one_of(text, &known))?.unwrap_or(false))
}

/// A plain text.
pub fn text(settings: &Settings, key: &str) -> Option<String> {
    settings.get(key).values.pop()
}

/// A file that must be there.
///
/// # Errors
/// A path that is no readable file.
pub fn file(settings: &Settings, key: &str) -> Result<Option<PathBuf>, Failure> {
    read(settings, key, |text| {
        let path = PathBuf::from(text);
        readable_file(&path).map(|()| path)
    })
}

/// Says why `path` cannot be read as a file.
///
/// # Errors
/// The reason.
pub fn readable_file(path: &std::path::Path) -> Result<(), String> {
    let information = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if information.is_dir() {
        return Err("is a directory, not a file".into());
    }
    std::fs::File::open(path).map(drop).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(key: &'static str, value: &str) -> Settings {
        Settings::of_flags([(key, vec![value.to_owned()])].into())
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("512", 512 << 20),
            ("1G", 1 << 30),
            ("64m", 64 << 20),
            ("4096K", 4 << 20),
            ("2GiB", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "1Q", "-1", "1.5G", "99999999999T"] {
            assert!(size(text).is_err(), "{text}");
        }
        assert_eq!(human(1536 << 20), "1.5 GiB");
        assert_eq!(human(2 << 20), "2 MiB");
    }

    #[test]
    fn impossible_values_say_what_and_where() {
        let message = |outcome: Failure| outcome.message;
        let wrong = message(cpus(&settings("cpus", "0"), 2).unwrap_err());
        assert_eq!(wrong, "cpus \"0\" (command line): a machine has at least 1 and here, with 2 host CPUs, at most 16");
        assert!(cpus(&settings("cpus", "17"), 2).is_err());
        assert_eq!(cpus(&settings("cpus", "4"), 2).unwrap(), 4);
        assert_eq!(cpus(&Settings::default(), 8).unwrap(), 2);
        assert!(memory(&settings("mem", "0"), 1 << 34).is_err());
        assert!(memory(&settings("mem", "64G"), 1 << 34).is_err());
        let wrong = message(engine(&settings("engine", "kvn")).unwrap_err());
        assert_eq!(
            wrong,
            "engine \"kvn\" (command line): not one of auto, translate, kvm, kvm-unprobed; did you mean \"kvm\"?"
        );
        let wrong = message(code_cache(&settings("code-cache", "63K")).unwrap_err());
        assert_eq!(wrong, "code-cache \"63K\" (command line): not between 64 KiB and 1 GiB");
        assert!(code_cache(&settings("code-cache", "2G")).is_err());
        assert_eq!(code_cache(&settings("code-cache", "64K")).unwrap(), 64 << 10);
        assert_eq!(code_cache(&Settings::default()).unwrap(), 128 << 20);
        let wrong = message(engine_check(&settings("engine-check", "lock")).unwrap_err());
        assert!(wrong.contains("not one of off, interpret, lockstep"), "{wrong}");
        let wrong = message(dialects(&settings("dialect", "kvm,cordal")).unwrap_err());
        assert!(wrong.ends_with("did you mean \"cordial\"?"), "{wrong}");
        assert!(dialects(&settings("dialect", "kvm,none")).is_err());
        assert!(dialects(&settings("dialect", "none")).unwrap().is_none());
        let both = dialects(&settings("dialect", "cordial,kvm")).unwrap();
        assert_eq!(both, Dialects { kvm: true, cordial: true, without: Without::NOTHING });
        let without = dialects(&settings("pv", "-wait,-hypervisor-bit")).unwrap().without;
        assert_eq!(without, Without { cordial: 1 << 11, kvm: 0, hypervisor_bit: true, ..Without::NOTHING });
        let wrong = message(dialects(&settings("pv", "wait")).unwrap_err());
        assert!(wrong.ends_with("features are offered unless they are taken away: write -wait"), "{wrong}");
        let wrong = message(dialects(&settings("pv", "-timr")).unwrap_err());
        assert!(wrong.ends_with("did you mean \"timer\"?"), "{wrong}");
        let wrong = message(disks(&settings("disk", "/:ro")).unwrap_err());
        assert!(wrong.contains("is a directory"), "{wrong}");
        assert!(message(disks(&settings("disk", "/nowhere/disk")).unwrap_err()).contains("No such file"));
    }

    #[test]
    fn durations_have_units() {
        let read = |text: &str| timeout(&settings("timeout", text)).ok().flatten();
        assert_eq!(read("30"), Some(Duration::from_secs(30)));
        assert_eq!(read("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(read("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(read("2h"), Some(Duration::from_secs(7200)));
        for text in ["0", "-1", "soon", "5d", "1e400", "nan"] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn a_time_policy_is_exact_or_has_a_quantum() {
        let read = |text: &str| time_policy(&settings("time-policy", text)).map_err(|error| error.message);
        let ns = |text| match read(text) {
            Ok(TimePolicy::Coarse(ns)) => ns,
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(
            ["coarse=1us", "coarse=1ms", "coarse=0.1s", "coarse=1.5us"].map(ns),
            [1000, 1_000_000, 100_000_000, 1500]
        );
        assert_eq!(read("exact"), Ok(TimePolicy::Exact));
        assert_eq!(time_policy(&Settings::default()).unwrap(), TimePolicy::Exact);
        for (text, why) in [
            ("coarse", "coarse by how much? Write coarse=1ms"),
            ("coarse=", "not a quantum such as 50us or 1ms"),
            ("coarse=0", "not a quantum such as 50us or 1ms"),
            ("coarse=0.9us", "a quantum is between 1us and 100ms"),
            ("coarse=101ms", "a quantum is between 1us and 100ms"),
            ("coarse=1h", "a quantum is between 1us and 100ms"),
            ("corse=1ms", "neither exact nor coarse=QUANTUM"),
        ] {
            assert_eq!(read(text), Err(format!("time-policy \"{text}\" (command line): {why}")));
        }
    }

    #[test]
    fn a_rate_of_calls_may_have_a_burst() {
        let read = |text: &str| time_of_day_rate(&settings("time-of-day-rate", text)).ok();
        assert_eq!(read("100/s"), Some(CallRate { per_s: 100, burst: 1000 }));
        assert_eq!(read("100/s:7"), Some(CallRate { per_s: 100, burst: 7 }));
        for text in ["", "100", "0/s", "1/s:", "1/s:0", "-1/s", "1/m", "5000000000/s", "1/s:2:3"] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
