//! From settings to a plan: everything that is decided before a machine exists.

use crate::cache::Cache;
use crate::cli::RunArguments;
use crate::copies::Copy;
use crate::failure::Failure;
use crate::initramfs;
use crate::kernel::{self, Kernel, Search, modules::Modules};
use crate::settings::Settings;
use crate::userland::{Busybox, PATH};
use crate::values::{self, Console, human};
use machine::Plan;
use machine::plan::{CallRate, Dialects, DiskPlan, EngineCheck, EngineChoice, Payload, TimePolicy, Virt};
use protocol::Command;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Least memory for a Linux guest with the generated initramfs: a distribution's kernel unpacked, and itself.
const LINUX_MINIMUM: u64 = 128 << 20;

/// The settings of a run, typed and checked; nothing has been looked for yet.
pub struct Options {
    /// vCPUs.
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    /// Which engine.
    pub engine: EngineChoice,
    /// Bytes of translated code that each vCPU keeps.
    pub code_cache: u64,
    /// What the engine checks of itself.
    pub engine_check: EngineCheck,
    /// What sensitive instructions of kernels are.
    pub virt: Virt,
    /// Which dialects.
    pub dialects: Dialects,
    /// How finely the guest may measure time.
    pub time_policy: TimePolicy,
    /// How often it may call `time_of_day`.
    pub time_of_day_rate: CallRate,
    /// A name the engine knows.
    pub cpu_model: String,
    /// Disks that can be opened.
    pub disks: Vec<DiskPlan>,
    /// Files for the generated initramfs.
    pub copies: Vec<Copy>,
    /// A file that can be read.
    pub initrd: Option<PathBuf>,
    /// As asked.
    pub console: Console,
    /// The machine's name, where one was asked for.
    pub name: Option<String>,
    /// When to stop.
    pub timeout: Option<Duration>,
    /// Where events are written.
    pub events: Option<PathBuf>,
    /// Devices for bare-metal tests.
    pub test_devices: bool,
    /// Print the exit table.
    pub exits: bool,
    /// Account for the vCPUs' time, and print where it went.
    pub profile: bool,
    /// Download without asking.
    pub yes: bool,
    /// Say nothing that is not asked for.
    pub quiet: bool,
    /// Show the guest's console.
    pub verbose: bool,
}

impl Options {
    /// Reads and checks them.
    ///
    /// # Errors
    /// The first value that cannot be.
    pub fn read(settings: &Settings) -> Result<Self, Failure> {
        let host_cpus = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
        Ok(Self {
            cpus: values::cpus(settings, host_cpus)?,
            memory: values::memory(settings, host_memory()?)?,
            engine: values::engine(settings)?,
            code_cache: values::code_cache(settings)?,
            engine_check: values::engine_check(settings)?,
            virt: values::virt(settings)?,
            dialects: values::dialects(settings)?,
            time_policy: values::time_policy(settings)?,
            time_of_day_rate: values::time_of_day_rate(settings)?,
            cpu_model: cpu_model(settings)?,
            disks: values::disks(settings)?,
            copies: Copy::of_settings(settings)?,
            initrd: values::file(settings, "initrd")?,
            console: values::console(settings)?,
            name: values::name(settings)?,
            timeout: values::timeout(settings)?,
            events: values::text(settings, "events").map(PathBuf::from),
            test_devices: values::switch(settings, "test-devices")?,
            exits: values::switch(settings, "exits")?,
            profile: values::switch(settings, "profile")?,
            yes: values::switch(settings, "yes")?,
            quiet: values::switch(settings, "quiet")?,
            verbose: values::switch(settings, "verbose")?,
        })
    }
}

/// Everything a run is about.
pub struct Prepared {
    /// What was asked for.
    pub options: Options,
    /// The machine.
    pub plan: Plan,
    /// The kernel in it, and why this one.
    pub kernel: Kernel,
    /// What our first process is to run; `None` where the guest has its own.
    pub command: Option<Command>,
    /// Where the console is; never [`Console::Auto`].
    pub console: Console,
}

