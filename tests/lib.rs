//! End-to-end tests of the `cordial` program.
