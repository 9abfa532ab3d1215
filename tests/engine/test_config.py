"""Configs: YAML, then a.b=c, then pydantic; every mistake is named with its path."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from stillhouse.config import (
    MethodSpec,
    RunConfig,
    Training,
    apply_override,
    dump,
    parse,
    read,
    shipped,
    to_yaml,
    validate,
)
from stillhouse.errors import ConfigError
from stillhouse.runs.resolve import resolve

PLAIN = {"task": "digits", "method": "kd"}


def problem(content: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(content)
    return str(caught.value)


class TestKeys:
    @pytest.mark.parametrize(
        ("extra", "said"),
        [
            ({"stpes": 3}, "stpes: unknown; did you mean 'steps'?"),
            ({"batchsize": 3}, "batchsize: unknown; did you mean 'batch_size'?"),
            ({"qqq": 1}, "qqq: unknown; known: batch_size, cache_teacher"),
        ],
    )
    def test_an_unknown_key_is_refused_with_the_nearest_name(self, extra, said):
        assert said in problem({**PLAIN, **extra})

    @pytest.mark.parametrize(
        ("extra", "path"),
        [
            ({"steps": "many"}, "steps: "),
            ({"steps": 0}, "steps: "),
            ({"steps": 1.5}, "steps: "),
            ({"seed": -1}, "seed: "),
            ({"optimizer": {"lr": "fast"}}, "optimizer.lr: "),
            ({"optimizer": {"lr": 0}}, "optimizer.lr: "),
            ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: "),
            ({"precision": "fp8"}, "precision: "),
            ({"clip": float("inf")}, "clip: "),
            ({"task": 3}, "task"),
            ({"task": {"labelled": 3}}, "task.name: missing"),
            ({"name": "a/b"}, "name: "),
            ({"teacher": {"name": "mlp", "train": 5}}, "teacher.train: "),
            ({"observers": [3]}, "observers.0"),
        ],
    )
    def test_a_wrong_type_or_value_is_refused_with_its_path(self, extra, path):
        assert problem({**PLAIN, **extra}).startswith(path)

    def test_every_mistake_is_told_at_once(self):
        said = problem({**PLAIN, "steps": "x", "sed": 1})
        assert "steps: " in said
        assert "sed: unknown; did you mean 'seed'?" in said

    @pytest.mark.parametrize(
        "content", [{"task": "digits"}, {"task": "digits", "method": "kd", "methods": ["sld"]}]
    )
    def test_methods_are_named_in_one_way(self, content):
        assert problem(content) == "expected either 'method' (one) or 'methods' (a list)"

    def test_a_key_that_is_no_string_is_refused(self):
        assert "1" in problem({**PLAIN, 1: 2})

    def test_a_bare_name_is_a_name_without_settings(self):
        config = validate({**PLAIN, "methods": ["kd", {"name": "sld", "temperature": 2}], "method": None})
        assert [(path, spec.name, spec.settings) for path, spec in config.named_methods] == [
            ("methods.0", "kd", {}),
            ("methods.1", "sld", {"temperature": 2}),
        ]

    def test_a_config_does_not_change_after_it_was_read(self):
        with pytest.raises(ValueError, match=r"frozen"):
            validate(PLAIN).steps = 3


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("steps=9", {"steps": 9}),
            ("optimizer.lr=2e-3", {"optimizer": {"name": "AdamW", "lr": 2e-3}}),
            ("method.temperature=2", {"method": {"name": "kd", "temperature": 2}}),
            ("teacher.train.steps=5", {"teacher": {"train": {"steps": 5}}}),
            ("methods=[kd, sld]", {"methods": ["kd", "sld"]}),
            ("clip=", {"clip": None}),
            ("name=a=b", {"name": "a=b"}),
        ],
    )
    def test_sets_one_value(self, override, expected):
        content = {"method": "kd", "optimizer": "AdamW"}
        apply_override(content, override)
        assert {key: content[key] for key in expected} == expected

    def test_reaches_into_lists(self):
        content = {"methods": ["kd", {"name": "sld"}]}
        apply_override(content, "methods.0.temperature=2")
        apply_override(content, "methods.1.labels=hard")
        assert content == {"methods": [{"name": "kd", "temperature": 2}, {"name": "sld", "labels": "hard"}]}

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("steps", "expected KEY=VALUE"),
            ("=3", "expected KEY=VALUE"),
            ("methods.7.x=1", "'7' is no index of a list of 1"),
            ("methods.one.x=1", "'one' is no index"),
            ("steps.x=1", "'steps' holds 5, which has no keys"),
            ("steps=[1", "expected plain YAML"),
            ("steps=!!python/name:os.system", "could not determine a constructor"),
        ],
    )
    def test_a_mistake_is_told_with_the_override(self, override, said):
        with pytest.raises(ConfigError) as caught:
            apply_override({"steps": 5, "methods": ["kd"]}, override)
        assert f"override '{override}'" in str(caught.value)
        assert said in str(caught.value)

    def test_come_after_the_file(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("task: digits\nmethod: kd\nsteps: 5\n")
        config = read(str(path), ["steps=7", "method.temperature=2"])
        assert (config.steps, config.method.settings, config.name) == (7, {"temperature": 2}, "mine")


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("steps: 1\nsteps: 2", "f.yaml:2: key 'steps' stands twice; expected once"),
            ("a: {b: 1, b: 2}", "f.yaml:1: key 'b' stands twice"),
            ("a: [1", "expected plain YAML"),
            ("- a", "got list; expected keys and values"),
            ("", "got NoneType; expected keys and values"),
            ("hello", "got str; expected keys and values"),
            ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
            ("a: !import_call {key: os.system}", "could not determine a constructor"),
            ("? [1, 2]\n: 3", "f.yaml:1: "),
            ("a: \x07", "f.yaml"),
        ],
    )
    def test_what_is_not_plain_is_refused_with_its_line(self, text, said):
        with pytest.raises(ConfigError) as caught:
            parse(text, "f.yaml")
        assert said in str(caught.value)

    def test_a_file_that_is_no_text_is_refused(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_bytes(b"\xff\xfe\x00\x01")
        with pytest.raises(ConfigError, match=r"mine\.yaml"):
            read(str(path))

    def test_a_file_that_is_not_there_offers_the_nearest_shipped_config(self):
        with pytest.raises(ConfigError, match=r"did you mean 'mnist1d-sld'"):
            read("mnist1d-sdl")

    def test_a_resolved_config_reads_back_as_itself(self):
        config = validate({**PLAIN, "optimizer": {"lr": 3e-3, "betas": [0.9, 0.99]}, "out": "x"})
        assert validate(parse(to_yaml(dump(config)), "again")) == config


def test_every_shipped_config_is_valid_and_says_what_it_is():
    assert set(shipped()) >= {"mnist1d-hard", "mnist1d-kd", "mnist1d-sld"}
    for name, path in shipped().items():
        assert read(name).name == name
        assert path.read_text().startswith("# ")


def test_the_compared_configs_differ_in_the_method_alone():
    plain = [dump(read(name)) for name in ("mnist1d-hard", "mnist1d-kd", "mnist1d-sld")]
    for config in plain:
        del config["name"], config["method"]
    assert plain[0] == plain[1] == plain[2]


def test_sld_runs_without_a_setting():
    assert read("mnist1d-sld").method == MethodSpec(name="sld")


def test_adamw_is_the_default_with_decoupled_weight_decay():
    assert Training().optimizer.name == "AdamW"
    assert RunConfig.model_fields.keys() > Training.model_fields.keys()


def test_the_commands_that_the_docs_show_resolve():
    root = Path(__file__).parents[2]
    lines = [
        line
        for name in ("README.md", "docs/configuration.md")
        for line in (root / name).read_text().splitlines()
    ]
    shown = [
        shlex.split(line, comments=True)[2:] for line in lines if line.startswith("stillhouse run mnist1d")
    ]
    assert len(shown) >= 3
    for name, *overrides in shown:
        resolve(read(name, [word for word in overrides if not word.startswith("--")]))
