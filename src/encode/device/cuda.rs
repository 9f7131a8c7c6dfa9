//! CUDA devices, through the driver alone: it is loaded when first asked for, so that neither building nor importing needs
//! it. Works in each device's primary context, which is the one that the CUDA runtime (and with it cuVS, CuPy and PyTorch)
//! uses.

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::driver::result as cu;
use cudarc::driver::sys;

use super::api::Device;
use super::numa::near;
use super::tensor::DeviceMemory;
use crate::error::{Error, Result};

/// A device as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaDevice {
    pub index: usize,
    pub name: String,
    pub compute_capability: (i32, i32),
    /// Bytes.
    pub total_memory: usize,
    /// Bytes; only where it was asked for, because asking starts the device.
    pub free_memory: Option<usize>,
}

/// What of CUDA is on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CudaDevices {
    /// Newest CUDA that the driver runs; `None`: no driver.
    pub driver: Option<(i32, i32)>,
    pub devices: Vec<CudaDevice>,
    /// Why there are no devices.
    pub error: Option<String>,
}

fn text(name: std::result::Result<&CStr, cu::DriverError>) -> String {
    name.map_or_else(|_| "unknown".into(), |text| text.to_string_lossy().into_owned())
}

fn describe(error: cu::DriverError) -> String {
    let found = format!("{} ({}): {}", text(error.error_name()), error.0 as u32, text(error.error_string()));
    if error.0 == sys::CUresult::CUDA_ERROR_STUB_LIBRARY {
        // `libcuda.so` is looked for before `libcuda.so.1`, and the toolkit has one to link with.
        return format!("{found}; what was loaded is the CUDA toolkit's stub: take the folder \"stubs\" out of LD_LIBRARY_PATH");
    }
    found
}

/// A driver's error as ours: `what` was being done, and where.
fn failed(what: impl std::fmt::Display) -> impl Fn(cu::DriverError) -> Error {
    move |error| match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::DeviceMemory(format!("{what}: {}", describe(error))),
        _ => Error::Device(format!(
            "{what}: {}; look at nvidia-smi and the kernel log (dmesg, Xid), then run again: nothing was committed",
            describe(error)
        )),
    }
}

/// Look for driver and devices. Starts none of them, unless `free_memory` is asked for.
pub fn cuda_devices(free_memory: bool) -> CudaDevices {
    let mut found = CudaDevices::default();
    // SAFETY: loads the driver's library, whose initialisers every CUDA program runs.
    if !unsafe { sys::is_culib_present() } {
        found.error = Some("libcuda.so.1 could not be loaded".into());
        return found;
    }
    let initialised = cu::init();
    let mut version = 0;
    // SAFETY: writes one integer; needs no initialised driver.
    if unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok() {
        found.driver = Some((version / 1000, version % 1000 / 10));
    }
    let count = initialised.and_then(|()| cu::device::get_count());
    match count {
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => {}
        Err(error) => found.error = Some(describe(error)),
        Ok(count) => {
            for index in 0..usize::try_from(count).unwrap_or(0) {
                match probe(index, free_memory) {
                    Ok(device) => found.devices.push(device),
                    Err(error) => found.error = Some(error.to_string()),
                }
            }
        }
    }
    found
}

fn probe(index: usize, free_memory: bool) -> Result<CudaDevice> {
    let what = failed(format!("CUDA device {index}"));
    let device = cu::device::get(index as i32).map_err(&what)?;
    let attribute = |which| {
        // SAFETY: the device comes from the driver.
        unsafe { cu::device::get_attribute(device, which) }.map_err(&what)
    };
    use sys::CUdevice_attribute::{CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR};
    let compute_capability =
        (attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?, attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?);
    let free_memory = if free_memory {
        let before = CurrentContext::get();
        let free = Cuda::open(index).and_then(|cuda| cuda.free_bytes());
        before.restore();
        Some(free?)
    } else {
        None
    };
    Ok(CudaDevice {
        index,
        name: cu::device::get_name(device).map_err(&what)?,
        compute_capability,
        // SAFETY: the device comes from the driver.
        total_memory: unsafe { cu::device::total_mem(device) }.map_err(&what)?,
        free_memory,
    })
}

/// The calling thread's context, to be put back after work on a device.
pub struct CurrentContext {
    /// No driver, no context.
    driver: bool,
    context: Option<sys::CUcontext>,
}

// SAFETY: a context is an opaque handle of the driver, which takes it on any thread.
unsafe impl Send for CurrentContext {}
// SAFETY: as above.
unsafe impl Sync for CurrentContext {}

impl CurrentContext {
    pub fn get() -> Self {
        // SAFETY: as in `cuda_devices`.
        let driver = unsafe { sys::is_culib_present() };
        Self { driver, context: if driver { cu::ctx::get_current().ok().flatten() } else { None } }
    }

    /// Errors are left to the next call that uses the context.
    pub fn restore(&self) {
        if self.driver {
            // SAFETY: was current on this thread before; the null context means none.
            let _ = unsafe { cu::ctx::set_current(self.context.unwrap_or(std::ptr::null_mut())) };
        }
    }
}

