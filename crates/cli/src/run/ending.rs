//! How a run ended.

/// What is found when everything is brought to an end.
#[derive(Debug, Default)]
pub(super) struct Ending {
    /// Why the run failed, in sentences.
    pub(super) failures: Vec<String>,
    /// Somebody did not end, and may be in the middle of anything: nobody may wait for it.
    pub(super) is_left: bool,
}

impl Ending {
    pub(super) fn fail(&mut self, why: impl Into<String>) {
        self.failures.push(why.into());
    }

    /// Somebody goes on, for the reason `why`.
    pub(super) fn leave(&mut self, why: impl Into<String>) {
        self.is_left = true;
        self.fail(why);
    }
}
