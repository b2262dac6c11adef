//! Loads, stores and read-modify-writes of guest memory.
//!
//! The fast path is one TLB probe and one machine access. Everything else (misses, page crossings, pages that hold code,
//! devices, breakpoints, alignment checks) goes through [`Cpu::locate`]. Faults come before any side effect: a store
//! that crosses into a page it may not write leaves the first page alone.

use engine::Phase;
use engine::state::{cr0, rflags, seg};
use memory::{Gpa, Gva};

use crate::cpu::{Cpu, vector};
use crate::mmu::walk::Translation;
use crate::mmu::{Access, DataMode, Fill, Rights, canonical};
use crate::op::{Done, LOCK, Leave, Mem, Op};
use crate::width::Width;

/// Where an access that missed the fast path goes.
enum Place {
    /// RAM within a page; `code` where the page holds code and a write must be noted.
    Ram { host: *mut u8, gpa: Gpa, code: bool },
    /// Memory that the guest can only read; a store is the machine's.
    ReadOnly { host: *const u8, gpa: Gpa },
    /// A device.
    Device(Gpa),
    /// Two pages, each with its own translation; `first` bytes lie in the first.
    Split { low: Translation, high: Translation, first: u64 },
}

/// What an access that missed the fast path does.
enum Transfer<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl<'a> Transfer<'a> {
    fn split_at(self, first: usize) -> (Transfer<'a>, Transfer<'a>) {
        match self {
            Self::Read(buffer) => {
                let (head, tail) = buffer.split_at_mut(first);
                (Self::Read(head), Self::Read(tail))
            }
            Self::Write(data) => {
                let (head, tail) = data.split_at(first);
                (Self::Write(head), Self::Write(tail))
            }
        }
    }
}

impl Cpu {
    /// Loads an operand.
    #[inline(always)]
    pub(crate) fn load<W: Width>(&mut self, mem: &Mem) -> Result<W, Leave> {
        let address = self.linear(mem, W::BYTES as u64, Access::Read)?;
        self.read_linear(address, mem.segment, Rights::Current)
    }

    /// Stores an operand.
    #[inline(always)]
    pub(crate) fn store<W: Width>(&mut self, mem: &Mem, value: W) -> Done {
        let address = self.linear(mem, W::BYTES as u64, Access::Write)?;
        self.write_linear(address, value, mem.segment, Rights::Current)
    }

    /// Loads from a linear address. `segment` only decides between #SS and #GP for a non-canonical one.
    #[inline(always)]
    pub(crate) fn read_linear<W: Width>(&mut self, address: u64, segment: u8, rights: Rights) -> Result<W, Leave> {
        let mode = self.data_mode_for(rights);
        if let Some(host) = self.tlb.lookup_read(mode, address, W::BYTES as u64) {
            // SAFETY: the TLB vouches for the page, the probe for its end.
            return Ok(unsafe { W::load(host) });
        }
        self.read_slow(address, W::BYTES as u64, segment, rights).map(W::of)
    }

    /// Stores to a linear address.
    #[inline(always)]
    pub(crate) fn write_linear<W: Width>(&mut self, address: u64, value: W, segment: u8, rights: Rights) -> Done {
        let mode = self.data_mode_for(rights);
        if let Some(host) = self.tlb.lookup_write(mode, address, W::BYTES as u64) {
            // SAFETY: the TLB vouches for the page, the probe for its end; pages that hold code are not in it.
            unsafe { value.store(host) };
            return Ok(());
        }
        self.write_slow(address, &value.zext().to_le_bytes()[..W::BYTES], segment, rights)
    }

    /// Reads an operand and replaces it by `change` of it; atomically with a LOCK prefix. `change` may run more than once.
    /// Returns the old and the new value. The access counts as a write from the start, as the processor has it.
    #[inline(always)]
    pub(crate) fn modify<W: Width>(&mut self, op: &Op, change: impl Fn(W) -> W) -> Result<(W, W), Leave> {
        let address = self.linear(&op.mem, W::BYTES as u64, Access::Write)?;
        let locked = op.prefixes & LOCK != 0;
        self.modify_linear(address, op.mem.segment, locked, change)
    }

