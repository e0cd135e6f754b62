"""OpenAI's requests and responses, as far as we serve them.

An option that we do not know is refused by name, never ignored. An option that asks for nothing (null, or the neutral
value in `_NEUTRAL`) is left out, in messages too, so that clients which always send it work.
"""

import secrets
import time
import uuid
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cllm.decoding.records import FinishReason, SamplingParams
from serving.messages import Chat, Delivery, Prompt

T = TypeVar("T")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "best_of": (1,),
    "continuous_usage_stats": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_obfuscation": (False,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
}

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
TopCount = Annotated[int, Field(ge=0, le=20)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Strict(BaseModel):
    """Of what clients send: nothing converted, and nothing unknown but what asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key in cls.model_fields or not _is_neutral(key, value)}


class StreamOptions(_Strict):
    """include_usage: one more chunk, with the usage and without choices."""

    include_usage: bool | None = None


class GenerationRequest(_Strict):
    """What both endpoints take. Not OpenAI's: top_k, min_p, repetition_penalty, stop_token_ids, min_tokens, ignore_eos
    (as in vLLM), and decoding: true asks for what each engine step committed, "guesses" for its guesses as well."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    decoding: bool | Literal["guesses"] | None = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need stream to be true")
        return self

    @property
    def num_choices(self) -> int:
        """Responses to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_guesses(self) -> bool:
        """Whether chunks are to tell guesses; there are none but in streams."""
        return self.decoding == "guesses" and bool(self.stream)

    @property
    def delivery(self) -> Delivery:
        """Who asks how the response is decoded wants to see it step by step."""
        if not self.stream:
            return "whole"
        return "steps" if self.decoding else "stream"

    def prompts(self) -> list[Prompt]:
        """Each asks for `num_choices` responses."""
        raise NotImplementedError

    @property
    def max_new_tokens(self) -> int | None:
        """Of each response; None: whatever the context has left."""
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report beside each token's log-probability; None: report nothing."""
        raise NotImplementedError

    def sampling(self) -> SamplingParams:
        """OpenAI's defaults. A request without a seed gets one here, so that it can be repeated on another replica."""
        temperature = _or(self.temperature, 1.0)
        unasked = 0 if temperature == 0 else secrets.randbits(63)  # greedy: the seed chooses nothing but first guesses
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            temperature=temperature,
            top_k=max(0, _or(self.top_k, 0)),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            seed=_or(self.seed, unasked),
            logprobs=self.num_logprobs,
            min_tokens=_or(self.min_tokens, 0),
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Count | None = None
    logprobs: TopCount | None = None

    def prompts(self) -> list[Prompt]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [item if isinstance(item, str) else tuple(item) for item in self.prompt]

    @property
    def max_new_tokens(self) -> int | None:
        return _or(self.max_tokens, 16)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions; without a limit the response may fill the context."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: TopCount | None = None

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs need logprobs to be true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    def prompts(self) -> list[Prompt]:
        return [Chat(tuple((message.role, message.text) for message in self.messages))]

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return _or(self.top_logprobs, 0) if self.logprobs else None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Decoding(BaseModel):
    """How a response was decoded: tokens committed by each step, and their mean (TPF)."""

    accepted: list[int]
    steps: int
    tokens_per_forward: float

    @classmethod
    def of(cls, accepted: list[int]) -> Self:
        return cls(accepted=accepted, steps=len(accepted), tokens_per_forward=sum(accepted) / max(1, len(accepted)))


def _extra() -> Any:
    """A field that responses carry only if it was asked for."""
    return Field(None, exclude_if=lambda value: value is None)


class _Choice(BaseModel):
    """accepted, guesses: of the chunk's step; decoding: of the whole response, in its last chunk."""

    index: int
    finish_reason: FinishReason | None = None
    accepted: int | None = _extra()
    guesses: list[str] | None = _extra()
    decoding: Decoding | None = _extra()


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """bytes: null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(_Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = _extra()
    content: str | None = _extra()


class ChatChunkChoice(_Choice):
    delta: Delta
    logprobs: ChatLogprobs | None = None


class _Response(BaseModel):
    id: str
    created: int
    model: str


class Completion(_Response):
    """A response of /v1/completions, or one of its chunks."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = _extra()


class ChatCompletion(_Response):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(_Response):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = _extra()


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cllm"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _is_neutral(key: str, value: Any) -> bool:
    if value is None:
        return True
    return any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL.get(key, ()))
