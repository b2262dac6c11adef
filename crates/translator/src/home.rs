//! Where a vCPU's state lives: one mapping in the lowest 2 GiB, so that generated code names every field by an absolute
//! 32-bit address and needs no register for it. That takes 8 bytes an access, so what is used most is at the end of the
//! first page, which is mapped once more in front of each translation table for writing: a register points there anyway,
//! and half as many bytes do.
//!
//! ```text
//!   Hot, general registers | rest of CpuState | landing tables (where indirect branches go, by target address) | anchors | placed
//!   └───── first page ─────┘
//! ```

use std::io;
use std::mem::offset_of;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use engine::{CpuState, Error};
use memory::PAGE_SIZE;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Entries of a landing table.
pub(crate) const LANDINGS: usize = 1 << 16;
/// Landing tables of a vCPU.
pub(crate) const LANDING_TABLES: usize = 3;
/// Most pages of code at lower addresses.
pub(crate) const ANCHORS: usize = 1 << 15;

/// Where the current address space has a page of code: what its translated code makes linear addresses of.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Anchor {
    /// The linear address, where there is one.
    pub address: u64,
    /// It, negated; [`NOWHERE`] where it is not known whether the page is there.
    pub negative: u64,
    /// The address of the page's second mapping in the host, negated.
    pub host: u64,
    reserved: u64,
}

/// [`Anchor::negative`] of a page that is nowhere: no canonical address is the difference of this and an offset.
pub(crate) const NOWHERE: u64 = 1 << 62;

/// Counters of instructions. There are several, so that code that counts need not wait until the last count is stored.
pub(crate) const COUNTERS: usize = 64;

/// What generated code and the monitor tell each other.
#[repr(C)]
pub(crate) struct Hot {
    /// Guest instructions that translated code has run since the monitor last looked, where they are counted: a part in
    /// each.
    pub instructions: [u64; COUNTERS],
    /// Status flags while the monitor runs: bits 15:8 as LAHF gives them, bit 0 OF.
    pub flags: u64,
    /// Stack pointer of generated code: the shadow return stack.
    pub shadow: u64,
    /// Stack pointer of the monitor while generated code runs.
    pub host_stack: u64,
    /// Where to enter.
    pub entry: u64,
    /// The current read table, as its register holds it.
    pub read: u64,
    /// The current write table, as its register holds it.
    pub write: u64,
    /// The `Cpu`, for callbacks.
    pub context: u64,
    /// Why generated code was left.
    pub exit: u64,
    /// What belongs to it.
    pub value: u64,
    /// Host instruction that faulted.
    pub fault: u64,
    /// MXCSR of the monitor.
    pub mxcsr: u64,
    /// 1: the code that [`Hot::shadow`] belongs to runs at CPL 3.
    pub user: u64,
    /// Where the shadow stacks begin, and where the one not in use stands; one a privilege.
    pub begins: [u64; 2],
    pub pointers: [u64; 2],
    /// The landing table in force, in bytes from the first.
    pub landing: u64,
    /// Which tables explicit data accesses use: a [`crate::mmu::DataMode`].
    pub data_mode: u64,
    /// Read and write tables for supervisor code without and with RFLAGS.AC.
    pub tables: [[u64; 2]; 2],
    /// Anchors that have been placed.
    pub placed: u64,
    /// The addend of a group of stack accesses, while the monitor resolves a miss.
    pub group: u64,
    // The words from here on are at hand by a register: see `Layout`.
    /// The address an access that missed was for.
    pub address: u64,
    /// Room for a register.
    pub scratch: u64,
    /// Status flags that translated code puts aside.
    pub own_flags: u64,
    /// 1: vector and x87 registers are in [`CpuState::xsave`]; 0: in the processor.
    pub vectors_away: u64,
    /// Not 0: the interrupt controller may have a vector to deliver once interrupts are enabled.
    pub waits: u64,
    /// Where the guest's TSC offset is.
    pub tsc: u64,
    /// The low bits of an address, as many as the index says.
    pub low_bits: [u64; 5],
    /// Those that are an offset in a page, and the first above them.
    pub offset_bits: u64,
    pub page_bit: u64,
    /// The bits of an address that are the index of its entry in a translation table.
    pub index_bits: u64,
}

/// Bytes of the mapping that lie in front of tables, too.
const FRONT: usize = PAGE_SIZE as usize;
/// Bytes before [`Hot`]: the state's first field, the general registers, ends with the first page.
const BEFORE: usize = FRONT - size_of::<[u64; 16]>() - size_of::<Hot>();

#[repr(C)]
struct Layout {
    reserved: [u8; BEFORE],
    hot: Hot,
    state: CpuState,
    landings: [[u64; LANDINGS]; LANDING_TABLES],
    anchors: [Anchor; ANCHORS],
    /// The addresses of those that have been placed; the rest is nothing.
    placed: [u64; ANCHORS],
}