    /// [`Cpu::modify`] at a linear address.
    #[inline(always)]
    pub(crate) fn modify_linear<W: Width>(
        &mut self,
        address: u64,
        segment: u8,
        locked: bool,
        change: impl Fn(W) -> W,
    ) -> Result<(W, W), Leave> {
        if let Some(host) = self.tlb.lookup_write(self.data_mode(), address, W::BYTES as u64) {
            // SAFETY: as in `write_linear`.
            return Ok(unsafe { modify_at(host, locked, change) });
        }
        self.modify_slow(address, segment, locked, change)
    }

    #[cold]
    fn modify_slow<W: Width>(
        &mut self,
        address: u64,
        segment: u8,
        locked: bool,
        change: impl Fn(W) -> W,
    ) -> Result<(W, W), Leave> {
        let bytes = W::BYTES as u64;
        match self.locate(address, bytes, Access::Write, segment, Rights::Current)? {
            Place::Ram { host, gpa, code } => {
                self.note_store(gpa, bytes);
                // SAFETY: `locate` vouches for `bytes` at `host`.
                let values = unsafe { modify_at(host, locked, change) };
                if code {
                    self.note_code_write(gpa, bytes);
                }
                Ok(values)
            }
            place => {
                // Two pages, or a device: no host instruction does this in one piece, so locked ones exclude each other.
                let shared = std::sync::Arc::clone(&self.shared);
                let guard = locked.then(|| shared.split_lock.lock());
                let mut buffer = [0; 8];
                self.transfer(&place, Transfer::Read(&mut buffer[..W::BYTES]));
                let old = W::of(u64::from_le_bytes(buffer));
                let new = change(old);
                self.transfer(&place, Transfer::Write(&new.zext().to_le_bytes()[..W::BYTES]));
                drop(guard);
                Ok((old, new))
            }
        }
    }

    #[cold]
    fn read_slow(&mut self, address: u64, bytes: u64, segment: u8, rights: Rights) -> Result<u64, Leave> {
        let mut buffer = [0; 8];
        self.read_bytes_slow(address, &mut buffer[..bytes as usize], segment, rights)?;
        Ok(u64::from_le_bytes(buffer))
    }

    #[cold]
    fn read_bytes_slow(&mut self, address: u64, buffer: &mut [u8], segment: u8, rights: Rights) -> Done {
        if self.read_across(address, buffer, rights).is_some() {
            return Ok(());
        }
        let place = self.locate(address, buffer.len() as u64, Access::Read, segment, rights)?;
        self.transfer(&place, Transfer::Read(buffer));
        Ok(())
    }

    /// A read across two pages, both of which have entries.
    fn read_across(&self, address: u64, buffer: &mut [u8], rights: Rights) -> Option<()> {
        let (first, mode) = (0x1000 - address % 0x1000, self.data_mode_for(rights));
        if !self.mode.long || first >= buffer.len() as u64 {
            return None;
        }
        let (low, high) = buffer.split_at_mut(first as usize);
        let low_host = self.tlb.lookup_read(mode, address, first)?;
        let high_host = self.tlb.lookup_read(mode, address.wrapping_add(first), high.len() as u64)?;
        // SAFETY: the soft TLB vouches for that many bytes at each.
        unsafe {
            copy_from(low_host, low);
            copy_from(high_host, high);
        }
        Some(())
    }

    /// The same for a write.
    fn write_across(&self, address: u64, data: &[u8], rights: Rights) -> Option<()> {
        let (first, mode) = (0x1000 - address % 0x1000, self.data_mode_for(rights));
        if !self.mode.long || first >= data.len() as u64 {
            return None;
        }
        let (low, high) = data.split_at(first as usize);
        let low_host = self.tlb.lookup_write(mode, address, first)?;
        let high_host = self.tlb.lookup_write(mode, address.wrapping_add(first), high.len() as u64)?;
        // SAFETY: as above.
        unsafe {
            copy_to(low_host, low);
            copy_to(high_host, high);
        }
        Some(())
    }

