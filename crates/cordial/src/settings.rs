//! What the user asked for, from everywhere it can be said.
//!
//! ```text
//!   flags  >  CORDIAL_* environment  >  ./cordial.toml  >  ~/.config/cordial/config.toml  >  /etc/cordial/config.toml
//!      \______________________ each a layer of (key -> text) ______________________________/
//!                     |
//!          Settings: per key the first layer that has it, its value and its origin
//! ```
//!
//! All layers hold text; [`crate::values`] gives it types, so an error names the value and where it was written.

use crate::failure::Failure;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// One thing that can be set.
pub struct Key {
    /// Its long flag, and its name in a file.
    pub name: &'static str,
    /// Value where nobody says anything; `None` where there is none.
    pub default: Option<&'static str>,
    /// May be given more than once.
    pub list: bool,
    /// What it means, for `--print-config`.
    pub help: &'static str,
}

const fn key(name: &'static str, default: Option<&'static str>, help: &'static str) -> Key {
    Key { name, default, list: false, help }
}

/// Everything that can be set, in the order `--print-config` shows it.
pub const KEYS: [Key; 28] = [
    key("cpus", None, "virtual CPUs; default: the host's, at most 2"),
    key("mem", Some("1G"), "memory; K, M, G or T; a plain number is MiB"),
    key("engine", Some("auto"), "auto, translate, kvm or kvm-unprobed"),
    key("code-cache", Some("128M"), "translated code that each vCPU keeps: 64K to 1G; a plain number is MiB"),
    key(
        "engine-check",
        Some("off"),
        "off, interpret (nothing is translated) or lockstep (translator and interpreter are compared)",
    ),
    key("virt", Some("para"), "para, or classic: each sensitive instruction of a kernel is an exit to the monitor"),
    key("cpu", Some(engine::cpu_model::DEFAULT), "the CPU model the guest sees"),
    key("dialect", Some("kvm"), "paravirtual dialects offered: kvm, cordial, both (kvm,cordial), or none"),
    Key { name: "pv", default: None, list: true, help: "-NAME, a paravirtual feature not to offer; may be repeated" },
    key("time-policy", Some("exact"), "how finely the guest may measure time: exact, or coarse=QUANTUM (1us to 100ms)"),
    key("time-of-day-rate", None, "time_of_day calls of the cordial dialect: N/s[:BURST]; default: 10000/s:1000"),
    key("kernel", None, "a path, host, debian or debian=VERSION; default: the first that is found"),
    key("modules", None, "directory of the kernel's modules; default: found by the kernel's release"),
    key("initrd", None, "an initial RAM disk instead of the generated one"),
    key("append", None, "words for the end of the kernel's command line"),
    Key { name: "disk", default: None, list: true, help: "PATH[:ro|rw], may be repeated" },
    Key { name: "copy", default: None, list: true, help: "HOST:GUEST, a file for the generated initramfs" },
    key("console", Some("auto"), "auto, virtio, serial or none"),
    key("name", None, "what other verbs call the machine; default: vm-PID"),
    key("timeout", None, "seconds (or 500ms, 5m, 1h) after which the machine is stopped"),
    key("events", None, "file for progress and outcome, one JSON object a line"),
    key("cwd", Some("/"), "working directory of the command"),
    key("test-devices", Some("false"), "devices that bare-metal test kernels expect"),
    key("exits", Some("false"), "print the exit table at the end"),
    key("profile", Some("false"), "print at the end where the engine's time went"),
    key("yes", Some("false"), "download what is missing without asking"),
    key("quiet", Some("false"), "print nothing of our own unless something fails"),
    key("verbose", Some("false"), "show the kernel's console and what is done"),
];

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// On the command line.
    Flag,
    /// In this environment variable.
    Environment(String),
    /// In this file.
    File(PathBuf),
    /// Nowhere.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("command line"),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// What one layer says: text by key; more than one only for list keys.
pub type Layer = BTreeMap<&'static str, Vec<String>>;

/// The layers, first first.
#[derive(Debug, Default)]
pub struct Settings {
    layers: Vec<(Origin, Layer)>,
}

/// One key's value and origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The values; empty where nothing is set.
    pub values: Vec<String>,
    /// Where from.
    pub origin: Origin,
}

