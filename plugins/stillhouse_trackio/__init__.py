"""Trackio as an observer (extra ``trackio``)."""

from stillhouse_trackio.observer import Trackio

__all__ = ["Trackio"]
