"""Files that are whole or not there, as they were written or refused, and nobody else's.

``write_*`` write beside, flush to disk and rename into place; ``read_*`` refuse what is no regular file and, where a
digest was kept, what was changed since. ``files.tensors`` is the same for tensors (it imports torch, and is imported by
itself), ``files.private`` makes and checks folders that nobody else may write to.
"""

from stillhouse.files.reading import digest, read_bytes, read_json, read_text
from stillhouse.files.seals import BLANK, check_seal, seal
from stillhouse.files.writing import sweep, write_bytes, write_json, write_text

__all__ = [
    "BLANK",
    "check_seal",
    "digest",
    "read_bytes",
    "read_json",
    "read_text",
    "seal",
    "sweep",
    "write_bytes",
    "write_json",
    "write_text",
]
