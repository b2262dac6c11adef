//! Little-endian fields in byte slices, checked: what a kernel's headers say is an allegation.

use super::error::Fault;

/// The `N` bytes at `offset`.
pub(super) fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// A 16-bit field.
pub(super) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    array(bytes, offset).map(u16::from_le_bytes)
}

/// A 32-bit field.
pub(super) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    array(bytes, offset).map(u32::from_le_bytes)
}

/// A 64-bit field.
pub(super) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    array(bytes, offset).map(u64::from_le_bytes)
}

/// Overwrites a field of a structure being built; `offset` is a constant of ours within it.
pub(super) fn put(bytes: &mut [u8], offset: usize, field: &[u8]) {
    bytes[offset..offset + field.len()].copy_from_slice(field);
}

/// Refuses a part that ends beyond a file of `length` bytes.
pub(super) fn within(length: u64, part: &'static str, end: u64) -> Result<(), Fault> {
    if end > length { Err(Fault::Truncated { part, end, length }) } else { Ok(()) }
}

/// The part of `file` at `offset`, or where it should have ended.
pub(super) fn part<'a>(file: &'a [u8], name: &'static str, offset: u64, length: u64) -> Result<&'a [u8], Fault> {
    let end = offset.saturating_add(length);
    within(file.len() as u64, name, end)?;
    Ok(&file[offset as usize..end as usize])
}
