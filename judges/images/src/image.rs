//! What the machine's memory holds when it starts. Offsets are from where the image is loaded.
//!
//! | offset | what |
//! |---|---|
//! | 0 | the program, `arm64.s` or `riscv.s` |
//! | 0x4000 | the guest's code: 16 bytes for each kind of access |
//! | 0x5000 | parameters, in words: count of records; root register; control register; guest-physical address of the guest's code; address and bytes of the records; address and bytes of the tables |
//! | 0x10000 | records of [`RECORD`] words |
//! | 0x100000 | tables |
//! | 0x200000 | frames behind the leaves |
//!
//! | word of a record | |
//! |---|---|
//! | 0, 1 | guest-physical address; kind of access |
//! | 2, 9 | physical address that is looked at afterwards; what is put there then |
//! | 3 | what a write writes |
//! | 4, 5, 6 | written by the program: syndrome, guest-physical address, address |
//! | 7, 8 | the guest's register; what is at the physical address |

use afterimage_mmu::Pfn;

/// Words of a record.
pub(crate) const RECORD: usize = 10;
pub(crate) const GUEST_CODE: u64 = 0x4000;
const PARAMETERS: usize = 0x5000;
pub(crate) const RECORDS: u64 = 0x1_0000;
pub(crate) const TABLES: u64 = 0x10_0000;
/// Pages for tables.
pub(crate) const TABLE_PAGES: usize = 256;
pub(crate) const FRAMES: u64 = 0x20_0000;
/// Bytes of the whole: the frames are one page of 2 MiB.
pub(crate) const BYTES: usize = 0x40_0000;

/// An image that is being made.
#[derive(Debug)]
pub(crate) struct Image {
    /// Where it is loaded; a multiple of 4 MiB.
    pub(crate) base: u64,
    pub(crate) bytes: Vec<u8>,
}

impl Image {
    /// Nothing but the program.
    pub(crate) fn new(base: u64, program: &[u8]) -> Self {
        let mut bytes = program.to_vec();
        bytes.resize(BYTES, 0);
        Self { base, bytes }
    }

    pub(crate) fn put(&mut self, offset: u64, words: impl IntoIterator<Item = u64>) {
        let at = offset as usize;
        for (index, word) in words.into_iter().enumerate() {
            self.bytes[at + 8 * index..][..8].copy_from_slice(&word.to_le_bytes());
        }
    }

    pub(crate) fn put_parameters(&mut self, parameters: [u64; 8]) {
        self.put(PARAMETERS as u64, parameters);
    }

    /// The frame at an offset.
    pub(crate) fn pfn(&self, offset: u64) -> Pfn {
        Pfn::new((self.base + offset) >> 12)
    }
}
