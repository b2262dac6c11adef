//! `cordial-guest`: what a Linux guest and its host have agreed on, from inside.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use cordial_guest::{Change, Device, EXIT_CAUSES, Error, Watcher, feature, names};
use serde_json::{Value, json};

const USAGE: &str = "\
usage: cordial-guest show|time|ledger|cost [--json]
       cordial-guest watch [FEATURE...]

  show     what is offered, accepted and being revoked
  time     the host's time of day (accepts time-of-day)
  ledger   why and how often each vCPU left for the monitor (accepts ledger)
  cost     exits and time of 100,000 looks at the VM page and of 1,000 calls (accepts ledger)
  watch    accepts the features, tells of what changes, and gives up what the host wants back; ends when it has none left.
           Features for user space: time-of-day, generation, ledger

status: 0 done, 1 an error, 2 wrong usage, 4 no contract device";

/// How often the watcher looks.
const LOOK: Duration = Duration::from_millis(100);

/// Wrong words.
const WRONG_USAGE: u8 = 2;
/// No device.
const PRECONDITION: u8 = 4;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).filter(|word| *word != "--json").collect();
    let as_json = words.len() < arguments.len();
    let outcome = match words[..] {
        ["show"] => show(as_json),
        ["time"] => time(as_json),
        ["ledger"] => ledger(as_json),
        ["cost"] => cost(as_json),
        ["watch", ref features @ ..] => match features_of(features) {
            Ok(features) => watch(features),
            Err(name) => return wrong(&format!("no feature is called \"{name}\"")),
        },
        ["--help" | "-h" | "help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => return wrong(USAGE),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cordial-guest: {error}");
            if matches!(error, Error::NoDevice) { ExitCode::from(PRECONDITION) } else { ExitCode::FAILURE }
        }
    }
}

fn wrong(text: &str) -> ExitCode {
    eprintln!("cordial-guest: {text}");
    ExitCode::from(WRONG_USAGE)
}

fn features_of<'a>(names: &[&'a str]) -> Result<u64, &'a str> {
    let bit = |name: &'a str| feature::NAMES.iter().find(|row| row.1 == name).map(|row| row.0).ok_or(name);
    names.iter().try_fold(0, |features, name| Ok(features | bit(name)?))
}

/// Prints a JSON object with the schema in it.
fn print(kind: &str, mut object: Value) {
    object["schema"] = format!("cordial.guest.{kind}/1").into();
    println!("{object}");
}

fn show(as_json: bool) -> Result<(), Error> {
    let device = Device::find()?;
    let terms = device.terms()?;
    let version = format!("{}.{}", device.version() >> 16, device.version() & 0xffff);
    let generation: String = terms.generation.iter().map(|byte| format!("{byte:02x}")).collect();
    if as_json {
        let object = json!({
            "device": device.path(), "version": version, "vcpus": device.vcpus(), "epoch": terms.epoch,
            "offered": names(terms.offered), "accepted": names(terms.accepted), "revoking": names(terms.revoking),
            "overdue": terms.overdue, "for_user_space": names(device.user_features()), "generation": generation,
            "ignored_stores": device.ignored(),
        });
        print("show", object);
        return Ok(());
    }
    let list = |features| match names(features) {
        names if names.is_empty() => "-".to_owned(),
        names => names.join(" "),
    };
    let late = if terms.overdue { " (overdue)" } else { "" };
    println!("device          {}", device.path().display());
    println!("version         {version}, epoch {}, {} vCPUs", terms.epoch, device.vcpus());
    println!("offered         {}", list(terms.offered));
    println!("accepted        {}", list(terms.accepted));
    println!("revoking        {}{late}", list(terms.revoking));
    println!("for user space  {}", list(device.user_features()));
    println!("generation      {generation}");
    Ok(())
}

fn time(as_json: bool) -> Result<(), Error> {
    let device = Device::find()?;
    device.accept(feature::TIME_OF_DAY)?;
    let now = device.time_of_day()?;
    if as_json {
        print("time", json!({ "ns": now.as_nanos() as u64, "quantum_ns": device.quantum().as_nanos() as u64 }));
    } else {
        println!("{}.{:09}", now.as_secs(), now.subsec_nanos());
    }
    Ok(())
}