/// Finds the kernel, makes what goes with it, and plans the machine.
///
/// # Errors
/// What cannot be: a line for the user.
pub fn prepare(options: Options, arguments: &RunArguments, settings: &Settings) -> Result<Prepared, Failure> {
    let cache = Cache::of_user()?;
    let modules = values::text(settings, "modules").map(PathBuf::from);
    let asked = asked(arguments, settings)?;
    let kernel = Search { asked, modules, cache: &cache, yes: options.yes }.find()?;
    // Our user space goes with every Linux kernel that is not given one.
    let ours = kernel.linux && options.initrd.is_none();
    let why = if kernel.linux { "--initrd replaces it" } else { "the kernel is not Linux" };
    if !ours && !arguments.command.is_empty() {
        let image = kernel.image.display();
        if std::fs::metadata(&kernel.image).is_ok_and(|file| file.is_file() && file.len() == 0) {
            return Err(Failure::usage(format!("{image}: is empty; fetch or build it again")));
        }
        return Err(Failure::usage(format!("a command runs in the generated initramfs, and {why}: leave one out")));
    }
    if !ours && !options.copies.is_empty() {
        return Err(Failure::usage(format!("--copy is for the generated initramfs, and {why}: leave one out")));
    }
    if ours && options.memory < LINUX_MINIMUM {
        let (given, least) = (human(options.memory), human(LINUX_MINIMUM));
        return Err(Failure::usage(format!("mem: {given} is too little for a Linux guest; give it at least {least}")));
    }
    let console = match options.console {
        Console::Auto if ours => Console::Virtio,
        Console::Auto => Console::Serial,
        chosen => chosen,
    };
    let plan = Plan {
        cpus: options.cpus,
        memory: options.memory,
        engine: options.engine,
        code_cache: options.code_cache,
        engine_check: options.engine_check,
        virt: options.virt,
        cpu_model: options.cpu_model.clone(),
        dialects: options.dialects,
        time_policy: options.time_policy,
        time_of_day_rate: options.time_of_day_rate,
        initrd: match &options.initrd {
            Some(file) => Some(Payload::File(file.clone())),
            None if ours => {
                let needs =
                    Needs { disks: !options.disks.is_empty(), guest_tool: options.dialects.has_contract_device() };
                Some(Payload::Bytes(generated(&kernel, &cache, needs, &options.copies)?.into()))
            }
            None => None,
        },
        command_line: command_line(settings, kernel.linux, ours, console),
        disks: options.disks.clone(),
        test_devices: options.test_devices,
        profile: options.profile,
        ..Plan::new(kernel.image.clone())
    };
    plan.check().map_err(|error| Failure::usage(error.to_string()))?;
    let command = if ours { Some(command(arguments, settings)?) } else { None };
    Ok(Prepared { options, plan, kernel, command, console })
}

/// Which kernel was asked for, by whom.
fn asked(arguments: &RunArguments, settings: &Settings) -> Result<Option<(String, String)>, Failure> {
    let setting = settings.get("kernel");
    let from_settings = setting.values.into_iter().next_back().map(|value| (value, setting.origin.to_string()));
    let Some(source) = &arguments.source else { return Ok(from_settings) };
    if arguments.layer().contains_key("kernel") {
        return Err(Failure::usage("two kernels: leave out --kernel or SRC"));
    }
    let path = source.to_str().ok_or_else(|| Failure::usage("SRC is not valid UTF-8"))?;
    if source.is_dir() {
        let message = format!("SRC \"{path}\" is a directory; booting directories is not part of this version");
        return Err(Failure::usage(message));
    }
    // Beside words like `debian`, a file of that name is meant here.
    let path = if source.components().count() == 1 { format!("./{path}") } else { path.to_owned() };
    Ok(Some((path, "command line".into())))
}

fn cpu_model(settings: &Settings) -> Result<String, Failure> {
    let model = values::text(settings, "cpu").unwrap_or_default();
    let names = engine::cpu_model::names;
    if names().any(|name| name == model) {
        return Ok(model);
    }
    let (known, near) = (names().collect::<Vec<_>>().join(", "), values::did_you_mean(&model, names()));
    let origin = settings.get("cpu").origin;
    Err(Failure::usage(format!("cpu \"{model}\" ({origin}): not one of {known}{near}")))
}

