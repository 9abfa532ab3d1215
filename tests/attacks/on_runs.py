"""Kills at any moment, several processes in one directory, and folders that are somebody's."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from attacks.lab import REHEARSED, Figures, Lab, Place, cycle, tree

POINTS = {
    "stillhouse.training.loop:Loop._update": REHEARSED + 18,
    "os:fsync": 18,
    "os:replace": 18,
    "os:unlink": 10,
    "stillhouse.runs.checkpoint:write": 9,
    "stillhouse.runs.metrics:Metrics.add": 12,
}
"""Functions at whose calls a run is killed, and about how often each is called."""


def _point(chance: random.Random) -> dict[str, object]:
    function = chance.choice(list(POINTS))
    call = chance.randrange(1, POINTS[function] + 1)
    return {"function": function, "call": call, "when": chance.choice(["before", "after"])}


def kills(lab: Lab, count: int, chance: random.Random) -> Figures:
    """Killed at a call of its own, or at any moment from outside, up to three times: taken up, bit for bit."""
    figures = Figures()
    whole = lab.whole()
    while figures.tried < count:
        place = lab.place()
        died = 0
        for _ in range(chance.choice([1, 1, 2, 3])):
            flags = ["--resume"] if died else []
            if chance.random() < 0.3:
                pid = place.start(*flags)
                time.sleep(chance.random() * 0.3)
                os.kill(pid, signal.SIGKILL)
                code = lab.forks.wait(pid)
            else:
                code = place.go(*flags, die=_point(chance))
            died += code == -signal.SIGKILL
        outcome = place.outcome(place.go("--resume"), whole)
        if outcome == "same" and (left := _left(place)):
            outcome = f"left behind: {left}"
        for _ in range(max(died, 1)):
            figures.judged("same" if outcome == "same" else outcome)
        shutil.rmtree(place.folder)
    return figures


def _left(place: Place) -> list[str]:
    return [path.name for path in place.run.rglob(".*") if path.name.endswith(".part")]


def kills_in_overwrite(lab: Lab, count: int, chance: random.Random) -> Figures:
    """Killed while a finished run of another config is replaced: the old run whole, or the new one, from any command."""
    figures = Figures()
    other, whole = lab.whole("optimizer.lr=0.01"), lab.whole()
    for number in range(count):
        place = lab.place(other.run)
        function, calls = cycle(
            [("os:unlink", 10), ("os:fsync", 8), ("os:replace", 8), ("os:rmdir", 3)], number
        )
        died = {
            "function": function,
            "call": chance.randrange(1, calls),
            "when": chance.choice(["before", "after"]),
        }
        place.go("--overwrite", die=died)
        flags = cycle([("--overwrite",), ("--resume",), ()], number)
        code = place.go(*flags)
        outcome = place.outcome(code, whole)
        if outcome == "told":  # the old run is still whole, or the new one unfinished: overwriting goes on
            untouched = place.result() == other.result()
            outcome = place.outcome(place.go("--overwrite"), whole)
            outcome = outcome if outcome != "same" else "same" if untouched or place.result() else "lost"
        figures.judged(outcome)
        shutil.rmtree(place.folder)
    return figures


RATES = ("optimizer.lr=0.001", "optimizer.lr=0.01", "optimizer.lr=0.003")


def processes(lab: Lab, count: int, chance: random.Random) -> Figures:
    """Two or three at once in one directory, with other rates: one of them has it, whole; the others are told."""
    figures = Figures()
    wholes = [lab.whole(rate) for rate in RATES]
    for number in range(count):
        place = lab.place()
        several = cycle([3, 2], number)
        logs = [place.folder / f"log{each}" for each in range(several)]
        pids = []
        for each in range(several):
            words = ["run", "run.yaml", "out=run", RATES[each], *cycle([(), ("--overwrite",), ()], number)]
            pids.append(lab.forks.start(words, place.folder, logs[each], quick=True))
            time.sleep(chance.random() * 0.05)
        codes = [lab.forks.wait(pid) for pid in pids]
        figures.judged(_one_of(place, codes, logs, wholes))
        shutil.rmtree(place.folder)
    return figures


def _one_of(place: Place, codes: list[int], logs: list[Path], wholes: list[Place]) -> str:
    said = [log.read_text() for log in logs]
    if any(code not in (0, 2) for code in codes) or any("Traceback" in text for text in said):
        return f"exits {codes}: {said}"
    if 0 not in codes:
        return f"nobody had it: {said}"
    rate = json.loads((place.run / "manifest.json").read_text())["config"]["optimizer"]["lr"]
    owner = [float(name.partition("=")[2]) for name in RATES].index(rate)
    if codes[owner] != 0:
        return f"the config is of one that was refused: {said}"
    return "same" if place.result() == wholes[owner].result() else "mixed"


def twice(lab: Lab, count: int, chance: random.Random) -> Figures:
    """The same config twice at once, or --resume beside a live run: no row doubled, the same results."""
    figures = Figures()
    whole = lab.whole()
    for number in range(count):
        place = lab.place()
        first = place.start()
        time.sleep(chance.random() * 0.4)
        flags = cycle([(), ("--resume",), ("--overwrite",)], number)
        log = place.folder / "log2"
        second = lab.forks.run(["run", "run.yaml", "out=run", *flags], place.folder, log, quick=True)
        code = lab.forks.wait(first)
        if {code, second} - {0, 2} or "Traceback" in log.read_text():
            figures.judged(f"exits {code}, {second}: {log.read_text()[-300:]}")
        else:
            figures.judged(place.outcome(min(code, second), whole))
        shutil.rmtree(place.folder)
    return figures


def foreign_folders(lab: Lab, count: int, chance: random.Random) -> Figures:
    """A folder with ``config.yaml``, ``.git`` and a text file: every file is there afterwards, as it was."""
    figures = Figures()
    whole = lab.whole()
    for number in range(count):
        place = lab.place()
        ours = number % 3 == 2  # a run of ours, into which somebody put files
        if ours:
            shutil.copytree(whole.run, place.run)
        place.run.mkdir(exist_ok=True)
        theirs = _furnish(place.run, chance, ours=ours)
        before = tree(place.run)
        flags = cycle([(), ("--overwrite",), ("--resume",)], chance.randrange(3))
        code = _run_in(place, cycle(["out=run", "out=.", "absolute", "link", "its config"], number), flags)
        after = tree(place.run)
        lost = [name for name in theirs if before.get(name) != after.get(name)]
        changed = [] if ours else [name for name in after if name not in before]
        problem = f"lost {lost}" if lost else f"left {changed}" if changed else ""
        if not problem and (code not in (0, 2) or "Traceback" in place.said()):
            problem = f"exit {code}: {place.said()[-300:]}"
        figures.judged(problem or ("told" if code else "same"))
        shutil.rmtree(place.folder)
    return figures


def _furnish(folder: Path, chance: random.Random, *, ours: bool) -> list[str]:
    """Put somebody's files there; their names."""
    before = set(tree(folder))
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (folder / "thesis.txt").write_text("three years\n")
    if not ours:
        (folder / "config.yaml").write_text(
            chance.choice(["db: x\n", "defaults:\n- model\n", "task: digits\nmethod: kd\n"])
        )
        if chance.random() < 0.5:
            (folder / "manifest.json").write_text('{"name": "an extension", "stillhouse": 1}')
    for name in ("checkpoints", "notes", "soft-labels"):
        if chance.random() < 0.5:
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "best.pt").write_text("mine")
    return sorted(set(tree(folder)) - before)


