"""The command line. Parsing imports nothing heavy; each command imports what it needs.

stillhouse run CONFIG|NAME [a.b=c ...] [--resume]
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from stillhouse.cli.signals import handled
from stillhouse.errors import StillhouseError, StillhouseWarning, printable
from stillhouse.terminal import steady_streams


def parser() -> argparse.ArgumentParser:
    """The whole command-line surface."""
    from stillhouse.cli import label_commands

    main = argparse.ArgumentParser(
        prog="stillhouse", description="A plugin-based engine for knowledge distillation."
    )
    main.add_argument("--version", action="store_true", help="print the version")
    commands = main.add_subparsers(dest="command", metavar="COMMAND")
    every = [*_making(commands), *_study(commands), *label_commands.add(commands), *_looking(commands)]
    every += [*_files(commands), *_plugins(commands), *_machine(commands), *_benches(commands)]
    main.add_argument("--debug", action="store_true", help="show tracebacks")
    for command in every:
        # SUPPRESS: a default here would undo a --debug before the command.
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
    return main


Parsers = tuple[argparse.ArgumentParser, ...]


def _making(commands: Any) -> Parsers:
    run = commands.add_parser("run", help="make one run from a config file or a shipped config's name")
    run.add_argument(
        "config", metavar="CONFIG|NAME", help="a YAML file, or a name: see 'stillhouse config list'"
    )
    run.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the config's")
    _keeping(run)

    compare = commands.add_parser("compare", help="make several runs with several seeds and print one table")
    compare.add_argument(
        "configs", nargs="+", metavar="CONFIG|NAME|a.b=c", help="configs; overrides go to each"
    )
    compare.add_argument("--seeds", default="0,1,2", metavar="0,1,2", help="seeds, default 0,1,2")
    compare.add_argument("--out", default="runs/compare", metavar="DIR", help="default runs/compare")
    compare.add_argument("--workers", type=int, metavar="N", help="runs at once, default as many as fit")
    _keeping(compare)
    return run, compare


def _looking(commands: Any) -> Parsers:
    verify = commands.add_parser("verify", help="check every file of a run against its digest")
    verify.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    verify.add_argument("--json", action="store_true", help="as JSON")
    runs = commands.add_parser("runs", help="what runs there are: finished, running, damaged, and how far")
    runs.add_argument("dir", nargs="?", default="runs", metavar="DIR", help="default runs")
    runs.add_argument("--json", action="store_true", help="as JSON")
    return verify, runs


def _files(commands: Any) -> Parsers:
    init = commands.add_parser("init", help="write a config for a task over your own files, with comments")
    init.add_argument(
        "task", metavar="TASK", help="causal-lm, text-classification, token-classification, ..."
    )
    init.add_argument("--file", default=None, metavar="YAML", help="default TASK.yaml")
    init.add_argument("--train", default="data", metavar="PATH", help="training file or folder")
    init.add_argument("--teacher", default="teacher", metavar="DIR", help="the teacher's checkpoint")
    init.add_argument("--student", default="student", metavar="DIR", help="the student's checkpoint")
    export = commands.add_parser(
        "export", help="the trained model of a run alone, for use without Stillhouse"
    )
    export.add_argument("run", metavar="RUN", help="a finished run's directory")
    export.add_argument(
        "--to", default="transformers", metavar="FORM", help="transformers, torch-export or onnx"
    )
    export.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    return init, export


def _plugins(commands: Any) -> Parsers:
    plugins = commands.add_parser("plugins", help="list what is installed, without importing it; and more")
    plugins.add_argument("--json", action="store_true", help="as JSON")
    _plugin_verbs(plugins)

    config = commands.add_parser("config", help="show configs").add_subparsers(
        dest="config_command", metavar="COMMAND", required=True
    )
    show = config.add_parser("show", help="print a config with every default filled in")
    show.add_argument("config", metavar="CONFIG|NAME")
    show.add_argument("overrides", nargs="*", metavar="a.b=c")
    config.add_parser("list", help="list the shipped configs")

    commands.add_parser("schema", help="print the config's JSON schema, for editors")
    return plugins, show


def _machine(commands: Any) -> Parsers:
    doctor = commands.add_parser(
        "doctor", help="versions, devices, the kernel in use and why, missing extras"
    )
    doctor.add_argument("--kernels", action="store_true", help="check the kernels on the devices at hand")
    doctor.add_argument("--json", action="store_true", help="as JSON")

    commands.add_parser("warmup", help="compile the CPU kernels now, and keep them: for images and CI")
    return (doctor,)


def _benches(commands: Any) -> Parsers:
    bench = commands.add_parser("bench", help="measure, side by side in one run").add_subparsers(
        dest="bench_command", metavar="WHAT", required=True
    )
    overhead = bench.add_parser("overhead", help="the engine's step beside the same step written by hand")
    overhead.add_argument("--steps", type=int, default=200, help="updates in a block, default 200")
    overhead.add_argument("--blocks", type=int, default=15, help="interleaved blocks of each, default 15")
    overhead.add_argument("--json", action="store_true", help="as JSON")
    trainers = bench.add_parser(
        "trainers", help="an update of a language model beside one by hand, and TRL's"
    )
    trainers.add_argument("--rounds", type=int, default=15, help="updates of each, taking turns, default 15")
    trainers.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    trainers.add_argument("--json", action="store_true", help="as JSON")
    labels = bench.add_parser(
        "labels", help="reading kept labels beside a bare memory map and a teacher's forward"
    )
    labels.add_argument("--json", action="store_true", help="as JSON")
    labels.add_argument("--quick", action="store_true", help="reading alone, not training")
    study_costs = bench.add_parser("study", help="a study beside the sum of its cells' own time")
    study_costs.add_argument("--cells", type=int, default=40, help="runs of the study, default 40")
    study_costs.add_argument("--updates", type=int, default=2000, help="updates of each, default 2000")
    study_costs.add_argument("--workers", type=int, default=1, help="cells at once, default 1")
    study_costs.add_argument("--json", action="store_true", help="as JSON")
    kernels = bench.add_parser(
        "kernels", help="softmax-KL beside torch, and beside the memory floor", add_help=False
    )
    kernels.add_argument("rest", nargs=argparse.REMAINDER)
    return overhead, trainers, study_costs, labels


def _study(commands: Any) -> Parsers:
    study = commands.add_parser("study", help="tune methods, run them on fresh seeds, and write a report")
    study.add_argument("study", metavar="STUDY.yaml|NAME", help="a study's file, or a shipped study's name")
    study.add_argument("--quick", action="store_true", help="as small as the study's key 'quick' says")
    study.add_argument("--out", metavar="DIR", help="default runs/study-NAME")
    where = study.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, metavar="N", help="cells at once, default as many as fit")
    where.add_argument("--ray", action="store_true", help="on the machines of a Ray cluster")
    study.add_argument(
        "--merge",
        action="append",
        default=[],
        metavar="DIR",
        help="take over finished cells from another machine",
    )
    study.add_argument(
        "--limit", type=float, metavar="SECONDS", help="kill a cell that takes longer; default never"
    )
    _keeping(study)
    report = commands.add_parser("report", help="write a study's report again, finished or not")
    report.add_argument("dir", metavar="DIR")
    report.add_argument("--out", metavar="DIR", help="default DIR")
    return study, report


def _plugin_verbs(plugins: argparse.ArgumentParser) -> None:
    verbs = plugins.add_subparsers(dest="plugins_command", metavar="COMMAND")
    kinds = ("method", "task", "observer")
    new = verbs.add_parser("new", help="write a package with a plugin that works")
    new.add_argument("name", metavar="NAME", help="what configs will call it")
    new.add_argument("--kind", choices=kinds, default="method", help="default method")
    new.add_argument("--dir", metavar="DIR", help="default stillhouse-NAME")
    show = verbs.add_parser("show", help="what a plugin implements, requires and can be told")
    check = verbs.add_parser("check", help="the conformance checks of stillhouse.testing")
    for verb in (show, check):
        verb.add_argument("name", metavar="NAME")
        verb.add_argument("--kind", choices=(*kinds, "model"), help="where a name stands for several")
    for verb in (new, show, check):
        verb.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="as JSON")
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def _keeping(command: argparse.ArgumentParser) -> None:
    group = command.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    group.add_argument("--overwrite", action="store_true", help="start over, replacing what is there")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status.

    0 when it worked; 1 where a check found something, and for a fault of ours; 2 for a mistake that the user can mend;
    128 + N where signal N ended it (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP).
    """
    with handled(restore=argv is not None), steady_streams():
        try:
            return _main(sys.argv[1:] if argv is None else list(argv))
        except KeyboardInterrupt as ended:
            print("interrupted", file=sys.stderr)
            return 128 + int(getattr(ended, "number", signal.SIGINT))


