"""Writes a run's config, metrics and scores to Trackio: into a database on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from stillhouse.api import MissingExtra, Observer, ObserverConfig, RunRecord


class TrackioConfig(ObserverConfig):
    """What Trackio calls the project."""

    project: str = "stillhouse"


class Trackio(Observer):
    """A run of Trackio in ``$TRACKIO_DIR``, by default Hugging Face's cache folder; look with ``trackio show``.

    A resumed run goes on with the run of Trackio that it began.
    """

    api_version = 1
    Config = TrackioConfig
    config: TrackioConfig

    def on_run_start(self, record: RunRecord) -> None:
        try:
            import trackio
        except ImportError:
            raise MissingExtra("observer 'trackio'", "trackio", "trackio") from None
        where = hashlib.sha256(str(record.dir.absolute()).encode()).hexdigest()[:8]
        self._run = trackio.init(
            project=self.config.project,
            name=f"{record.name}-{where}",
            config=dict(record.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
        )

    def on_metrics(self, row: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        final = {
            f"final.{split}.{name}": value
            for split, scores in summary["scores"].items()
            for name, value in scores.items()
        }
        self._run.log(final, step=summary["steps"])
        self._run.finish()
