"""MLflow as an observer (extra ``mlflow``)."""

from stillhouse_mlflow.observer import MLflow

__all__ = ["MLflow"]
