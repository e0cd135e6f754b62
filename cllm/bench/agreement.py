"""Whether two decoders of one model give the same greedy tokens, and how close the call was where they do not.

In float32 they always do. In bfloat16 a forward over another number of tokens rounds differently, and an argmax between
two nearly equal logits may fall the other way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cllm.bench.engine_subject import EngineSubject, OpenedModel
from cllm.decoding.records import DecodeRequest, DecodeResult, Refill, SamplingParams
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.load import build_engine

_ROWS = 64  # decoded together


@dataclass(frozen=True, slots=True)
class Agreement:
    """Outputs of two decoders on the same requests.

    Attributes:
        num_requests: compared.
        margins: for each request whose outputs differ, how much likelier the likeliest token is than the second one at
            the first difference (a difference of log-probabilities, in nats).
    """

    num_requests: int
    margins: tuple[float, ...]

    @property
    def identical(self) -> float:
        """Share of requests with the same tokens."""
        return 1 - len(self.margins) / self.num_requests

    def document(self) -> dict[str, object]:
        ordered = sorted(self.margins)
        return {
            "requests": self.num_requests,
            "identical": round(self.identical, 4),
            "largest_margin_nats": round(ordered[-1], 5) if ordered else None,
            "median_margin_nats": round(ordered[len(ordered) // 2], 5) if ordered else None,
        }


def measure_agreement(
    subject: EngineSubject, n: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, object]]:
    """Greedy Jacobi decoding with windows of n against AR on the subject's requests, a document for each refill."""
    opened = subject.open(dtype, device)
    requests = subject.requests(opened.model.shape.vocab_size)
    judge = _engine(opened, requests, 1, "sliding")
    expected = judge.generate(requests)
    documents: list[dict[str, object]] = []
    for refill in ("sliding", "block"):
        agreement = compare(judge, requests, expected, _engine(opened, requests, n, refill).generate(requests))
        documents.append({"dtype": str(dtype), "refill": refill, "n": n} | agreement.document())
    return documents


def _engine(opened: OpenedModel, requests: Sequence[DecodeRequest], n: int, refill: Refill) -> Engine:
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    config = EngineConfig(window=n, refill=refill, guess="pad", max_rows=min(len(requests), _ROWS), max_tokens=longest)
    return build_engine(opened.model, config, eos_ids=opened.eos_ids, pad_id=opened.pad_id)


def compare(
    judge: Engine, requests: Sequence[DecodeRequest], first: Sequence[DecodeResult], second: Sequence[DecodeResult]
) -> Agreement:
    """Compare results of the same requests; `judge`, an AR engine of the same model, rates the first differences."""
    questions = []
    for request, one, other in zip(requests, first, second, strict=True):
        place = first_difference(one.token_ids, other.token_ids)
        if place is not None:
            known = request.prompt_ids + one.token_ids[:place]
            questions.append(DecodeRequest(known, 1, SamplingParams(logprobs=2)))
    margins = {}
    for commits in judge.stream(questions):
        for commit in commits:
            assert commit.logprobs is not None
            (_, likeliest), (_, runner_up) = commit.logprobs[0].top
            margins[commit.row] = likeliest - runner_up
    return Agreement(len(requests), tuple(margins[row] for row in range(len(questions))))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two outputs differ; where one is a beginning of the other, its length."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))