impl Settings {
    /// All layers: `flags` as given, then environment and files.
    ///
    /// # Errors
    /// A file that cannot be read or understood, or has a key nobody knows.
    pub fn load(flags: Layer) -> Result<Self, Failure> {
        let mut layers = vec![(Origin::Flag, flags)];
        for key in &KEYS {
            let name = variable(key.name);
            // An empty variable is an unset one, as in most programs.
            if let Some(text) = std::env::var(&name).ok().filter(|text| !text.is_empty()) {
                let values = if key.list { text.split_whitespace().map(str::to_owned).collect() } else { vec![text] };
                layers.push((Origin::Environment(name), Layer::from([(key.name, values)])));
            }
        }
        for path in files() {
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    let layer = parse(&text).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
                    layers.push((Origin::File(path), layer));
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(Failure::usage(format!("cannot read {}: {error}", path.display()))),
            }
        }
        Ok(Self { layers })
    }

    /// Flags alone, as a test gives them.
    #[cfg(test)]
    pub(crate) fn of_flags(flags: Layer) -> Self {
        Self { layers: vec![(Origin::Flag, flags)] }
    }

    /// The value of the key called `name`.
    ///
    /// # Panics
    /// For a name that is not in [`KEYS`].
    pub fn get(&self, name: &str) -> Setting {
        let key = KEYS.iter().find(|key| key.name == name).expect("a key of the table");
        let said = self.layers.iter().find_map(|(origin, layer)| Some((origin, layer.get(name)?)));
        match said {
            Some((origin, values)) => Setting { values: values.clone(), origin: origin.clone() },
            None => Setting { values: key.default.map(str::to_owned).into_iter().collect(), origin: Origin::Default },
        }
    }

    /// `--print-config`: a file that says the same, with each origin beside it.
    pub fn print(&self) -> String {
        let mut text = String::from("[defaults]\n");
        for key in &KEYS {
            let Setting { values, origin } = self.get(key.name);
            let value = match (key.list, values.as_slice()) {
                (false, [one]) if one == "true" || one == "false" => one.clone(),
                (false, [one]) => quoted(one),
                (true, [_, ..]) => format!("[{}]", values.iter().map(|one| quoted(one)).collect::<Vec<_>>().join(", ")),
                _ => {
                    text += &format!("# {} is not set; {}\n", key.name, key.help);
                    continue;
                }
            };
            text += &format!("{} = {value} # {origin}\n", key.name);
        }
        text
    }
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// The environment variable of a key.
fn variable(name: &str) -> String {
    format!("CORDIAL_{}", name.to_uppercase().replace('-', "_"))
}

/// Configuration files, the one that wins first.
fn files() -> Vec<PathBuf> {
    let personal = match (std::env::var_os("XDG_CONFIG_HOME"), std::env::var_os("HOME")) {
        (Some(directory), _) if !directory.is_empty() => Some(PathBuf::from(directory)),
        (_, Some(home)) => Some(Path::new(&home).join(".config")),
        _ => None,
    };
    let mut files = vec![PathBuf::from("cordial.toml")];
    files.extend(personal.map(|directory| directory.join("cordial/config.toml")));
    files.push("/etc/cordial/config.toml".into());
    files
}

/// One configuration file: a table `[defaults]`.
fn parse(text: &str) -> Result<Layer, String> {
    let mut document: toml::Table = text.parse().map_err(|error: toml::de::Error| one_line(error.message()))?;
    let defaults = match document.remove("defaults") {
        Some(toml::Value::Table(table)) => table,
        Some(_) => return Err("defaults is not a table: write [defaults]".into()),
        None => toml::Table::new(),
    };
    if let Some(name) = document.keys().next() {
        let advice = if KEYS.iter().any(|key| key.name == name) { "; it belongs under [defaults]" } else { "" };
        return Err(format!("unknown table or key \"{name}\"{advice}"));
    }
    let mut layer = Layer::new();
    for (name, value) in defaults {
        let key = KEYS.iter().find(|key| key.name == name).ok_or_else(|| unknown(&name))?;
        let values = match value {
            toml::Value::Array(values) if key.list => values.into_iter().map(plain).collect::<Result<_, _>>(),
            value => plain(value).map(|text| vec![text]),
        };
        layer.insert(key.name, values.map_err(|kind| format!("{name} cannot be {kind}"))?);
    }
    Ok(layer)
}

fn plain(value: toml::Value) -> Result<String, &'static str> {
    match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Boolean(yes) => Ok(yes.to_string()),
        other => Err(other.type_str()),
    }
}

fn unknown(name: &str) -> String {
    let names = KEYS.iter().map(|key| key.name);
    format!("unknown key \"{name}\"{}", crate::values::did_you_mean(name, names))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_layer_that_has_a_key_wins() {
        let settings = Settings {
            layers: vec![
                (Origin::Flag, Layer::from([("cpus", vec!["3".into()])])),
                (
                    Origin::File("a".into()),
                    parse("[defaults]\ncpus = 1\nmem = \"2G\"\ndisk = [\"x\", \"y:ro\"]").unwrap(),
                ),
                (Origin::File("b".into()), parse("[defaults]\nmem = \"4G\"\nexits = true").unwrap()),
            ],
        };
        assert_eq!(settings.get("cpus"), Setting { values: vec!["3".into()], origin: Origin::Flag });
        assert_eq!(settings.get("mem"), Setting { values: vec!["2G".into()], origin: Origin::File("a".into()) });
        assert_eq!(settings.get("disk").values, ["x", "y:ro"]);
        assert_eq!(settings.get("engine"), Setting { values: vec!["auto".into()], origin: Origin::Default });
        assert_eq!(settings.get("kernel").values, Vec::<String>::new());
        let printed = settings.print();
        assert!(printed.contains("cpus = \"3\" # command line\n"), "{printed}");
        assert!(printed.contains("exits = true # b\n"), "{printed}");
        assert!(parse(&printed).is_ok(), "what is printed can be read: {printed}");
    }

    #[test]
    fn unknown_keys_are_errors_with_a_suggestion() {
        assert_eq!(parse("[defaults]\nengin = 1").unwrap_err(), "unknown key \"engin\"; did you mean \"engine\"?");
        assert_eq!(parse("cpus = 1").unwrap_err(), "unknown table or key \"cpus\"; it belongs under [defaults]");
        assert_eq!(parse("[defaults]\nmem = [1]").unwrap_err(), "mem cannot be array");
        assert!(parse("[defaults").is_err());
    }
}