/// The host's memory, bytes.
fn host_memory() -> Result<u64, Failure> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| Failure::io("read /proc/meminfo", &error))?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    total.map(|kilobytes: u64| kilobytes << 10).ok_or_else(|| Failure::other("/proc/meminfo has no MemTotal"))
}

/// What a generated initramfs has beside what each has.
#[derive(Clone, Copy)]
pub struct Needs {
    /// Drivers for disks.
    pub disks: bool,
    /// The tool for the contract device.
    pub guest_tool: bool,
}

/// The generated initramfs for a kernel.
///
/// # Errors
/// Modules that are missing or damaged; no busybox; a file to copy that cannot be read.
pub fn generated(kernel: &Kernel, cache: &Cache, needs: Needs, copies: &[Copy]) -> Result<Vec<u8>, Failure> {
    let modules = match &kernel.modules {
        None => {
            tracing::warn!(release = ?kernel.release, "no modules found for the kernel; its drivers must be built in");
            Vec::new()
        }
        Some(directory) => {
            let modules = Modules::open(directory)?;
            let optional =
                [&kernel::ENTROPY_MODULES[..], if needs.disks { &kernel::DISK_MODULES } else { &[] }].concat();
            let mut wanted = kernel::CONSOLE_MODULES.to_vec();
            wanted.extend(optional.into_iter().filter(|name| modules.has(name)));
            modules.closure(&wanted)?
        }
    };
    // The user's come last, and may be another version of ours.
    let ours = needs.guest_tool.then(initramfs::guest_tool);
    let files = ours.into_iter().map(Ok).chain(copies.iter().map(Copy::read)).collect::<Result<Vec<_>, _>>()?;
    initramfs::build(&Busybox::find(cache)?, &modules, &files)
}

/// The kernel's command line. A kernel that is not Linux gets the user's words alone.
fn command_line(settings: &Settings, linux: bool, ours: bool, console: Console) -> String {
    let mut words = Vec::new();
    let terminal = if console == Console::Virtio { "hvc0" } else { "ttyS0" };
    if ours {
        // The kernel's own messages always go to the serial port: it is there from the first instruction on.
        words.push("console=ttyS0".to_owned());
        words.push(format!("{}=virtio", protocol::AGENT_OPTION));
        words.push(format!("{}={terminal}", protocol::CONSOLE_OPTION));
    } else if linux {
        words.push(format!("console={terminal}"));
    }
    if linux {
        // A panic resets at once, which ends the run.
        words.push("panic=-1".to_owned());
        // A tenth of a boot goes into these self-tests. Who wants them says cryptomgr.notests=0 behind this.
        words.push("cryptomgr.notests".to_owned());
    }
    words.extend(values::text(settings, "append"));
    words.join(" ")
}

/// What our first process is to run.
fn command(arguments: &RunArguments, settings: &Settings) -> Result<Command, Failure> {
    let argv = arguments
        .command
        .iter()
        .map(|word| word.to_str().map(str::to_owned))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| Failure::usage("the command is not valid UTF-8"))?;
    let at_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    // A shell at a terminal is interactive; a shell without one reads its script from standard input.
    let terminal = arguments.tty || (argv.is_empty() && at_terminal);
    let term = std::env::var("TERM").unwrap_or_else(|_| "linux".into());
    let env = [("PATH", PATH), ("HOME", "/root"), ("USER", "root"), ("SHELL", "/bin/sh"), ("TERM", &term)];
    let shell = if terminal { vec!["/bin/sh".to_owned(), "-l".to_owned()] } else { vec!["/bin/sh".to_owned()] };
    Ok(Command {
        argv: if argv.is_empty() { shell } else { argv },
        env: env.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        cwd: values::text(settings, "cwd").filter(|cwd| Path::new(cwd).is_absolute()).unwrap_or_else(|| "/".into()),
        terminal,
        window: if terminal { crate::terminal::window() } else { None },
    })
}
