"""One writer at a time in a place: ``stillhouse label``, ``label_split``, and whoever compacts or imports."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse.errors import CheckpointError, DamagedFile
from stillhouse.files.lock import Lock
from stillhouse.softlabels.places import Folder, Place

LOCK = "lock.json"
"""The object at a URI that says who writes there."""


@contextmanager
def held(where: Place) -> Iterator[None]:
    """The place, held by this process for the writer's life, without what a killed writer left half written.

    Raises InUse, or CheckpointError at a URI, saying who writes there.
    """
    if not isinstance(where, Folder):
        with _held_remote(where):
            yield
        return
    with Lock(where.path):
        where.sweep()
        yield


@contextmanager
def _held_remote(where: Place) -> Iterator[None]:
    """An object that says who writes. Stores without locks leave a moment in which two may begin: shards are equal then."""
    me = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if LOCK in where.names():
        try:
            who = json.loads(where.read(LOCK))
        except (DamagedFile, ValueError):
            who = {}
        if not _gone(who):
            raise CheckpointError(
                f"{where} is in use: process {who.get('pid')} on {who.get('host')} writes there since {who.get('started')}; "
                f"wait for it, or remove {where}/{LOCK} if it is gone"
            )
    where.write(LOCK, json.dumps(me).encode())
    try:
        yield
    finally:
        where.remove(LOCK)


def _gone(who: dict[str, Any]) -> bool:
    if who.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(who["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False
