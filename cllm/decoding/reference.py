"""The slow, readable twins: one prompt at a time, no cache, no batch. Tests and benchmarks compare against them.

Shapes: L tokens so far, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from cllm.decoding.guess import Guesser
from cllm.decoding.records import BlockTrajectory, DecodeRequest, SamplingParams
from cllm.decoding.sampling import TokenPicker


@torch.inference_mode()
def next_tokens(model: PreTrainedModel, tokens: Sequence[int], count: int, sampling: SamplingParams) -> list[int]:
    """What the model predicts after each of the last `count` prefixes of `tokens`, by one full forward."""
    logits_1LV = model(input_ids=torch.tensor([list(tokens)], device=model.device)).logits
    positions = torch.arange(len(tokens) - count + 1, len(tokens) + 1, device=model.device)[None]
    return TokenPicker([sampling], model.device).pick_BQ(logits_1LV[:, -count:], positions, [0])[0].tolist()


def autoregressive(model: PreTrainedModel, request: DecodeRequest, eos_ids: Sequence[int]) -> list[int]:
    """AR decoding, one full forward a token: the definition of a right answer."""
    tokens = list(request.prompt_ids)
    while len(tokens) < len(request.prompt_ids) + request.max_new_tokens:
        tokens += next_tokens(model, tokens, 1, request.sampling)
        if tokens[-1] in eos_ids:
            break
    return tokens[len(request.prompt_ids) :]


def jacobi_trajectories(
    model: PreTrainedModel, request: DecodeRequest, guesser: Guesser, block_size: int, eos_ids: Sequence[int]
) -> list[BlockTrajectory]:
    """Jacobi iteration as the paper defines it (section 3.1, algorithm 1): iterate a block until it stops changing.

    Every iteration recomputes prompt and block; the last one only verifies. Used as the baseline of collection.
    """
    prefix = list(request.prompt_ids)
    trajectories = []
    end = len(prefix) + request.max_new_tokens
    while len(prefix) < end:
        states = [guesser.guess(len(prefix), block_size)]
        while len(states) < 2 or states[-1] != states[-2]:
            states.append(next_tokens(model, prefix + states[-1][:-1], block_size, request.sampling))
        trajectories.append(BlockTrajectory(tuple(map(tuple, states[:-1]))))
        prefix += states[-1]
        if any(token in eos_ids for token in states[-1]):
            break
    return trajectories
