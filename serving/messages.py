"""What travels between the ingress and a replica."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

from cllm.decoding.records import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages for the model's chat template: (role, content)."""

    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's text and natural log-probability, and those of the likeliest tokens in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


Prompt = str | tuple[int, ...] | Chat
# How chunks are wanted: one for each engine step; as they come, but no more than the replica can send; few, for nobody
# reads them before the end.
Delivery = Literal["steps", "stream", "whole"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one engine step gave a request, or several did.

    Attributes:
        token_ids: the tokens they committed.
        text: what they add to the text; characters that later tokens may change are held back.
        num_prompt_tokens: of the prompt.
        finish_reason: set on the last chunk.
        scores: one a token, if the request asked for log-probabilities.
        guesses: texts of the tokens guessed behind these, if the request asked for them.
        accepted: of `token_ids`, how many each step committed.
    """

    token_ids: tuple[int, ...]
    text: str
    num_prompt_tokens: int
    finish_reason: FinishReason | None = None
    scores: tuple[ScoredToken, ...] = ()
    guesses: tuple[str, ...] = ()
    accepted: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """What the client already has of a response."""

    token_ids: tuple[int, ...] = ()
    num_characters: int = 0

    def plus(self, chunk: Chunk) -> "Given":
        return Given(self.token_ids + chunk.token_ids, self.num_characters + len(chunk.text))


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One response to one prompt.

    Attributes:
        max_new_tokens: None: whatever the context has left.
        arrived_at: when the client asked, seconds since the epoch.
        given: of an earlier attempt; the chunks go on behind it.
        guesses: whether the chunks tell the engine's guesses.
        delivery: how the chunks are wanted.
    """

    request_id: str
    prompt: Prompt
    max_new_tokens: int | None
    sampling: SamplingParams
    arrived_at: float
    given: Given = Given()
    guesses: bool = False
    delivery: Delivery = "stream"


class Responder(Protocol):
    """Whoever answers requests: a replica, the replicas of a deployment, these with retries."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Chunks as the request wants them delivered; closing the generator aborts the request.

        Raises:
            InputError: the request is refused.
            ReplicaLostError: another attempt may succeed.
            OverloadedError: not now.
            ReplicaFailedError: a defect of ours.
        """
        ...
