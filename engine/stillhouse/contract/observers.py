"""Observers watch a run: trackers, loggers, anything that reads and never changes the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class ObserverConfig(BaseModel):
    """Base of an observer's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass
class RunRecord:
    """What an observer is told about the run: its directory, resolved config and manifest."""

    name: str
    dir: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)


class Observer:
    """Base of observers; found by entry point in ``stillhouse.observers``. Every method may be left out."""

    api_version: ClassVar[int]
    writes: ClassVar[tuple[str, ...]] = ()
    """Files that it writes to the run directory, as in ``("tensorboard/events.*",)``: ``--overwrite`` removes these."""
    Config: ClassVar[type[ObserverConfig]] = ObserverConfig

    config: Any

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config

    def on_run_start(self, record: RunRecord) -> None:
        """Before the first update; on a resume too."""

    def on_metrics(self, row: Mapping[str, Any]) -> None:
        """One row of ``metrics.jsonl``: ``step``, ``stage``, and numbers by name."""

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """After the final evaluation, with ``summary.json``'s content."""

    def on_run_failed(self, error: BaseException) -> None:
        """In place of ``on_run_end`` where the run ends early (an error, Ctrl-C): let go of threads and files."""