impl Layout {
    /// The number of the anchor at an address.
    fn number(&self, address: u64) -> u32 {
        let first = self.anchors.as_ptr() as u64;
        (address.wrapping_sub(first) as usize / size_of::<Anchor>() % ANCHORS) as u32
    }
}

/// The mapping.
pub(crate) struct Home {
    at: NonNull<Layout>,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Home {}

impl Home {
    /// A home for `state`.
    pub(crate) fn new(state: CpuState) -> Result<Self, Error> {
        let refused = |source: io::Error| Error::Host { what: "memory for a virtual processor", source };
        let file = memfd_create("processor", MemfdFlags::CLOEXEC).map_err(|error| refused(error.into()))?;
        ftruncate(&file, size_of::<Layout>() as u64).map_err(|error| refused(error.into()))?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let map = |flags| {
            // SAFETY: a new mapping at an address the kernel chooses.
            unsafe { mmap(std::ptr::null_mut(), size_of::<Layout>(), protection, flags, &file, 0) }
        };
        let low = MapFlags::SHARED | MapFlags::from_bits_retain(libc::MAP_32BIT as u32);
        let at = map(low).or_else(|_| map(MapFlags::SHARED)).map_err(|error| refused(error.into()))?;
        let nowhere = || refused(io::Error::other("mapped at address zero"));
        let at = NonNull::new(at.cast::<Layout>()).ok_or_else(nowhere)?;
        // SAFETY: the mapping is zero and as large and aligned as `Layout`; the other fields are integers.
        unsafe { (&raw mut (*at.as_ptr()).state).write(state) };
        let mut home = Self { at, file };
        home.hot_mut().vectors_away = 1;
        home.hot_mut().mxcsr = 0x1f80;
        let hot = home.hot_mut();
        (hot.index_bits, hot.offset_bits, hot.page_bit) = (crate::mmu::INDEX_BITS, PAGE_SIZE - 1, PAGE_SIZE);
        hot.low_bits = std::array::from_fn(|count| (1 << count) - 1);
        Ok(home)
    }

    /// The file that the mapping is of, from its start on.
    pub(crate) fn file(&self) -> io::Result<OwnedFd> {
        self.file.try_clone()
    }

    /// The address generated code calls the mapping's start by; `None` where that takes more than 31 bits.
    pub(crate) fn low(&self) -> Option<i32> {
        let start = i32::try_from(self.at.as_ptr() as usize).ok()?;
        i32::try_from(self.at.as_ptr() as usize + size_of::<Layout>()).ok().map(|_| start)
    }

    /// What generated code and the monitor tell each other.
    pub(crate) fn hot(&self) -> &Hot {
        // SAFETY: initialised in `new`; generated code writes to it only while it runs on this thread.
        unsafe { &(*self.at.as_ptr()).hot }
    }

    pub(crate) fn hot_mut(&mut self) -> &mut Hot {
        // SAFETY: as above.
        unsafe { &mut (*self.at.as_ptr()).hot }
    }

    /// A landing table.
    pub(crate) fn landings(&mut self, table: usize) -> &mut [u64; LANDINGS] {
        // SAFETY: as above.
        unsafe { &mut (*self.at.as_ptr()).landings[table % LANDING_TABLES] }
    }

    /// The anchor with a number; there is one for every number, by its remainder.
    pub(crate) fn anchor(&self, number: u32) -> &Anchor {
        // SAFETY: as above.
        unsafe { &(*self.at.as_ptr()).anchors[number as usize % ANCHORS] }
    }

    /// Makes an anchor of the page at `host` in the host, which is nowhere yet.
    pub(crate) fn set_anchor(&mut self, number: u32, host: u64) {
        let anchor = Anchor { address: 0, negative: NOWHERE, host: host.wrapping_neg(), reserved: 0 };
        // SAFETY: as above.
        unsafe { (*self.at.as_ptr()).anchors[number as usize % ANCHORS] = anchor };
    }

    /// Makes an anchor of one at address zero that is never taken away.
    pub(crate) fn set_fixed_anchor(&mut self, number: u32) {
        // SAFETY: as above.
        unsafe { (*self.at.as_ptr()).anchors[number as usize % ANCHORS].negative = 0 };
    }

    /// Says where an anchor's page is.
    pub(crate) fn place(&mut self, number: u32, address: u64) {
        let number = number as usize % ANCHORS;
        let placed = self.hot().placed as usize % ANCHORS;
        // SAFETY: as above.
        let layout = unsafe { &mut *self.at.as_ptr() };
        let anchor = &mut layout.anchors[number];
        if anchor.negative == NOWHERE {
            layout.placed[placed] = std::ptr::from_ref(anchor) as u64;
            layout.hot.placed += 1;
        }
        (anchor.address, anchor.negative) = (address, address.wrapping_neg());
    }

