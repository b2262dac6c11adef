//! PVH: the 32-bit entry point a "Xen" ELF note names, with a start-info block (xen/include/public/arch-x86/hvm/start_info.h).

use engine::CpuState;
use engine::state::gpr;

use super::error::Fault;
use super::image::{Image, Space};
use super::wire::put;
use super::{Cargo, state};
use crate::layout::{self, Layout};

const START_MAGIC: u32 = 0x336e_c578;
/// Version 1 has the memory map.
const VERSION: u32 = 1;
const INFO_BYTES: usize = 56;
const MODULE_BYTES: usize = 32;
const MAP_ENTRY_BYTES: usize = 24;

/// Puts what a kernel is handed into memory beside it; returns the state to enter it in.
pub(super) fn hand_over(
    space: &mut Space<'_>,
    layout: &Layout,
    image: &Image,
    cargo: &Cargo<'_>,
) -> Result<CpuState, Fault> {
    let low = 0..layout::LOW_MEMORY_END;
    let mut info = [0; INFO_BYTES];
    put(&mut info, 0, &START_MAGIC.to_le_bytes());
    put(&mut info, 4, &VERSION.to_le_bytes());
    put(&mut info, 12, &(cargo.modules.len() as u32).to_le_bytes());
    if !cargo.modules.is_empty() {
        let mut list = vec![0; MODULE_BYTES * cargo.modules.len()];
        for (module, slot) in cargo.modules.iter().zip(list.chunks_exact_mut(MODULE_BYTES)) {
            let (start, name) = (module.place(space, image.extent().end)?, space.string(&module.command_line)?);
            put(slot, 0, &start.to_le_bytes());
            put(slot, 8, &(module.bytes.len() as u64).to_le_bytes());
            put(slot, 16, &name.to_le_bytes());
        }
        let address = space.lowest(list.len() as u64, low.clone(), "the module list")?;
        space.write(address, &list)?;
        put(&mut info, 16, &address.to_le_bytes());
    }
    put(&mut info, 24, &space.string(cargo.command_line)?.to_le_bytes());
    put(&mut info, 32, &layout::RSDP.0.to_le_bytes());

    let mut map = vec![0; MAP_ENTRY_BYTES * layout.memory_map.len()];
    for (entry, slot) in layout.memory_map.iter().zip(map.chunks_exact_mut(MAP_ENTRY_BYTES)) {
        put(slot, 0, &entry.range.start.to_le_bytes());
        put(slot, 8, &(entry.range.end - entry.range.start).to_le_bytes());
        put(slot, 16, &(entry.usage as u32).to_le_bytes());
    }
    let address = space.lowest(map.len() as u64, low.clone(), "the memory map")?;
    space.write(address, &map)?;
    put(&mut info, 40, &address.to_le_bytes());
    put(&mut info, 48, &(layout.memory_map.len() as u32).to_le_bytes());

    let address = space.lowest(INFO_BYTES as u64, low, "the start info")?;
    space.write(address, &info)?;
    let mut state = state::protected(space, image.entry)?;
    state.gpr[gpr::RBX] = address;
    Ok(state)
}
