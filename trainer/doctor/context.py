"""What every check is given. Tests replace parts of it to make a machine ill."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .place import Place

__all__ = ["Context"]


@dataclass
class Context:
    """One rank's view.

    Args:
        run_dir: the run's folder, or the one it would be made in.
        is_quick: smaller sizes, no compiler.
        limit_s: longest wait for other ranks.
        clock: seconds since 1970 on this node.
    """

    place: Place
    run_dir: Path
    is_quick: bool = False
    limit_s: float = 120.0
    clock: Callable[[], float] = time.time
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @cached_property
    def run_config(self) -> dict[str, Any]:
        """RUN/config.yaml as it stands there; empty where there is no run yet."""
        import yaml

        path = self.run_dir / "config.yaml"
        return yaml.safe_load(path.read_text()) or {} if path.is_file() else {}

    def wants(self, *keys: str) -> Any:
        """A value of the run's configuration, or None."""
        value: Any = self.run_config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value