fn ledger(as_json: bool) -> Result<(), Error> {
    let device = Device::find()?;
    device.accept(feature::LEDGER)?;
    let vcpus = device.ledger()?;
    if as_json {
        let counters = |vcpu: &[u64; EXIT_CAUSES.len()]| -> Value {
            EXIT_CAUSES.iter().zip(vcpu).map(|(cause, count)| ((*cause).to_owned(), json!(count))).collect()
        };
        print("ledger", json!({ "vcpus": vcpus.iter().map(counters).collect::<Vec<_>>() }));
        return Ok(());
    }
    println!("{:<16} {:>12}  by vCPU", "CAUSE", "EXITS");
    for (index, cause) in EXIT_CAUSES.iter().enumerate() {
        let counts: Vec<u64> = vcpus.iter().map(|vcpu| vcpu[index]).collect();
        let each: Vec<String> = counts.iter().map(u64::to_string).collect();
        println!("{cause:<16} {:>12}  {}", counts.iter().sum::<u64>(), each.join(" "));
    }
    Ok(())
}

/// Looks at the VM page, and calls, of a measurement.
const LOOKS: u64 = 100_000;
const CALLS: u64 = 1_000;

fn cost(as_json: bool) -> Result<(), Error> {
    let device = Device::find()?;
    device.accept(feature::LEDGER)?;
    let looks = measure(&device, LOOKS, || device.terms().map(drop))?;
    let calls = measure(&device, CALLS, || device.call_nothing())?;
    if as_json {
        let row = |(exits, ns): (u64, f64), times| json!({ "times": times, "exits": exits, "ns": ns });
        print("cost", json!({ "look": row(looks, LOOKS), "call": row(calls, CALLS) }));
        return Ok(());
    }
    println!("{:<6} {:>8} {:>8} {:>10}", "", "TIMES", "EXITS", "NS EACH");
    for (name, times, (exits, ns)) in [("look", LOOKS, looks), ("call", CALLS, calls)] {
        println!("{name:<6} {times:>8} {exits:>8} {ns:>10.0}");
    }
    Ok(())
}

/// How many loads from device memory left guest code while `operation` was done so many times, and nanoseconds of each.
fn measure(device: &Device, times: u64, operation: impl Fn() -> Result<(), Error>) -> Result<(u64, f64), Error> {
    let loads = || -> Result<u64, Error> {
        let index = EXIT_CAUSES.iter().position(|cause| *cause == "mmio-read").unwrap_or(0);
        Ok(device.ledger()?.iter().map(|vcpu| vcpu[index]).sum())
    };
    let (before, start) = (loads()?, Instant::now());
    for _ in 0..times {
        operation()?;
    }
    let elapsed = start.elapsed();
    // The load that brings the ledger up to date the second time is none of them.
    let exits = loads()?.saturating_sub(before).saturating_sub(1);
    Ok((exits, elapsed.as_nanos() as f64 / times as f64))
}

fn watch(features: u64) -> Result<(), Error> {
    let device = Device::find()?;
    device.accept(features)?;
    let mut watcher = Watcher::new(&device)?;
    println!("watching {}", names(features).join(" "));
    let mut left = features;
    loop {
        for change in watcher.look(&device)? {
            match change {
                Change::Revoking { features, epoch } => {
                    println!("revoking {} (epoch {epoch})", names(features).join(" "));
                    // Nothing here uses them beyond this line.
                    if !device.acknowledge(epoch)? {
                        println!("not ours to give up, or revoked anew: {}", names(features).join(" "));
                    }
                }
                Change::Gone(features) => {
                    println!("gone {}", names(features).join(" "));
                    left &= !features;
                }
                Change::Generation(id) => println!("another copy of the machine {:02x?}", id),
            }
        }
        if left == 0 && features != 0 {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
}
