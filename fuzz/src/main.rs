//! Fuzz targets of lance-artifact over libFuzzer: one program, because each one links all of Lance.
//!
//! `fuzz TARGET [libFuzzer's options] [CORPUS...]`; `fuzz --list` names the targets. `scripts/fuzz` builds it with the library
//! instrumented and runs it. A target drives the library's public functions and aborts at what must not be: a panic of the library's own
//! code (caught or not), memory beyond a cap, an error that is none of its typed ones, a wrong answer, a file outside the artifact opened.

#![recursion_limit = "512"]

use std::ffi::{CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

// Linked for libFuzzer's C++.
use libfuzzer_sys as _;

mod bases;
mod check;
mod input;
mod json;
mod lance_file;
mod limits;
mod place;
mod targets;
mod wire;

use targets::{TARGETS, Target};

unsafe extern "C" {
    fn LLVMFuzzerRunDriver(argc: *mut c_int, argv: *mut *mut *mut c_char, run: extern "C" fn(*const u8, usize) -> c_int) -> c_int;
    fn LLVMFuzzerMutate(data: *mut u8, size: usize, most: usize) -> usize;
}

/// The one that runs, and how its inputs are changed.
struct Chosen {
    target: Mutex<Box<dyn Target>>,
    is_json: bool,
}

static CHOSEN: OnceLock<Chosen> = OnceLock::new();

/// The input at `data`.
///
/// # Safety
/// libFuzzer's: `size` bytes at `data` may be read until the call that got them ends.
unsafe fn bytes<'a>(data: *const u8, size: usize) -> &'a [u8] {
    if size == 0 {
        return &[];
    }
    // SAFETY: as the caller's.
    unsafe { std::slice::from_raw_parts(data, size) }
}

extern "C" fn run(data: *const u8, size: usize) -> c_int {
    // SAFETY: libFuzzer calls this with an input of its own.
    let input = unsafe { bytes(data, size) };
    let Some(chosen) = CHOSEN.get() else { return 0 };
    let mut target = chosen.target.lock().unwrap_or_else(PoisonError::into_inner);
    if catch_unwind(AssertUnwindSafe(|| target.run(input))).is_err() {
        // A panic of a dependency that nobody caught.
        eprintln!("fuzz: a panic reached the caller");
        std::process::abort();
    }
    0
}

/// libFuzzer's own changes, and for JSON also such that leave it JSON.
#[unsafe(no_mangle)]
extern "C" fn LLVMFuzzerCustomMutator(data: *mut u8, size: usize, most: usize, seed: u32) -> usize {
    if CHOSEN.get().is_some_and(|chosen| chosen.is_json) && !seed.is_multiple_of(4) {
        // SAFETY: libFuzzer gives an input of `size` bytes in a block of `most`.
        let changed = json::mutated(unsafe { bytes(data, size) }, seed);
        if let Some(changed) = changed.filter(|changed| changed.len() <= most) {
            // SAFETY: the block is of `most` bytes, and nobody else's while this runs.
            unsafe { std::slice::from_raw_parts_mut(data, changed.len()) }.copy_from_slice(&changed);
            return changed.len();
        }
    }
    // SAFETY: the block is libFuzzer's own.
    unsafe { LLVMFuzzerMutate(data, size, most) }
}

fn main() {
    let mut arguments: Vec<String> = std::env::args().collect();
    let name = arguments.get(1).cloned().unwrap_or_default();
    if name == "--list" {
        TARGETS.iter().filter(|target| !target.is_planted).for_each(|target| println!("{}", target.name));
        return;
    }
    let mut found = TARGETS.iter().find(|target| target.name == name);
    if found.is_some() {
        arguments.remove(1);
    } else if let Ok(name) = std::env::var("FUZZ_TARGET") {
        // libFuzzer starts itself anew to merge inputs, with the arguments that it was given.
        found = TARGETS.iter().find(|target| target.name == name);
    }
    let Some(entry) = found else {
        eprintln!("fuzz: {name:?} is no target; fuzz --list names them");
        std::process::exit(2);
    };
    let chosen = Chosen { target: Mutex::new((entry.make)()), is_json: entry.is_json };
    if CHOSEN.set(chosen).is_err() {
        std::process::exit(2);
    }
    // What a target needs was made; from here on a panic is a find.
    limits::install();
    let arguments: Vec<CString> = arguments.into_iter().filter_map(|argument| CString::new(argument).ok()).collect();
    let mut pointers: Vec<*mut c_char> = arguments.iter().map(|argument| argument.as_ptr().cast_mut()).collect();
    let mut count = pointers.len() as c_int;
    pointers.push(std::ptr::null_mut());
    let mut argv = pointers.as_mut_ptr();
    // SAFETY: `argv` points to `count` texts that end with a zero, and a null; they live as long as the call.
    let code = unsafe { LLVMFuzzerRunDriver(&mut count, &mut argv, run) };
    // libFuzzer ends the process itself after a run; a destructor of something static must not change its answer.
    std::process::exit(code);
}
