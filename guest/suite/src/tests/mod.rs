//! The tests, a module an area.

mod exceptions;
mod paging;

use crate::tap::Group;

/// Every group, in the order they run.
pub const GROUPS: &[Group] =
    &[Group { name: "exceptions", tests: exceptions::TESTS }, Group { name: "paging", tests: paging::TESTS }];
