"""The next token in plain Python, and whole responses by it: what every other way of decoding must give."""

import math
from collections import Counter

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cllm.decoding.records import DecodeRequest
from cllm.decoding.sampling import gumbel_noise_RV
from tests.fakes import EOS

LETTERS = "abcdefghijklmnopqrstuvwx"  # the text of each token of the smallest models


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are letters."""
    tokenizer = Tokenizer(models.WordLevel({letter: token for token, letter in enumerate(LETTERS)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def slow_token(logits_V, params, prompt, output):
    """The next token of AR decoding: one step in plain Python."""
    logits = logits_V.double().tolist()
    for token in {*prompt, *output}:
        by = params.repetition_penalty
        logits[token] = logits[token] / by if logits[token] > 0 else logits[token] * by
    for token, count in Counter(output).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    if len(output) < params.min_tokens:
        for token in params.end_ids([EOS]):
            logits[token] = -math.inf
    if params.temperature == 0:
        return max(range(len(logits)), key=logits.__getitem__)
    scaled = [x / params.temperature for x in logits]
    kept = sorted(range(len(scaled)), key=lambda token: -scaled[token])[: params.top_k or None]
    weights = [math.exp(scaled[token] - scaled[kept[0]]) for token in kept]
    if params.top_p < 1:
        before = [sum(weights[:i]) / sum(weights) for i in range(len(kept))]
        kept = [token for token, mass in zip(kept, before, strict=True) if mass < params.top_p]
    kept = [token for token in kept if math.exp(scaled[token] - scaled[kept[0]]) >= params.min_p]
    seed = params.seed - 2**64 if params.seed >= 2**63 else params.seed
    noise_V = gumbel_noise_RV(torch.tensor([seed]), torch.tensor([len(prompt) + len(output)]), len(scaled))[0]
    return max(kept, key=lambda token: scaled[token] + noise_V[token].item())


@torch.no_grad()
def slow_response(model: PreTrainedModel, request: DecodeRequest) -> list[int]:
    """All tokens of a response, the one that ends it included; the tokens' texts are `LETTERS`."""
    params, output = request.sampling, []
    while len(output) < request.max_new_tokens:
        logits_V = model(torch.tensor([[*request.prompt_ids, *output]])).logits[0, -1]
        output.append(slow_token(logits_V, params, request.prompt_ids, output))
        text = "".join(LETTERS[token] for token in output)
        is_stopped = len(output) > params.min_tokens and text.endswith(params.stop) if params.stop else False
        if is_stopped or output[-1] in params.end_ids([EOS]):
            break
    return output
