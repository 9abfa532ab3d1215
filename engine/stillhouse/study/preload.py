"""Imported by the server that cells are forked from: imports what the preparation of the study had imported.

The names come from the file that ``STILLHOUSE_STUDY_MODULES`` names: they are too many for a command line. This is the one
module that works when it is imported, since importing is its work.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from pathlib import Path

MODULES = "STILLHOUSE_STUDY_MODULES"


def import_all(names: list[str]) -> None:
    """Import what can be; the rest is the matter of whoever imports it in earnest."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


if MODULES in os.environ:
    import_all(json.loads(Path(os.environ[MODULES]).read_text(encoding="utf-8")))
