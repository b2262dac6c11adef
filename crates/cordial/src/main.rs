//! The `cordial` program: reads the command line, does what it says, ends with the status that says how it went.

use clap::{CommandFactory, Parser};
use cordial::cli::{Cli, Verb, one_line};
use cordial::failure::{Failure, status};
use cordial::{contract, doctor, image, ps, run};
use std::io::{self, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            // Help and version, asked for.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("cordial: {}", one_line(&error));
            // The run verb's small numbers belong to the guest.
            let run = std::env::args_os().nth(1).is_some_and(|verb| verb == "run");
            return ExitCode::from(if run { status::SETUP } else { status::USAGE });
        }
    };
    log(matches!(&cli.verb, Verb::Run(arguments) if arguments.layer().contains_key("verbose")));
    let (outcome, is_run) = match &cli.verb {
        Verb::Run(arguments) => (run::run(arguments), true),
        other => (verb(other).map(|(text, status)| write(&text).max(status)), false),
    };
    ExitCode::from(outcome.unwrap_or_else(|failure| {
        eprintln!("cordial: {failure}");
        if is_run { failure.run_status() } else { failure.verb_status() }
    }))
}

/// Everything but `run`: what it prints, and the status.
fn verb(verb: &Verb) -> Result<(Vec<u8>, u8), Failure> {
    let text = match verb {
        Verb::Run(_) => Vec::new(),
        Verb::Image(verb) => image::image(verb)?.into_bytes(),
        Verb::Ps { json } => ps::ps(*json)?.into_bytes(),
        Verb::Contract(verb) => {
            let (text, status) = contract::contract(verb)?;
            return Ok((text.into_bytes(), status));
        }
        Verb::Doctor { json } => {
            let rows = doctor::probe();
            let text = if *json {
                format!("{}\n", serde_json::json!({ "schema": "cordial.doctor/1", "probes": rows }))
            } else {
                doctor::print(&rows)
            };
            if let Some(row) = rows.iter().find(|row| row.vital && !row.works) {
                write(text.as_bytes());
                return Err(Failure::precondition(format!("{}: {}", row.probe, row.result)));
            }
            text.into_bytes()
        }
        Verb::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "cordial", &mut script);
            script
        }
        Verb::Man => {
            let mut page = Vec::new();
            let written = clap_mangen::Man::new(Cli::command()).render(&mut page);
            written.map_err(|error| Failure::other(error.to_string()))?;
            page
        }
    };
    Ok((text, 0))
}

/// Writes to standard output; returns the status.
fn write(text: &[u8]) -> u8 {
    let mut output = io::stdout().lock();
    match output.write_all(text).and_then(|()| output.flush()) {
        Ok(()) => 0,
        // A reader that has seen enough is no failure.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
        Err(error) => {
            eprintln!("cordial: cannot write to standard output: {error}");
            status::ERROR
        }
    }
}

/// Log lines go to standard error: warnings, more with --verbose, anything with CORDIAL_LOG.
fn log(verbose: bool) {
    use tracing_subscriber::EnvFilter;
    let default = if verbose { "info" } else { "warn" };
    let filter = EnvFilter::try_from_env("CORDIAL_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).without_time().with_target(false).init();
}
