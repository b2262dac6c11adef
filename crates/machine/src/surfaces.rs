//! What a machine and its guest have agreed on, seen from outside: every paravirtual surface, whether it is offered,
//! accepted and used, what its use costs, and what it exposes.

use std::sync::Arc;

use contract::kvm::feature as kvm;
use contract::native::feature as native;
use host::{Clock, HostClock};
use paravirt::native::Terms;
use paravirt::{KvmUsage, Used};
use serde::{Deserialize, Serialize};

use crate::plan::{Dialects, Without};

/// How much a surface gives to a guest that means harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exposure {
    /// Nothing it has not got anyway.
    None,
    /// Its own state, or something bounded.
    Low,
    /// The host does bounded work for it, or tells it how the host is doing.
    Medium,
}

impl Exposure {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Low => "low",
            Self::Medium => "medium",
        }
    }
}

/// One paravirtual surface of a running machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Surface {
    /// "kvm", "cordial", or "cpuid" for what belongs to no dialect.
    pub dialect: String,
    /// The name that `--pv -NAME` takes.
    pub name: String,
    /// The guest can have it.
    pub offered: bool,
    /// The guest has it; `None` where that leaves no trace.
    pub accepted: Option<bool>,
    /// The host wants it back, and the guest has not answered yet.
    pub revoking: bool,
    /// How often it was used by a call or a register; `None` where it is used by loads, which nobody sees.
    pub used: Option<u64>,
    /// How often a use was refused.
    pub refused: u64,
    /// Median time of a use in the monitor, microseconds; `None` where it was not used.
    pub p50_us: Option<f64>,
    /// 99th percentile.
    pub p99_us: Option<f64>,
    /// What it exposes.
    pub exposure: Exposure,
    /// In words.
    pub risk: String,
}

/// The contract of a running machine at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Contract {
    /// Since the machine was made, milliseconds.
    pub uptime_ms: u64,
    /// The native dialect's epoch, where it is spoken.
    pub epoch: Option<u64>,
    /// A revocation has not been acknowledged in time.
    pub overdue: bool,
    /// Every surface there is, offered or not.
    pub surfaces: Vec<Surface>,
}

/// How a revocation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Revocation {
    /// The guest has given the feature up, or never had it.
    Acknowledged,
    /// It has not answered yet.
    Pending,
    /// It has not answered in time; it still can.
    Overdue,
}

/// Why a feature cannot be revoked.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotRevoked {
    /// No feature has this name.
    #[error("no paravirtual feature is called \"{name}\"")]
    Unknown {
        /// The name.
        name: String,
    },
    /// Only the native dialect has a handshake for it.
    #[error(
        "{name} cannot be taken back from a running guest: there is no handshake for it; start without it (--pv -{name})"
    )]
    NoHandshake {
        /// The feature.
        name: String,
    },
    /// It is not offered.
    #[error("{name} is not offered to this guest, or no longer")]
    NotOffered {
        /// The feature.
        name: String,
    },
}

/// Reads it all.
#[derive(Clone)]
pub(crate) struct Observer {
    pub(crate) dialects: Dialects,
    /// Features of the kvm dialect in CPUID.
    pub(crate) kvm_offered: u32,
    /// One a vCPU; empty where the host's kernel serves the kvm dialect.
    pub(crate) kvm_usage: Vec<Arc<KvmUsage>>,
    pub(crate) native: Option<Arc<paravirt::native::Vm>>,
    pub(crate) tsc_khz: u64,
    /// On the host's clock, however coarse the guest's is.
    pub(crate) started_ns: u64,
}

impl Observer {
    pub(crate) fn contract(&self) -> Contract {
        let terms = self.native.as_ref().map(|vm| vm.terms());
        let kvm_rows = KVM.iter().map(|&(bit, exposure, risk)| self.kvm_surface(bit, exposure, risk));
        let native_rows = NATIVE.iter().map(|&(bit, exposure, risk)| self.native_surface(bit, terms, exposure, risk));
        let shown = !self.dialects.is_none() && !self.dialects.without.hypervisor_bit;
        let bit = Surface { dialect: "cpuid".into(), offered: shown, ..surface("hypervisor-bit", BIT.0, BIT.1) };
        let device = self.device_surface();
        Contract {
            uptime_ms: HostClock.monotonic_ns().saturating_sub(self.started_ns) / 1_000_000,
            epoch: terms.map(|terms| terms.epoch),
            overdue: terms.is_some_and(|terms| terms.overdue),
            surfaces: std::iter::once(bit).chain(kvm_rows).chain(native_rows).chain([device]).collect(),
        }
    }

