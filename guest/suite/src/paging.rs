//! Page tables: the suite's own, and those a test takes apart.
//!
//! ```text
//!  0 .. 4 GiB                  one to one, supervisor, 2 MiB pages (the second GiB of addresses is left out, see below)
//!  USER_ALIAS .. +1 GiB        the first GiB again, for users: code and stacks of user snippets
//!  TEST_VA .. +2 MiB, two PTEs  built by `Window`, level by level
//! ```

use crate::cpu::{invlpg, write_cr3};
use core::ptr::addr_of_mut;

/// Page-table entry bits.
pub mod pte {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
    /// Everything allowed.
    pub const ALL: u64 = P | W | U;
}

/// Page-fault error code bits (SDM 4.7).
pub mod pfec {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const RSVD: u64 = 1 << 3;
    pub const I: u64 = 1 << 4;
    pub const PK: u64 = 1 << 5;
}

/// A page of entries.
#[repr(C, align(4096))]
pub struct Table(pub [u64; 512]);

const EMPTY: Table = Table([0; 512]);

struct Tables {
    pml4: Table,
    pdpt: Table,
    pds: [Table; 4],
    window: [Table; 3],
}

static mut TABLES: Tables = Tables { pml4: EMPTY, pdpt: EMPTY, pds: [EMPTY; 4], window: [EMPTY; 3] };

/// Two pages in a row, and the 2 MiB and 1 GiB regions they are in, for tests to map anywhere.
#[repr(C, align(4096))]
struct Frames([[u8; 4096]; 4]);
static mut FRAMES: Frames = Frames([[0; 4096]; 4]);

/// Addresses that are no RAM: between RAM and devices, local APIC, I/O APIC, beyond all.
pub const NO_RAM: [u64; 4] = [0xB000_0000, crate::apic::BASE, 0xFEC0_0000, 1 << 45];
/// Where [`Window`] maps: PML4 entry 1, and every index below it nonzero.
pub const TEST_VA: u64 = 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12;

fn tables() -> &'static mut Tables {
    // SAFETY: one processor changes mappings, and no caller holds two of these.
    unsafe { &mut *addr_of_mut!(TABLES) }
}

/// Physical address of an object: memory is mapped one to one.
pub fn physical<T>(object: *const T) -> u64 {
    object as u64
}

/// Physical address of the suite's PML4.
pub fn root() -> u64 {
    physical(&raw const tables().pml4)
}

/// The suite's PML4, for tests that hang their own tables into it.
pub fn pml4() -> &'static mut [u64; 512] {
    &mut tables().pml4.0
}

/// The `n`th of four pages in a row tests may fill and map.
pub fn frame(n: usize) -> &'static mut [u8; 4096] {
    // SAFETY: tests hold one reference to a frame at a time; other processors use addresses.
    unsafe { &mut (*addr_of_mut!(FRAMES)).0[n] }
}

/// Rebuilds the suite's own mappings, nothing else mapped, and loads them.
pub fn reset() {
    let t = tables();
    // These tables may be the ones in use: entries the suite itself runs on are overwritten, never cleared.
    t.pml4.0[1..].fill(0);
    t.pdpt.0[4..].fill(0);
    // Users may pass both upper levels; the page directories decide.
    t.pml4.0[0] = physical(&raw const t.pdpt) | pte::ALL;
    for (gib, pd) in t.pds.iter_mut().enumerate() {
        let (base, user) = if gib == 2 { (0, pte::U) } else { ((gib as u64) << 30, 0) };
        for (i, entry) in pd.0.iter_mut().enumerate() {
            // The accessed and dirty bits are set, so that the processor need not write to these tables.
            *entry = base | (i as u64) << 21 | pte::P | pte::W | user | pte::PS | pte::A | pte::D;
        }
        t.pdpt.0[gib] = physical(&raw const *pd) | pte::ALL | pte::A;
    }
    write_cr3(root());
    crate::cpu::write_cr4(crate::cpu::read_cr4() ^ crate::cpu::cr4::PGE); // also the global entries
    crate::cpu::write_cr4(crate::cpu::read_cr4() ^ crate::cpu::cr4::PGE);
}

/// The entries that translate [`TEST_VA`]: index 0 is the PML4 entry, 3 the page-table entry.
pub struct Window;

impl Window {
    /// Maps two pages at [`TEST_VA`] to frames 0 and 1, everything allowed.
    pub fn new() -> Window {
        let t = tables();
        let [pdpt, pd, pt] = &mut t.window;
        for table in [&mut *pdpt, pd, pt] {
            table.0.fill(0);
        }
        t.pml4.0[1] = physical(&raw const *pdpt) | pte::ALL;
        pdpt.0[1] = physical(&raw const *pd) | pte::ALL;
        pd.0[1] = physical(&raw const *pt) | pte::ALL;
        for i in 0..2 {
            pt.0[1 + i] = physical(frame(i)) | pte::ALL;
        }
        write_cr3(root());
        Window
    }

    /// The entry of `level` for page `page` (0 or 1; only the last level has two).
    pub fn entry(&self, level: usize, page: usize) -> &'static mut u64 {
        let t = tables();
        match level {
            0 => &mut t.pml4.0[1],
            1 => &mut t.window[0].0[1],
            2 => &mut t.window[1].0[1],
            _ => &mut t.window[2].0[1 + page],
        }
    }

    /// Replaces an entry and drops what was cached of it.
    pub fn set(&self, level: usize, value: u64) {
        *self.entry(level, 0) = value;
        self.flush();
    }

    /// Replaces the last-level entry of a page.
    pub fn set_page(&self, page: usize, value: u64) {
        *self.entry(3, page) = value;
        self.flush();
    }

    /// Forgets both pages' translations.
    pub fn flush(&self) {
        invlpg(TEST_VA);
        invlpg(TEST_VA + 4096);
    }

    /// Clears accessed and dirty at every level.
    pub fn clear_accessed(&self) {
        for level in 0..4 {
            *self.entry(level, 0) &= !(pte::A | pte::D);
        }
        self.flush();
    }
}
