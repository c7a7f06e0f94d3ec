"""Several image sets in one array on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from celo2_harness.lab.tasks.images.pairs import SIDE, Pair


class ImageSets(NamedTuple):
    """Several training sets in one array, so that a batch of any of them is one gather.

    `images` [total, 64] holds pixels 0 to 255, `labels` [total]; set k lies at `starts[k] : starts[k] + sizes[k]`.
    """

    images: UInt8[Array, "total 64"]
    labels: Int[Array, " total"]
    starts: Int[Array, " sets"]
    sizes: Int[Array, " sets"]

    def batch(
        self, which: Int[Array, ""], key: Array, size: int
    ) -> tuple[Float[Array, "size 64"], Int[Array, " size"]]:
        """A batch drawn with replacement from set `which`: pixels in [0, 1], labels."""
        rows = self.starts[which] + jax.random.randint(key, (size,), 0, self.sizes[which])
        return self.images[rows].astype(jnp.float32) / 255.0, self.labels[rows]


def join_sets(pairs: Sequence[Pair]) -> ImageSets:
    """Puts image sets side by side, in order."""
    sizes = np.array([len(pair.labels) for pair in pairs])
    return ImageSets(
        images=jnp.asarray(np.concatenate([pair.images.reshape(-1, SIDE * SIDE) for pair in pairs])),
        labels=jnp.asarray(np.concatenate([pair.labels for pair in pairs]).astype(np.int32)),
        starts=jnp.asarray((np.cumsum(sizes) - sizes).astype(np.int32)),
        sizes=jnp.asarray(sizes.astype(np.int32)),
    )
