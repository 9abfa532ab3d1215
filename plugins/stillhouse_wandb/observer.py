"""Writes a run's config, metrics and scores to Weights & Biases: offline unless the config says otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from stillhouse.api import MissingExtra, Observer, ObserverConfig, RunRecord


class WandbConfig(ObserverConfig):
    """Where Weights & Biases keeps what it is told."""

    project: str = "stillhouse"
    mode: Literal["offline", "online"] = Field(
        "offline", description="offline: files in the run directory, sent later by 'wandb sync'."
    )


class Wandb(Observer):
    """A run of Weights & Biases; ``wandb sync RUN_DIR/wandb/offline-run-*`` sends one that was kept offline.

    A resumed run has the id of the one that it goes on with.
    """

    api_version = 1
    Config = WandbConfig
    config: WandbConfig

    def on_run_start(self, record: RunRecord) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("observer 'wandb'", "wandb", "wandb") from None
        self._run = wandb.init(
            project=self.config.project,
            name=record.name,
            id=hashlib.sha256(str(record.dir.absolute()).encode()).hexdigest()[:12],
            resume="allow" if self.config.mode == "online" else None,
            dir=str(record.dir),
            mode=self.config.mode,
            config=dict(record.config),
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
            reinit="create_new",
        )

    def on_metrics(self, row: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        for split, scores in summary["scores"].items():
            self._run.summary.update({f"final.{split}.{name}": value for name, value in scores.items()})
        self._run.finish()
