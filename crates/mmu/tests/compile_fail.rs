//! The mistakes that reviewers of the kernel look for do not compile.
#![cfg(not(loom))]

#[test]
fn mistakes_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
