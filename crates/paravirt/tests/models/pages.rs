//! The version protocol: a reader never sees half of two bodies, and time never goes back across a change of the scale.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::thread;

use crate::reader;
use crate::seqlock::{self, Versioned};

/// A page of two words that belong together.
struct Page {
    version: AtomicU32,
    body: [AtomicU64; 2],
}

impl Versioned for Page {
    fn version(&self) -> u32 {
        self.version.load(Ordering::Relaxed)
    }

    fn set_version(&self, version: u32) {
        self.version.store(version, Ordering::Relaxed);
    }
}

impl Page {
    fn new(body: [u64; 2]) -> Self {
        Self { version: AtomicU32::new(0), body: body.map(AtomicU64::new) }
    }

    fn set(&self, body: [u64; 2]) {
        for (word, value) in self.body.iter().zip(body) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// The guest's reader: `between` is read while the body is.
    fn read<R>(&self, between: impl FnOnce() -> R) -> Option<([u64; 2], R)> {
        let body = || {
            let body = [0, 1].map(|index: usize| self.body[index].load(Ordering::Relaxed));
            let also = between();
            // LFENCE behind RDTSC: the counter has been read when the version is. The writer's half is the fence in `begin`.
            fence(Ordering::SeqCst);
            (body, also)
        };
        reader::read(|| self.version(), body)
    }
}

fn write_while_read(write: fn(&Page)) {
    let page = Arc::new(Page::new([1, 1]));
    let writer = thread::spawn({
        let page = Arc::clone(&page);
        move || write(&page)
    });
    if let Some((body, ())) = page.read(|| ()) {
        assert_eq!(body[0], body[1], "half of each");
    }
    writer.join().unwrap();
    assert_eq!(page.read(|| ()).map(|read| read.0), Some([2, 2]), "a quiet page can be read");
}

#[test]
fn a_reader_never_sees_half_of_two_bodies() {
    loom::model(|| {
        write_while_read(|page| {
            let odd = seqlock::begin(page);
            page.set([2, 2]);
            seqlock::end(page, odd);
        });
    });
}

#[test]
fn a_writer_that_does_not_make_the_version_odd_is_caught() {
    assert!(crate::fails(|| {
        write_while_read(|page| {
            page.set([2, 2]); // the mutation: before begin
            let odd = seqlock::begin(page);
            seqlock::end(page, odd);
        });
    }));
}

/// The rate falls to a tenth while two vCPUs read: `[start, rate]` in a page each, the counter moves with each look.
fn rescale_while_read(choose: fn(&[Page; 2], &AtomicU64)) {
    let pages = Arc::new([Page::new([0, 10]), Page::new([0, 10])]);
    let counter = Arc::new(AtomicU64::new(10));
    let writer = thread::spawn({
        let (pages, counter) = (Arc::clone(&pages), Arc::clone(&counter));
        move || choose(&pages, &counter)
    });
    let time = |page: &Page| {
        let ([start, rate], counter) = page.read(|| counter.fetch_add(10, Ordering::AcqRel) + 10)?;
        Some(if rate == 10 { counter * 10 } else { start * 10 + (counter - start) })
    };
    // One vCPU after the other, as a thread that moves between them.
    let first = time(&pages[0]);
    let second = time(&pages[1]);
    if let (Some(first), Some(second)) = (first, second) {
        assert!(second >= first, "{second} after {first}");
    }
    writer.join().unwrap();
}

fn write_new(page: &Page, odd: u32, start: u64) {
    page.set([start, 1]);
    seqlock::end(page, odd);
}

#[test]
fn time_does_not_go_back_across_a_change_of_the_scale() {
    loom::model(|| {
        rescale_while_read(|pages, counter| {
            let odd = [0, 1].map(|index: usize| seqlock::begin(&pages[index]));
            let start = counter.load(Ordering::Acquire);
            (0..2).for_each(|index: usize| write_new(&pages[index], odd[index], start));
        });
    });
}

#[test]
fn choosing_the_moment_before_all_pages_are_marked_is_caught() {
    assert!(crate::fails(|| {
        rescale_while_read(|pages, counter| {
            let start = counter.load(Ordering::Acquire); // the mutation: a reader may be later with the old rate
            let odd = [0, 1].map(|index: usize| seqlock::begin(&pages[index]));
            (0..2).for_each(|index: usize| write_new(&pages[index], odd[index], start));
        });
    }));
}
