"""Strict configuration: every mistake is named, overrides are typed, hashes are stable."""

import pytest
from pydantic import Field, ValidationError

from cllm.config import Config, digest
from cllm.errors import InputError


class Inner(Config):
    steps: int = Field(10, ge=1)
    rate: float = 0.5
    label: str = "x"
    flag: bool = False


class Outer(Config):
    inner: Inner = Inner()
    optional: Inner | None = None
    sizes: tuple[int, ...] = (1,)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("inner.steps=3", Outer(inner=Inner(steps=3))),
        ("inner.rate=1e-3", Outer(inner=Inner(rate=1e-3))),
        ("inner.label=a=b", Outer(inner=Inner(label="a=b"))),
        ("inner.flag=true", Outer(inner=Inner(flag=True))),
        ("sizes=[4,5]", Outer(sizes=(4, 5))),
        ('optional={"steps": 2}', Outer(optional=Inner(steps=2))),
    ],
)
def test_override_is_typed(override: str, expected: Outer) -> None:
    assert Outer().with_overrides([override]) == expected


def test_overrides_apply_in_order_and_leave_the_original() -> None:
    original = Outer()
    assert original.with_overrides(["inner.steps=3", "inner.steps=4"]).inner.steps == 4
    assert original.inner.steps == 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.steps", "expected key=value"),
        ("inner.stepz=3", "unknown key 'stepz'; known here: flag, label, rate, steps"),
        ("outer.steps=3", "no section named 'outer'"),
        ("inner.steps.more=3", "no section named 'steps'"),
        ("optional.steps=3", "no section named 'optional'"),
        ("inner.steps=three", r"--set: inner\.steps: .*integer.*'three'"),
        ("inner.steps=0", r"inner\.steps: .*greater than or equal to 1.*got 0"),
        ("inner=5", r"--set: inner: "),
    ],
)
def test_bad_override_names_the_key(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Outer().with_overrides([override])


def test_unknown_key_in_data_is_named_with_its_source() -> None:
    with pytest.raises(InputError, match=r"run\.json: inner\.stepz: Extra inputs are not permitted"):
        Outer.from_data({"inner": {"stepz": 1}}, where="run.json")


def test_config_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Inner().steps = 3  # type: ignore[misc]


def test_fingerprint_follows_content_only() -> None:
    assert Outer().fingerprint() == Outer(inner=Inner(steps=10)).fingerprint()
    assert Outer().fingerprint() != Outer(inner=Inner(steps=11)).fingerprint()
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) == "0855bfc20eb6cfaa"
