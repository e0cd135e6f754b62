"""Speed of trajectory collection: batched with a cache, against one prompt at a time without one."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.decoding.guess import Guesser
from cllm.decoding.records import BlockTrajectory
from cllm.decoding.reference import jacobi_trajectories
from cllm.engine.collection import collect, collection_request
from cllm.engine.engine import Engine
from cllm.evaluation.timing import Timing
from cllm.recipe import CollectConfig
from cllm.tasks.prompts import Prompt

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CollectionSpeed:
    """Response tokens per second of both ways, on the same model and number of threads.

    Attributes:
        identical: share of the slow way's responses that the fast way gives token for token.
    """

    batched: Timing
    one_by_one: Timing
    num_batched: int
    num_one_by_one: int
    identical: float

    @property
    def ratio(self) -> float:
        return self.batched.speedup_over(self.one_by_one)


@dataclass(frozen=True, slots=True)
class Collector:
    """What one actor of the collection job holds."""

    engine: Engine
    reference: PreTrainedModel  # the same weights, for the slow way
    tokenizer: PreTrainedTokenizerBase
    config: CollectConfig
    seed: int

    def batched(self, prompts: Sequence[Prompt], config: CollectConfig) -> dict[str, Tokens]:
        """Kept responses by prompt id, as the job collects them: decoding, cleaning and augmentation."""
        rows, _ = collect(self.engine, self.tokenizer, prompts, config, self.seed)
        return {row.prompt_id: row.response_ids for row in rows}

    def one_by_one(self, prompts: Sequence[Prompt]) -> dict[str, Tokens]:
        """All responses by prompt id, in the way of the paper's code (algorithm 1), from the same guesses."""
        engine = self.engine
        responses = {}
        for prompt in prompts:
            request = collection_request(prompt, self.config, self.seed)
            guesser = Guesser(self.config.guess, prompt.prompt_ids, engine.pad_id, request.sampling.seed)
            blocks = jacobi_trajectories(
                self.reference, request, guesser, self.config.block_size, tuple(sorted(engine.eos_ids))
            )
            responses[prompt.prompt_id] = response_of(blocks, request.max_new_tokens, engine.eos_ids)
        return responses


def time_collection(
    collector: Collector, prompts: Sequence[Prompt], *, num_one_by_one: int, repeats: int
) -> CollectionSpeed:
    """Time both ways in turns; the slow one on `num_one_by_one` of the prompts, spread evenly over their lengths.

    Every response counts on both sides, also one that cleaning drops: decoding is deterministic, so the tokens are
    counted once, in the warm-up.
    """
    few = spread_by_length(prompts, num_one_by_one)
    unfiltered = collector.config.model_copy(
        update={"max_token_repeat": None, "max_sentence_repeat": None, "drop_unfinished": False}
    )
    fast, slow = collector.batched(prompts, unfiltered), collector.one_by_one(few)
    num_fast, num_slow = (sum(map(len, responses.values())) for responses in (fast, slow))
    fast_speeds, slow_speeds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        collector.batched(prompts, collector.config)
        middle = time.perf_counter()
        collector.one_by_one(few)
        end = time.perf_counter()
        fast_speeds.append(num_fast / (middle - start))
        slow_speeds.append(num_slow / (end - middle))
    identical = sum(fast[key] == response for key, response in slow.items()) / len(slow)
    return CollectionSpeed(Timing(tuple(fast_speeds)), Timing(tuple(slow_speeds)), len(fast), len(slow), identical)


def response_of(blocks: Sequence[BlockTrajectory], max_new_tokens: int, eos_ids: frozenset[int]) -> Tokens:
    """The fixed points concatenated, cut behind the end token and at the length limit."""
    tokens = [token for block in blocks for token in block.fixed_point][:max_new_tokens]
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return tuple(tokens[:end])


def spread_by_length(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts (all, if there are fewer) at even distances in the order of their lengths."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.prompt_ids))
    count = min(count, len(ordered))
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]
