//! uffd
