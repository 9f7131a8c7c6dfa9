import ctypes


def device():
    """Not of the real one."""
    found = ctypes.c_int()
    ctypes.CDLL("libcuda.so").cuCtxGetDevice(ctypes.byref(found))
    return found.value


class DeviceMemoryResource:
    def used(self, size):
        """So much was taken, and given back. Not of the real one."""


class CudaMemoryResource(DeviceMemoryResource):
    pass


class CudaAsyncMemoryResource(DeviceMemoryResource):
    """A pool of the context that the device has."""

    def __init__(self, initial_pool_size=None, release_threshold=None, enable_ipc=False, enable_fabric=False):
        self.release_threshold = release_threshold
        self.of_device = device()
        self.of_context = ctypes.CDLL("libcuda.so").fake_cuda_generation(self.of_device)

        self.trims = 0

    def used(self, size):
        if ctypes.CDLL("libcuda.so").fake_cuda_generation(self.of_device) != self.of_context:
            raise RuntimeError(
                "CUDA error encountered at: file=double: cudaErrorContextIsDestroyed context is destroyed"
            )
        # Without a threshold it keeps everything.
        self.trims += self.release_threshold is not None and size > self.release_threshold


class LimitingResourceAdaptor(DeviceMemoryResource):
    def __init__(self, upstream_mr, allocation_limit):
        self.upstream_mr, self.allocation_limit = upstream_mr, allocation_limit
        self.of_device = getattr(upstream_mr, "of_device", None)

    def used(self, size):
        if size > self.allocation_limit:
            raise RuntimeError(
                f"std::bad_alloc: out_of_memory: RMM failure at: file=double: Exceeded memory limit (failed to allocate {size} bytes)"
            )
        self.upstream_mr.used(size)


_current = {}


def get_current_device_resource():
    return _current.setdefault(device(), CudaMemoryResource())


def set_current_device_resource(mr):
    _current[device()] = mr