    fn kvm_surface(&self, bit: u32, exposure: Exposure, risk: &str) -> Surface {
        let offered = self.dialects.kvm && self.kvm_offered & bit == bit;
        let base = Surface { dialect: "kvm".into(), offered, ..surface(kvm_name(bit), exposure, risk) };
        if self.kvm_usage.is_empty() {
            return base;
        }
        let vcpus = self.kvm_usage.iter().map(Arc::as_ref);
        let accepted = KvmUsage::held(vcpus.clone(), bit);
        Surface { accepted, ..self.with_use(base, KvmUsage::used(vcpus, bit)) }
    }

    fn native_surface(&self, bit: u64, terms: Option<Terms>, exposure: Exposure, risk: &str) -> Surface {
        let used = self.native.as_ref().and_then(|vm| vm.used(bit));
        let has = |mask: fn(Terms) -> u64| terms.is_some_and(|terms| mask(terms) & bit != 0);
        let base = Surface {
            dialect: "cordial".into(),
            offered: has(|terms| terms.offered),
            accepted: Some(has(|terms| terms.accepted)),
            revoking: has(|terms| terms.revoking),
            ..surface(native_name(bit), exposure, risk)
        };
        self.with_use(base, used)
    }

    fn device_surface(&self) -> Surface {
        let offered = self.dialects.has_contract_device() && self.native.is_some();
        let base = Surface { dialect: "cordial".into(), offered, ..surface(DEVICE.0, DEVICE.1, DEVICE.2) };
        let used = self.native.as_ref().filter(|_| offered).map(|vm| vm.user_calls());
        self.with_use(base, used)
    }

    fn with_use(&self, surface: Surface, used: Option<Used>) -> Surface {
        let Some(Used { times, refused }) = used else { return surface };
        let us = |ticks: u64| (times.count > 0).then(|| ticks as f64 * 1000.0 / self.tsc_khz.max(1) as f64);
        Surface { used: Some(times.count), refused, p50_us: us(times.p50), p99_us: us(times.p99), ..surface }
    }

    /// Takes a feature back from the guest, unless that has been done already. How it stands, and the epoch.
    pub(crate) fn revoke(&self, name: &str) -> Result<(Revocation, u64), NotRevoked> {
        let owned = || name.to_owned();
        let Some(bit) = NATIVE.iter().map(|row| row.0).find(|bit| native_name(*bit) == name) else {
            let known = Without::names().any(|known| known == name);
            return Err(if known {
                NotRevoked::NoHandshake { name: owned() }
            } else {
                NotRevoked::Unknown { name: owned() }
            });
        };
        let vm = self.native.as_ref().ok_or_else(|| NotRevoked::NotOffered { name: owned() })?;
        let terms = vm.terms();
        let terms = match () {
            () if terms.revoking & bit != 0 => terms,
            () if terms.offered & bit == 0 => return Err(NotRevoked::NotOffered { name: owned() }),
            () => vm.revoke(bit),
        };
        let stands = match () {
            () if terms.revoking & bit == 0 => Revocation::Acknowledged,
            () if terms.overdue => Revocation::Overdue,
            () => Revocation::Pending,
        };
        Ok((stands, terms.epoch))
    }
}

/// A surface of which nothing is known yet.
fn surface(name: &str, exposure: Exposure, risk: &str) -> Surface {
    Surface {
        dialect: String::new(),
        name: name.to_owned(),
        offered: false,
        accepted: None,
        revoking: false,
        used: None,
        refused: 0,
        p50_us: None,
        p99_us: None,
        exposure,
        risk: risk.to_owned(),
    }
}

fn native_name(bit: u64) -> &'static str {
    native::NAMES.iter().find(|row| row.0 == bit).map_or("", |row| row.1)
}

fn kvm_name(bit: u32) -> &'static str {
    kvm::NAMES.iter().find(|row| row.0 == bit).map_or("", |row| row.1)
}

/// Of the contract device.
const DEVICE: (&str, Exposure, &str) =
    ("contract-device", Exposure::Medium, "user space that may map PCI resources accepts, uses and gives up features");

/// Of the hypervisor-present bit.
const BIT: (Exposure, &str) = (Exposure::None, "software sees that it runs in a VM, which it can find out anyway");

