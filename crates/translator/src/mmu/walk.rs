//! Page walks in every paging mode (Intel SDM vol. 3A, chapter 4), with accessed and dirty bits.

use engine::state::{cr0, cr4, efer, rflags};
use memory::{Gpa, Gva};

use crate::cpu::{Cpu, Exception, vector};
use crate::mmu::DataMode;
use crate::op::Leave;
use crate::width::Width;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// On whose behalf an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// The running program: CPL decides.
    Current,
    /// The processor itself: descriptor tables, TSS, inner stacks (SDM vol. 3A, 4.6: implicit supervisor-mode access).
    System,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Translation {
    pub gpa: Gpa,
    /// A write needs no further walk: the page is writable and its dirty bit is set.
    pub writable_now: bool,
    /// An instruction fetch for the same program would be allowed.
    pub executable: bool,
    /// The translation holds in every address space until it is flushed by name.
    pub global: bool,
    /// Size of the large page it lies in.
    pub large: Option<u64>,
}

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// Page-fault error code bits (SDM vol. 3A, 4.7).
const CODE_PRESENT: u32 = 1 << 0;
const CODE_WRITE: u32 = 1 << 1;
const CODE_USER: u32 = 1 << 2;
const CODE_RESERVED: u32 = 1 << 3;
const CODE_FETCH: u32 = 1 << 4;

/// The address field of an entry, as wide as the architecture lets it be; narrower processors have reserved bits in it.
const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;

/// One paging structure's part in a walk.
struct Level {
    /// Lowest linear-address bit it translates.
    shift: u32,
    /// Linear-address bits it indexes by.
    bits: u32,
    /// Whether its LARGE bit maps a page.
    may_be_large: bool,
}

const FOUR_LEVEL: [Level; 4] = [
    Level { shift: 39, bits: 9, may_be_large: false },
    Level { shift: 30, bits: 9, may_be_large: true },
    Level { shift: 21, bits: 9, may_be_large: true },
    Level { shift: 12, bits: 9, may_be_large: false },
];
const PAE: [Level; 2] =
    [Level { shift: 21, bits: 9, may_be_large: true }, Level { shift: 12, bits: 9, may_be_large: false }];
const TWO_LEVEL: [Level; 2] =
    [Level { shift: 22, bits: 10, may_be_large: true }, Level { shift: 12, bits: 10, may_be_large: false }];

/// What the walk found out, before permissions are looked at.
struct Leaf {
    /// Permissions of all levels together: WRITABLE and USER anded, NO_EXECUTE ored.
    rights: u64,
    /// The entries used, for their accessed bits: guest-physical address and value.
    entries: [(Gpa, u64); 4],
    count: usize,
    page: u64,
    shift: u32,
    wide: bool,
}

impl Cpu {
    /// Translates a linear address, checking permissions and setting accessed and dirty bits.
    pub(crate) fn translate(&mut self, address: Gva, access: Access, rights: Rights) -> Result<Translation, Leave> {
        let user = rights == Rights::Current && self.mode.cpl == 3;
        if self.state.cr0 & cr0::PG == 0 {
            let gpa = Gpa(address.0 & 0xffff_ffff);
            return Ok(Translation { gpa, writable_now: true, executable: true, global: false, large: None });
        }
        let mut code = if access == Access::Write { CODE_WRITE } else { 0 };
        if user {
            code |= CODE_USER;
        }
        let no_execute = self.state.efer & efer::NXE != 0 && self.state.cr4 & cr4::PAE != 0;
        if access == Access::Execute && (no_execute || self.state.cr4 & cr4::SMEP != 0) {
            code |= CODE_FETCH;
        }
        let leaf = self.walk(address).map_err(|bits| self.page_fault(address, code | bits))?;
        if !self.permitted(&leaf, access, user, rights) {
            return Err(self.page_fault(address, code | CODE_PRESENT));
        }
        let dirty = self.set_used(&leaf, access == Access::Write);
        let offset = address.0 & ((1 << leaf.shift) - 1);
        let last = leaf.entries[leaf.count - 1].1;
        Ok(Translation {
            gpa: Gpa(leaf.page | offset),
            writable_now: dirty && self.permitted(&leaf, Access::Write, user, rights),
            executable: self.permitted(&leaf, Access::Execute, user, rights),
            global: last & GLOBAL != 0 && self.state.cr4 & cr4::PGE != 0,
            large: (leaf.shift > 12).then(|| 1 << leaf.shift),
        })
    }

