#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvrail::store::fuzzing::lmcache(bytes));
