import ctypes

import numpy as np


class _Wrapper:
    def __init__(self, interface, from_cai):
        self.ai_, self.from_cai = interface, from_cai
        self.dtype, self.shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
        self.c_contiguous = interface.get("strides") is None

    def view(self):
        """Not of the real one: the double's device memory is host memory."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        buffer = (ctypes.c_char * size).from_address(self.ai_["data"][0])
        return np.frombuffer(buffer, self.dtype).reshape(self.shape)


def wrap_array(array):
    try:
        return _Wrapper(array.__cuda_array_interface__, True)
    except AttributeError:
        return _Wrapper(array.__array_interface__, False)
