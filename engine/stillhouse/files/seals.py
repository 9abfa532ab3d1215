"""A digest inside of the file that it is the digest of: one file, written and renamed at once, says if it was changed.

The place of the digest is written as zeros, the SHA-256 of the whole is taken, and put there. It can stand anywhere
in a format that has room for a word: a key of JSON, the metadata of safetensors, the comment of a zip.
"""

from __future__ import annotations

import hashlib

MARK = b"stillhouse-sha256:"
ZEROS = b"0" * 64
BLANK = (MARK + ZEROS).decode()
"""What to write where the digest is to stand."""


def seal(content: bytes) -> bytes:
    """``content`` with the digest of the whole in the place of ``BLANK``, which it holds once."""
    assert content.count(BLANK.encode()) == 1, "content to be sealed has one place for the digest"
    at = content.find(BLANK.encode()) + len(MARK)
    return content[:at] + _digest(content, at) + content[at + len(ZEROS) :]


def check_seal(content: bytes) -> str:
    """Empty where ``content`` is as it was sealed, else what is wrong with it."""
    start = content.rfind(MARK, max(0, len(content) - 256))  # the end is near, and cheap to look at
    if start < 0:
        start = content.find(MARK)
    if start < 0:
        return "it holds no digest of itself"
    at = start + len(MARK)
    if content[at : at + len(ZEROS)] != _digest(content, at):
        return "it was changed or damaged since it was written"
    return ""


def _digest(content: bytes, at: int) -> bytes:
    view = memoryview(content)
    found = hashlib.sha256(view[:at])
    found.update(ZEROS)
    found.update(view[at + len(ZEROS) :])
    return found.hexdigest().encode()
