"""``stillhouse label`` and ``stillhouse labels``: soft labels made, looked at, mended, moved."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stillhouse.errors import ConfigError, DataError

FIDELITY = {
    "kl": "KL(exact || stored), all classes",
    "kept_kl": "KL(exact || stored), the kept entries and the rest",
    "sampled_kl": "KL(draws || exact): noise of the draws, no bias",
    "coverage": "mass of the kept classes",
    "entropy": "entropy of the teacher",
}


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add both commands to the parser; every parser made."""
    label = commands.add_parser("label", help="keep a teacher's answers, to train from them without it")
    label.add_argument("config", metavar="CONFIG|NAME", help="whose teacher, over whose data")
    label.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the config's")
    label.add_argument(
        "--out", required=True, metavar="DIR", help="a directory, or a URI such as s3://bucket/labels"
    )
    label.add_argument(
        "--form",
        choices=("dense", "topk", "sampled", "hidden"),
        help="default: dense to 1,024 outputs, topk above",
    )
    label.add_argument("--k", type=int, help="entries of a top k (default 64), or draws (default 50)")
    label.add_argument("--dtype", help="float32, float16, bfloat16, or uint8 for log-probabilities in a byte")
    label.add_argument(
        "--pack", action="store_true", help="compress each sample's block (zstd; extra 'pack')"
    )
    label.add_argument(
        "--features", nargs="+", default=(), metavar="MODULE", help="keep outputs of these modules too"
    )
    label.add_argument(
        "--head", default="", metavar="MODULE", help="for hidden: the module that makes the logits"
    )
    label.add_argument("--data", choices=("all", "labelled", "unlabelled"), default="all", help="default all")
    label.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="samples asked at once, default 64"
    )
    label.add_argument(
        "--shard-samples", type=int, metavar="N", help="samples of a shard; default: about 32 MiB"
    )
    label.add_argument("--seed", type=int, default=0, help="of the draws, default 0")
    label.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes, each with its own teacher"
    )
    label.add_argument("--ray", action="store_true", help="workers on a Ray cluster (extra 'ray')")
    labels = commands.add_parser("labels", help="look at, check, rewrite and move kept labels")
    verbs = labels.add_subparsers(dest="labels_command", metavar="COMMAND", required=True)
    inspect = verbs.add_parser(
        "inspect", help="counts, bytes, entropy, coverage, samples with their top classes"
    )
    inspect.add_argument("--show", type=int, default=3, metavar="N", help="samples shown, default 3")
    inspect.add_argument(
        "--names", metavar="FILE", help="JSON: a list of class names, or tokens with their numbers"
    )
    inspect.add_argument("--plot", metavar="FILE.png", help="draw entropy and coverage")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    verify = verbs.add_parser(
        "verify", help="check every shard's digest, and that no sample is missing or twice"
    )
    compact = verbs.add_parser("compact", help="write the same labels in fewer shards")
    compact.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    compact.add_argument("--pack", action="store_true", help="compress each sample's block (extra 'pack')")
    export = verbs.add_parser("export", help="write Parquet (extra 'parquet')")
    export.add_argument("--out", required=True, metavar="FILE.parquet")
    bring = verbs.add_parser(
        "import", help="read Parquet that 'export' or DistillKit wrote (extra 'parquet')"
    )
    bring.add_argument("source", metavar="FILE|DIR", help="a Parquet file, or DistillKit's directory")
    bring.add_argument(
        "made_from",
        nargs="*",
        metavar="FIELD=VALUE",
        help="what they were made from: teacher=..., tokenizer=...",
    )
    for verb in (inspect, verify, compact, export):
        verb.add_argument("dir", metavar="DIR", help="a store, or its URI")
    bring.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    return [label, inspect, verify, compact, export, bring]


def run(options: argparse.Namespace) -> int:
    """Do what the command line says."""
    if options.command == "label":
        return _label(options)
    verbs = {
        "inspect": _inspect,
        "verify": _verify,
        "compact": _compact,
        "export": _export,
        "import": _import,
    }
    return verbs[options.labels_command](options)