    #[cold]
    fn write_slow(&mut self, address: u64, data: &[u8], segment: u8, rights: Rights) -> Done {
        if self.write_across(address, data, rights).is_some() {
            return Ok(());
        }
        let place = self.locate(address, data.len() as u64, Access::Write, segment, rights)?;
        self.transfer(&place, Transfer::Write(data));
        Ok(())
    }

    #[cold]
    fn probe_slow(&mut self, address: u64, bytes: u64, segment: u8, rights: Rights) -> Done {
        self.locate(address, bytes, Access::Write, segment, rights).map(|_| ())
    }

    /// Reads up to a page of bytes at a linear address (vector operands, state areas). One access for up to 8 bytes only.
    #[inline(always)]
    pub(crate) fn read_bytes(&mut self, address: u64, buffer: &mut [u8], segment: u8, rights: Rights) -> Done {
        match self.direct(address, buffer.len() as u64, Access::Read, rights) {
            Some(host) => {
                // SAFETY: `direct` vouches for that many bytes at `host`, which are the guest's and not `buffer`.
                unsafe { copy_from(host, buffer) };
                Ok(())
            }
            None => self.read_bytes_slow(address, buffer, segment, rights),
        }
    }

    /// Writes up to a page of bytes at a linear address; all of them or, with a fault, none.
    #[inline(always)]
    pub(crate) fn write_bytes(&mut self, address: u64, data: &[u8], segment: u8, rights: Rights) -> Done {
        match self.direct(address, data.len() as u64, Access::Write, rights) {
            Some(host) => {
                // SAFETY: as in `read_bytes`; pages that hold code are not found directly.
                unsafe { copy_to(host, data) };
                Ok(())
            }
            None => self.write_slow(address, data, segment, rights),
        }
    }

    /// Checks that `bytes` (up to a page) at a linear address may be written, without writing.
    #[inline(always)]
    pub(crate) fn probe_write(&mut self, address: u64, bytes: u64, segment: u8, rights: Rights) -> Done {
        match self.direct(address, bytes, Access::Write, rights) {
            Some(_) => Ok(()),
            None => self.probe_slow(address, bytes, segment, rights),
        }
    }

    /// The host address of `bytes` (up to a page) at a linear address where no check is left to make.
    #[inline(always)]
    pub(crate) fn direct(&self, address: u64, bytes: u64, access: Access, rights: Rights) -> Option<*mut u8> {
        let mode = self.data_mode_for(rights);
        match access {
            Access::Write => self.tlb.lookup_write(mode, address, bytes),
            _ => self.tlb.lookup_read(mode, address, bytes),
        }
    }

    /// The host address of as many of `bytes` at `address` as lie in its page and need no care, for bulk operations (REP
    /// MOVS and STOS). `None`: take the ordinary way, one element at a time.
    pub(crate) fn bulk(&self, address: u64, bytes: u64, access: Access) -> Option<(*mut u8, u64)> {
        let here = bytes.min(0x1000 - (address & 0xfff));
        self.direct(address, here, access, Rights::Current).map(|host| (host, here))
    }

