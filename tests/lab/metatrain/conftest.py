"""Two tiny image sets: as a folder, as arrays, and as the data of a run."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import META_CONFIG, META_IMAGES, META_LABELS

from celo2_harness.lab.metatrain import InnerData, load_data
from celo2_harness.lab.tasks import ImageSets


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, part in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        np.savez(folder / f"{name}_8x8.npz", train_images=META_IMAGES[part], train_labels=META_LABELS[part])
    return str(folder)


@pytest.fixture(scope="session")
def data(images):
    return load_data(META_CONFIG, images)


@pytest.fixture(scope="session")
def inner_data():
    return InnerData(
        ImageSets(
            images=jnp.asarray(META_IMAGES.reshape(20, 64)),
            labels=jnp.asarray(META_LABELS, jnp.int32),
            starts=jnp.array([0, 10], jnp.int32),
            sizes=jnp.array([10, 10], jnp.int32),
        )
    )