/// A reference to a device's primary context.
struct Primary {
    device: sys::CUdevice,
    context: sys::CUcontext,
    name: String,
    /// Of the host's memory that is nearest to it.
    node: Option<u32>,
}

// SAFETY: both are handles of the driver, which takes them on any thread.
unsafe impl Send for Primary {}
// SAFETY: as above.
unsafe impl Sync for Primary {}

impl Primary {
    fn make_current(&self) -> Result<()> {
        // SAFETY: the context is retained as long as this lives.
        unsafe { cu::ctx::set_current(self.context) }.map_err(failed(&self.name))
    }
}

impl Drop for Primary {
    fn drop(&mut self) {
        // SAFETY: retained once, released once. An error would mean that the device is gone, and the context with it.
        let _ = unsafe { cu::primary_ctx::release(self.device) };
    }
}

/// A CUDA device in use.
#[derive(Clone)]
pub struct Cuda(Arc<Primary>);

/// Declares a handle that knows its device and gives itself back when dropped.
macro_rules! owned {
    ($(#[$doc:meta])* $name:ident($handle:ty), $release:path) => {
        $(#[$doc])*
        pub struct $name {
            handle: $handle,
            owner: Arc<Primary>,
        }

        // SAFETY: a handle or address of the driver, which takes it on any thread where the context is current.
        unsafe impl Send for $name {}
        // SAFETY: as above; who writes to memory at which time is ordered by the slots.
        unsafe impl Sync for $name {}

        impl Drop for $name {
            fn drop(&mut self) {
                // Any thread may drop it, and keeps its own context.
                let before = CurrentContext::get();
                let _ = self.owner.make_current();
                // SAFETY: made once, released once; whoever put work on it has waited for it. An error here is one of earlier
                // work, which whoever waited for that work was told.
                let _ = unsafe { $release(self.handle) };
                before.restore();
            }
        }
    };
}

owned!(
    /// A stream that does not wait for the default stream.
    Stream(sys::CUstream), cu::stream::destroy
);
owned!(
    /// An event, timed, whose waiters sleep.
    Event(sys::CUevent), cu::event::destroy
);
owned!(
    /// Memory on the device.
    Memory(sys::CUdeviceptr), cu::free_sync
);
owned!(
    /// Page-locked host memory.
    Pinned((*mut c_void, usize)), free_pinned
);

unsafe fn free_pinned(memory: (*mut c_void, usize)) -> std::result::Result<(), cu::DriverError> {
    // SAFETY: the caller's.
    unsafe { cu::free_host(memory.0) }
}

impl DeviceMemory for Memory {
    fn address(&self) -> usize {
        self.handle as usize
    }
}

impl Stream {
    /// As the CUDA runtime takes it.
    pub fn address(&self) -> usize {
        self.handle as usize
    }
}

impl Cuda {
    /// Open a device by its index among the visible ones.
    pub fn open(index: usize) -> Result<Self> {
        let found = cuda_devices(false);
        let Some(device) = found.devices.iter().find(|d| d.index == index) else {
            let why = found.error.map(|e| format!(" ({e})")).unwrap_or_default();
            return Err(Error::Device(format!(
                "CUDA device {index} is not there{why}: the driver shows {} devices; look at nvidia-smi and CUDA_VISIBLE_DEVICES",
                found.devices.len()
            )));
        };
        let name = format!("CUDA device {index} ({})", device.name);
        let handle = cu::device::get(index as i32).map_err(failed(&name))?;
        // SAFETY: the device comes from the driver.
        let context = unsafe { cu::primary_ctx::retain(handle) }.map_err(failed(format!("{name}: starting it")))?;
        // SAFETY: the device comes from the driver. Older ones do not know the attribute; on a machine with one node it is -1.
        let node = unsafe { cu::device::get_attribute(handle, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID) };
        let primary = Primary { device: handle, context, name, node: node.ok().and_then(|node| u32::try_from(node).ok()) };
        primary.make_current()?;
        Ok(Self(Arc::new(primary)))
    }

    fn owned<T>(&self, handle: T) -> (T, Arc<Primary>) {
        (handle, self.0.clone())
    }
}

impl Device for Cuda {
    type Pinned = Pinned;
    type Memory = Memory;
    type Stream = Stream;
    type Event = Event;

    fn name(&self) -> String {
        self.0.name.clone()
    }

    fn make_current(&self) -> Result<()> {
        self.0.make_current()
    }

    fn free_bytes(&self) -> Result<usize> {
        Ok(cu::mem_get_info().map_err(failed(&self.0.name))?.0)
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<Pinned> {
        let what = || format!("{}: page-locked host memory, {bytes} bytes", self.0.name);
        // Page-locked for every device.
        // SAFETY: the memory is zeroed before anybody reads it.
        let allocated = near(self.0.node, || unsafe { cu::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) });
        let pointer = allocated.map_err(failed(what()))?;
        // SAFETY: allocated above with this length.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        let (handle, owner) = self.owned((pointer, bytes));
        Ok(Pinned { handle, owner })
    }

    fn pinned<'a>(&self, memory: &'a Pinned) -> &'a [u8] {
        // SAFETY: initialised when allocated; copies into it are over when the slot is read.
        unsafe { std::slice::from_raw_parts(memory.handle.0.cast(), memory.handle.1) }
    }

    fn pinned_mut<'a>(&self, memory: &'a mut Pinned) -> &'a mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(memory.handle.0.cast(), memory.handle.1) }
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        // SAFETY: nobody reads it before a copy or an encoder wrote it.
        let pointer = unsafe { cu::malloc_sync(bytes) }.map_err(failed(format!("{}: {bytes} bytes", self.0.name)))?;
        let (handle, owner) = self.owned(pointer);
        Ok(Memory { handle, owner })
    }

    fn stream(&self) -> Result<Stream> {
        let stream = cu::stream::create(cu::stream::StreamKind::NonBlocking).map_err(failed(&self.0.name))?;
        let (handle, owner) = self.owned(stream);
        Ok(Stream { handle, owner })
    }

    fn event(&self) -> Result<Event> {
        let event = cu::event::create(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC).map_err(failed(&self.0.name))?;
        let (handle, owner) = self.owned(event);
        Ok(Event { handle, owner })
    }

    unsafe fn copy_in(&self, stream: &Stream, source: &Pinned, from: usize, target: &Memory, to: usize, bytes: usize) -> Result<()> {
        let source = &self.pinned(source)[from..from + bytes];
        // SAFETY: the caller's promises.
        unsafe { cu::memcpy_htod_async(target.handle + to as u64, source, stream.handle) }
            .map_err(failed(format!("{}: copying to it", self.0.name)))
    }

    unsafe fn copy_out(&self, stream: &Stream, source: &Memory, target: &Pinned, bytes: usize) -> Result<()> {
        if bytes > target.handle.1 {
            return Err(Error::internal("a copy beyond the end of a slot"));
        }
        // SAFETY: in bounds, and nobody else uses the range until the copy is done.
        let target = unsafe { std::slice::from_raw_parts_mut(target.handle.0.cast::<u8>(), bytes) };
        // SAFETY: the caller's promises.
        unsafe { cu::memcpy_dtoh_async(target, source.handle, stream.handle) }.map_err(failed(format!("{}: copying from it", self.0.name)))
    }

    fn record(&self, event: &Event, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        unsafe { cu::event::record(event.handle, stream.handle) }.map_err(failed(&self.0.name))
    }

    fn wait(&self, stream: &Stream, event: &Event) -> Result<()> {
        // SAFETY: both live.
        unsafe { cu::stream::wait_event(stream.handle, event.handle, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(failed(&self.0.name))
    }

    fn finish(&self, event: &Event) -> Result<()> {
        // SAFETY: lives.
        unsafe { cu::event::synchronize(event.handle) }.map_err(failed(&self.0.name))
    }

    fn seconds_between(&self, start: &Event, end: &Event) -> Option<f64> {
        // SAFETY: both live; the driver refuses events that are not finished.
        unsafe { cu::event::elapsed(start.handle, end.handle) }.ok().map(|ms| f64::from(ms) / 1e3)
    }
}

/// Wait for all work on the calling thread's device; nothing where it has none.
pub fn synchronize() -> Result<()> {
    if CurrentContext::get().context.is_none() {
        return Ok(());
    }
    cu::ctx::synchronize().map_err(failed("waiting for a device"))
}

/// Bytes a second of copies from page-locked memory to a device, and back: the limit of its bus.
pub fn measure_copy(index: usize, bytes: usize, repeats: usize) -> Result<(f64, f64)> {
    let before = CurrentContext::get();
    let cuda = Cuda::open(index)?;
    let (host, memory) = (cuda.allocate_pinned(bytes)?, cuda.allocate(bytes)?);
    let (stream, start, end) = (cuda.stream()?, cuda.event()?, cuda.event()?);
    let mut rates = [0.0; 2];
    for (rate, inwards) in rates.iter_mut().zip([true, false]) {
        // The first copies map and warm up.
        for round in 0..repeats + 2 {
            if round == 2 {
                cuda.record(&start, &stream)?;
            }
            // SAFETY: both memories outlive the copies, which are waited for below, and nobody else knows them.
            unsafe {
                if inwards {
                    cuda.copy_in(&stream, &host, 0, &memory, 0, bytes)?;
                } else {
                    cuda.copy_out(&stream, &memory, &host, bytes)?;
                }
            }
        }
        cuda.record(&end, &stream)?;
        cuda.finish(&end)?;
        *rate = (bytes * repeats) as f64 / cuda.seconds_between(&start, &end).unwrap_or(f64::INFINITY);
    }
    before.restore();
    Ok((rates[0], rates[1]))
}
