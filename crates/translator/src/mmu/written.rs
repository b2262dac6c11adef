//! Under which linear addresses a vCPU may hold write entries for each page of RAM: what has to be forgotten when a page
//! turns out to hold code.

use memory::Gpa;

/// What is known about one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// It has no write entry.
    Nowhere,
    /// At most under this address, in whatever address spaces.
    At(u64),
    /// Under several.
    Anywhere,
}

const SEVERAL: u64 = 1;
const ONE: u64 = 2;

/// One vCPU's notes, by guest-physical page.
pub(crate) struct Written {
    pages: Vec<u64>,
}

impl Written {
    /// Notes for RAM that ends below `end`. Costs memory as pages are noted.
    pub(crate) fn new(end: Gpa) -> Self {
        Self { pages: vec![0; (end.0 >> 12) as usize + 1] }
    }

    /// A write entry for `gpa` at linear address `address` is about to be made.
    pub(crate) fn note(&mut self, gpa: Gpa, address: u64) {
        let Some(page) = self.pages.get_mut((gpa.0 >> 12) as usize) else { return };
        let here = address & !0xfff | ONE;
        *page = match *page {
            0 => here,
            known if known == here => here,
            _ => SEVERAL,
        };
    }

    /// Where `gpa` may have write entries; they are taken to be gone after this.
    pub(crate) fn take(&mut self, gpa: Gpa) -> Where {
        let Some(page) = self.pages.get_mut((gpa.0 >> 12) as usize) else { return Where::Anywhere };
        match std::mem::take(page) {
            0 => Where::Nowhere,
            SEVERAL => Where::Anywhere,
            known => Where::At(known & !0xfff),
        }
    }

    /// No page has a write entry any more.
    pub(crate) fn clear(&mut self) {
        self.pages = vec![0; self.pages.len()];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_is_remembered_and_two_are_anywhere() {
        let mut written = Written::new(Gpa(0x10_0000));
        assert_eq!(written.take(Gpa(0x5000)), Where::Nowhere);
        written.note(Gpa(0x5000), 0xffff_8880_0000_5123);
        written.note(Gpa(0x5fff), 0xffff_8880_0000_5000);
        assert_eq!(written.take(Gpa(0x5000)), Where::At(0xffff_8880_0000_5000));
        assert_eq!(written.take(Gpa(0x5000)), Where::Nowhere);
        written.note(Gpa(0x5000), 0x1000);
        written.note(Gpa(0x5000), 0x2000);
        assert_eq!(written.take(Gpa(0x5000)), Where::Anywhere);
        assert_eq!(written.take(Gpa(1 << 40)), Where::Anywhere, "what is not known may be anything");
    }
}
