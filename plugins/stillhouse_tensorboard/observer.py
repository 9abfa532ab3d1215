"""Writes a run's metrics as TensorBoard events into ``tensorboard/`` of the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.api import MissingExtra, Observer, RunRecord


class TensorBoard(Observer):
    """Every number of ``metrics.jsonl`` as a scalar; look with ``tensorboard --logdir runs``."""

    api_version = 1
    writes = ("tensorboard/events.*",)
    _writer: Any = None

    def on_run_start(self, record: RunRecord) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("observer 'tensorboard'", "tensorboard", "tensorboard") from None
        self._writer = SummaryWriter(record.dir / "tensorboard")

    def on_metrics(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        self._close()

    def on_run_failed(self, error: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        """End the writer's thread."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