/// Of the kvm dialect.
const KVM: [(u32, Exposure, &str); 12] = [
    (kvm::CLOCKSOURCE, Exposure::Low, "a deprecated pair of MSRs for the clock: more to attack for nothing gained"),
    (kvm::NOP_IO_DELAY, Exposure::None, "a promise that ports need no delays"),
    (kvm::CLOCKSOURCE2, Exposure::Low, "the host writes a page of the guest's choice; time as fine as the TSC"),
    (kvm::STEAL_TIME, Exposure::Medium, "how long its vCPUs wait for a processor: the host's load"),
    (kvm::PV_EOI, Exposure::Low, "the host writes a byte of the guest's choice; ends of interrupts without an exit"),
    (kvm::PV_UNHALT, Exposure::Low, "the guest ends the sleep of its own vCPUs"),
    (kvm::PV_TLB_FLUSH, Exposure::Low, "flushes of its own vCPUs, put off until they run again"),
    (kvm::PV_SEND_IPI, Exposure::Low, "interrupts to its own vCPUs, up to 128 in one exit"),
    (kvm::POLL_CONTROL, Exposure::None, "a wish about polling, which the monitor never does"),
    (kvm::PV_SCHED_YIELD, Exposure::Low, "the guest gives its processor up"),
    (kvm::MSI_EXT_DEST_ID, Exposure::None, "more destinations for messages of its own devices"),
    (kvm::CLOCKSOURCE_STABLE, Exposure::None, "a promise about the clock"),
];

/// Of the native dialect: every feature that is built, in the order of their bits.
const NATIVE: [(u64, Exposure, &str); 15] = [
    (native::CLOCK, Exposure::Low, "the host writes a page of the guest's choice; time as fine as the TSC"),
    (native::TIME_OF_DAY, Exposure::Low, "the host's time of day, in steps of the quantum and at a limited rate"),
    (native::TIMER, Exposure::Medium, "the guest decides when the host wakes up; a bounded number of timers a vCPU"),
    (native::INTERRUPTS, Exposure::Low, "the guest masks its own interrupts; the monitor reads its page each time"),
    (native::EOI, Exposure::Low, "the host writes a byte of the guest's page; ends of interrupts without an exit"),
    (native::YIELD, Exposure::Medium, "hints that let a vCPU keep its processor a bounded while longer"),
    (native::RUN_STATE, Exposure::Low, "which of its own vCPUs sleep"),
    (native::STEAL, Exposure::Medium, "how long its vCPUs wait for a processor: the host's load"),
    (native::CRITICAL, Exposure::Medium, "hints that let a vCPU keep its processor a bounded while longer"),
    (native::IPI, Exposure::Low, "interrupts to its own vCPUs, up to 64 in one exit"),
    (native::FLUSH_TLB, Exposure::Medium, "the monitor stops vCPUs of the guest until they have flushed"),
    (native::WAIT, Exposure::Low, "the monitor reads words in guest memory; one wait a vCPU"),
    (native::MULTICALL, Exposure::Medium, "up to 64 calls in one exit: longer stretches in the monitor"),
    (native::GENERATION, Exposure::Low, "a random number that tells copies of the VM apart"),
    (native::LEDGER, Exposure::Medium, "counts of the guest's own exits, from which the host's load can be guessed"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_that_is_built_has_a_row_and_every_row_a_name() {
        assert_eq!(NATIVE.iter().fold(0, |bits, row| bits | row.0), paravirt::native::BUILT);
        assert!(NATIVE.is_sorted_by_key(|row| row.0) && KVM.is_sorted_by_key(|row| row.0));
        let mut names: Vec<_> = NATIVE.iter().map(|row| native_name(row.0)).collect();
        names.extend(KVM.iter().map(|row| kvm_name(row.0)));
        names.extend(["hypervisor-bit", DEVICE.0]);
        names.sort_unstable();
        let mut known: Vec<_> = Without::names().collect();
        known.sort_unstable();
        assert_eq!(names, known, "what can be left out is what is shown");
    }

    #[test]
    fn a_machine_without_the_native_dialect_has_nothing_to_revoke() {
        let observer = Observer {
            dialects: Dialects::default(),
            kvm_offered: kvm::CLOCKSOURCE2,
            kvm_usage: vec![Arc::default()],
            native: None,
            tsc_khz: 1_000_000,
            started_ns: 0,
        };
        let refused = |name: &str| observer.revoke(name).unwrap_err();
        assert_eq!(refused("wait"), NotRevoked::NotOffered { name: "wait".into() });
        assert_eq!(refused("wate"), NotRevoked::Unknown { name: "wate".into() });
        assert!(matches!(refused("kvm-clocksource2"), NotRevoked::NoHandshake { .. }));
        let contract = observer.contract();
        assert_eq!(contract.epoch, None);
        let offered: Vec<_> = contract.surfaces.iter().filter(|row| row.offered).map(|row| &row.name[..]).collect();
        assert_eq!(offered, ["hypervisor-bit", "kvm-clocksource2"]);
        let clock = contract.surfaces.iter().find(|row| row.name == "kvm-clocksource2").unwrap();
        assert_eq!((clock.accepted, clock.used, clock.p50_us), (Some(false), Some(0), None));
    }
}
