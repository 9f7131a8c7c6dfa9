"""What of CUDA is on this machine, asked of the driver itself, without importing a CUDA package."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Cuda:
    """The driver's version (None: no driver) and the number of devices it sees."""

    driver: tuple[int, int] | None
    devices: int
    error: str | None = None


def probe() -> Cuda:
    """Load the driver's library and count devices; makes no context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return Cuda(None, 0, str(error))
    status = driver.cuInit(0)
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    found = (version.value // 1000, version.value % 1000 // 10)
    if status != 0:
        # 100: CUDA_ERROR_NO_DEVICE
        return Cuda(found, 0, None if status == 100 else f"cuInit failed with CUDA error {status}")
    count = ctypes.c_int(0)
    status = driver.cuDeviceGetCount(ctypes.byref(count))
    return Cuda(
        found, count.value, None if status == 0 else f"cuDeviceGetCount failed with CUDA error {status}"
    )


def missing(cuda: Cuda) -> list[str]:
    """What a GPU backend lacks of driver and device, and how to get it."""
    if cuda.driver is None:
        return [
            f"driver: the NVIDIA driver is not installed or not visible ({cuda.error}); "
            "install it on the host, and start containers with --gpus all"
        ]
    if cuda.devices == 0:
        why = f" ({cuda.error})" if cuda.error else ""
        return [
            f"device: the NVIDIA driver (CUDA {cuda.driver[0]}.{cuda.driver[1]}) sees no GPU{why}; "
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        ]
    return []
