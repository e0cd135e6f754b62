"""Frozen, typed, strict configuration: the base class, overrides from the command line, and hashing.

A configuration class stands beside the code that it configures; `cllm.recipe.Recipe` composes them. An unknown key is
an error, never ignored.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cllm.errors import InputError


class Config(BaseModel):
    """Base of all configuration classes: immutable, and an unknown key raises."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def with_overrides(self, overrides: Sequence[str]) -> Self:
        """A copy with `a.b=value` overrides applied; values are JSON literals, or else strings.

        Raises:
            InputError: an override without "=", an unknown key, or a value of the wrong type.
        """
        data = self.model_dump()
        for override in overrides:
            key, separator, text = override.partition("=")
            if not separator:
                raise InputError(f"--set {override}: expected key=value")
            _set_key(data, key, _parse_literal(text))
        return self.from_data(data, where="--set")

    @classmethod
    def from_data(cls, data: Any, *, where: str) -> Self:
        """Validate plain data (as read from JSON); `where` names its source in the error."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{where}: {key or 'recipe'}: {first['msg']} (got {first.get('input')!r:.80})") from error

    def fingerprint(self) -> str:
        """A short stable hash of the content: equal configurations hash equally in every process."""
        return digest(self.model_dump(mode="json"))


Named = TypeVar("Named", bound=Config)


def build_named(registry: Mapping[str, Callable[[], Named]], name: str, option: str) -> Named:
    """Build the configuration called `name`; `option` is the command line's, for the error.

    Raises:
        InputError: no such name; the known ones are listed.
    """
    if name not in registry:
        raise InputError(f"--{option} {name}: unknown; known are {', '.join(registry)}")
    return registry[name]()


def digest(data: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of `data` as canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parse_literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _set_key(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    node: Any = data
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise InputError(f"--set {key}: no section named {parent!r}")
    if leaf not in node:
        raise InputError(f"--set {key}: unknown key {leaf!r}; known here: {', '.join(sorted(node))}")
    node[leaf] = value
