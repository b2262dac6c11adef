//! The words of the dialogue: a request is one line, its reply is one line.

use machine::surfaces::Revocation;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Named in each line; another version is refused.
const SCHEMA: &str = "cordial.control/1";

/// Longest request in bytes, its newline included.
pub(super) const LONGEST_REQUEST: usize = 4096;
/// Longest reply in bytes, its newline included.
pub(super) const LONGEST_REPLY: usize = 1 << 20;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// What the machine is: [`Facts`].
    Status,
    /// Its contract: [`machine::surfaces::Contract`].
    Contract,
    /// Take this feature back: [`Revoked`].
    Revoke {
        /// Its name.
        feature: String,
    },
}

/// What a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Its name.
    pub name: String,
    /// The process it runs in.
    pub pid: u32,
    /// "translate" or "kvm".
    pub engine: String,
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// The kernel's file.
    pub kernel: String,
    /// Since it was made, milliseconds.
    pub uptime_ms: u64,
}

/// How a revocation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Acknowledged, pending or overdue.
    pub state: Revocation,
    /// The epoch that the guest has to acknowledge.
    pub epoch: u64,
}

/// Why a request was not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// "bad-request", "too-many", "unknown-feature", "not-offered" or "no-handshake".
    pub kind: String,
    /// In words.
    pub message: String,
}

impl Problem {
    pub(super) fn new(kind: &str, message: impl Into<String>) -> Self {
        Self { kind: kind.into(), message: message.into() }
    }

    fn bad(message: impl Into<String>) -> Self {
        Self::new("bad-request", message)
    }
}

/// A request, as a line.
pub(super) fn request(ask: &Ask) -> String {
    let mut object = json!(ask);
    object["schema"] = SCHEMA.into();
    format!("{object}\n")
}

/// What a line asks for.
///
/// # Errors
/// It is no request of this version.
pub(super) fn asked(line: &[u8]) -> Result<Ask, Problem> {
    let object: Value = serde_json::from_slice(line).map_err(|error| Problem::bad(format!("not JSON: {error}")))?;
    match object["schema"].as_str() {
        Some(SCHEMA) => {}
        Some(other) => return Err(Problem::bad(format!("schema \"{other}\" is not spoken here, but {SCHEMA}"))),
        None => return Err(Problem::bad(format!("no schema; this one is spoken: {SCHEMA}"))),
    }
    serde_json::from_value(object).map_err(|error| Problem::bad(error.to_string()))
}

/// A reply, as a line.
pub(super) fn reply(answer: &Result<Value, Problem>) -> String {
    let object = match answer {
        Ok(value) => json!({ "schema": SCHEMA, "reply": value }),
        Err(problem) => json!({ "schema": SCHEMA, "error": problem }),
    };
    format!("{object}\n")
}

/// What a line replies.
///
/// # Errors
/// The problem it tells of, or that it makes no sense.
pub(super) fn replied(line: &[u8]) -> Result<Value, Problem> {
    let nonsense = || Problem::bad("the machine's process answers in another version of the dialogue");
    let mut object: Value = serde_json::from_slice(line).map_err(|_| nonsense())?;
    if object["schema"] != SCHEMA {
        return Err(nonsense());
    }
    match object.get_mut("reply").map(Value::take) {
        Some(value) => Ok(value),
        None => Err(serde_json::from_value(object["error"].take()).unwrap_or_else(|_| nonsense())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_come_back() {
        for ask in [Ask::Status, Ask::Contract, Ask::Revoke { feature: "wait".into() }] {
            assert_eq!(asked(request(&ask).as_bytes()), Ok(ask));
        }
        assert_eq!(request(&Ask::Status), "{\"ask\":\"status\",\"schema\":\"cordial.control/1\"}\n");
        let revoked = Revoked { state: Revocation::Overdue, epoch: 3 };
        assert_eq!(json!(revoked), json!({ "state": "overdue", "epoch": 3 }));
        assert_eq!(replied(reply(&Ok(json!(7))).as_bytes()), Ok(json!(7)));
        let problem = Problem::new("not-offered", "x");
        assert_eq!(replied(reply(&Err(problem.clone())).as_bytes()), Err(problem));
    }

    #[test]
    fn what_is_no_request_is_named() {
        let bad = |line: &str| asked(line.as_bytes()).unwrap_err().message;
        assert!(bad("").starts_with("not JSON"));
        assert!(bad("[]").starts_with("no schema"));
        assert!(bad("{\"ask\":\"status\"}").starts_with("no schema"));
        assert!(bad("{\"schema\":\"cordial.control/2\",\"ask\":\"status\"}").contains("not spoken"));
        assert!(bad("{\"schema\":\"cordial.control/1\",\"ask\":\"reboot\"}").contains("reboot"));
        assert!(bad("{\"schema\":\"cordial.control/1\",\"ask\":\"revoke\"}").contains("feature"));
        assert!(replied(b"{}").is_err());
    }
}
