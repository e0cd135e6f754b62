"""Which examples are the same, and which split each belongs to."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

from cllm.config import digest
from cllm.tasks.base import SPLITS, Example


def example_id(task_name: str, example: Example) -> str:
    """16 hexadecimal digits that name the question and its group, whatever the answer, the row order or the split.

    Unicode forms (NFC) and runs of whitespace do not count.
    """
    return digest([task_name, _question(example), example.group])


def assign_splits(
    examples: Iterable[Example], *, validation_fraction: float, seed: int
) -> tuple[list[Example], dict[str, int]]:
    """Deduplicate, carve `validation` out of `train` if the source has none, and keep the splits apart.

    Afterwards no question and no group is in two splits: test wins over validation, and validation over train; the
    other rows are dropped. Validation takes whole groups in the order of their seeded hash until it holds
    `validation_fraction` of the train rows, and leaves at least one group in train. The result does not depend on the
    order of rows, apart from which of several rows with one id stays (the first of the winning split).

    Returns:
        The kept examples in their given order, and counts: `rows` read, `duplicates` (a row with the same question
        and group was kept), `leaks` (dropped because another split holds its question or group), and the rows kept
        of each split.
    """
    given = list(examples)
    unique = _deduplicate(given)
    if not any(example.split == "validation" for example in unique):
        unique = _carve_validation(unique, validation_fraction, seed)
    kept = _separate(unique)
    sizes = Counter(example.split for example in kept)
    counts = {"rows": len(given), "duplicates": len(given) - len(unique), "leaks": len(unique) - len(kept)}
    return kept, counts | {split: sizes[split] for split in SPLITS}


def _question(example: Example) -> list[list[str]]:
    return [[turn.role, " ".join(unicodedata.normalize("NFC", turn.content).split())] for turn in example.turns]


def _deduplicate(examples: Sequence[Example]) -> list[Example]:
    winners: dict[str, int] = {}
    for row, example in enumerate(examples):
        key = example_id("", example)
        if key not in winners or SPLITS.index(example.split) > SPLITS.index(examples[winners[key]].split):
            winners[key] = row
    return [examples[row] for row in sorted(winners.values())]


def _carve_validation(examples: Sequence[Example], fraction: float, seed: int) -> list[Example]:
    keys = [digest(_question(example)) if example.group is None else example.group for example in examples]
    sizes = Counter(key for key, example in zip(keys, examples, strict=True) if example.split == "train")
    wanted = max(1, round(fraction * sizes.total()))
    order = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    chosen: set[str] = set()
    taken = 0
    for key in order[:-1]:  # the last one stays in train
        if taken >= wanted:
            break
        chosen.add(key)
        taken += sizes[key]
    return [
        replace(example, split="validation") if example.split == "train" and key in chosen else example
        for key, example in zip(keys, examples, strict=True)
    ]


def _separate(examples: Sequence[Example]) -> list[Example]:
    """Drop what shares its question or group with a split of higher rank (test, then validation, then train)."""
    kept: set[int] = set()
    taken: set[Hashable] = set()
    for split in reversed(SPLITS):
        claims: set[Hashable] = set()
        for row, example in enumerate(examples):
            own = {("question", digest(_question(example)))}
            own |= {("group", example.group)} if example.group is not None else set()
            if example.split == split and own.isdisjoint(taken):
                kept.add(row)
                claims |= own
        taken |= claims
    return [example for row, example in enumerate(examples) if row in kept]
