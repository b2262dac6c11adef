//! The end of an interrupt without an exit, by a byte in guest RAM: one protocol for both dialects.
//!
//! ```text
//!                    take_interrupt, alone and edge-triggered
//!   no word ───────────────────────────────────────────────────> offered: the guest's byte is 1
//!      ▲                                                             │ the guest makes it 0, instead of a write to EOI
//!      │   hear: it is 0, and EOI is written for the guest           ▼
//!      ├──────────────────────────────────────────────────────── ended
//!      └── hear: it is 1 still, and is made 0: the guest will write to EOI
//! ```
//!
//! The byte is the vCPU's thread's to look at and to change, and only between two of the guest's instructions: the guest
//! changes it by one instruction, not locked. Whoever requests an interrupt meanwhile drives the vCPU's interrupt pin, which
//! has the vCPU hear before anything is delivered: without that, an interrupt requested behind the offer would wait for an exit
//! that nobody owes any more.
//!
//! Neighbours: [`Vcpu`](crate::Vcpu) keeps what is offered; the local APIC decides, with the interrupt it hands out, whether
//! it is alone.

/// Where the byte is, and what its end means.
pub(crate) trait Ends {
    /// Names a byte.
    type Place: Copy + PartialEq;
    /// Where the guest has its byte at present, if anywhere.
    fn place(&self) -> Option<Self::Place>;
    /// True where the byte there is set. One that cannot be read is.
    fn is_set(&self, place: Self::Place) -> bool;
    /// Sets or clears the byte there.
    fn set(&self, place: Self::Place, set: bool);
    /// Writes to the local APIC's EOI register.
    fn end(&self);
}

/// The interrupt that is being delivered may end in memory. Returns what to [`hear`], if the guest has a byte.
pub(crate) fn offer<E: Ends>(ends: &E) -> Option<E::Place> {
    let place = ends.place()?;
    ends.set(place, true);
    Some(place)
}

/// Has the local APIC know whether the interrupt that was offered to end at `place` has; where not, takes the offer back.
pub(crate) fn hear<E: Ends>(ends: &E, place: E::Place) {
    if !ends.is_set(place) {
        ends.end();
    } else if ends.place() == Some(place) {
        ends.set(place, false);
    }
}
