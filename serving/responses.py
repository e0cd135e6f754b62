"""From chunks to the bodies of both endpoints."""

from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel

from cllm.decoding.records import FinishReason
from serving import protocol
from serving.messages import Chunk, ScoredToken


class Choice:
    """One response as far as it has come."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.text = ""
        self.num_prompt_tokens = 0
        self.accepted: list[int] = []
        self.scores: list[ScoredToken] = []
        self.finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.num_prompt_tokens = chunk.num_prompt_tokens
        self.scores += chunk.scores
        self.finish_reason = chunk.finish_reason
        if chunk.token_ids:
            self.accepted.append(len(chunk.token_ids))


class Format(Protocol):
    """How an endpoint writes responses. `piece` follows `Choice.add` of its chunk."""

    def piece(self, choice: Choice, chunk: Chunk) -> BaseModel: ...

    def usage_piece(self, usage: protocol.Usage) -> BaseModel: ...

    def whole(self, choices: Sequence[Choice], usage: protocol.Usage) -> BaseModel: ...


class CompletionFormat:
    """/v1/completions."""

    def __init__(self, model: str, *, decoding: bool) -> None:
        self._id, self._created, self._model = protocol.new_id("cmpl"), protocol.now(), model
        self._decoding = decoding

    def piece(self, choice: Choice, chunk: Chunk) -> protocol.Completion:
        offset = sum(len(score.text) for score in choice.scores[: len(choice.scores) - len(chunk.scores)])
        return self._body(
            [
                protocol.CompletionChoice(
                    index=choice.index,
                    text=chunk.text,
                    logprobs=_completion_logprobs(chunk.scores, offset),
                    finish_reason=chunk.finish_reason,
                    accepted=len(chunk.token_ids) if self._decoding else None,
                    guesses=list(chunk.guesses) or None,
                    decoding=_decoding(choice, self._decoding),
                )
            ]
        )

    def usage_piece(self, usage: protocol.Usage) -> protocol.Completion:
        return self._body([], usage)

    def whole(self, choices: Sequence[Choice], usage: protocol.Usage) -> protocol.Completion:
        return self._body(
            [
                protocol.CompletionChoice(
                    index=choice.index,
                    text=choice.text,
                    logprobs=_completion_logprobs(choice.scores, 0),
                    finish_reason=choice.finish_reason,
                    decoding=_decoding(choice, self._decoding),
                )
                for choice in choices
            ],
            usage,
        )

    def _body(
        self, choices: list[protocol.CompletionChoice], usage: protocol.Usage | None = None
    ) -> protocol.Completion:
        return protocol.Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)


class ChatFormat:
    """/v1/chat/completions."""

    def __init__(self, model: str, *, decoding: bool) -> None:
        self._id, self._created, self._model = protocol.new_id("chatcmpl"), protocol.now(), model
        self._decoding = decoding

    def piece(self, choice: Choice, chunk: Chunk) -> protocol.ChatCompletionChunk:
        is_first = choice.accepted == ([len(chunk.token_ids)] if chunk.token_ids else [])
        return self._chunk(
            [
                protocol.ChatChunkChoice(
                    index=choice.index,
                    delta=protocol.Delta(role="assistant" if is_first else None, content=chunk.text),
                    logprobs=_chat_logprobs(chunk.scores),
                    finish_reason=chunk.finish_reason,
                    accepted=len(chunk.token_ids) if self._decoding else None,
                    guesses=list(chunk.guesses) or None,
                    decoding=_decoding(choice, self._decoding),
                )
            ]
        )

    def usage_piece(self, usage: protocol.Usage) -> protocol.ChatCompletionChunk:
        return self._chunk([], usage)

    def whole(self, choices: Sequence[Choice], usage: protocol.Usage) -> protocol.ChatCompletion:
        return protocol.ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            usage=usage,
            choices=[
                protocol.ChatChoice(
                    index=choice.index,
                    message=protocol.ChatMessage(content=choice.text),
                    logprobs=_chat_logprobs(choice.scores),
                    finish_reason=choice.finish_reason,
                    decoding=_decoding(choice, self._decoding),
                )
                for choice in choices
            ],
        )

    def _chunk(
        self, choices: list[protocol.ChatChunkChoice], usage: protocol.Usage | None = None
    ) -> protocol.ChatCompletionChunk:
        return protocol.ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )


def usage_of(choices: Sequence[Choice], choices_per_prompt: int) -> protocol.Usage:
    """A prompt counts once, however many responses it has."""
    prompt = sum(choice.num_prompt_tokens for choice in choices[::choices_per_prompt])
    completion = sum(sum(choice.accepted) for choice in choices)
    return protocol.Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _decoding(choice: Choice, asked: bool) -> protocol.Decoding | None:
    return protocol.Decoding.of(choice.accepted) if asked and choice.finish_reason is not None else None


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
