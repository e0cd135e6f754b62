"""The API before one replica: whole responses, streams and the engine itself say the same."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openai import OpenAI

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.load import load_engine
from cllm.models import load_tokenizer
from serving.engines import start_engine
from serving.replica import Replica
from tests.serving.running import (
    MODEL_NAME,
    OPTIONS,
    Server,
    local_app,
    model_entry,
    serving_on_a_port,
    wait_until,
)

PROMPT = "SELECT"  # by which some guesses hold
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 3}
Decode = Callable[..., tuple[str, int]]


@pytest.fixture(scope="module")
def decode(model_folder: Path) -> Decode:
    """prompt, number of tokens, sampling -> text and number of tokens that the engine alone decodes."""
    entry = model_entry(model_folder)
    engine, tokenizer = load_engine(entry.path, entry.options), load_tokenizer(entry.path)

    def run(prompt: str, max_new_tokens: int, sampling: SamplingParams, bos: bool = True) -> tuple[str, int]:
        ids = tuple(tokenizer(prompt, add_special_tokens=bos).input_ids)
        result = engine.generate([DecodeRequest(ids, max_new_tokens, sampling)])[0]
        text = tokenizer.decode(result.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text, len(result.token_ids)

    return run


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_stream_and_whole_response_are_the_engines_text(
    client: OpenAI, decode: Decode, options: dict[str, Any]
) -> None:
    expected, count = decode(PROMPT, 40, SamplingParams(**options))
    asked = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 40, **options}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].text == expected
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == count
    assert whole.usage.prompt_tokens == chunks[-1].usage.prompt_tokens == whole.usage.total_tokens - count
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason
    assert [c.choices[0].finish_reason for c in chunks[:-2]] == [None] * (len(chunks) - 2)


def test_one_chunk_a_step_and_its_statistics(client: OpenAI) -> None:
    asked = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    chunks = list(client.completions.create(**asked, stream=True, extra_body={"decoding": True}))
    statistics = chunks[-1].choices[0].decoding
    assert [chunk.choices[0].accepted for chunk in chunks] == statistics["accepted"]
    assert sum(statistics["accepted"]) == 40 > len(chunks)
    assert statistics["tokens_per_forward"] == 40 / len(chunks)
    assert client.completions.create(**asked, extra_body={"decoding": True}).choices[0].decoding == statistics


def test_chat_applies_the_template(client: OpenAI, decode: Decode) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected, _ = decode("system: be brief\nuser: hi\nassistant:", 24, SamplingParams(), bos=False)
    asked = {"model": MODEL_NAME, "messages": messages, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert whole.choices[0].message.role == chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert whole.choices[0].message.content == expected


def test_a_chat_without_limit_fills_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        temperature=0, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.usage.total_tokens == 160
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(client: OpenAI, decode: Decode, stream: bool) -> None:
    text, _ = decode(PROMPT, 40, SamplingParams())
    stop = text[10:14]
    asked = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": [stop, "never there"]}
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    else:
        choices = client.completions.create(**asked).choices
    assert "".join(choice.text for choice in choices) == text[: text.find(stop)]
    assert choices[-1].finish_reason == "stop"


def test_n_responses_differ_and_repeat(client: OpenAI) -> None:
    asked = {"model": MODEL_NAME, "prompt": [PROMPT, "How many"], "max_tokens": 12, "n": 3, "temperature": 1, "seed": 5}
    first, again = client.completions.create(**asked), client.completions.create(**asked)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert [choice.index for choice in first.choices] == list(range(6))
    assert len(set(texts[:3])) == 3
    assert client.completions.create(**asked | {"prompt": PROMPT, "n": 1}).choices[0].text == texts[0]
    streamed = [""] * 6
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_unseeded_samples_differ(client: OpenAI) -> None:
    asked = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 24}
    assert len({client.completions.create(**asked).choices[0].text for _ in range(4)}) > 1


def test_logprobs_of_both_endpoints(client: OpenAI) -> None:
    asked = {"model": MODEL_NAME, "max_tokens": 10, "temperature": 0}
    found = client.completions.create(**asked, prompt=PROMPT, logprobs=2).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 10
    assert all(p == max(top.values()) <= 0 for p, top in zip(found.token_logprobs, found.top_logprobs, strict=True))
    chunks = list(client.completions.create(**asked, prompt=PROMPT, logprobs=2, stream=True))
    assert [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens] == found.tokens
    assert [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset] == found.text_offset
    messages = [{"role": "user", "content": "hi"}]
    asked |= {"messages": messages, "logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}}
    chat = client.chat.completions.create(**asked)
    content = chat.choices[0].logprobs.content
    assert len(content) == 10
    assert all(len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob for token in content)


def test_raw_events(server: Server) -> None:
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 20, "stream": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(answer.headers["x-request-id"]) == 32
    *events, last, empty = answer.text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)


def test_models_health_page_and_schema(server: Server, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert "<html" in httpx.get(server.url).text
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health"} <= schema["paths"].keys()
    assert "422" not in schema["paths"]["/v1/completions"]["post"]["responses"]


def test_clients_that_go_away_leave_no_row(server: Server, replica: Replica) -> None:
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 150, "ignore_eos": True, "stream": True}
    for _ in range(40):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    wait_until(lambda: replica.num_unfinished() == 0)


def test_a_closed_stream_has_its_row_freed_within_one_step(model_folder: Path) -> None:
    """The step that is under way when it is closed is the last one of its request."""
    engine = start_engine(MODEL_NAME, model_entry(model_folder)).engine

    async def steps_behind_the_end() -> int:
        stream = engine.stream(DecodeRequest((5, 6, 7), 150, SamplingParams(ignore_eos=True)))
        await anext(stream)
        await stream.aclose()
        closed_at = engine.steps
        while engine.num_unfinished:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)  # were it still decoded, some ten steps
        return engine.steps - closed_at

    assert max(asyncio.run(steps_behind_the_end()) for _ in range(10)) <= 1
    engine.close()


class Counted(Replica):
    @property
    def steps(self) -> int:
        return self._engine.steps


def test_when_its_client_goes_away_a_response_is_not_decoded_on(model_folder: Path) -> None:
    """Over HTTP the server has to notice first; the response would take 150 steps."""
    replica = Counted(MODEL_NAME, model_entry(model_folder, options=OPTIONS | {"window": 1}))
    body = {"model": MODEL_NAME, "prompt": PROMPT, "max_tokens": 150, "ignore_eos": True, "stream": True}
    with serving_on_a_port(local_app({MODEL_NAME: replica})) as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        left_at = replica.steps
        wait_until(lambda: replica.num_unfinished() == 0)
        assert replica.steps - left_at < 50
    replica.close()


def events_of(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = httpx.post(server.url + path, json=body | {"model": MODEL_NAME, "max_tokens": 12, "stream": True})
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": PROMPT, "logprobs": 2}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2},
        ),
    ],
)
def test_events_are_as_the_schema_says(server: Server, path: str, body: dict[str, Any]) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    media = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    end, event = media["itemSchema"]["properties"]["data"]["anyOf"]
    assert end == {"const": "[DONE]"}
    described = event["contentSchema"] | {"components": document["components"]}
    schema = jsonschema.Draft202012Validator(described)
    options = {
        "decoding": "guesses",
        "stream_options": {"include_usage": True},
        "seed": 0,
        "ignore_eos": True,
        "max_tokens": 24,
    }
    events = events_of(server, path, body | options)
    assert len(events) > 5
    for found in events:
        schema.validate(found)
    assert not schema.is_valid({key: value for key, value in events[0].items() if key != "choices"})
    assert schema.is_valid({"error": {"message": "m", "type": "t", "param": None, "code": None}})