    /// Raises #PF. CR2 is loaded when it is delivered.
    fn page_fault(&mut self, address: Gva, code: u32) -> Leave {
        self.exception = Exception { vector: vector::PF, error: Some(code), address: address.0 };
        Leave::Raised
    }

    fn permitted(&self, leaf: &Leaf, access: Access, user: bool, rights: Rights) -> bool {
        let user_page = leaf.rights & USER != 0;
        let writable = leaf.rights & WRITABLE != 0;
        let state = &*self.state;
        if user {
            return user_page
                && match access {
                    Access::Read => true,
                    Access::Write => writable,
                    Access::Execute => leaf.rights & NO_EXECUTE == 0,
                };
        }
        if access == Access::Execute {
            return leaf.rights & NO_EXECUTE == 0 && !(user_page && state.cr4 & cr4::SMEP != 0);
        }
        // SMAP: explicit accesses may be allowed by RFLAGS.AC, implicit ones never are.
        let overridden = rights == Rights::Current && state.rflags & rflags::AC != 0;
        if user_page && state.cr4 & cr4::SMAP != 0 && !overridden {
            return false;
        }
        access == Access::Read || writable || state.cr0 & cr0::WP == 0
    }

    /// Follows the paging structures. An error is the bits it adds to the error code.
    fn walk(&self, address: Gva) -> Result<Leaf, u32> {
        let state = &*self.state;
        let mut leaf =
            Leaf { rights: WRITABLE | USER, entries: [(Gpa(0), 0); 4], count: 0, page: 0, shift: 12, wide: true };
        if state.efer & efer::LMA != 0 {
            self.descend(address, state.cr3 & ADDRESS, &FOUR_LEVEL, &mut leaf)?;
        } else if state.cr4 & cr4::PAE != 0 {
            // The four page-directory-pointer entries have no permission bits (SDM vol. 3A, 4.4.1).
            let pointer = state.pdptrs[(address.0 >> 30 & 3) as usize];
            if pointer & PRESENT == 0 {
                return Err(0);
            }
            self.descend(address, pointer & ADDRESS, &PAE, &mut leaf)?;
        } else {
            leaf.wide = false;
            self.descend(address, state.cr3 & 0xffff_f000, &TWO_LEVEL, &mut leaf)?;
        }
        Ok(leaf)
    }

    fn descend(&self, address: Gva, root: u64, levels: &[Level], leaf: &mut Leaf) -> Result<(), u32> {
        let mut table = root;
        for level in levels {
            let index = address.0 >> level.shift & ((1 << level.bits) - 1);
            let at = Gpa(table + index * if leaf.wide { 8 } else { 4 });
            let entry = self.read_entry(at, leaf.wide);
            if entry & PRESENT == 0 {
                return Err(0);
            }
            let is_last = level.shift == 12
                || level.may_be_large && entry & LARGE != 0 && (leaf.wide || self.state.cr4 & cr4::PSE != 0);
            if entry & self.reserved(level, is_last, leaf.wide) != 0 {
                return Err(CODE_PRESENT | CODE_RESERVED);
            }
            leaf.rights = (leaf.rights & (entry | !(WRITABLE | USER))) | (entry & NO_EXECUTE);
            leaf.entries[leaf.count] = (at, entry);
            leaf.count += 1;
            if is_last {
                leaf.shift = level.shift;
                leaf.page = if !leaf.wide && level.shift == 22 {
                    // PSE-36: bits 20:13 are address bits 39:32 (SDM vol. 3A, table 4-4).
                    (entry & 0xffc0_0000) | (entry >> 13 & 0xff) << 32
                } else {
                    entry & ADDRESS & !((1 << level.shift) - 1)
                };
                return Ok(());
            }
            table = if leaf.wide { entry & ADDRESS } else { entry & 0xffff_f000 };
        }
        Err(0)
    }

