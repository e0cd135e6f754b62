"""From chunks to the bodies of both endpoints."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from cllm.decoding.records import FinishReason
from serving import protocol
from serving.messages import Chunk, ScoredToken


class Choice:
    """One response as far as it has come.

    Attributes:
        accepted: tokens that each step committed.
        num_chunks: added so far.
        score_offset: characters of the scored tokens before the latest chunk.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.num_prompt_tokens = 0
        self.num_chunks = 0
        self.accepted: list[int] = []
        self.scores: list[ScoredToken] = []
        self.score_offset = 0
        self.finish_reason: FinishReason | None = None
        self._scored_characters = 0

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.num_prompt_tokens = chunk.num_prompt_tokens
        self.num_chunks += 1
        self.scores += chunk.scores
        self.score_offset = self._scored_characters
        self._scored_characters += sum(len(score.text) for score in chunk.scores)
        self.finish_reason = chunk.finish_reason
        self.accepted += chunk.accepted


class Format(ABC):
    """How an endpoint writes responses.

    Args:
        model: its name.
        decoding: whether the client asked how the response was decoded.
        prefix: of the response's id.
    """

    def __init__(self, model: str, *, decoding: bool, prefix: str) -> None:
        self._decoding = decoding
        self._head = {"id": protocol.new_id(prefix), "created": protocol.now(), "model": model}

    def piece(self, choice: Choice, chunk: Chunk) -> BaseModel:
        """The event of a chunk, which has just been added to the choice."""
        facts = self._facts(choice) | {
            "accepted": len(chunk.token_ids) if self._decoding else None,
            "guesses": list(chunk.guesses) or None,
        }
        return self._chunk([self._part(choice, chunk, facts)], None)

    def usage_piece(self, usage: protocol.Usage) -> BaseModel:
        """The event behind those of all chunks."""
        return self._chunk([], usage)

    def whole(self, choices: Sequence[Choice], usage: protocol.Usage) -> BaseModel:
        """The body of a response that is not streamed."""
        return self._body([self._all(choice, self._facts(choice)) for choice in choices], usage)

    def _facts(self, choice: Choice) -> dict[str, Any]:
        """What choices of all kinds have in common."""
        is_over = choice.finish_reason is not None
        return {
            "index": choice.index,
            "finish_reason": choice.finish_reason,
            "decoding": protocol.Decoding.of(choice.accepted) if self._decoding and is_over else None,
        }

    @abstractmethod
    def _part(self, choice: Choice, chunk: Chunk, facts: dict[str, Any]) -> Any:
        """A chunk as the choice of an event."""

    @abstractmethod
    def _all(self, choice: Choice, facts: dict[str, Any]) -> Any:
        """A whole response as a choice."""

    @abstractmethod
    def _chunk(self, parts: list[Any], usage: protocol.Usage | None) -> BaseModel: ...

    @abstractmethod
    def _body(self, choices: list[Any], usage: protocol.Usage) -> BaseModel: ...


class CompletionFormat(Format):
    """/v1/completions."""

    def __init__(self, model: str, *, decoding: bool) -> None:
        super().__init__(model, decoding=decoding, prefix="cmpl")

    def _part(self, choice: Choice, chunk: Chunk, facts: dict[str, Any]) -> protocol.CompletionChoice:
        logprobs = _completion_logprobs(chunk.scores, choice.score_offset)
        return protocol.CompletionChoice(text=chunk.text, logprobs=logprobs, **facts)

    def _all(self, choice: Choice, facts: dict[str, Any]) -> protocol.CompletionChoice:
        return protocol.CompletionChoice(text=choice.text, logprobs=_completion_logprobs(choice.scores, 0), **facts)

    def _chunk(self, parts: list[protocol.CompletionChoice], usage: protocol.Usage | None) -> protocol.Completion:
        return protocol.Completion(choices=parts, usage=usage, **self._head)

    def _body(self, choices: list[protocol.CompletionChoice], usage: protocol.Usage) -> protocol.Completion:
        return self._chunk(choices, usage)


class ChatFormat(Format):
    """/v1/chat/completions."""

    def __init__(self, model: str, *, decoding: bool) -> None:
        super().__init__(model, decoding=decoding, prefix="chatcmpl")

    def _part(self, choice: Choice, chunk: Chunk, facts: dict[str, Any]) -> protocol.ChatChunkChoice:
        delta = protocol.Delta(role="assistant" if choice.num_chunks == 1 else None, content=chunk.text)
        return protocol.ChatChunkChoice(delta=delta, logprobs=_chat_logprobs(chunk.scores), **facts)

    def _all(self, choice: Choice, facts: dict[str, Any]) -> protocol.ChatChoice:
        message = protocol.ChatMessage(content=choice.text)
        return protocol.ChatChoice(message=message, logprobs=_chat_logprobs(choice.scores), **facts)

    def _chunk(
        self, parts: list[protocol.ChatChunkChoice], usage: protocol.Usage | None
    ) -> protocol.ChatCompletionChunk:
        return protocol.ChatCompletionChunk(choices=parts, usage=usage, **self._head)

    def _body(self, choices: list[protocol.ChatChoice], usage: protocol.Usage) -> protocol.ChatCompletion:
        return protocol.ChatCompletion(choices=choices, usage=usage, **self._head)


def usage_of(choices: Sequence[Choice], choices_per_prompt: int) -> protocol.Usage:
    """A prompt counts once, however many responses it has."""
    prompt = sum(choice.num_prompt_tokens for choice in choices[::choices_per_prompt])
    completion = sum(sum(choice.accepted) for choice in choices)
    return protocol.Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _completion_logprobs(scores: Sequence[ScoredToken], offset: int) -> protocol.CompletionLogprobs | None:
    if not scores:
        return None
    offsets = [offset]
    for score in scores[:-1]:
        offsets.append(offsets[-1] + len(score.text))
    return protocol.CompletionLogprobs(
        tokens=[score.text for score in scores],
        token_logprobs=[score.logprob for score in scores],
        top_logprobs=[dict(reversed(score.top)) for score in scores],  # of equal texts the likelier stays
        text_offset=offsets,
    )


def _chat_logprobs(scores: Sequence[ScoredToken]) -> protocol.ChatLogprobs | None:
    if not scores:
        return None
    return protocol.ChatLogprobs(
        content=[
            protocol.TokenLogprobs(
                token=score.text,
                logprob=score.logprob,
                bytes=_bytes(score.text),
                top_logprobs=[
                    protocol.TopLogprob(token=text, logprob=logprob, bytes=_bytes(text)) for text, logprob in score.top
                ],
            )
            for score in scores
        ]
    )


def _bytes(text: str) -> list[int] | None:
    return None if "\ufffd" in text else list(text.encode())
