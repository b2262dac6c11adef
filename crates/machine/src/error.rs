//! Why a machine could not be made or run.

/// Every message says what was wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value in the plan.
    #[error(transparent)]
    Plan(#[from] crate::plan::Invalid),
    /// No model of that name.
    #[error("unknown CPU model \"{name}\"; known are {known}")]
    UnknownCpuModel {
        /// The name asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// The host's processor lacks part of the model.
    #[error(transparent)]
    CpuModel(#[from] engine::cpu_model::MissingFeatures),
    /// The kernel, the initial RAM disk or a module.
    #[error(transparent)]
    Boot(#[from] crate::boot::Error),
    /// A disk's image.
    #[error(transparent)]
    Disk(#[from] device::virtio::block::OpenError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The CPU engine.
    #[error(transparent)]
    Engine(#[from] engine::Error),
    /// Devices in each other's way: a mistake of ours in the layout.
    #[error("the machine's layout is wrong: {0}; this is a bug")]
    Bus(#[from] device::bus::Error),
    /// More PCI functions than there are slots, or room for.
    #[error("the PCI bus: {0}; ask for fewer disks")]
    Pci(#[from] device::pci::Error),
    /// The host refused a resource.
    #[error("the host refused {what}: {source}")]
    Host {
        /// The resource.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// A vCPU's thread died.
    #[error("vCPU {index} died of an error in the monitor; its message stands above, please report it")]
    Vcpu {
        /// Which.
        index: u32,
    },
    /// Every vCPU returned without a reason.
    #[error("the run ended without a reason; this is a bug")]
    NoOutcome,
}