def _label(options: argparse.Namespace) -> int:
    from stillhouse.config import read
    from stillhouse.runs.labelling import Options, label
    from stillhouse.softlabels.writer import size

    for name in ("batch_size", "workers"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}; expected 1 or more")
    if options.shard_samples is not None and options.shard_samples < 1:
        raise ConfigError(f"--shard-samples {options.shard_samples}; expected 1 or more")
    chosen = Options(
        options.form, options.k, options.dtype, options.pack, tuple(options.features), options.head, options.data,
        options.batch_size, options.shard_samples, options.workers, options.ray, options.seed,
    )  # fmt: skip
    done = label(read(options.config, options.overrides), options.out, chosen, say=print)
    rows = sum(int(manifest["rows"]) for manifest in done.labels.manifests)
    print(
        f"{len(done.labels):,} samples, {rows:,} rows in {size(done.bytes)} ({done.bytes / max(rows, 1):.1f} B a row); "
        f"{done.made:,} labelled now, {done.seconds:.1f} s"
    )
    for name, value in done.fidelity.items():
        if name in FIDELITY:
            print(f"{FIDELITY[name]}: {value:.3g}{'' if name == 'coverage' else ' nats'}")
    print(f"see stillhouse labels inspect {options.out}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from stillhouse.softlabels import SoftLabels
    from stillhouse.softlabels.inspection import facts, plot, shown
    from stillhouse.softlabels.writer import size

    labels = SoftLabels.open(options.dir)
    found = facts(labels)
    if options.plot:
        plot(found, Path(options.plot))
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{labels.form}")
    missing = labels.about["samples"] - len(labels)
    note = f", {missing:,} of {labels.about['samples']:,} missing" if missing else ""
    print(f"{found['samples']:,} samples{note}, {found['rows']:,} rows, {found['shards']} shards")
    print(f"{size(found['bytes'])}, {found['bytes_per_row']:.1f} B a row")
    for name in ("entropy", "coverage"):
        if name in found:
            values = found[name]
            print(f"{name}: mean {values['mean']:.4g}, from {values['min']:.4g} to {values['max']:.4g}")
    for name, value in sorted(labels.fingerprint.items()):
        print(f"{name}: {value}")
    for name, value in (labels.about.get("fidelity") or {}).items():
        if name in FIDELITY:
            print(f"{FIDELITY[name]}: {value:.3g}")
    for line in shown(labels, options.show, _names(options.names)):
        print(line)
    return 0


def _names(path: str | None) -> dict[int, str]:
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--names {path} can't be read ({error}); expected JSON") from None
    if isinstance(content, list):
        return {number: str(name) for number, name in enumerate(content)}
    if isinstance(content, dict) and all(isinstance(number, int) for number in content.values()):
        return {number: name for name, number in content.items()}
    raise ConfigError(f"--names {path}: expected a list of names, or an object from token to number")


def _verify(options: argparse.Namespace) -> int:
    from stillhouse.softlabels.inspection import verify

    problems = 0
    for name, problem in verify(options.dir):
        problems += bool(problem)
        print(f"{'DAMAGED' if problem else 'ok     '} {name}{': ' + problem if problem else ''}")
    if problems:
        raise DataError(
            f"{problems} problem{'s' if problems > 1 else ''} in {options.dir}; run the command that labelled it again: what is "
            "whole is kept, and what is not is made again"
        )
    return 0


def _compact(options: argparse.Namespace) -> int:
    from stillhouse.softlabels import SoftLabels
    from stillhouse.softlabels.holding import held
    from stillhouse.softlabels.places import place
    from stillhouse.softlabels.rewrite import compact
    from stillhouse.softlabels.writer import size

    before = SoftLabels.open(options.dir)
    where = place(options.out)
    with held(where):
        after = compact(before, where, packed=options.pack or before.form.packed)
    was, now = (sum(int(item["bytes"]) for item in labels.manifests) for labels in (before, after))
    print(
        f"{len(before.manifests)} shards of {size(was)} are {len(after.manifests)} of {size(now)} in {options.out}"
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from stillhouse.softlabels import SoftLabels
    from stillhouse.softlabels.exchange import write_parquet

    labels = SoftLabels.open(options.dir)
    rows = write_parquet(labels, Path(options.out))
    print(f"{len(labels):,} samples, {rows:,} rows in {options.out}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from stillhouse.softlabels.exchange import read_any
    from stillhouse.softlabels.holding import held
    from stillhouse.softlabels.places import place

    made_from = {}
    for word in options.made_from:
        field, sign, value = word.partition("=")
        if not sign or field not in ("teacher", "tokenizer", "data"):
            raise ConfigError(f"'{word}'; expected teacher=DIGEST, tokenizer=DIGEST or data=DIGEST")
        made_from[field] = value
    where = place(options.out)
    with held(where):
        labels = read_any(Path(options.source), where, made_from)
    print(f"{len(labels):,} samples in {options.out}: {labels.form}")
    return 0
