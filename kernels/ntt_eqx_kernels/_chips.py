"""Why a device cannot run Mosaic's kernels; known without importing Pallas."""

import jax

from ._dispatch import Device

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # in the names of its devices
JAX_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])


def lacks_mosaic_gpu(device: Device) -> str | None:
    """Why Mosaic GPU kernels cannot run on a device, or `None`."""
    if device.platform != "gpu" or not any(name in device.kind for name in HOPPER):
        return f"needs a Hopper GPU, and the device is {device.kind!r} ({device.platform})"
    if JAX_VERSION < (0, 11):
        return f"needs JAX 0.11 or newer for Mosaic GPU, and this is {jax.__version__}"
    return None


def lacks_mosaic_tpu(device: Device) -> str | None:
    """Why Mosaic TPU kernels cannot run on a device, or `None`."""
    if device.platform != "tpu":
        return f"needs a TPU, and the device is {device.kind!r} ({device.platform})"
    return None