    /// Finds out where an access of 1..=4096 bytes goes, checking all of it and filling the TLB.
    fn locate(
        &mut self,
        address: u64,
        bytes: u64,
        access: Access,
        segment: u8,
        rights: Rights,
    ) -> Result<Place, Leave> {
        let last = address.wrapping_add(bytes - 1);
        let (address, last) = if self.mode.long {
            if !canonical(address) || !canonical(last) {
                return Err(self.segment_fault(segment as usize));
            }
            (address, last)
        } else {
            (address & 0xffff_ffff, last & 0xffff_ffff)
        };
        self.check_alignment(address, bytes, rights)?;
        let place = if (address ^ last) & !0xfff == 0 {
            let before = self.config.ledger.profile.begin(Phase::TlbFill);
            let found = self.translate(Gva(address), access, rights);
            if let Ok(translation) = &found {
                self.fill(address, access, rights, translation);
            }
            self.config.ledger.profile.back(before);
            self.place(&found?)
        } else {
            let low = self.translate(Gva(address), access, rights)?;
            let high = self.translate(Gva(last & !0xfff), access, rights)?;
            self.fill(address, access, rights, &low);
            self.fill(last & !0xfff, access, rights, &high);
            Place::Split { low, high, first: 0x1000 - (address & 0xfff) }
        };
        if self.rehearsal.is_some() && self.is_for_good(&place, access) {
            return Err(Leave::Raised);
        }
        if self.watch {
            self.check_data_breakpoints(address, bytes, access);
        }
        Ok(place)
    }

    /// True for an access that cannot be taken back: of a device, or a write to a page that holds code.
    fn is_for_good(&self, place: &Place, access: Access) -> bool {
        match place {
            Place::Device(_) => true,
            // What the host writes there may differ the next time.
            Place::ReadOnly { .. } => true,
            Place::Ram { code, .. } => *code && access == Access::Write,
            Place::Split { low, high, .. } => {
                [low, high].into_iter().any(|half| self.is_for_good(&self.place(half), access))
            }
        }
    }

    fn place(&self, translation: &Translation) -> Place {
        match self.shared.ram.region(translation.gpa) {
            Some(region) => {
                let offset = translation.gpa.0 - region.start.0;
                // SAFETY: `region` found the address inside its mapping.
                let host = unsafe { region.host_base().as_ptr().add(offset as usize) };
                Place::Ram { host, gpa: translation.gpa, code: region.code().holds_code(offset) }
            }
            None => match self.read_only(translation.gpa) {
                Some(host) => Place::ReadOnly { host, gpa: translation.gpa },
                None => Place::Device(translation.gpa),
            },
        }
    }

    /// The host address of a byte that the guest can only read, good up to the end of its page.
    fn read_only(&self, gpa: Gpa) -> Option<*const u8> {
        let host = self.shared.ram.read_only()?.host_page(gpa)?;
        Some(host.as_ptr())
    }

    /// #AC(0): CR0.AM, RFLAGS.AC and CPL 3 (SDM vol. 3A, 6.15). Operands of 32 bytes need 16 (AMD Zen);
    /// larger operands have their own rules.
    fn check_alignment(&mut self, address: u64, bytes: u64, rights: Rights) -> Done {
        let on = self.mode.cpl == 3
            && rights == Rights::Current
            && self.state.cr0 & cr0::AM != 0
            && self.state.rflags & rflags::AC != 0;
        if on && matches!(bytes, 2 | 4 | 8 | 16 | 32) && !address.is_multiple_of(bytes.min(16)) {
            return Err(self.raise_code(vector::AC, 0));
        }
        Ok(())
    }

    /// Puts a translation into the TLB where no later access through it needs a check.
    fn fill(&mut self, address: u64, access: Access, rights: Rights, translation: &Translation) {
        let mode = self.data_mode_for(rights);
        if mode == DataMode::Slow || self.rehearsal.is_some() {
            return;
        }
        let Some(region) = self.shared.ram.region(translation.gpa) else {
            return self.fill_read_only(mode, address, access, translation);
        };
        let offset = translation.gpa.0 - region.start.0;
        region.note_use(offset);
        let addend = |base: std::ptr::NonNull<u8>| (base.as_ptr() as u64).wrapping_add(offset).wrapping_sub(address);
        // A write-only page does not exist: what may be written may be read. Pages that hold code are written to with
        // care only.
        let readable = access == Access::Read || translation.writable_now;
        let writable = translation.writable_now && region.code().admit_writer(offset, self.config.id.0);
        let window = (mode == DataMode::User && !translation.executable && !translation.global)
            .then(|| self.window.holds(address, translation.gpa))
            .flatten();
        let base = if translation.executable { region.alias_base() } else { region.host_base() };
        let fill = Fill {
            address,
            read: readable.then(|| addend(base)),
            write: writable.then(|| addend(region.host_base())),
            window,
            global: translation.global,
        };
        if let Some(bytes) = translation.large {
            self.tlb.note_large(address, bytes);
        }
        if writable {
            self.written.note(translation.gpa, address);
        }
        self.tlb.fill(mode, fill);
        self.config.ledger.work(engine::ledger::Work::TlbFill, 1);
    }