    /// Bits that must be clear in an entry (SDM vol. 3A, 4.5, figure 4-11 and tables).
    fn reserved(&self, level: &Level, is_last: bool, wide: bool) -> u64 {
        if !wide {
            // Two-level: only bit 21 of a 4 MiB entry, with PSE-36 for up to 40 address bits.
            return if is_last && level.shift == 22 { 1 << 21 } else { 0 };
        }
        let mut reserved = (1_u64 << 52) - (1 << self.features.physical_bits);
        if self.state.efer & efer::LMA == 0 {
            reserved |= 0x7ff << 52; // PAE: everything above the address but NX
        }
        if self.state.efer & efer::NXE == 0 {
            reserved |= NO_EXECUTE;
        }
        if level.shift == 39 {
            reserved |= LARGE;
        }
        if level.shift == 30 && !self.features.pages_1g {
            reserved |= LARGE;
        }
        if is_last && level.shift > 12 {
            reserved |= (1 << level.shift) - (1 << 13); // bit 12 is PAT
        }
        reserved
    }

    fn read_entry(&self, at: Gpa, wide: bool) -> u64 {
        // Page tables outside RAM read as nothing present.
        let Some(host) = self.shared.ram.host_page(at) else { return 0 };
        // SAFETY: entries are aligned to their size, so they do not cross the page `host_page` vouches for.
        unsafe { if wide { u64::load(host.as_ptr()) } else { u32::load(host.as_ptr()).zext() } }
    }

    /// Sets the accessed bits of all entries, and the dirty bit of the last for a write. Returns whether it is dirty.
    fn set_used(&mut self, leaf: &Leaf, write: bool) -> bool {
        let mut last_dirty = false;
        for (position, &(at, entry)) in leaf.entries[..leaf.count].iter().enumerate() {
            let last = position + 1 == leaf.count;
            let wanted = if last && write { ACCESSED | DIRTY } else { ACCESSED };
            if entry & wanted != wanted {
                self.or_entry(at, wanted, leaf.wide);
            }
            last_dirty = last && (entry | wanted) & DIRTY != 0;
        }
        last_dirty
    }

    /// Ors bits into a paging-structure entry, atomically against other processors.
    fn or_entry(&mut self, at: Gpa, bits: u64, wide: bool) {
        let Some(host) = self.shared.ram.host_page(at) else { return };
        if wide {
            // SAFETY: as in `read_entry`; every access to guest RAM is by such single accesses.
            unsafe { or_atomic::<u64>(host.as_ptr(), bits) };
        } else {
            // SAFETY: as above.
            unsafe { or_atomic::<u32>(host.as_ptr(), bits) };
        }
        self.shared.ram.note_write(at, 8);
    }

    /// The data mode an access with `rights` uses in the TLB.
    pub(crate) fn data_mode_for(&self, rights: Rights) -> DataMode {
        match rights {
            Rights::Current => self.data_mode(),
            Rights::System if self.watch => DataMode::Slow,
            Rights::System => DataMode::Supervisor,
        }
    }
}

/// # Safety
/// `at` must be valid for reading and writing `W::BYTES` bytes.
unsafe fn or_atomic<W: Width>(at: *mut u8, bits: u64) {
    // SAFETY: by the caller's promise.
    let mut held = unsafe { W::load(at) };
    loop {
        // SAFETY: by the caller's promise.
        let seen = unsafe { held.compare_exchange(W::of(held.zext() | bits), at) };
        if seen == held {
            return;
        }
        held = seen;
    }
}
