import numpy as np
from pylibraft.common import device_ndarray


class DeviceTensorView:
    """What an index gives out: a view of its memory."""

    def __init__(self, array_like=None):
        self._array = device_ndarray(np.ascontiguousarray(array_like))

    def copy_to_host(self, resources=None):
        return self._array.copy_to_host()

    @property
    def __cuda_array_interface__(self):
        return {**self._array.__cuda_array_interface__, "version": 2}

    @property
    def shape(self):
        return self._array.shape

    @property
    def strides(self):
        return None

    @property
    def dtype(self):
        return self._array.dtype
