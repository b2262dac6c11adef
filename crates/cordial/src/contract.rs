//! `cordial contract`: what a running machine and its guest have agreed on, what of it is exposed without need, and
//! taking it back.

use crate::cli::ContractVerb;
use crate::control::{Ask, Client, Problem, Revoked, find};
use crate::failure::{Failure, status};
use machine::surfaces::{Contract, Exposure, Revocation, Surface};
use serde::Serialize;
use serde_json::json;
use std::thread;
use std::time::{Duration, Instant};

/// How often the guest's answer to a revocation is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Longest wait for it, seconds: a day.
const LONGEST_WAIT: u64 = 86_400;

/// What it prints, and the status.
///
/// # Errors
/// No such machine; what it refuses; a guest that does not answer in time.
pub fn contract(verb: &ContractVerb) -> Result<(String, u8), Failure> {
    match verb {
        ContractVerb::Show { vm, over, json } => Ok((show(vm.as_deref(), *over, *json)?, 0)),
        ContractVerb::Audit { vm, json } => {
            let machine = find(vm.as_deref())?;
            let contract = ask(&mut Client::to(&machine)?)?;
            let findings = findings(&contract);
            let text = if *json {
                document(&json!({ "schema": "cordial.audit/1", "name": machine.name, "findings": findings }))
            } else {
                audit_text(&contract, &findings)
            };
            Ok((text, if findings.is_empty() { 0 } else { status::FINDINGS }))
        }
        ContractVerb::Revoke { vm, feature, wait, json } => revoke(vm, feature, *wait, *json),
    }
}

fn ask(client: &mut Client) -> Result<Contract, Failure> {
    client.ask(&Ask::Contract).map_err(failure)
}

fn failure(problem: Problem) -> Failure {
    match &problem.kind[..] {
        "unknown-feature" => Failure::usage(problem.message),
        _ => Failure::other(problem.message),
    }
}

fn document(object: &serde_json::Value) -> String {
    format!("{object}\n")
}

/// A surface with how often it was used.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    surface: Surface,
    /// Uses a second.
    rate: Option<f64>,
}

/// Rates between two looks, or since the start where there was one only.
fn rows(before: Option<&Contract>, now: Contract) -> (Vec<Row>, u64) {
    let elapsed_ms = now.uptime_ms.saturating_sub(before.map_or(0, |before| before.uptime_ms)).max(1);
    let earlier = |name: &str| {
        before.and_then(|before| before.surfaces.iter().find(|row| row.name == name)).and_then(|row| row.used)
    };
    let row = |surface: Surface| {
        let uses = surface.used.map(|used| used.saturating_sub(earlier(&surface.name).unwrap_or(0)));
        Row { rate: uses.map(|uses| uses as f64 * 1000.0 / elapsed_ms as f64), surface }
    };
    (now.surfaces.into_iter().map(row).collect(), elapsed_ms)
}

fn show(vm: Option<&str>, over: Option<u64>, as_json: bool) -> Result<String, Failure> {
    // The machine hangs up on those who say nothing for a minute.
    if let Some(seconds) = over.filter(|seconds| !(1..=50).contains(seconds)) {
        return Err(Failure::usage(format!("--over {seconds}: not 1 to 50 seconds")));
    }
    let machine = find(vm)?;
    let mut client = Client::to(&machine)?;
    let mut before = None;
    if let Some(seconds) = over {
        before = Some(ask(&mut client)?);
        thread::sleep(Duration::from_secs(seconds));
    }
    let now = ask(&mut client)?;
    let (epoch, overdue, uptime_ms) = (now.epoch, now.overdue, now.uptime_ms);
    let (rows, rate_over_ms) = rows(before.as_ref(), now);
    if as_json {
        return Ok(document(&json!({
            "schema": "cordial.contract/1", "name": machine.name, "uptime_ms": uptime_ms, "epoch": epoch, "overdue": overdue,
            "rate_over_ms": rate_over_ms, "surfaces": rows,
        })));
    }
    Ok(table(&rows))
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<24} {:<8} {:<8} {:>10} {:>8} {:>10} {:>10} {:>8}  {}\n",
        "FEATURE", "OFFERED", "ACCEPTED", "USED", "RATE/s", "COST p50", "COST p99", "REFUSED", "EXPOSURE"
    );
    let optional = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let time = |us: Option<f64>| optional(us.map(|us| format!("{us:.1}us")));
    for Row { surface, rate } in rows {
        let accepted = match surface.accepted {
            _ if surface.revoking => "revoking",
            Some(yes) => yes_no(yes),
            None => "-",
        };
        text += &format!(
            "{:<24} {:<8} {accepted:<8} {:>10} {:>8} {:>10} {:>10} {:>8}  {}\n",
            surface.name,
            yes_no(surface.offered),
            optional(surface.used.map(|used| used.to_string())),
            optional(rate.map(|rate| format!("{rate:.1}"))),
            time(surface.p50_us),
            time(surface.p99_us),
            surface.refused,
            surface.exposure.name(),
        );
    }
    text
}

const fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// Something that an audit has found.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    feature: String,
    /// "unused", "refused", "pending" or "overdue".
    kind: &'static str,
    message: String,
}

/// What is exposed without need, or not in order.
fn findings(contract: &Contract) -> Vec<Finding> {
    let mut found = Vec::new();
    for surface in &contract.surfaces {
        let name = &surface.name;
        let mut find = |kind, message| found.push(Finding { feature: name.clone(), kind, message });
        if surface.revoking {
            let (kind, late) = if contract.overdue { ("overdue", ", and is late") } else { ("pending", "") };
            find(kind, format!("the host wants it back; the guest has not answered{late}"));
        }
        if surface.refused > 0 {
            find("refused", format!("{} uses were refused: not accepted, or with wrong arguments", surface.refused));
        }
        let unused = match (surface.accepted, surface.used) {
            (Some(false), _) => Some("offered, but not accepted"),
            (Some(true), Some(0)) => Some("accepted, but not used"),
            (None, Some(0)) => Some("offered, but not used"),
            _ => None,
        };
        if let Some(unused) = unused.filter(|_| surface.offered && surface.exposure > Exposure::None) {
            // The contract device itself cannot be accepted, and so not be given up.
            let revocable = surface.dialect == "cordial" && surface.accepted.is_some();
            let now = if revocable { ", or take it back with `cordial contract revoke`" } else { "" };
            find("unused", format!("{unused}: {}; start without it (--pv -{name}){now}", surface.risk));
        }
    }
    found
}

fn audit_text(contract: &Contract, findings: &[Finding]) -> String {
    let mut text = format!("{:<24} {:<9} {}\n", "OFFERED", "EXPOSURE", "WHAT IT EXPOSES");
    for surface in contract.surfaces.iter().filter(|surface| surface.offered || surface.revoking) {
        text += &format!("{:<24} {:<9} {}\n", surface.name, surface.exposure.name(), surface.risk);
    }
    text.push('\n');
    match findings.len() {
        0 => text += "nothing is exposed without need\n",
        1 => text += "1 finding:\n",
        many => text += &format!("{many} findings:\n"),
    }
    for Finding { feature, message, .. } in findings {
        text += &format!("  {feature}: {message}\n");
    }
    text
}

fn revoke(vm: &str, feature: &str, wait: Option<u64>, as_json: bool) -> Result<(String, u8), Failure> {
    if let Some(seconds) = wait.filter(|seconds| *seconds > LONGEST_WAIT) {
        return Err(Failure::usage(format!("--wait {seconds}: not 0 to {LONGEST_WAIT} seconds")));
    }
    let mut client = Client::to(&find(Some(vm))?)?;
    let Revoked { mut state, epoch } = client.ask(&Ask::Revoke { feature: feature.to_owned() }).map_err(failure)?;
    if let Some(seconds) = wait {
        let end = Instant::now() + Duration::from_secs(seconds);
        while state != Revocation::Acknowledged && Instant::now() < end {
            thread::sleep(LOOK);
            let contract = ask(&mut client)?;
            let pending = contract.surfaces.iter().any(|surface| surface.name == feature && surface.revoking);
            state = match () {
                () if !pending => Revocation::Acknowledged,
                () if contract.overdue => Revocation::Overdue,
                () => Revocation::Pending,
            };
        }
        if state != Revocation::Acknowledged {
            let late = if state == Revocation::Overdue { "overdue" } else { "pending" };
            return Err(Failure::late(format!(
                "{feature} is still honoured: the guest has not acknowledged epoch {epoch} within {seconds} s ({late})"
            )));
        }
    }
    if as_json {
        let object =
            json!({ "schema": "cordial.revoke/1", "name": vm, "feature": feature, "epoch": epoch, "state": state });
        return Ok((document(&object), 0));
    }
    Ok((format!("{feature}: {}\n", revocation_text(state, epoch)), 0))
}