def _main(words: Sequence[str]) -> int:
    options = _parsed(words)
    if options.version:
        from stillhouse import __version__

        print(f"stillhouse {__version__}")
        return 0
    if options.command is None:
        parser().print_help()
        return 0
    warnings.showwarning = _show_warning(warnings.showwarning)
    try:
        return _dispatch(options)
    except Exception as error:
        if getattr(options, "debug", False):
            raise
        return _report(error)


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """The options; overrides may also stand after an option, where argparse by itself takes none."""
    words, kept = _without_rest(words)
    options, rest = parser().parse_known_args(words)
    if kept:
        options.rest = kept
    late: list[str] | None = getattr(options, "overrides", getattr(options, "configs", None))
    if rest and (late is None or any(word.startswith("-") for word in rest)):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    if late is not None:
        late.extend(rest)
    return options


def _without_rest(words: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """``bench kernels`` has a parser of its own, and argparse hands on no remainder that begins with an option."""
    for first in range(len(words) - 1):
        if list(words[first : first + 2]) == ["bench", "kernels"]:
            return words[: first + 2], list(words[first + 2 :])
        if not words[first].startswith("-"):
            break
    return words, []


def _dispatch(options: argparse.Namespace) -> int:
    if options.command == "bench" and options.bench_command == "kernels":
        from stillhouse.bench import kernels

        return kernels.main(kernels.parser().parse_args(options.rest))
    from stillhouse.cli import commands

    command = options.command
    if command in ("label", "labels"):
        from stillhouse.cli import label_commands

        return label_commands.run(options)
    if command == "plugins":
        from stillhouse.cli import plugin_commands

        return plugin_commands.run(options)
    if command in ("verify", "runs"):
        from stillhouse.cli import run_commands

        return int(getattr(run_commands, command)(options))
    if command in ("study", "compare", "report"):
        from stillhouse.cli import study_commands

        return int(getattr(study_commands, {"report": "write_report"}.get(command, command))(options))
    if command in ("bench", "config"):
        command += f"_{getattr(options, f'{command}_command')}"
    return int(getattr(commands, command)(options))


def _show_warning(otherwise: Callable[..., None]) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, StillhouseWarning):
            print(printable(f"note: {message}"), file=sys.stderr)
        else:
            otherwise(message, category, *rest, **more)

    return show


def _report(error: Exception) -> int:
    """A mistake as a message; a plugin's failure with its own line; ours with its traceback."""
    notes = getattr(error, "__notes__", [])
    if isinstance(error, StillhouseError):
        print(f"error: {error}", file=sys.stderr)
        for note in notes:
            print(printable(f"  {note}"), file=sys.stderr)
        number = getattr(error, "number", None)  # of the signal that a run was ended by
        return 2 if number is None else 128 + int(number)
    import traceback

    if notes:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(printable(f"error: {type(error).__name__}: {error}"), file=sys.stderr)
        for note in notes:
            print(printable(f"  {note}"), file=sys.stderr)
        print(f"  at {frame.filename}:{frame.lineno} (--debug shows all of it)", file=sys.stderr)
        return 2
    if isinstance(error, OSError):
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print("error: this is a fault of stillhouse; please report it with the lines above", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