    /// The same for what is not RAM: memory that the guest can only read has entries for reads.
    fn fill_read_only(&mut self, mode: DataMode, address: u64, access: Access, translation: &Translation) {
        match self.read_only(translation.gpa) {
            Some(host) if access == Access::Read => {
                let read = Some((host as u64).wrapping_sub(address));
                self.tlb.fill(mode, Fill { address, read, write: None, window: None, global: translation.global });
                self.config.ledger.work(engine::ledger::Work::TlbFill, 1);
            }
            _ => self.tlb.missed(mode),
        }
    }

    /// Resolves a miss of translated code. False where the interpreter has to make the access: a device, a page that holds
    /// code, breakpoints.
    pub(crate) fn resolve_miss(&mut self, address: u64, access: Access) -> Result<bool, Leave> {
        // How long it is, is not known here: what may end beyond is for the interpreter to judge.
        if !canonical(address) || !canonical(address.wrapping_add(63)) {
            return Ok(false);
        }
        let mode = self.data_mode();
        let translation =
            self.translate(Gva(address), access, Rights::Current).inspect_err(|_| self.tlb.missed(mode))?;
        self.fill(address, access, Rights::Current, &translation);
        let hit = match access {
            Access::Write => self.tlb.lookup_write(mode, address, 1),
            _ => self.tlb.lookup_read(mode, address, 1),
        };
        Ok(hit.is_some())
    }

    /// Makes a read entry of a page of code, where the page may be read.
    pub(crate) fn vouch_for_code(&mut self, linear: u64) {
        if self.tlb.lookup_read(self.data_mode(), linear, 1).is_none() {
            let before = self.exception;
            match self.translate(Gva(linear), Access::Read, Rights::Current) {
                Ok(translation) => self.fill(linear, Access::Read, Rights::Current, &translation),
                Err(_) => self.exception = before,
            }
        }
    }

    /// Does an access of as many bytes as `place` was found for.
    fn transfer(&mut self, place: &Place, transfer: Transfer<'_>) {
        match place {
            Place::Ram { host, gpa, code } => match transfer {
                // SAFETY: `locate` vouches for the whole access.
                Transfer::Read(buffer) => unsafe { copy_from(*host, buffer) },
                Transfer::Write(data) => {
                    self.note_store(*gpa, data.len() as u64);
                    // SAFETY: as above.
                    unsafe { copy_to(*host, data) };
                    if *code {
                        self.note_code_write(*gpa, data.len() as u64);
                    }
                }
            },
            Place::ReadOnly { host, gpa } => match transfer {
                // SAFETY: `locate` vouches for the whole access.
                Transfer::Read(buffer) => unsafe { copy_from(*host, buffer) },
                Transfer::Write(data) => {
                    self.io().mmio_write(*gpa, data);
                    self.after_device();
                }
            },
            Place::Device(gpa) => {
                match transfer {
                    Transfer::Read(buffer) => self.io().mmio_read(*gpa, buffer),
                    Transfer::Write(data) => self.io().mmio_write(*gpa, data),
                }
                self.after_device();
            }
            Place::Split { low, high, first } => {
                let (head, tail) = transfer.split_at(*first as usize);
                let (low, high) = (self.place(low), self.place(high));
                self.transfer(&low, head);
                self.transfer(&high, tail);
            }
        }
    }

    /// Notes a write that did not go through a write entry.
    pub(crate) fn note_code_write(&mut self, gpa: Gpa, bytes: u64) {
        if self.shared.ram.note_write(gpa, bytes) {
            // It may have been this very block.
            self.recheck = true;
            self.stale.push(gpa);
            self.code_writes += 1;
            self.tell_others(gpa);
        }
    }

