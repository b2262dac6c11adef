//! The command line.

use crate::settings::{KEYS, Layer};
use clap::{ArgAction, Args, Parser, Subcommand};
use std::path::PathBuf;

/// Virtual machines for Linux and bare-metal x86-64 guests, with or without /dev/kvm.
#[derive(Debug, Parser)]
#[command(name = "cordial", version, disable_help_subcommand = true, after_help = "cordial run -- uname -a")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Boot a machine; run a command in it, or a shell; exit with its status.
    #[command(after_help = RUN_HELP)]
    Run(Box<RunArguments>),
    /// Check what this host can do, and say how to fix what it cannot.
    Doctor {
        /// One JSON document instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// List the machines that run.
    Ps {
        /// One JSON document instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// What a running machine and its guest have agreed on.
    #[command(subcommand)]
    Contract(ContractVerb),
    /// Kernels and other images in the cache.
    #[command(subcommand)]
    Image(ImageVerb),
    /// Print a completion script for a shell.
    Completion {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

/// What to do with images.
#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// List what is in the cache.
    Ls {
        /// One JSON document instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Fetch a kernel, or its newest version: debian (the cloud kernel), debian=generic, debian=VERSION.
    Pull {
        /// Which.
        #[arg(default_value = crate::kernel::DEBIAN)]
        request: String,
    },
    /// Remove what a newer version has replaced.
    Gc {
        /// Remove everything.
        #[arg(long)]
        all: bool,
    },
    /// Write the generated initramfs to a file, to boot it elsewhere. Prints the kernel's path.
    Initramfs {
        /// The file.
        #[arg(short, long)]
        output: PathBuf,
        /// As for run.
        #[arg(long)]
        kernel: Option<String>,
        /// As for run.
        #[arg(long, value_name = "HOST:GUEST")]
        copy: Vec<String>,
        /// Leave out what disks need, as run does where it has none.
        #[arg(long)]
        no_disks: bool,
        /// Download what is missing without asking.
        #[arg(long)]
        yes: bool,
    },
}

/// What to do about a contract.
#[derive(Debug, Subcommand)]
pub enum ContractVerb {
    /// Show every paravirtual feature: offered, accepted, used, what a use costs.
    Show {
        /// The machine; default: the only one that runs.
        vm: Option<String>,
        /// Rates over the next so many seconds; default: since the machine started.
        #[arg(long, value_name = "SECONDS")]
        over: Option<u64>,
        /// One JSON document instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Say what is exposed without need. Status 6 where there is something.
    Audit {
        /// The machine; default: the only one that runs.
        vm: Option<String>,
        /// One JSON document instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Take a feature of the native dialect back from the guest.
    Revoke {
        /// The machine.
        vm: String,
        /// The feature.
        feature: String,
        /// Wait so many seconds for the guest to give it up; status 5 where it does not.
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
        /// One JSON document instead of a line.
        #[arg(long)]
        json: bool,
    },
}

const RUN_HELP: &str = "\
Exit status: the guest command's own (128+N for signal N, 126 cannot execute, 127 not found); 123 the guest panicked or
triple-faulted, 124 --timeout, 125 the machine could not be set up or --engine-check found a
difference, 4 no kernel at hand.

Settings come from flags, then CORDIAL_* variables, ./cordial.toml, ~/.config/cordial/config.toml and
/etc/cordial/config.toml ([defaults]); --print-config shows each value and where it came from.

Examples:
  cordial run                                  a shell
  cordial run -- uname -a                      a command; its streams and status are the program's
  cordial run --disk data.img:ro -- sh -c 'mount -o ro /dev/vda /mnt && ls /mnt'
  cordial run --copy ./program:/bin/program -- program
  cordial run --kernel test.elf --test-devices a bare-metal kernel, serial port on standard output";

/// Words of `cordial run`.
#[derive(Debug, Default, Args)]
pub struct RunArguments {
    /// What to boot: a kernel, or a Debian kernel package (.deb).
    pub source: Option<PathBuf>,
    /// The command to run in the guest, after --.
    #[arg(last = true)]
    pub command: Vec<std::ffi::OsString>,
    /// Virtual CPUs; default: the host's, at most 2.
    #[arg(short, long, value_name = "N")]
    cpus: Option<String>,
    /// Memory: 1G, 512M, ...; a plain number is MiB.
    #[arg(short, long, value_name = "SIZE")]
    mem: Option<String>,
    /// CPU engine: auto (kvm where a probe guest runs on it, else translate), translate, kvm, or kvm-unprobed (for bare-metal
    /// guests that need less than Linux does).
    #[arg(long)]
    engine: Option<String>,
    /// Translated code that each vCPU keeps: 64K to 1G.
    #[arg(long, value_name = "SIZE")]
    code_cache: Option<String>,
    /// How far the engine trusts its translator: off (entirely), interpret (nothing is translated; slow) or lockstep (each
    /// translated block, each time it runs, is compared with the interpreter; slower).
    #[arg(long, value_name = "CHECK")]
    engine_check: Option<String>,
    /// What a kernel's sensitive instructions are: para (translated code does what it can by itself) or classic (each is an exit
    /// to the monitor, as for a kernel without privileges; for comparison, on the translating engine).
    #[arg(long, value_name = "MODE")]
    virt: Option<String>,
    /// CPU model the guest sees.
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
    /// Paravirtual dialects offered to the guest: kvm, cordial, both with a comma between them, or none.
    #[arg(long)]
    dialect: Option<String>,
    /// A paravirtual feature not to offer: -NAME; a name that is none lists them. May be repeated.
    #[arg(long, value_name = "-NAME", allow_hyphen_values = true)]
    pv: Vec<String>,
    /// How finely the guest may measure time: exact, or coarse=QUANTUM (1us to 100ms), where no clock, counter or timer that
    /// it sees is finer. Coarse needs the translating engine.
    #[arg(long, value_name = "POLICY")]
    time_policy: Option<String>,
    /// How often the guest may ask for the time of day in the cordial dialect, on average and at once.
    #[arg(long, value_name = "N/s[:BURST]")]
    time_of_day_rate: Option<String>,
    /// Kernel: a path, host, debian or debian=VERSION.
    #[arg(long)]
    kernel: Option<String>,
    /// Directory of the kernel's modules (/lib/modules/RELEASE or a build tree).
    #[arg(long, value_name = "DIR")]
    modules: Option<String>,
    /// Initial RAM disk instead of the generated one.
    #[arg(long, value_name = "FILE")]
    initrd: Option<String>,
    /// Words for the end of the kernel's command line.
    #[arg(short, long, value_name = "WORDS", allow_hyphen_values = true)]
    append: Option<String>,
    /// A disk: PATH[:ro|rw]. May be repeated.
    #[arg(long, value_name = "PATH")]
    disk: Vec<String>,
    /// A file of the host's to put into the generated initramfs: HOST:GUEST. May be repeated.
    #[arg(long, value_name = "HOST:GUEST")]
    copy: Vec<String>,
    /// Where the guest's console is: auto, virtio, serial or none.
    #[arg(long)]
    console: Option<String>,
    /// What other verbs call the machine; default: vm-PID.
    #[arg(long)]
    name: Option<String>,
    /// Stop the machine after this time (seconds; 500ms, 5m, 1h) with status 124.
    #[arg(long, value_name = "TIME")]
    timeout: Option<String>,
    /// Write progress and outcome to a file, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    events: Option<String>,
    /// Working directory of the command.
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Devices that bare-metal test kernels expect (debug exit, fw_cfg, test latch).
    #[arg(long)]
    test_devices: bool,
    /// Print the exit table at the end, on standard error.
    #[arg(long)]
    exits: bool,
    /// Print at the end, on standard error, where the engine's time went: translated code, translating, page walks,
    /// devices and so on; and how many guest instructions were translated and executed. Translated code is slower meanwhile.
    #[arg(long)]
    profile: bool,
    /// Download what is missing without asking.
    #[arg(short, long)]
    yes: bool,
    /// Print nothing of our own unless something fails.
    #[arg(short, long)]
    quiet: bool,
    /// Show the kernel's console and what is done.
    #[arg(short, long)]
    verbose: bool,
    /// Run the command on a terminal, as an interactive session.
    #[arg(short, long)]
    pub tty: bool,
    /// One JSON document about the run on standard output, the guest's streams in it; or in FILE, streams untouched.
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    pub json: Option<String>,
    /// Print the plan as JSON and boot nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Print every setting and where it came from.
    #[arg(long, action = ArgAction::SetTrue)]
    pub print_config: bool,
}

impl RunArguments {
    /// What the flags say, as a layer of settings.
    pub fn layer(&self) -> Layer {
        let switches = [
            ("test-devices", self.test_devices),
            ("exits", self.exits),
            ("profile", self.profile),
            ("yes", self.yes),
            ("quiet", self.quiet),
            ("verbose", self.verbose),
        ];
        let texts = [
            ("cpus", &self.cpus),
            ("mem", &self.mem),
            ("engine", &self.engine),
            ("code-cache", &self.code_cache),
            ("engine-check", &self.engine_check),
            ("virt", &self.virt),
            ("cpu", &self.cpu),
            ("dialect", &self.dialect),
            ("time-policy", &self.time_policy),
            ("time-of-day-rate", &self.time_of_day_rate),
            ("kernel", &self.kernel),
            ("modules", &self.modules),
            ("initrd", &self.initrd),
            ("append", &self.append),
            ("console", &self.console),
            ("name", &self.name),
            ("timeout", &self.timeout),
            ("events", &self.events),
            ("cwd", &self.cwd),
        ];
        let mut layer: Layer = texts.iter().filter_map(|(key, text)| Some((*key, vec![(*text).clone()?]))).collect();
        layer.extend(switches.iter().filter(|(_, on)| *on).map(|(key, _)| (*key, vec!["true".to_owned()])));
        let lists = [("disk", &self.disk), ("copy", &self.copy), ("pv", &self.pv)];
        layer.extend(lists.iter().filter(|(_, list)| !list.is_empty()).map(|(key, list)| (*key, (*list).clone())));
        debug_assert!(layer.keys().all(|name| KEYS.iter().any(|key| key.name == *name)));
        layer
    }
}

/// One line for what clap says in several.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let useful = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let words: Vec<_> = useful.map(str::trim).filter(|line| !line.is_empty()).collect();
    words.join("; ").trim_start_matches("error: ").replace(":;", ":").replace("; tip: ", "; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_setting_has_a_flag_and_a_line_of_help() {
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        for key in &KEYS {
            let flag = run.get_arguments().find(|flag| flag.get_long() == Some(key.name));
            assert!(flag.is_some_and(|flag| flag.get_help().is_some()), "--{}", key.name);
        }
    }

    #[test]
    fn a_mistyped_flag_is_one_line_with_a_suggestion() {
        let error = Cli::try_parse_from(["cordial", "run", "--cpu5", "3"]).unwrap_err();
        let line = one_line(&error);
        assert!(line.starts_with("unexpected argument '--cpu5' found"), "{line}");
        assert!(line.contains("--cpu"), "{line}");
        assert!(!line.contains('\n'));
    }

    #[test]
    fn the_command_comes_after_two_dashes() {
        let parse = |words: &[&str]| match Cli::try_parse_from(words).unwrap().verb {
            Verb::Run(arguments) => arguments,
            other => panic!("{other:?}"),
        };
        let run =
            parse(&["cordial", "run", "-c", "2", "--json", "--disk", "a", "--disk", "b:ro", "--", "sh", "-c", "x"]);
        assert_eq!(run.command, ["sh", "-c", "x"]);
        assert_eq!(run.json.as_deref(), Some("-"));
        let layer = run.layer();
        assert_eq!(layer["disk"], ["a", "b:ro"]);
        assert_eq!(layer["cpus"], ["2"]);
        assert!(!layer.contains_key("exits"));
        let run = parse(&["cordial", "run", "vmlinuz", "-a", "-x y"]);
        assert_eq!(run.source, Some(PathBuf::from("vmlinuz")));
        assert_eq!(run.layer()["append"], ["-x y"]);
    }
}