def _run_in(place: Place, how: str, flags: tuple[str, ...]) -> int:
    words = ["run", "run.yaml", "out=run"]
    cwd = place.folder
    if how == "out=.":
        words, cwd = ["run", "../run.yaml", "out=."], place.run
    elif how == "absolute":
        words[-1] = f"out={place.run}"
    elif how == "link":
        (place.folder / "link").symlink_to(place.run)
        words[-1] = "out=link"
    elif how == "its config":
        words = [
            "run",
            "run/config.yaml",
            *(["out=run"] if not (place.run / "manifest.json").exists() else []),
        ]
    return place.forks.run([*words, *flags], cwd, place.log, quick=True)


def hostile_repositories(lab: Lab, count: int, chance: random.Random) -> Figures:
    """A run in a working directory whose git config names programs: none of them runs."""
    figures = Figures()
    for _ in range(count):
        place = lab.place()
        mark = place.folder / "ran"
        git = ["git", "-C", str(place.folder), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        (place.folder / "a.txt").write_text("a")
        (place.folder / ".gitattributes").write_text("*.txt filter=evil\n")
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", "a"], check=True)
        program = f"touch {mark}; cat"
        for key in (
            "core.fsmonitor",
            "filter.evil.clean",
            "filter.evil.process",
            "core.hooksPath",
            "core.sshCommand",
        ):
            subprocess.run([*git, "config", key, program], check=True)
        (place.folder / "a.txt").write_text(f"{chance.random()}")
        code = place.go()
        outcome = place.outcome(code, lab.whole())
        if mark.exists():
            outcome = "a program of the repository ran"
        elif not json.loads((place.run / "manifest.json").read_text())["git"].get("changed"):
            outcome = "the change in the repository was not seen"
        figures.judged(outcome)
        shutil.rmtree(place.folder)
    return figures
