"""Deterministic weights and inputs for the parity data in this folder.

Every tensor is drawn from NumPy's default_rng, seeded by the CRC-32 of its own name, so anyone
can rebuild the exact weights under the *official* parameter names without storing them.
"""

import zlib

import numpy as np


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values for the official checkpoint key ``name`` (float32; int64 zero for step counters)."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith((".unfold.weights", ".fold.weights")):  # the fixed 3x3 one-hot kernels
        return np.eye(9, dtype=np.float32).reshape(shape)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    z = rng.standard_normal(shape)
    if name.endswith("running_var"):
        z = 0.5 + rng.random(shape)
    elif name.endswith("running_mean") or name.endswith("bias"):
        z = 0.1 * z
    elif ".gamma_" in name:  # layer scale
        z = 0.5 + 0.1 * z
    elif len(shape) == 1:  # affine weights of norms
        z = 1 + 0.1 * z
    else:
        z = 0.7 * z / np.sqrt(np.prod(shape[1:]))
    return z.astype(np.float32)


def image(seed: int, *shape: int) -> np.ndarray:
    """A float32 input of ``shape`` (N, C, H, W): 16x16 blocks of random colour under fine noise."""
    rng = np.random.default_rng(seed)
    n, c, h, w = shape
    coarse = rng.standard_normal((n, c, -(-h // 16), -(-w // 16)))
    blocks = coarse.repeat(16, axis=2).repeat(16, axis=3)[:, :, :h, :w]
    return (blocks + 0.3 * rng.standard_normal(shape)).astype(np.float32)
