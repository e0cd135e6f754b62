"""A cell's prompts as requests."""

from collections.abc import Sequence

from cllm.bench.matrix import Cell
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.tasks.prompts import Prompt


def requests_of(cell: Cell, prompts: Sequence[Prompt]) -> list[DecodeRequest]:
    """Their seeds depend on prompt and cell's seed alone, so methods meet the same noise."""
    load = cell.load
    assert load.max_new_tokens is not None
    return [
        DecodeRequest(
            prompt.prompt_ids,
            load.max_new_tokens,
            SamplingParams(temperature=load.temperature, top_p=load.top_p, seed=int(prompt.prompt_id, 16) + cell.seed),
        )
        for prompt in prompts
    ]
