"""What each command does. Imported by the command line once a command is known."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from stillhouse.plugin import catalog


def run(options: argparse.Namespace) -> int:
    """Make one run and print where it is and what it scored."""
    from stillhouse.config import read
    from stillhouse.runs.display import display, numbers
    from stillhouse.runs.train import run as make
    from stillhouse.terminal import show

    config = read(options.config, options.overrides)
    summary = make(config, resume=options.resume, overwrite=options.overwrite, display=display())
    for split, scores in summary["scores"].items():
        show(f"{split}: {numbers(scores)}")
    for warning in summary["warnings"]:
        show(f"note: {warning}")
    print(f"{summary['steps']} updates, {summary['teacher_calls']} teacher calls, {summary['seconds']:.1f} s")
    print(f"see {Path(summary['dir']) / 'README.md'}")
    return 0


def config_show(options: argparse.Namespace) -> int:
    """Print a config as it would be run."""
    from stillhouse.config import dump, read, to_yaml
    from stillhouse.runs.resolve import resolve

    print(to_yaml(dump(resolve(read(options.config, options.overrides)).config)), end="")
    return 0


def config_list(options: argparse.Namespace) -> int:
    """List the shipped configs with the comment that each begins with."""
    from stillhouse.config import shipped

    known = shipped()
    width = max(map(len, known))
    for name, path in known.items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        print(f"{name.ljust(width)}  {first.removeprefix('#').strip()}")
    return 0


def schema(options: argparse.Namespace) -> int:
    """Print the JSON schema."""
    from stillhouse.plugin.schema import schema as make

    print(json.dumps(make(), indent=2))
    return 0


def bench_overhead(options: argparse.Namespace) -> int:
    """Measure the engine's step beside one written by hand."""
    from stillhouse.bench.overhead import main

    return main(options)


def init(options: argparse.Namespace) -> int:
    """Write a config for a task."""
    from stillhouse.scaffold.config import write
    from stillhouse.terminal import show

    file = Path(options.file or f"{options.task}.yaml")
    write(options.task, file, train=options.train, teacher=options.teacher, student=options.student)
    show(f"wrote {file}; look through it, then: stillhouse run {file}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a run's model for use without Stillhouse."""
    from stillhouse.runs.compression import table
    from stillhouse.runs.contents import COMPRESSION
    from stillhouse.runs.export import export as write
    from stillhouse.terminal import show

    found = write(Path(options.run).expanduser(), options.to, Path(options.out).expanduser())
    show(f"wrote {options.out}; its outputs are the run's to {found.difference:.1e} of the greatest")
    if found.inputs:
        show(f"it takes {', '.join(found.inputs)}")
    if found.length is not None:
        show(
            f"it takes rows of {found.length} tokens alone: the model's code lets no other length be exported"
        )
    show(table(found.sizes))
    show(f"see {Path(options.run) / COMPRESSION}")
    return 0


def bench_trainers(options: argparse.Namespace) -> int:
    """Measure an update of a language model beside one written by hand."""
    from stillhouse.bench.trainers import main

    return main(options)


def bench_labels(options: argparse.Namespace) -> int:
    """Measure kept labels beside a bare memory map, hard labels and a teacher's forward."""
    from stillhouse.bench.labels import main

    return main(options)


def bench_study(options: argparse.Namespace) -> int:
    """Measure a study beside the sum of its cells."""
    from stillhouse.bench.study import main

    return main(options)


def warmup(options: argparse.Namespace) -> int:
    """Compile what the first training would otherwise wait for."""
    from stillhouse.kernels import warmup as make

    return 0 if make(lambda line: print(line, flush=True)) else 1


def doctor(options: argparse.Namespace) -> int:
    """Say what is there, what is in use, and what is missing."""
    import torch

    from stillhouse.cache import cache_dir
    from stillhouse.kernels import check, explain
    from stillhouse.runs.machine import machine

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "versions": {"python": sys.version.split()[0]},
        "devices": {},
        "extras": _extras(),
    }
    for name in ("stillhouse", "torch", "numpy", "numba", "pluggy", "pydantic", "safetensors"):
        found["versions"][name] = version(name)
    for device in devices:
        backend, why = explain(device, certain=options.kernels)
        found["devices"][str(device)] = {**machine(device), "kernel": backend, "why": why}
        if options.kernels:
            found["devices"][str(device)]["checks"] = check(device)
    found["plugins"] = _loadable()
    found["cache"] = str(cache_dir())
    bad = any(not ok for facts in found["devices"].values() for _, ok, _ in facts.get("checks", []))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_doctor(found)
    return 1 if bad else 0


def _print_doctor(found: dict[str, Any]) -> None:
    for name, value in found["versions"].items():
        print(f"{name:12} {value}")
    for device, facts in found["devices"].items():
        print(f"{device:12} {facts['device']}, {facts['cpus']} processors, {facts['threads']} threads")
        print(f"{'':12} kernel backend {facts['kernel']}: {facts['why']}")
        for name, ok, detail in facts.get("checks", []):
            print(f"{'':12} {'ok    ' if ok else 'FAILED'} {name}: {detail}")
    for extra, missing in found["extras"].items():
        state = f"missing {', '.join(missing)}: pip install 'stillhouse[{extra}]'" if missing else "installed"
        print(f"{'extra':12} {extra}: {state}")
    for name, problem in found["plugins"].items():
        print(f"{'plugin':12} {name}: {problem or 'loads'}")
    print(f"{'cache':12} {found['cache']}")


def _extras() -> dict[str, list[str]]:
    """For each extra, the distributions that are not installed."""
    missing: dict[str, list[str]] = {}
    for requirement in requires("stillhouse") or []:
        spec, _, marker = requirement.partition(";")
        _, found, extra = marker.replace('"', "'").partition("extra == '")
        if not found:
            continue
        name = spec.split("[")[0].split("=")[0].split("<")[0].split(">")[0].split("~")[0].strip()
        lacking = missing.setdefault(extra.rstrip("' "), [])
        try:
            version(name)
        except PackageNotFoundError:
            lacking.append(name)
    return missing


def _loadable() -> dict[str, str]:
    """Every plugin with what keeps it from loading, or an empty string."""
    from stillhouse.errors import PluginError

    found = {}
    for entry in catalog.entries():
        try:
            catalog.load(entry)
            found[f"{entry.kind} {entry.name}"] = ""
        except PluginError as error:
            found[f"{entry.kind} {entry.name}"] = str(error)
    return found
