"""Random numbers as a function of (seed, first sample of the micro-batch): nothing random depends on history.

Whatever draws inside a forward pass draws the same numbers after a resume, in a replay, and on another machine.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

__all__ = ["rng_state", "seed_micro_batch"]


def seed_micro_batch(seed: int, first_sample: int) -> None:
    """Seed Python, NumPy and torch (all devices) for one micro-batch."""
    digest = hashlib.blake2b(f"{seed}/{first_sample}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    # Not torch.manual_seed: without a CUDA context it queues a call, traceback included, every time.
    torch.default_generator.manual_seed(value >> 1)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value >> 1)


def rng_state() -> dict[str, Any]:
    """This rank's generators as plain data; a checkpoint carries it so that two runs can be compared."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert not isinstance(keys, str)
    state: dict[str, Any] = {
        "python": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "numpy": hashlib.sha256(
            keys.tobytes() + repr((kind, position, has_gauss, cached)).encode()
        ).hexdigest(),
        "torch": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }
    if torch.cuda.is_available():
        state["cuda"] = hashlib.sha256(torch.cuda.get_rng_state().numpy().tobytes()).hexdigest()
    return state
