//! PyO3 bindings: convert arguments, release the GIL, map errors. No decisions.

mod allocator;
mod artifact;
mod build;
mod builder;
mod cancel;
mod convert;
mod dataset;
mod device;
mod dlpack;
mod errors;
mod exit;
mod files;
mod logs;
mod means;
mod model;
mod process;
mod runtime;
mod segment;
mod storage;
mod without;

use pyo3::prelude::*;

#[pymodule(name = "_lance_artifact")]
fn lance_artifact_module(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<model::PyIvfPqModel>()?;
    module.add_class::<model::PyCpuEncoder>()?;
    module.add_class::<builder::PyPartitionArtifactBuilder>()?;
    module.add_class::<artifact::PyArtifact>()?;
    module.add_class::<artifact::PyVerifyReport>()?;
    module.add_class::<dataset::PyDataset>()?;
    module.add_class::<segment::PySegment>()?;
    module.add_class::<build::PyVectorSource>()?;
    module.add_class::<build::PyVectorScan>()?;
    module.add_class::<means::PyMeans>()?;
    module.add_class::<device::PyDeviceArray>()?;
    module.add_class::<device::PyCudaDevice>()?;
    crate::budget::set_give_back(allocator::give_back);
    exit::register(module)?;
    logs::install();
    module.add_function(wrap_pyfunction!(process::owner_marks, module)?)?;
    module.add_function(wrap_pyfunction!(process::owner_is_gone, module)?)?;
    module.add_function(wrap_pyfunction!(device::cuda_devices, module)?)?;
    module.add_function(wrap_pyfunction!(device::measure_copy, module)?)?;
    module.add_function(wrap_pyfunction!(device::synchronize, module)?)?;
    module.add_function(wrap_pyfunction!(device::encode_on_device, module)?)?;
    module.add_function(wrap_pyfunction!(model::train_on_cpu, module)?)?;
    module.add_function(wrap_pyfunction!(model::model_of_index, module)?)?;
    module.add_function(wrap_pyfunction!(process::default_memory_limit, module)?)?;
    module.add_function(wrap_pyfunction!(files::unfinished_files, module)?)?;
    module.add_function(wrap_pyfunction!(files::delete_unfinished, module)?)?;
    module.add_function(wrap_pyfunction!(segment::unfinished_segments, module)?)?;
    module.add_function(wrap_pyfunction!(files::put_new, module)?)?;
    module.add_function(wrap_pyfunction!(files::read_file, module)?)?;
    module.add_function(wrap_pyfunction!(files::list_folder, module)?)?;
    module.add_function(wrap_pyfunction!(files::delete_files, module)?)?;
    module.add_function(wrap_pyfunction!(files::shown_uri, module)?)?;
    module.add_function(wrap_pyfunction!(files::without_secrets, module)?)?;
    module.add_function(wrap_pyfunction!(files::uri_below, module)?)?;
    module.add_function(wrap_pyfunction!(files::uri_place, module)?)?;
    module.add_function(wrap_pyfunction!(segment::merge_segments, module)?)?;
    module.add_function(wrap_pyfunction!(segment::segments_with, module)?)?;
    module.add_function(wrap_pyfunction!(segment::segments_without_coverage, module)?)?;
    module.add_function(wrap_pyfunction!(segment::partition_sizes, module)?)?;
    module.add_function(wrap_pyfunction!(segment::build_segment, module)?)?;
    module.add_function(wrap_pyfunction!(segment::discard_segment, module)?)?;
    module.add_function(wrap_pyfunction!(segment::delete_artifact, module)?)?;
    Ok(())
}
