//! The program is linked for a bare machine: by its own script, at fixed addresses, with nothing beside it.

fn main() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/image.ld");
    println!("cargo:rerun-if-changed={script}");
    for argument in
        ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-n", "-T", script]
    {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
