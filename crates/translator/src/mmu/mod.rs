//! Memory as the guest sees it: segments, paging, the soft TLB, and the way out to devices.
//!
//! ```text
//!   operand ─address─> linear ─soft TLB─> host pointer ──> one load or store
//!                        │ miss
//!                        └─walk─> guest-physical ─┬─ RAM: fill the TLB, access
//!                                                 ├─ RAM that holds code: access, then note the write
//!                                                 └─ not RAM: CpuIo::mmio_*
//! ```

mod access;
mod address;
mod busy;
mod table;
mod tlb;
mod walk;
mod window;
mod written;

pub(crate) use address::canonical;
pub(crate) use table::{INDEX_BITS, SKEW as TABLE_SKEW, index as table_index};
pub(crate) use tlb::{DataMode, Fill, Starts, Tlb};
pub(crate) use walk::{Access, Rights};
pub(crate) use window::Window;
pub(crate) use written::{Where, Written};
