//! Gives the mock the name by which NVIDIA's libcufile looks for the driver: glibc hands out the
//! library of that name that a process has loaded already.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
}
