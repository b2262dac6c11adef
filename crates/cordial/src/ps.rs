//! `cordial ps`: the machines of this user that run.

use crate::control::{Ask, Client, Facts, Running, running};
use crate::failure::Failure;
use crate::values::human;
use serde_json::json;

/// A machine, and what it says of itself; `None` where it does not answer, or not yet.
type Row = (Running, Option<Facts>);

/// What it prints.
///
/// # Errors
/// The directory of what runs cannot be used.
pub fn ps(as_json: bool) -> Result<String, Failure> {
    let ask = |machine: Running| {
        let facts = Client::to(&machine).ok().and_then(|mut client| client.ask(&Ask::Status).ok());
        (machine, facts)
    };
    let rows: Vec<Row> = running()?.into_iter().map(ask).collect();
    Ok(if as_json { document(&rows) } else { table(&rows) })
}

fn document(rows: &[Row]) -> String {
    let machine = |(running, facts): &Row| match facts {
        Some(facts) => json!(facts),
        None => json!({ "name": running.name, "pid": running.pid }),
    };
    let machines: Vec<_> = rows.iter().map(machine).collect();
    format!("{}\n", json!({ "schema": "cordial.ps/1", "machines": machines }))
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<20} {:>8} {:<10} {:>4} {:>10} {:>9}  {}\n",
        "NAME", "PID", "ENGINE", "CPUS", "MEMORY", "UPTIME", "KERNEL"
    );
    for (running, facts) in rows {
        let pid = running.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        text += &match facts {
            &Some(Facts { ref engine, cpus, memory, ref kernel, uptime_ms, .. }) => format!(
                "{:<20} {pid:>8} {engine:<10} {cpus:>4} {:>10} {:>9}  {kernel}\n",
                running.name,
                human(memory),
                duration(uptime_ms)
            ),
            None => format!("{:<20} {pid:>8} is being prepared, or does not answer\n", running.name),
        };
    }
    text
}

/// 1h02m, 3m04s, 5s.
fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_listed_whether_or_not_they_answer() {
        let running = |name: &str, pid| Running { name: name.into(), pid, socket: "/x".into() };
        let facts = Facts {
            name: "web".into(),
            pid: 7,
            engine: "translate".into(),
            cpus: 2,
            memory: 1 << 30,
            kernel: "/boot/vmlinuz".into(),
            uptime_ms: 3_723_000,
        };
        let rows = [(running("web", Some(7)), Some(facts)), (running("vm-8", Some(8)), None)];
        let text = table(&rows);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["web", "7", "translate", "2", "1", "GiB", "1h02m", "/boot/vmlinuz"]);
        assert_eq!(lines[2].join(" "), "vm-8 8 is being prepared, or does not answer");
        let document: serde_json::Value = serde_json::from_str(&document(&rows)).unwrap();
        assert_eq!(document["schema"], "cordial.ps/1");
        assert_eq!((&document["machines"][0]["cpus"], &document["machines"][1]["pid"]), (&json!(2), &json!(8)));
        assert_eq!([59_999, 60_000, 3_599_999].map(duration), ["59s", "1m00s", "59m59s"]);
    }
}