    /// Records hits of DR0..DR3 data breakpoints (SDM vol. 3B, 17.2.4); they trap after the instruction.
    fn check_data_breakpoints(&mut self, address: u64, bytes: u64, access: Access) {
        for number in 0..4 {
            let control = self.state.dr7 >> (16 + number * 4) & 15;
            let enabled = self.state.dr7 >> (number * 2) & 3 != 0;
            let watches = match control & 3 {
                1 => access == Access::Write,
                3 => access != Access::Execute,
                _ => false,
            };
            let length = [1, 2, 8, 4][(control >> 2) as usize];
            let start = self.state.dr[number as usize] & !(length - 1);
            if enabled && watches && address < start.wrapping_add(length) && start < address.wrapping_add(bytes) {
                self.pending_debug |= 1 << number;
                self.recheck = true;
            }
        }
    }

    /// Pushes a value of width `W`; RSP moves only when the store has happened.
    #[inline(always)]
    pub(crate) fn push<W: Width>(&mut self, value: W) -> Done {
        let pointer = self.state.gpr[4].wrapping_sub(W::BYTES as u64);
        let address = self.stack_linear(pointer, W::BYTES as u64, Access::Write)?;
        self.write_linear(address, value, seg::SS as u8, Rights::Current)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// Pops a value of width `W`.
    #[inline(always)]
    pub(crate) fn pop<W: Width>(&mut self) -> Result<W, Leave> {
        let pointer = self.state.gpr[4];
        let address = self.stack_linear(pointer, W::BYTES as u64, Access::Read)?;
        let value = self.read_linear(address, seg::SS as u8, Rights::Current)?;
        self.set_stack_pointer(pointer.wrapping_add(W::BYTES as u64));
        Ok(value)
    }

    /// Writes RSP, ESP or SP, whichever the stack segment says. A 32-bit stack clears the upper half.
    #[inline(always)]
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        if self.mode.stack == 3 {
            self.state.gpr[4] = value;
        } else {
            self.set_gpr(4, self.mode.stack, value);
        }
    }
}

/// # Safety
/// `W::BYTES` bytes at `host` must be readable and writable.
#[inline(always)]
unsafe fn modify_at<W: Width>(host: *mut u8, locked: bool, change: impl Fn(W) -> W) -> (W, W) {
    // SAFETY: by the caller's promise, for every access below.
    unsafe {
        let mut old = W::load(host);
        if !locked {
            let new = change(old);
            new.store(host);
            return (old, new);
        }
        loop {
            let new = change(old);
            let seen = old.compare_exchange(new, host);
            if seen == old {
                return (old, new);
            }
            old = seen;
        }
    }
}

/// Copies out of guest memory: one access for 1, 2, 4 and 8 bytes, as the guest would see it.
///
/// # Safety
/// `buffer.len()` bytes at `host` must be readable.
#[inline(always)]
unsafe fn copy_from(host: *const u8, buffer: &mut [u8]) {
    // SAFETY: by the caller's promise.
    unsafe {
        match buffer.len() {
            2 => buffer.copy_from_slice(&u16::load(host).to_le_bytes()),
            4 => buffer.copy_from_slice(&u32::load(host).to_le_bytes()),
            8 => buffer.copy_from_slice(&u64::load(host).to_le_bytes()),
            length => std::ptr::copy_nonoverlapping(host, buffer.as_mut_ptr(), length),
        }
    }
}

/// # Safety
/// `data.len()` bytes at `host` must be writable.
#[inline(always)]
unsafe fn copy_to(host: *mut u8, data: &[u8]) {
    // SAFETY: by the caller's promise; the conversions cannot fail for these lengths.
    unsafe {
        match *data {
            [a, b] => u16::from_le_bytes([a, b]).store(host),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).store(host),
            [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]).store(host),
            _ => std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()),
        }
    }
}
