"""Damage to one file of a run, of each kind: a bit flipped, cut short, emptied, written over."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from attacks.lab import Figures, Lab, Place, cycle, damage
from stillhouse import cache
from stillhouse.errors import DamagedFile
from stillhouse.runs import checkpoint


def _damaged(
    lab: Lab, count: int, chance: random.Random, pick: Callable[[Path], Path], *cases: tuple[str, ...]
) -> Figures:
    """In a copy of a run, damage one file, then call the command; cases: (whole or cut, flags...)."""
    figures = Figures()
    for number in range(count):
        which, *flags = cycle(cases, number)
        place = lab.place((lab.whole() if which == "whole" else lab.cut()).run)
        done = damage(pick(place.run), chance)
        outcome = place.outcome(place.go(*flags), lab.whole())
        figures.judged(outcome if outcome in ("same", "told") else f"{done} {flags}: {outcome}")
        shutil.rmtree(place.folder)
    return figures


def newest_checkpoint(lab: Lab, count: int, chance: random.Random) -> Figures:
    return _damaged(lab, count, chance, lambda run: max((run / "checkpoints").iterdir()), ("cut", "--resume"))


def soft_labels(lab: Lab, count: int, chance: random.Random) -> Figures:
    return _damaged(
        lab, count, chance, lambda run: next((run / "soft-labels").iterdir()), ("cut", "--resume")
    )


def student(lab: Lab, count: int, chance: random.Random) -> Figures:
    return _damaged(
        lab, count, chance, lambda run: run / "student.safetensors", ("whole",), ("whole", "--resume")
    )


def summary(lab: Lab, count: int, chance: random.Random) -> Figures:
    return _damaged(lab, count, chance, lambda run: run / "summary.json", ("whole",), ("whole", "--resume"))


def manifest(lab: Lab, count: int, chance: random.Random) -> Figures:
    cases = [("whole",), ("cut", "--resume"), ("cut",), ("whole", "--overwrite")]
    return _damaged(lab, count, chance, lambda run: run / "manifest.json", *cases)


def config(lab: Lab, count: int, chance: random.Random) -> Figures:
    return _damaged(
        lab, count, chance, lambda run: run / "config.yaml", ("whole",), ("cut", "--resume"), ("cut",)
    )


def metrics(lab: Lab, count: int, chance: random.Random) -> Figures:
    return _damaged(lab, count, chance, lambda run: run / "metrics.jsonl", ("whole",), ("cut", "--resume"))


def deleted(lab: Lab, count: int, chance: random.Random) -> Figures:
    """Any one file of a run is gone."""
    figures = Figures()
    for number in range(count):
        base = cycle([lab.whole(), lab.cut()], number)
        place = lab.place(base.run)
        path = chance.choice([path for path in sorted(place.run.rglob("*")) if path.is_file()])
        path.unlink()
        code = place.go(*cycle([(), ("--resume",)], number // 2))
        outcome = place.outcome(code, lab.whole())
        if path.name == "metrics.jsonl" and code == 0:  # rows that are gone can only be told of
            outcome = "told" if "is gone: its rows begin here" in place.said() else "rows lost without a word"
        elif path.name in ("README.md", "curve.png"):
            outcome = "same" if code == 0 else outcome
        figures.judged(outcome if outcome in ("same", "told") else f"{path.name}: {outcome}")
        shutil.rmtree(place.folder)
    return figures


def teacher_cache(lab: Lab, count: int, chance: random.Random) -> Figures:
    """The teacher of an earlier run is damaged: it is trained anew, with a word, and the run is the same."""
    figures = Figures()
    whole = lab.whole()
    kept = Path(os.environ[cache.CACHE])
    for _ in range(count):
        place = lab.place()
        own = place.folder / "cache"
        shutil.copytree(kept, own)
        for path in (own / "teachers").iterdir():
            damage(path, chance)
        code = place.go(env={cache.CACHE: str(own)})
        outcome = place.outcome(code, whole)
        if outcome == "same" and "it is made anew" not in place.said():
            outcome = "made anew without a word"
        figures.judged(outcome)
        shutil.rmtree(place.folder)
    return figures


def data_cache(lab: Lab, count: int, chance: random.Random) -> Figures:
    """Generated data that were kept are damaged: the same data come out."""
    import warnings

    figures = Figures()
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    right = {"x": torch.randn(50, 8, generator=generator), "y": torch.arange(50)}
    before = os.environ[cache.CACHE]
    os.environ[cache.CACHE] = str(lab.folder / "data-cache")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(count):
                made_from = {"number": number}
                cache.made_once("data", made_from, lambda: right)
                damage(cache.Cache("data").path(made_from), chance)
                found = cache.made_once("data", made_from, lambda: right)
                same = found.keys() == right.keys() and all(
                    torch.equal(found[name], right[name]) for name in right
                )
                figures.judged("same" if same else "other data")
    finally:
        os.environ[cache.CACHE] = before
    return figures


def loads(lab: Lab, count: int, chance: random.Random) -> Figures:
    """A checkpoint with one flipped bit is read: refused each time."""
    figures = Figures()
    whole = max((lab.cut().run / "checkpoints").iterdir()).read_bytes()
    path = lab.folder / "step-000000001.pt"
    for _ in range(count):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            checkpoint.read(path)
        except DamagedFile:
            figures.judged("told")
        else:
            figures.judged("read as if it were whole")
    return figures


def verify(lab: Lab, count: int, chance: random.Random) -> Figures:
    """``stillhouse verify`` finds a damaged file, whichever it is, and none in a whole run."""
    figures = Figures()
    for number in range(count):
        place = lab.place(cycle([lab.whole(), lab.cut()], number).run)
        if number % 8 == 0:
            code = lab.forks.run(["verify", place.run], place.folder, place.log)
            figures.judged("same" if code == 0 else f"a whole run: {place.said()[-300:]}")
        else:
            files = [path for path in sorted(place.run.rglob("*")) if path.is_file() and path.name[0] != "."]
            if not (place.run / "summary.json").exists():
                files = [
                    path for path in files if path.name != "metrics.jsonl"
                ]  # its last rows may not be sealed yet
            path = chance.choice(files)
            before = path.read_bytes()
            done = damage(path, chance)
            code = lab.forks.run(["verify", place.run], place.folder, place.log)
            said = place.said()
            harmless = path.name == "config.yaml" and code == 0 and _means_the_same(before, path.read_bytes())
            told = code in (1, 2) and "Traceback" not in said
            figures.judged(
                "told" if told else "same" if harmless else f"{path.name}, {done}, exit {code}: {said[-300:]}"
            )
        shutil.rmtree(place.folder)
    return figures


def _means_the_same(before: bytes, after: bytes) -> bool:
    from stillhouse.config import parse
    from stillhouse.errors import ConfigError

    try:
        return parse(before.decode(), "") == parse(after.decode(), "")
    except (ConfigError, UnicodeDecodeError):
        return False


def full_disk(lab: Lab, count: int, chance: random.Random) -> Figures:
    """A file may not grow beyond a limit: told, nothing lost, and taken up afterwards bit for bit."""
    figures = Figures()
    whole = lab.whole()
    for _ in range(count):
        place = lab.place()
        code = place.go(limit=chance.randrange(1, 40_000))
        outcome = place.outcome(code, whole)
        if outcome == "told":
            said = place.said()
            outcome = place.outcome(place.go("--resume"), whole)
            if "can't be written" not in said:
                outcome = f"without the file's name: {said[-200:]}"
        figures.judged("told" if outcome == "same" and code else outcome)
        shutil.rmtree(place.folder)
    return figures


def interrupted(lab: Lab, count: int, chance: random.Random) -> Figures:
    """Ctrl-C, SIGTERM, SIGHUP, once or several times at once: the exit status, no traceback, taken up bit for bit."""
    figures = Figures()
    whole = lab.whole()
    points = [
        "stillhouse.training.loop:Loop._update",
        "os:fsync",
        "stillhouse.runs.recorder:Recorder._validate",
    ]
    for number in range(count):
        place = lab.place()
        sends = {
            "function": chance.choice(points),
            "call": chance.randrange(1, 16),
            "times": chance.choice([1, 1, 2, 3]),
            "signal": int(cycle([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], number)),
        }
        code = place.go(interrupt=sends)
        expected = (0, 128 + sends["signal"])
        if code not in expected or "Traceback" in place.said():
            figures.judged(f"{sends}: exit {code}: {place.said()[-300:]}")
        else:
            figures.judged(place.outcome(place.go("--resume"), whole))
        shutil.rmtree(place.folder)
    return figures


def unread_output(lab: Lab, count: int, chance: random.Random) -> Figures:
    """Standard output is a pipe that nobody reads: the run ends as it would, with exit 0."""
    figures = Figures()
    for _ in range(count):
        place = lab.place()
        code = place.go(unread=True)
        figures.judged(_ended(place, code, lab))
        shutil.rmtree(place.folder)
    return figures


def _ended(place: Place, code: int, lab: Lab) -> str:
    return place.outcome(code, lab.whole()) if code == 0 else f"exit {code}: {place.said()[-200:]}"
