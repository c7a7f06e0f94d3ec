"""Reinforcement learning: the games, the network, advantages and the loss, against arithmetic of our own."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import celo2_harness as c2
from celo2_harness.lab.reinforce import (
    ActorCriticConfig,
    Atari,
    AtariConfig,
    Catch,
    ConvolutionConfig,
    PPOConfig,
    Samples,
    apply_actor_critic,
    generalized_advantages,
    init_actor_critic,
    make_environments,
    ppo_loss,
)
from celo2_harness.lab.reinforce.convolution import convolve

GAMES = ("asterix", "freeway", "space_invaders")


def plain_convolution(images, kernel, stride):
    """Position by position, in float64."""
    images, kernel = np.float64(images), np.float64(kernel)
    side = kernel.shape[0]
    rows, columns = ((length - side) // stride + 1 for length in images.shape[1:3])
    outputs = np.zeros((len(images), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            window = images[:, i * stride : i * stride + side, j * stride : j * stride + side]
            outputs[:, i, j] = np.tensordot(window, kernel, 3)
    return outputs


# An odd batch, and two chunks of the way that CPUs go; pixels at the edge that no window reaches.
@pytest.mark.parametrize(
    ("batch", "height", "side", "stride"),
    [(3, 9, 4, 2), (32, 10, 4, 2), pytest.param(32, 5, 3, 1, marks=pytest.mark.slow)],
)
def test_convolution_and_gradients(key, batch, height, side, stride):
    keys = jax.random.split(key, 3)
    images = jax.random.normal(keys[0], (batch, height, height + 1, 2))
    kernel = jax.random.normal(keys[1], (side, side, 2, 3))
    expected = plain_convolution(images, kernel, stride)
    weight = jax.random.normal(keys[2], expected.shape)

    @jax.jit
    def both(images, kernel):
        outputs, back = jax.vjp(lambda x, k: convolve(x, k, stride), images, kernel)
        return outputs, back(weight)

    outputs, (of_images, of_kernel) = both(images, kernel)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    # The convolution is linear in each argument: <gradient, direction> = <weight, convolution of the direction>.
    for gradient, direction, changed in (
        (of_images, images[::-1] ** 2, lambda d: plain_convolution(d, kernel, stride)),
        (of_kernel, kernel[::-1] ** 2, lambda d: plain_convolution(images, d, stride)),
    ):
        # Along a direction with all coordinates, with one, and with some.
        for part in (direction, jnp.zeros_like(direction).at[(-1,) * 4].set(1), direction.at[:, 1:].set(0)):
            expected_slope = float(np.sum(np.float64(weight) * changed(part)))
            assert float(jnp.vdot(gradient, part)) == pytest.approx(expected_slope, rel=1e-4, abs=1e-3)


def test_the_stride_divides_the_kernel():
    with pytest.raises(ValueError, match="stride = 2: expected a divisor of the kernel's side 3"):
        convolve(jnp.ones((1, 5, 5, 1)), jnp.ones((3, 3, 1, 1)), 2)


def test_the_nature_network_is_routed_as_it_should_be():
    params = init_actor_critic(ActorCriticConfig((84, 84, 4), actions=3), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_686_180
    labels = {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): label
        for path, label in jax.tree_util.tree_leaves_with_path(c2.label_params(params))
    }
    layers = [f"convolutions/{i}" for i in range(3)] + ["hidden"]
    expected = {f"{layer}/kernel": "hidden" for layer in layers} | {f"{layer}/bias": "vector" for layer in layers}
    expected |= {f"{head}_head/kernel": "head" for head in ("policy", "value")}
    assert labels == expected | {f"{head}_head/bias": "vector" for head in ("policy", "value")}


def test_initial_kernels_are_orthogonal_and_the_policy_is_even():
    config = ActorCriticConfig((12, 12, 2), 3, (ConvolutionConfig(4, 4, 2),), hidden=8)
    params = init_actor_critic(config, jax.random.key(1))
    for name, scale in (("policy_head", 0.01), ("value_head", 1.0), ("hidden", np.sqrt(2))):
        kernel = np.asarray(params[name]["kernel"][...])
        np.testing.assert_allclose(kernel.T @ kernel, scale**2 * np.eye(kernel.shape[1]), atol=1e-5)
    kernel = np.asarray(params["convolutions"][0]["kernel"][...]).reshape(-1, 4)
    np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(4), atol=1e-5)
    board = jax.random.randint(jax.random.key(2), (5, 12, 12, 2), 0, 256).astype(jnp.uint8)
    logits, _ = apply_actor_critic(config, params, board)
    np.testing.assert_allclose(jax.nn.softmax(logits), 1 / 3, atol=0.02)


def test_convolutions_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match=r"convolutions: .*side=8.* leaves nothing of observations \(5, 5, 1\)"):
        ActorCriticConfig((5, 5, 1), 3)


def test_advantages_are_sums_of_discounted_errors(seed):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, 7, 3))
    terminals, last = rng.random((7, 3)) < 0.3, rng.normal(size=3)
    got = generalized_advantages(
        *(jnp.asarray(x, jnp.float32) for x in (rewards, values)),
        jnp.asarray(terminals),
        jnp.asarray(last, jnp.float32),
        0.9,
        0.8,
    )
    following = np.concatenate([values[1:], last[None]])
    errors = rewards + 0.9 * np.where(terminals, 0.0, following) - values
    for t in range(7):
        for n in range(3):
            expected, weight = 0.0, 1.0
            for later in range(t, 7):
                expected += weight * errors[later, n]
                if terminals[later, n]:
                    break
                weight *= 0.9 * 0.8
            assert float(got[t, n]) == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def perceptron():
    config = ActorCriticConfig((2, 2, 1), 3, (), hidden=4)
    return config, init_actor_critic(config, jax.random.key(3))


def test_the_loss_is_that_of_the_paper(perceptron):
    config, params = perceptron
    rng = np.random.default_rng(0)
    boards = rng.integers(0, 256, (6, 2, 2, 1)).astype(np.uint8)
    actions = rng.integers(0, 3, 6).astype(np.int32)
    old, old_values, advantages, returns = rng.normal(size=(4, 6)).astype(np.float32)
    old = old * 0.2 - 1.1
    settings = PPOConfig(clip=0.15, entropy_coefficient=0.02, value_coefficient=0.3)
    samples = Samples(*map(jnp.asarray, (boards, actions, old, old_values, advantages, returns)))
    loss, losses = jax.jit(lambda params: ppo_loss(settings, config, params, samples))(params)

    logits, values = (np.float64(x) for x in apply_actor_critic(config, params, jnp.asarray(boards)))
    policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ratio = policy[range(6), actions] / np.exp(np.float64(old))
    scaled = (advantages - advantages.mean()) / advantages.std()
    gain = np.minimum(scaled * ratio, scaled * np.clip(ratio, 0.85, 1.15)).mean()
    near = np.clip(values, old_values - 0.15, old_values + 0.15)
    value = 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2).mean()
    entropy = -(policy * np.log(policy)).sum(1).mean()
    assert 0 < (np.abs(ratio - 1) > 0.15).sum() < 6  # both sides of the clipping are in the test
    expected = {
        "loss": -gain - 0.02 * entropy + 0.3 * value,
        "policy": -gain,
        "value": value,
        "entropy": entropy,
        "divergence": (ratio - 1 - np.log(ratio)).mean(),
        "clipped": (np.abs(ratio - 1) > 0.15).mean(),
    }
    assert {k: float(v) for k, v in losses._asdict().items()} == pytest.approx(expected, abs=1e-5)
    assert float(loss) == float(losses.loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs = 0: expected at least 1"),
        ({"minibatches": 3}, "minibatches = 3: expected a divisor of environments x rollout = 1024"),
        ({"clip": 0.0}, "clip = 0.0: expected a number above 0"),
        ({"discount": 1.5}, "discount = 1.5: expected a number from 0 to 1"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**change)


def play(environments, policy, steps, seed=0):
    """Observations, rewards, terminals and ends of so many steps."""
    boards, record = environments.reset(seed), []
    for _ in range(steps):
        step = environments.step(np.asarray(policy(boards), np.int32))
        record.append((boards, step.rewards, step.terminals, step.episodes_over))
        boards = step.observations
    return [np.stack(column) for column in zip(*record, strict=True)]


def follow(boards):
    """The perfect player of Catch, from the picture: the ball is above the last row, the paddle in it."""
    ball = boards[:, :-1, :, 0].any(axis=1).argmax(axis=1)
    return 1 + np.sign(ball - boards[:, -1, :, 0].argmax(axis=1))


def test_catch_is_won_by_the_perfect_player_and_lost_by_the_other():
    boards, rewards, terminals, over = play(Catch(6), follow, 27)
    assert (boards.reshape(27, 6, -1) == 255).sum(axis=-1).min() == 2 and set(np.unique(boards)) == {0, 255}
    assert over[8::9].all() and over.sum() == 18 and (over == terminals).all()
    assert (rewards[over] == 1).all() and not rewards[~over].any()
    assert len({tuple(column) for column in boards[::9, :, 0, :, 0].reshape(-1, 5)}) > 2  # balls differ
    away = lambda boards: np.where(boards[:, :-1, :2].any(axis=(1, 2, 3)), 2, 0)
    _, rewards, _, over = play(Catch(6), away, 9)
    assert (rewards[over] == -1).all()


def test_catch_is_determined_by_its_seed():
    first, again, other = (play(Catch(5), follow, 20, seed)[0] for seed in (1, 1, 2))
    assert (first == again).all() and not (first == other).all()


def test_games_are_refused_by_name():
    with pytest.raises(ValueError, match="game = 'pong': expected one of asterix, freeway, space_invaders, catch"):
        make_environments("pong", 1)
    with pytest.raises(ValueError, match="environments = 0: expected at least 1"):
        make_environments("catch", 0)


@pytest.mark.parametrize("module", ["ale_py", "ale_py.vector_env"])  # no ale-py; ale-py without gymnasium
def test_a_missing_extra_is_named(module, monkeypatch):
    monkeypatch.delitem(sys.modules, "ale_py.vector_env", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"game = 'freeway' needs ale_py.*: pip install 'celo2-harness\[atari\]'"):
        make_environments("freeway", 1)


@pytest.fixture
def ale():
    pytest.importorskip("ale_py.vector_env", reason="the extra atari (ale-py and gymnasium) is not installed")


@pytest.mark.usefixtures("ale")
@pytest.mark.parametrize("game", GAMES)
def test_atari_games_run_and_repeat(game):
    def record():
        environments = make_environments(game, 2)
        rng = np.random.default_rng(0)
        try:
            assert environments.observation_shape == (84, 84, 4)
            return play(environments, lambda boards: rng.integers(0, environments.actions, 2), 12)
        finally:
            environments.close()

    first, again = record(), record()
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert first[0].shape == (12, 2, 84, 84, 4)
    # Channels are frames, the newest last: each step moves them up by one.
    assert (first[0][1:, ..., :3] == first[0][:-1, ..., 1:]).all()
    assert not (first[0][1:, ..., 3] == first[0][:-1, ..., 3]).all()


@pytest.mark.usefixtures("ale")
def test_a_lost_life_ends_the_future_but_not_the_game_and_rewards_are_not_clipped():
    def record(config):
        environments = Atari("asterix", 4, config)
        rng = np.random.default_rng(1)
        try:
            return play(environments, lambda boards: rng.integers(0, 9, 4), 260)
        finally:
            environments.close()

    _, rewards, terminals, over = record(AtariConfig())
    assert rewards.max() == 50
    assert (terminals & ~over).any() and over.any() and terminals[over].all()
    # Three lives make a game.
    first = [np.flatnonzero(over[:, copy]) for copy in range(4)]
    assert {int(terminals[: ends[0] + 1, copy].sum()) for copy, ends in enumerate(first) if len(ends)} == {3}
    _, same_rewards, terminals, same_over = record(AtariConfig(life_is_terminal=False))
    assert (same_rewards == rewards).all() and (same_over == over).all() and (terminals == over).all()
