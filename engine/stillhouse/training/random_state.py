"""The state of the random number generators, taken and put back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch


@dataclass
class RandomState:
    """State of the random number generators of torch (CPU and every GPU), numpy and python."""

    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def capture(cls) -> RandomState:
        """The generators as they stand."""
        name, keys, position, has_gauss, gauss = cast(
            "tuple[str, Any, int, int, float]", np.random.get_state()
        )
        version, numbers, spare = random.getstate()
        return cls(
            {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
                "python": [version, list(numbers), spare],
            }
        )

    @classmethod
    def seeded(cls, seed: int) -> RandomState:
        """The generators as they stand after seeding each with ``seed``; the present ones are untouched."""
        before = cls.capture()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        made = cls.capture()
        before.restore()
        return made

    def restore(self) -> None:
        """Set the generators."""
        torch.set_rng_state(self.state["torch"])
        if self.state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.state["cuda"])
        name, keys, position, has_gauss, gauss = self.state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
        version, numbers, spare = self.state["python"]
        random.setstate((version, tuple(numbers), spare))
