"""CMA-ES, small: it proposes points around a mean and learns from their ranks alone (arXiv 1604.00772)."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class CMA:
    """A search for the minimum of a noisy function of a few numbers.

    Points come in mirrored pairs, mean + sigma z and mean - sigma z, which takes the noise of the mean away.

    Attributes:
        mean: Where to start; later the estimate of the minimum.
        sigma: The scale of the steps; the numbers should be scaled such that one value suits all.
        population: Points per generation; an even number.
        seed: Of the points.
    """

    mean: np.ndarray
    sigma: float
    population: int
    seed: int = 0

    def __post_init__(self):
        n, half = len(self.mean), self.population // 2
        raw = math.log(half + 0.5) - np.log(np.arange(1, half + 1))
        self.weights = raw / raw.sum()
        mass = 1.0 / np.sum(self.weights**2)
        self.mass = mass
        self.path_rate = (mass + 2) / (n + mass + 5)
        self.damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + self.path_rate
        self.rank_one_path = (4 + mass / n) / (n + 4 + 2 * mass / n)
        self.rank_one = 2 / ((n + 1.3) ** 2 + mass)
        self.rank_many = min(1 - self.rank_one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
        self.expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        self.covariance = np.eye(n)
        self.sigma_path, self.covariance_path = np.zeros(n), np.zeros(n)
        self.generation = 0
        self._random = np.random.default_rng(self.seed)

    def ask(self) -> np.ndarray:
        """Points to try, one per row."""
        values, vectors = np.linalg.eigh(self.covariance)
        self._root = vectors * np.sqrt(np.maximum(values, 1e-12))
        z = self._random.standard_normal((self.population // 2, len(self.mean))) @ self._root.T
        self._points = self.mean + self.sigma * np.concatenate([z, -z])
        return self._points

    def tell(self, losses: np.ndarray) -> None:
        """Takes what the points gave, in their order; what is no number counts as the worst."""
        order = np.argsort(np.where(np.isfinite(losses), losses, np.inf))[: len(self.weights)]
        steps = (self._points[order] - self.mean) / self.sigma
        move = self.weights @ steps
        self.mean = self.mean + self.sigma * move
        whitened = np.linalg.solve(self._root, move)
        rate = self.path_rate
        self.sigma_path = (1 - rate) * self.sigma_path + math.sqrt(rate * (2 - rate) * self.mass) * whitened
        self.generation += 1
        length = np.linalg.norm(self.sigma_path)
        bound = (1.4 + 2 / (len(self.mean) + 1)) * self.expected
        small = length / math.sqrt(1 - (1 - rate) ** (2 * self.generation)) < bound
        rate = self.rank_one_path
        self.covariance_path = (1 - rate) * self.covariance_path
        if small:
            self.covariance_path = self.covariance_path + math.sqrt(rate * (2 - rate) * self.mass) * move
        self.covariance = (
            (1 - self.rank_one - self.rank_many) * self.covariance
            + self.rank_one * np.outer(self.covariance_path, self.covariance_path)
            + self.rank_many * (steps.T * self.weights) @ steps
        )
        self.sigma *= math.exp(min(1.0, (self.path_rate / self.damping) * (length / self.expected - 1)))
