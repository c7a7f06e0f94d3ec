"""Convolution without padding, computed on a CPU a few images at a time, where XLA's own gradient is slow."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# So few images that what is computed of them stays in a core's cache.
_CHUNK = 16

Images = Float[Array, "batch height width inputs"]
Kernel = Float[Array, "side side inputs outputs"]
Outputs = Float[Array, "batch rows columns outputs"]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(images: Images, kernel: Kernel, stride: int) -> Outputs:
    """Convolves images with a square kernel, without padding.

    y[b, i, j, o] = sum over u, v, c of x[b, s i + u, s j + v, c] k[u, v, c, o], with s the stride.

    Args:
        images: The images, channels last.
        kernel: The kernel (height, width, inputs, outputs).
        stride: The distance between neighbouring outputs; it divides the side of the kernel.

    Returns:
        The outputs, (height - side) // stride + 1 rows and accordingly many columns.

    Raises:
        ValueError: If the stride does not divide the side of the kernel.

    >>> convolve(jnp.ones((2, 9, 9, 3)), jnp.ones((4, 4, 3, 5)), 2).shape
    (2, 3, 3, 5)
    """
    if kernel.shape[0] % stride:
        raise ValueError(f"stride = {stride}: expected a divisor of the kernel's side {kernel.shape[0]}")
    return jax.lax.platform_dependent(
        images, kernel, cpu=partial(_in_chunks, stride), default=partial(_convolve, stride)
    )


def _convolve(stride: int, images: Images, kernel: Kernel) -> Outputs:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(images, kernel, (stride, stride), "VALID", dimension_numbers=numbers)


def _in_chunks(stride: int, images: Images, kernel: Kernel) -> Outputs:
    outputs = jax.lax.map(lambda chunk: _convolve(stride, chunk, kernel), _chunked(images))
    return outputs.reshape(-1, *outputs.shape[2:])


def _chunked(x: Float[Array, "batch *rest"]) -> Float[Array, "chunks chunk *rest"]:
    size = _CHUNK if x.shape[0] % _CHUNK == 0 else x.shape[0]
    return x.reshape(-1, size, *x.shape[1:])


def _forward(images: Images, kernel: Kernel, stride: int) -> tuple[Outputs, tuple[Images, Kernel]]:
    return convolve(images, kernel, stride), (images, kernel)


def _backward(stride: int, saved: tuple[Images, Kernel], gradient: Outputs) -> tuple[Images, Kernel]:
    images, kernel = saved
    of_images = jax.vjp(lambda x: _convolve(stride, x, kernel), images)[1](gradient)[0]
    of_kernel = jax.lax.platform_dependent(
        images,
        kernel,
        gradient,
        cpu=partial(_kernel_gradient, stride),
        default=lambda x, k, g: jax.vjp(lambda k: _convolve(stride, x, k), k)[1](g)[0],
    )
    return of_images, of_kernel


convolve.defvjp(_forward, _backward)


def _kernel_gradient(stride: int, images: Images, kernel: Kernel, gradient: Outputs) -> Kernel:
    """The gradient of the kernel as one matrix product.

    With stride x stride pixels moved to the channels the stride becomes 1, and the kernel has side / stride rows. Then
    the image as a matrix (positions, channels) is multiplied by the gradient shifted to each of the kernel's places,
    side by side, as a matrix (positions, places x outputs).
    """
    side, _, inputs, outputs = kernel.shape
    places, (rows, columns) = side // stride, gradient.shape[1:3]
    height, width, edge = rows + places - 1, columns + places - 1, places - 1

    def add(total, chunk):
        x, g = chunk
        x = x[:, : height * stride, : width * stride].reshape(-1, height, stride, width, stride, inputs)
        shifted = [
            jnp.pad(g, ((0, 0), (down, edge - down), (right, edge - right), (0, 0)))
            for down in range(places)
            for right in range(places)
        ]
        # Without barriers XLA fuses all the moves into one loop over single numbers.
        x = jax.lax.optimization_barrier(x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, stride**2 * inputs))
        g = jax.lax.optimization_barrier(jnp.concatenate(shifted, axis=-1))
        return total + x.T @ g.reshape(-1, places**2 * outputs), None

    total = jnp.zeros((stride**2 * inputs, places**2 * outputs), gradient.dtype)
    total, _ = jax.lax.scan(add, total, (_chunked(images), _chunked(gradient)))
    total = total.reshape(stride, stride, inputs, places, places, outputs)
    return total.transpose(3, 0, 4, 1, 2, 5).reshape(kernel.shape)
