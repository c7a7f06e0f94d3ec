"""How much of an accelerator's arithmetic a training step uses."""

import jax

# Dense products in bfloat16, operations per second, by a part of the device's name; the first that fits counts. From
# the makers' data sheets, without sparsity.
PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5": 197e12,
    "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the operations per second of a device in bfloat16, or None if it is not known.

    Example:
        >>> peak_flops("NVIDIA H100 80GB HBM3")
        989000000000000.0
        >>> peak_flops("cpu") is None
        True
    """
    return next((peak for name, peak in PEAKS.items() if name.lower() in device_kind.lower()), None)


def share_of_peak(flops: float | None, seconds: float) -> float | None:
    """Returns the share of the devices' peak that a step takes.

    Args:
        flops: The operations of the model in a step; None if they are not known.
        seconds: The time of a step.

    Returns:
        The share, of all devices together, or None.
    """
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if flops is None or peak is None else flops / seconds / (peak * jax.device_count())
