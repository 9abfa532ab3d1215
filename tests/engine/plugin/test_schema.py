"""The JSON schema by which an editor completes a config."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml

from stillhouse.config import dump, shipped, validate
from stillhouse.plugin.schema import schema
from stillhouse.runs.resolve import resolve


@pytest.fixture(scope="module")
def checks():
    made = json.loads(json.dumps(schema()))
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_config_is_valid_as_it_is_written_and_as_it_is_resolved(name, checks):
    content = yaml.safe_load(shipped()[name].read_text())
    checks.validate(content)
    checks.validate(dump(resolve(validate({"name": name, **content})).config))


PLAIN = {"task": "digits", "method": "sld"}


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        {**PLAIN, "method": {"name": "sld", "labels": "hard", "top_per_class": 3}},
        {**PLAIN, "student": {"name": "mlp", "hidden": 3}, "target": "mlp"},
        {**PLAIN, "teacher": {"name": "mlp", "checkpoint": "x.safetensors"}},
        {**PLAIN, "optimizer": {"name": "SGD", "momentum": 0.9}, "scheduler": "CosineAnnealingLR"},
        {"task": "digits", "methods": ["kd", {"name": "hard_labels"}], "observers": ["tensorboard"]},
    ],
)
def test_knows_what_a_config_may_hold(content, checks):
    checks.validate(content)


@pytest.mark.parametrize(
    "content",
    [
        {**PLAIN, "stpes": 3},
        {**PLAIN, "steps": "many"},
        {**PLAIN, "method": "sdl"},
        {**PLAIN, "method": {"name": "sld", "labels": "true"}},
        {**PLAIN, "method": {"name": "sld", "temprature": 3}},
        {**PLAIN, "task": {"name": "digits", "labelled": -1}},
        {**PLAIN, "student": {"name": "mlp", "hiden": 3}},
        {**PLAIN, "precision": "fp8"},
    ],
)
def test_knows_what_it_may_not(content, checks):
    assert not checks.is_valid(content)


def test_describes_its_keys(checks):
    properties = checks.schema["properties"]
    assert properties["steps"]["description"]
    assert properties["steps"]["default"] == 3000


def test_a_plugin_that_can_not_be_loaded_is_named_and_not_described(install):
    install("acme", "[stillhouse.methods]\nacme = acme_broken:Mine\n", acme_broken="raise RuntimeError")
    assert "acme" in schema()["$defs"]["Method"]["anyOf"][0]["enum"]


def test_the_command_prints_it(cli):
    assert json.loads(cli("schema").out)["title"] == "Stillhouse run"