    /// The numbers of the anchors that have been placed.
    pub(crate) fn placed(&self) -> impl Iterator<Item = u32> {
        // SAFETY: as above.
        let layout = unsafe { &*self.at.as_ptr() };
        layout.placed[..layout.hot.placed as usize % ANCHORS].iter().map(|&placed| layout.number(placed))
    }

    /// Takes all anchors from where they are.
    pub(crate) fn forget_places(&mut self) {
        // SAFETY: as above.
        let layout = unsafe { &mut *self.at.as_ptr() };
        for at in 0..layout.hot.placed as usize % ANCHORS {
            let number = layout.number(layout.placed[at]);
            layout.anchors[number as usize].negative = NOWHERE;
        }
        layout.hot.placed = 0;
    }
}

/// Offsets from [`Home::low`].
pub(crate) mod offset {
    use super::{Anchor, CpuState, Hot, LANDINGS, Layout, offset_of};

    /// Behind the mapping.
    #[cfg(debug_assertions)]
    pub(crate) const END: i32 = size_of::<Layout>() as i32;
    pub(crate) const STATE: i32 = offset_of!(Layout, state) as i32;
    /// What lies before it lies in front of tables for writing, too.
    pub(crate) const FRONT: i32 = super::FRONT as i32;
    const _: () = assert!(GPR + 16 * 8 == FRONT && HOT + size_of::<Hot>() as i32 == GPR);
    pub(crate) const GPR: i32 = STATE + offset_of!(CpuState, gpr) as i32;
    pub(crate) const RIP: i32 = STATE + offset_of!(CpuState, rip) as i32;
    pub(crate) const RFLAGS: i32 = STATE + offset_of!(CpuState, rflags) as i32;
    pub(crate) const SEGMENTS: i32 = STATE + offset_of!(CpuState, segments) as i32;
    pub(crate) const KERNEL_GS_BASE: i32 = STATE + offset_of!(CpuState, kernel_gs_base) as i32;
    pub(crate) const TSC_AUX: i32 = STATE + offset_of!(CpuState, tsc_aux) as i32;
    pub(crate) const XSAVE: i32 = STATE + offset_of!(CpuState, xsave) as i32;
    pub(crate) const HOT: i32 = offset_of!(Layout, hot) as i32;

    macro_rules! hot {
        ($($name:ident $field:ident;)*) => {
            $(pub(crate) const $name: i32 = HOT + offset_of!(Hot, $field) as i32;)*
        };
    }
    hot! {
        FLAGS flags; SHADOW shadow; HOST_STACK host_stack; ENTRY entry; READ read; WRITE write; CONTEXT context;
        VECTORS_AWAY vectors_away; EXIT exit; VALUE value; ADDRESS address; SCRATCH scratch; MXCSR mxcsr;
        LANDING landing; WAITS waits; DATA_MODE data_mode; TABLES tables; TSC tsc; PLACED_COUNT placed; INDEX_BITS index_bits;
        GROUP group; OWN_FLAGS own_flags; OFFSET_BITS offset_bits; PAGE_BIT page_bit;
        LOW_BITS low_bits;
        INSTRUCTIONS instructions;
    }

    /// A landing table.
    pub(crate) const fn landings(table: usize) -> i32 {
        offset_of!(Layout, landings) as i32 + (table * LANDINGS * 8) as i32
    }

    pub(crate) const PLACED: i32 = offset_of!(Layout, placed) as i32;
    /// Fields of an anchor.
    pub(crate) const ADDRESS_IN_ANCHOR: i32 = offset_of!(Anchor, address) as i32;
    pub(crate) const NEGATIVE_IN_ANCHOR: i32 = offset_of!(Anchor, negative) as i32;
    pub(crate) const HOST_IN_ANCHOR: i32 = offset_of!(Anchor, host) as i32;

    /// An anchor.
    pub(crate) const fn anchor(number: u32) -> i32 {
        offset_of!(Layout, anchors) as i32 + number as i32 * size_of::<Anchor>() as i32
    }
}

impl Deref for Home {
    type Target = CpuState;

    fn deref(&self) -> &CpuState {
        // SAFETY: initialised in `new`; generated code writes to it only while it runs on this thread.
        unsafe { &self.at.as_ref().state }
    }
}

impl DerefMut for Home {
    fn deref_mut(&mut self) -> &mut CpuState {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { &mut self.at.as_mut().state }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping; `CpuState` owns nothing.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), size_of::<Layout>()) };
    }
}
