"""Writes a run's config, metrics and scores to MLflow: by default into a database beside the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from stillhouse.api import MissingExtra, Observer, ObserverConfig, RunRecord

RUN_ID, DATABASE = "mlflow.json", "mlflow.db"
LONGEST = 500
"""Characters of a parameter that every MLflow store takes."""


class MLflowConfig(ObserverConfig):
    """Where MLflow keeps what it is told."""

    tracking_uri: str | None = Field(
        None, description="A server or a store; default: the file mlflow.db of the run directory."
    )
    experiment: str = "stillhouse"


class MLflow(Observer):
    """A run of MLflow: settings as parameters, numbers of ``metrics.jsonl`` as metrics, final scores as metrics.

    A resumed run goes on with the run of MLflow that it began.
    """

    api_version = 1
    Config = MLflowConfig
    writes = (RUN_ID, DATABASE)
    config: MLflowConfig

    def on_run_start(self, record: RunRecord) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise MissingExtra("observer 'mlflow'", "mlflow-skinny", "mlflow") from None
        uri = self.config.tracking_uri or f"sqlite:///{record.dir.absolute() / DATABASE}"
        self._client = MlflowClient(tracking_uri=uri)
        kept = record.dir / RUN_ID
        if kept.is_file():
            self._run = json.loads(kept.read_text())["run"]
            return
        found = self._client.get_experiment_by_name(self.config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self.config.experiment)
        self._run = self._client.create_run(experiment, run_name=record.name).info.run_id
        for name, value in flat(record.config):
            self._client.log_param(self._run, name, str(value)[:LONGEST])
        kept.write_text(json.dumps({"run": self._run, "tracking_uri": uri}))

    def on_metrics(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._client.log_metric(self._run, name, float(value), step=row["step"])

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        for split, scores in summary["scores"].items():
            for name, value in scores.items():
                self._client.log_metric(
                    self._run, f"final.{split}.{name}", float(value), step=summary["steps"]
                )
        self._client.set_terminated(self._run)


def flat(content: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Nested settings as dotted names with their values."""
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{path}.{key}" if path else str(key)
        found += flat(value, name) if isinstance(value, Mapping) and value else [(name, value)]
    return found
