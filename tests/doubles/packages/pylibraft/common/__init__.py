from .device_ndarray import device_ndarray

__all__ = ["device_ndarray"]
