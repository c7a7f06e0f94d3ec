"""A folder of two tiny image sets."""

import numpy as np
import pytest
from helpers import META_IMAGES, META_LABELS


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, part in (("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        np.savez(folder / f"{name}_8x8.npz", train_images=META_IMAGES[part], train_labels=META_LABELS[part])
    return str(folder)