fn revocation_text(state: Revocation, epoch: u64) -> String {
    match state {
        Revocation::Acknowledged => format!("revoked; nothing of it is honoured any more (epoch {epoch})"),
        Revocation::Pending => format!("pending; honoured until the guest has acknowledged epoch {epoch}"),
        Revocation::Overdue => {
            format!("overdue; the guest should have acknowledged epoch {epoch}, and it is still honoured")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surface(name: &str, exposure: Exposure) -> Surface {
        Surface {
            dialect: "cordial".into(),
            name: name.into(),
            offered: true,
            accepted: Some(true),
            revoking: false,
            used: Some(10),
            refused: 0,
            p50_us: Some(0.25),
            p99_us: Some(4.0),
            exposure,
            risk: "what it does".into(),
        }
    }

    fn contract(uptime_ms: u64, surfaces: Vec<Surface>) -> Contract {
        Contract { uptime_ms, epoch: Some(1), overdue: false, surfaces }
    }

    #[test]
    fn rates_are_since_the_start_or_between_two_looks() {
        let look = |at, used| contract(at, vec![Surface { used, ..surface("wait", Exposure::Low) }]);
        let rate = |before: Option<&Contract>, now| rows(before, now).0[0].rate;
        assert_eq!(rate(None, look(2000, Some(10))), Some(5.0));
        assert_eq!(rate(Some(&look(2000, Some(10))), look(4000, Some(110))), Some(50.0));
        assert_eq!(rate(None, look(0, None)), None);
    }

    #[test]
    fn a_table_has_a_line_a_feature() {
        let revoking = Surface { revoking: true, ..surface("timer", Exposure::Medium) };
        let loads = Surface { used: None, p50_us: None, p99_us: None, ..surface("clock", Exposure::Low) };
        let (rows, _) = rows(None, contract(1000, vec![surface("wait", Exposure::Low), revoking, loads]));
        let text = table(&rows);
        let lines: Vec<Vec<&str>> = text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["wait", "yes", "yes", "10", "10.0", "0.2us", "4.0us", "0", "low"]);
        assert_eq!(lines[1][2], "revoking");
        assert_eq!(lines[2][3..], ["-", "-", "-", "-", "0", "low"]);
    }

    #[test]
    fn an_audit_finds_what_is_offered_without_use_refused_or_not_given_back() {
        let kinds = |changed: Surface, overdue| {
            let contract = Contract { overdue, ..contract(1, vec![changed]) };
            findings(&contract).into_iter().map(|finding| finding.kind).collect::<Vec<_>>()
        };
        let base = || surface("wait", Exposure::Low);
        assert_eq!(kinds(base(), false), <[&str; 0]>::default());
        assert_eq!(kinds(Surface { accepted: Some(false), ..base() }, false), ["unused"]);
        assert_eq!(kinds(Surface { used: Some(0), ..base() }, false), ["unused"]);
        assert_eq!(kinds(Surface { used: None, ..base() }, false), <[&str; 0]>::default());
        assert_eq!(kinds(Surface { accepted: None, used: None, ..base() }, false), <[&str; 0]>::default());
        assert_eq!(kinds(Surface { accepted: None, used: Some(0), ..base() }, false), ["unused"]);
        let harmless = Surface { accepted: Some(false), ..surface("x", Exposure::None) };
        assert_eq!(kinds(harmless, false), <[&str; 0]>::default());
        assert_eq!(kinds(Surface { accepted: Some(false), offered: false, ..base() }, false), <[&str; 0]>::default());
        assert_eq!(kinds(Surface { refused: 3, ..base() }, false), ["refused"]);
        let revoking = || Surface { revoking: true, offered: false, ..base() };
        assert_eq!((kinds(revoking(), false), kinds(revoking(), true)), (vec!["pending"], vec!["overdue"]));
        let device = Surface { accepted: None, used: Some(0), ..surface("contract-device", Exposure::Medium) };
        let contract = contract(1, vec![Surface { accepted: Some(false), ..base() }, device]);
        let text = audit_text(&contract, &findings(&contract));
        for line in [
            "2 findings:",
            "  wait: offered, but not accepted: what it does; start without it (--pv -wait), or take it back with `cordial contract revoke`",
            "  contract-device: offered, but not used: what it does; start without it (--pv -contract-device)",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}: {text}");
        }
    }
}
