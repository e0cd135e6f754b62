"""Prompts to trajectories: block decoding of one shard, cleaning and augmentation (paper algorithm 1)."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.trajectories import Trajectory, longest_run, most_repeated_sentence, partly_corrected
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.recipe import CollectConfig
from cllm.tasks.prompts import Prompt


def collect(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: CollectConfig,
    seed: int,
) -> tuple[list[Trajectory], Counter[str]]:
    """Trajectories of `prompts` in their order, without the dropped ones; and how many were dropped for what reason.

    A prompt's responses follow each other; one that it has given before is dropped.
    """
    wanted = [(prompt, sample) for prompt in prompts for sample in range(config.samples)]
    requests = [collection_request(prompt, config, seed, sample) for prompt, sample in wanted]
    kept: list[Trajectory] = []
    dropped: Counter[str] = Counter()
    known: set[tuple[str, tuple[int, ...]]] = set()
    for (prompt, _), result in zip(wanted, engine.generate(requests), strict=True):
        row = Trajectory.from_result(prompt.prompt_id, prompt.prompt_ids, result)
        response = (row.prompt_id, row.response_ids)
        reason = "repeated" if response in known else reason_to_drop(row, tokenizer, config)
        known.add(response)
        if reason is None:
            kept.append(augment(row, config.augment, seed))
        else:
            dropped[reason] += 1
    return kept, dropped


def collection_engine_config(config: CollectConfig, longest_prompt: int) -> EngineConfig:
    """Settings of an engine that decodes prompts of up to `longest_prompt` tokens, and records what is wanted."""
    return EngineConfig(
        window=config.block_size if config.record else 1,
        refill="block",
        record=config.record,
        guess=config.guess,
        max_rows=config.batch_size,
        max_tokens=longest_prompt + config.max_new_tokens,
    )


def collection_request(prompt: Prompt, config: CollectConfig, seed: int, sample: int = 0) -> DecodeRequest:
    """Sample 0 is greedy. Prompt and sample decide the seed of guesses and noise, in every batch."""
    temperature = config.temperature if sample else 0.0
    sampling = SamplingParams(temperature=temperature, seed=(int(prompt.prompt_id, 16) ^ seed) + sample)
    return DecodeRequest(prompt.prompt_ids, config.max_new_tokens, sampling)


def reason_to_drop(row: Trajectory, tokenizer: PreTrainedTokenizerBase, config: CollectConfig) -> str | None:
    """Why a response would harm the student (paper section 3.2.1), or None."""
    if config.drop_unfinished and row.finish_reason == "length":
        return "unfinished"
    if config.max_token_repeat is not None and longest_run(row.response_ids) > config.max_token_repeat:
        return "token_repetition"
    if config.max_sentence_repeat is not None:
        text = tokenizer.decode(list(row.response_ids), skip_special_tokens=True)
        if most_repeated_sentence(str(text)) > config.max_sentence_repeat:
            return "sentence_repetition"
    return None


def augment(row: Trajectory, share: float, seed: int) -> Trajectory:
    """Add partly corrected copies of the states (`cllm.decoding.trajectories.partly_corrected`)."""
    if share == 0:
        return row
    rng = random.Random(f"{seed}/augment/{row.prompt_id}")
    return replace(row, augmented=tuple(partly_corrected(block, share, rng) for block in row.blocks))
