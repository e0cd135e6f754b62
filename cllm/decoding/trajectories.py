"""Trajectories of whole responses: the record, its parquet form, the cleaning rules and the paper's augmentation."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cllm.decoding.records import BlockTrajectory, DecodeResult, FinishReason
from cllm.errors import InputError

SCHEMA_VERSION = "1"
_TOKENS = pa.list_(pa.int32())
_STATES = pa.list_(pa.list_(_TOKENS))
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_ids", _TOKENS),
        ("response_ids", _TOKENS),
        ("finish_reason", pa.string()),
        ("states", _STATES),  # block, iteration, token
        ("augmented", _STATES),
    ]
)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The Jacobi trajectory of one response, block by block.

    Attributes:
        response_ids: the fixed points concatenated and cut behind the end-of-sequence token.
        blocks: block j covers response tokens j*n .. j*n+n-1; the last one may reach beyond the response.
        augmented: for each block, copies of its states with some wrong tokens corrected; may be empty.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finish_reason: FinishReason
    blocks: tuple[BlockTrajectory, ...]
    augmented: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @staticmethod
    def from_result(prompt_id: str, prompt_ids: tuple[int, ...], result: DecodeResult) -> "Trajectory":
        return Trajectory(prompt_id, prompt_ids, result.token_ids, result.finish_reason, result.trajectory)


def longest_run(tokens: Sequence[int]) -> int:
    """Length of the longest run of one token."""
    longest = run = 0
    previous = None
    for token in tokens:
        run = run + 1 if token == previous else 1
        longest, previous = max(longest, run), token
    return longest


def most_repeated_sentence(text: str) -> int:
    """How often the commonest sentence occurs. Sentences end at . ! ? with a space, or at a line break; those under
    three words do not count, for code and tables repeat such lines rightfully."""
    sentences = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text))
    counts = Counter(sentence for sentence in sentences if len(sentence.split()) >= 3)
    return max(counts.values(), default=0)


def partly_corrected(block: BlockTrajectory, share: float, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    """Copies of the block's states in which `share` of the wrong tokens, never the first wrong one, are corrected.

    Raw states look like "correct, correct, wrong, wrong"; a student also meets "wrong, correct, wrong" (paper section
    3.2.1). States with fewer than two wrong tokens have nothing to correct and are left out.
    """
    copies = []
    for state in block.states[:-1]:
        wrong = [i for i, (token, right) in enumerate(zip(state, block.fixed_point, strict=True)) if token != right]
        if len(wrong) < 2:
            continue
        corrected = set(rng.sample(wrong[1:], max(1, round(share * (len(wrong) - 1)))))
        copies.append(tuple(block.fixed_point[i] if i in corrected else token for i, token in enumerate(state)))
    return tuple(copies)


def to_table(trajectories: Iterable[Trajectory], metadata: dict[str, str]) -> pa.Table:
    """Rows in the given order, with the schema version and `metadata` in the schema."""
    rows = [
        {
            "prompt_id": row.prompt_id,
            "prompt_ids": row.prompt_ids,
            "response_ids": row.response_ids,
            "finish_reason": row.finish_reason,
            "states": [block.states for block in row.blocks],
            "augmented": row.augmented,
        }
        for row in trajectories
    ]
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata({"schema_version": SCHEMA_VERSION, **metadata}))


def read_table(path: Path) -> tuple[pa.Table, dict[str, str]]:
    """One parquet file and its metadata.

    Raises:
        InputError: the file is truncated, foreign, or of another schema version.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable trajectory file: {error}") from error
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("schema_version") != SCHEMA_VERSION or table.schema.names != SCHEMA.names:
        raise InputError(f"{path}: trajectory schema {metadata.get('schema_version')}, expected {SCHEMA_VERSION}")
    return table, metadata


def from_table(table: pa.Table, *, states: bool = True) -> list[Trajectory]:
    """The rows of a table. Without `states` they have no blocks: most of a file is states, and not all need them."""
    if not states:
        columns = table.select(["prompt_id", "prompt_ids", "response_ids", "finish_reason"]).to_pylist()
        return [
            Trajectory(row["prompt_id"], tuple(row["prompt_ids"]), tuple(row["response_ids"]), row["finish_reason"], ())
            for row in columns
        ]
    return [
        Trajectory(
            row["prompt_id"],
            tuple(row["prompt_ids"]),
            tuple(row["response_ids"]),
            row["finish_reason"],
            tuple(BlockTrajectory(tuple(map(tuple, block))) for block in row["states"]),
            tuple(tuple(map(tuple, block)) for block in row["augmented"]),
        )
        for row in table.to_pylist()
    ]
