//! The JSON document about a run.

use super::exits::Table;
use super::prepare::Prepared;
use super::profile::Profile;
use super::supervise::Ended;
use machine::SelectedEngine;
use machine::plan::Plan;
use serde::Serialize;

/// `--json`. What is `null` is not known or not there.
#[derive(Serialize)]
pub(super) struct Document<'a> {
    schema: &'static str,
    /// exited, panic, timeout, interrupted, vmm_error.
    outcome: &'static str,
    /// The status this process ends with.
    status: u8,
    /// The guest's own.
    guest_status: Option<i32>,
    message: Option<String>,
    engine: &'a SelectedEngine,
    kernel: KernelDocument<'a>,
    plan: &'a Plan,
    /// First to last guest instruction, milliseconds.
    run_ms: Option<f64>,
    memory: Option<machine::MemoryFigures>,
    exits: Table,
    /// With `--profile`.
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<Profile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout: Option<Stream>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stderr: Option<Stream>,
    /// The last lines of the kernel's console.
    console: Vec<String>,
}

#[derive(Serialize)]
struct KernelDocument<'a> {
    image: &'a std::path::Path,
    reason: &'a str,
    /// As the running kernel says.
    release: Option<&'a str>,
}

#[derive(Serialize)]
struct Stream {
    /// Bytes that are not UTF-8 are replaced.
    text: String,
    /// False where it was too long to be kept whole.
    complete: bool,
}

impl<'a> Document<'a> {
    pub(super) fn of(prepared: &'a Prepared, engine: &'a SelectedEngine, ended: &'a Ended) -> Self {
        let stream = |index: usize| {
            let (text, complete) = ended.captured.as_ref()?[index].text();
            Some(Stream { text, complete })
        };
        Self {
            schema: "cordial.run/1",
            outcome: ended.verdict.outcome(),
            status: ended.verdict.status(),
            guest_status: ended.verdict.guest_status(),
            message: ended.verdict.complaint(),
            engine,
            kernel: KernelDocument {
                image: &prepared.kernel.image,
                reason: &prepared.kernel.reason,
                release: ended.guest_kernel.as_deref(),
            },
            plan: &prepared.plan,
            run_ms: ended.report.as_ref().map(|report| report.run_ns as f64 / 1e6),
            memory: ended.report.as_ref().map(|report| report.memory),
            exits: ended.exits(),
            profile: if prepared.options.profile { ended.profile() } else { None },
            stdout: stream(0),
            stderr: stream(1),
            console: ended.console.tail(super::TAIL),
        }
    }
}
