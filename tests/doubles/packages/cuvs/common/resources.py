import ctypes
import functools

from .exceptions import CuvsException


def _library():
    return ctypes.CDLL("libcuvs_c.so")


class Resources:
    def __init__(self, stream=None, memory_tracking_csv_path=None, memory_tracking_sample_interval_ms=10):
        if stream:
            raise CuvsException("the real one takes the address of the int for the stream, and crashes")
        self._handle = ctypes.c_size_t()
        _library().cuvsResourcesCreate(ctypes.byref(self._handle))

    def get_c_obj(self):
        return self._handle.value

    @property
    def stream(self):
        """Not of the real one."""
        stream = ctypes.c_void_p()
        _library().cuvsStreamGet(self._handle, ctypes.byref(stream))
        return stream.value

    def sync(self):
        # 2: the per-thread default stream, on which the double never puts anything.
        if self.stream != 2:
            status = ctypes.CDLL("libcuda.so").cuStreamSynchronize(ctypes.c_void_p(self.stream))
            if status:
                raise CuvsException(
                    f"CUDA error encountered at: file=double: call='cudaStreamSynchronize', Reason=cudaError:{status}"
                )

    def __del__(self):
        _library().cuvsResourcesDestroy(self._handle)


def auto_sync_resources(f):
    @functools.wraps(f)
    def wrapper(*args, resources=None, **kwargs):
        sync_resources = resources is None
        resources = resources if resources is not None else Resources()
        ret_value = f(*args, resources=resources, **kwargs)
        if sync_resources:
            resources.sync()
        return ret_value

    return wrapper
