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
    """Trajectories of `prompts` in their order, without the dropped ones; and how many were dropped for what reason."""
    requests = [collection_request(prompt, config, seed) for prompt in prompts]
    kept: list[Trajectory] = []
    dropped: Counter[str] = Counter()
    for prompt, result in zip(prompts, engine.generate(requests), strict=True):
        row = Trajectory.from_result(prompt.prompt_id, prompt.prompt_ids, result)
        reason = reason_to_drop(row, tokenizer, config)
        if reason is None:
            kept.append(augment(row, config.augment, seed))
        else:
            dropped[reason] += 1
    return kept, dropped


def collection_engine_config(config: CollectConfig, longest_prompt: int) -> EngineConfig:
    """Settings of an engine that records trajectories of prompts of up to `longest_prompt` tokens."""
    return EngineConfig(
        window=config.block_size,
        refill="block",
        record=True,
        guess=config.guess,
        max_rows=config.batch_size,
        max_tokens=longest_prompt + config.max_new_tokens,
    )


def collection_request(prompt: Prompt, config: CollectConfig, seed: int) -> DecodeRequest:
    """Greedy; a prompt's own seed decides its guesses, in every batch."""
    sampling = SamplingParams(seed=int(prompt.prompt_id, 16) ^ seed)
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
