//! Buffers for one page and for the store, kept by each thread between uses.

use std::cell::Cell;

use crate::store::Scratch;

/// A page's bytes on their way, and what the store needs to pack and unpack them.
#[derive(Debug)]
pub(crate) struct Buffer {
    inner: Option<Box<Inner>>,
}

#[derive(Debug)]
struct Inner {
    page: Vec<u8>,
    scratch: Scratch,
}

thread_local! {
    static KEPT: Cell<Option<Box<Inner>>> = const { Cell::new(None) };
}

impl Buffer {
    /// The thread's buffer, or a new one if that is in use; for a page of `bytes` bytes.
    pub(crate) fn take(bytes: u64) -> Self {
        let mut inner =
            KEPT.take().unwrap_or_else(|| Box::new(Inner { page: Vec::new(), scratch: Scratch::new() }));
        inner.page.resize(bytes as usize, 0);
        Self { inner: Some(inner) }
    }

    /// The page's bytes, and the store's buffers.
    pub(crate) fn parts(&mut self) -> (&mut [u8], &mut Scratch) {
        let inner = self.inner.as_mut().expect("the buffer is there until it is dropped");
        (&mut inner.page, &mut inner.scratch)
    }

    /// The page's bytes.
    pub(crate) fn page(&self) -> &[u8] {
        &self.inner.as_ref().expect("the buffer is there until it is dropped").page
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // At the end of a thread there is nowhere to keep it.
        let _ = KEPT.try_with(|kept| kept.set(self.inner.take()));
    }
}
