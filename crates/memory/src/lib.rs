//! Guest RAM: typed addresses, checked access, and the page tracking the engines rely on.
//!
//! What a guest says about memory is an *allegation*: a [`Gpa`] is only a number until an access through
//! [`GuestRam`] has checked it. No `&[u8]` into live guest RAM ever exists; bytes are copied in and out.
//!
//! ```text
//!   devices ──(vm-memory slices)──┐
//!   paravirt ──(read/write)───────┤──> GuestRam ──> one memfd, each region mapped twice
//!   engines ──(host_page)─────────┘        │
//!                                          └──> CodePages: which 64-byte lines hold translated code
//! ```
//!
//! Neighbours: engines turn guest-virtual into guest-physical addresses and come here with the latter; devices hand
//! [`GuestRam::backend`] to `virtio-queue`.

mod address;
mod code_pages;
mod mapping;
mod ram;
pub mod vectored;

pub use address::{Gpa, Gva, PAGE_SHIFT, PAGE_SIZE};
pub use code_pages::{CodeBitmap, CodePages, LINE_SIZE, Marked};
pub use ram::{Backend, Error, GuestRam, Region};
