"""What of CUDA is on this machine, asked of the driver itself, without importing a CUDA package."""

from __future__ import annotations

from typing import Any

from .._lance_artifact import cuda_devices


def version(found: dict[str, Any]) -> str | None:
    """The newest CUDA that the driver runs, as text."""
    return ".".join(map(str, found["driver"])) if found["driver"] else None


def missing(found: dict[str, Any]) -> list[str]:
    """What a GPU backend lacks of driver and device, and how to get it."""
    if found["driver"] is None:
        return [
            f"driver: the NVIDIA driver is not installed or not visible ({found['error']}); "
            "install it on the host, and start containers with --gpus all"
        ]
    if not found["devices"]:
        why = f" ({found['error']})" if found["error"] else ""
        return [
            f"device: the NVIDIA driver (CUDA {version(found)}) sees no GPU{why}; "
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        ]
    return []


def describe(found: dict[str, Any]) -> dict[str, Any]:
    """Driver and devices for `Availability.details`."""
    return {"cuda_driver": version(found), "devices": found["devices"]}


def probe(*, free_memory: bool = False) -> dict[str, Any]:
    """Driver and devices. Starts no device, unless their free memory is asked for."""
    return cuda_devices(free_memory=free_memory)


def capability(device: int) -> int | None:
    """The first number of a device's compute capability."""
    found = [d["compute_capability"][0] for d in probe()["devices"] if d["index"] == device]
    return found[0] if found else None
