"""YAML from anyone: numbers as people write them, nothing that grows, nothing but plain values."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.plain_yaml import DEPTH, NODES, dump, load

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["1e-8", "2024-01-01", "0x1F", ".5", "1_0", "on", "~", "1:30", "-.inf"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc_1", min_size=1, max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-8", 1e-8), ("1E3", 1000.0), ("-2.5e+3", -2500.0), (".5", 0.5), ("5.", 5.0), ("1_000", 1000), ("0x10", 16), ("-7", -7), ("0", 0),
        ("2024-01-01", "2024-01-01"), ("007", "007"), ("1:30", "1:30"), ("e5", "e5"), ("1e", "1e"), ("+1", 1), ("yes", True), ("~", None),
    ],
)  # fmt: skip
def test_numbers_are_what_they_look_like(text, value):
    found = load(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]", "a: &a {<<: *a}", "a: " + "[" * (DEPTH + 5), "a: [" + "0," * NODES + "0]", "a: " + "9" * 50, "a: !!int x",
        "a: !!binary aGk=", "a: !!set {b}", "a: !!timestamp 2024-01-01", "a: !!bool x", "a: !x y", "a: !!python/name:os.system",
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcde", "bcdef", strict=True)),
    ],
)  # fmt: skip
def test_what_grows_or_is_not_plain_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        load(text)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), PLAIN, max_size=4))
def test_what_is_dumped_reads_back_as_it_is(content):
    assert load(dump(content)) == content
