"""The multilayer perceptron of the inner task."""

import jax.numpy as jnp
import numpy as np

from celo2_harness.lab.tasks import image_mlp


def test_mlp_initial_values(key):
    params = image_mlp.init_mlp(key, (64, 32, 10))
    assert [layer.kernel.shape for layer in params] == [(32, 64), (10, 32)]
    assert not any(np.any(layer.bias) for layer in params)
    for layer in params:
        scaled = np.asarray(layer.kernel) * np.sqrt(layer.kernel.shape[1])
        # Cut off at 2 sigma and not rescaled: standard deviation 0.880; 2048 and 320 samples.
        assert np.abs(scaled).max() <= 2.0 and abs(scaled.std() - 0.880) < 0.08


def test_mlp_loss_by_hand():
    layer = image_mlp.Layer(jnp.zeros((10, 64)), jnp.zeros(10))
    images, labels = jnp.ones((4, 64)), jnp.arange(4)
    np.testing.assert_allclose(image_mlp.mlp_loss((layer,), images, labels), np.log(10), rtol=1e-6)
    # Two layers on one pixel: hidden relu(1, -1) = (1, 0); logits (2, 0, ...).
    first = image_mlp.Layer(jnp.zeros((2, 64)).at[:, 0].set(jnp.array([1.0, -1.0])), jnp.zeros(2))
    second = image_mlp.Layer(jnp.zeros((10, 2)).at[0, 0].set(2.0).at[1, 1].set(5.0), jnp.zeros(10))
    loss = image_mlp.mlp_loss((first, second), jnp.zeros((1, 64)).at[0, 0].set(1.0), jnp.zeros(1, int))
    np.testing.assert_allclose(loss, np.log(np.exp(2.0) + 9) - 2, rtol=1e-6)
