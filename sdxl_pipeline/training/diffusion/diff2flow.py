"""Diff2Flow: a diffusion model's prediction judged as the velocity of a straight path from image to noise (Schusterbauer et al. 2025).

With sigma^2 = (1 - abar) / abar, the loss equals the plain one weighted by (1 + sigma)^2 for epsilon (1.2 at timestep 10 of SDXL's
schedule, 244 at 999), and by (sqrt(abar) + sqrt(1 - abar))^2, between 1 and 2, for v-prediction, wherever x_t holds just the noise
that the target names.
"""

from torch import Tensor


def flow_target(latents: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the straight path x_0 + s (eps - x_0), s from 0 to 1."""
    return noise - latents


def flow_from_epsilon(epsilon: Tensor, noisy_latents: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that a prediction of eps amounts to, for x_t = signal x_0 + sigma eps."""
    return epsilon - (noisy_latents - sigma * epsilon) / signal


def flow_from_velocity(velocity: Tensor, noisy_latents: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that a prediction of v = signal eps - sigma x_0 amounts to."""
    latents = signal * noisy_latents - sigma * velocity
    epsilon = signal * velocity + sigma * noisy_latents
    return epsilon - latents
