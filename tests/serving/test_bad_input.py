"""Whatever a client sends: the right status, one clear line in OpenAI's form, and a server that goes on."""

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from cllm.errors import InputError
from serving.config import AppConfig, Keys, Limits
from serving.engines import check_model
from serving.keys import KeyRing
from serving.replica import Replica
from tests.serving.running import (
    CONTEXT,
    MODEL_NAME,
    Server,
    local_app,
    model_entry,
    save_tiny_model,
    serving_on_a_port,
)

BASE = {"model": MODEL_NAME, "prompt": "How many", "max_tokens": 4}
CHAT = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def refusal(answer: httpx.Response, status: int) -> str:
    """The message, after checking its form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    return str(error["message"])


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"tools": [{"type": "function"}]}, "tools: this option is not supported"),
    (COMPLETIONS, {"logit_bias": {"5": 1}}, "logit_bias: this option is not supported"),
    (COMPLETIONS, {"best_of": 3}, "best_of: this option is not supported"),
    (COMPLETIONS, {"echo": True}, "echo: this option is not supported"),
    (COMPLETIONS, {"suffix": "x"}, "suffix: this option is not supported"),
    (COMPLETIONS, {"no_such": 1}, "no_such: this option is not supported"),
    (COMPLETIONS, {"temperature": -1}, "temperature"),
    (COMPLETIONS, {"temperature": "1"}, "temperature"),
    (COMPLETIONS, {"top_p": 0}, "top_p"),
    (COMPLETIONS, {"top_p": 1.5}, "top_p"),
    (COMPLETIONS, {"top_k": -2}, "top_k"),
    (COMPLETIONS, {"min_p": 2}, "min_p"),
    (COMPLETIONS, {"presence_penalty": 3}, "presence_penalty"),
    (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"seed": 2**70}, "seed"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": True}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": CONTEXT}, f"the engine's max_tokens is {CONTEXT}"),
    (COMPLETIONS, {"min_tokens": 5}, "min_tokens"),
    (COMPLETIONS, {"stop": [""]}, "stop"),
    (COMPLETIONS, {"stop_token_ids": [10**6]}, "vocabulary"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"n": 9}, "more than 8 responses"),
    (COMPLETIONS, {"n": 0}, "n:"),
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options need stream"),
    (COMPLETIONS, {"stream": True, "stream_options": {"no_such": 1}}, "stream_options.no_such"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETIONS, {"prompt": [10**6]}, "vocabulary"),
    (COMPLETIONS, {"prompt": "a b c " * CONTEXT}, "context"),
    (COMPLETIONS, {"model": 5}, "model"),
    (CHATS, {"messages": []}, "messages"),
    (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    (CHATS, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    (CHATS, {"messages": [*CHAT["messages"], {"role": "system", "content": "x"}]}, "the system message comes first"),
    (CHATS, {"max_completion_tokens": 3}, "not both"),
    (CHATS, {"top_logprobs": 2}, "top_logprobs need logprobs"),
    (CHATS, {"response_format": {"type": "json_object"}}, "response_format: this option is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "named"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_bad_fields_are_named(server: Server, path: str, fields: dict[str, Any], named: str) -> None:
    body = (BASE if path == COMPLETIONS else CHAT) | fields
    assert named in refusal(httpx.post(server.url + path, json=body), 400)


NEUTRAL = {"tools": [], "logit_bias": {}, "best_of": 1, "echo": False, "suffix": None, "logprobs": None, "stop": None,
           "no_such": None, "top_k": -1}  # fmt: skip


def test_options_that_ask_for_nothing_are_fine(server: Server) -> None:
    assert httpx.post(server.url + COMPLETIONS, json=BASE | NEUTRAL).status_code == 200
    for options in ({"include_usage": None}, {"include_usage": True, "include_obfuscation": False, "no_such": None}):
        body = BASE | {"stream": True, "stream_options": options}
        assert httpx.post(server.url + COMPLETIONS, json=body).status_code == 200


def test_messages_that_the_openai_client_gave_can_be_sent_back(server: Server, client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT).choices[0].message.model_dump()
    assert None in answer.values()  # such as its refusal
    others = {"name": None, "tool_calls": [], "annotations": [], "audio": None}
    messages = [*CHAT["messages"], answer | others, *CHAT["messages"]]
    assert httpx.post(server.url + CHATS, json=CHAT | {"messages": messages}).status_code == 200
    messages[1] = answer | {"tool_calls": [{"id": "x"}]}
    answered = httpx.post(server.url + CHATS, json=CHAT | {"messages": messages})
    assert "messages.1.tool_calls: this option is not supported" in refusal(answered, 400)


def test_an_empty_prompt_is_continued_where_the_tokenizer_puts_a_token_in_front(server: Server) -> None:
    assert httpx.post(server.url + COMPLETIONS, json=BASE | {"prompt": ""}).status_code == 200


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'{"model": "tiny", "prompt": "\xff\xfe"}',
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "tiny", "prompt": "x", "\\udc00": 1}',
    b'{"model": "\\udc00", "prompt": "x", "stream": 5}',
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
    b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b"[" * 50_000,
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:40]))
def test_bad_bodies(server: Server, body: bytes) -> None:
    refusal(httpx.post(server.url + COMPLETIONS, content=body, headers={"content-type": "application/json"}), 400)


def test_other_refusals(server: Server) -> None:
    assert "there are tiny" in refusal(httpx.post(server.url + COMPLETIONS, json=BASE | {"model": "gpt"}), 404)
    refusal(httpx.get(server.url + "/v1/no-such"), 404)
    refusal(httpx.get(server.url + COMPLETIONS), 405)
    refusal(httpx.get(server.url + "/../config.py"), 404)
    refusal(httpx.post(server.url + COMPLETIONS, content=b"x" * 100_001), 413)
    refusal(httpx.post(server.url + COMPLETIONS, content=iter([b"x" * 60_000] * 2)), 413)  # no length is declared


def test_a_slow_body_is_cut_off(replica: Replica) -> None:
    with (
        serving_on_a_port(local_app({MODEL_NAME: replica}, limits=Limits(body_s=0.2))) as server,
        socket.create_connection((server.host, server.port)) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(12) == b"HTTP/1.1 408"


def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    replica = Replica("plain", model_entry(save_tiny_model(tmp_path, template=None)))
    with serving_on_a_port(local_app({"plain": replica})) as server:
        message = refusal(httpx.post(server.url + CHATS, json=CHAT | {"model": "plain"}), 400)
    replica.close()
    assert "no chat template" in message


def test_keys(replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.json").write_text(json.dumps({"ann": "secret-1"}))
    monkeypatch.setenv("TEST_KEYS", "secret-2, secret-3")
    keys = KeyRing.load(Keys(file=str(tmp_path / "keys.json"), env="TEST_KEYS", requests_per_minute=3))
    with serving_on_a_port(local_app({MODEL_NAME: replica}, keys=keys)) as server:

        def ask(authorization: str | None) -> httpx.Response:
            headers = {} if authorization is None else {"Authorization": authorization}
            return httpx.post(server.url + COMPLETIONS, json=BASE, headers=headers)

        for wrong in (None, "", "Bearer", "Bearer wrong", "Basic secret-1", "secret-1", "Bearer secret-1x"):
            refusal(ask(wrong), 401)
        for key in ("secret-1", "secret-2", "secret-3"):
            assert ask(f"Bearer {key}").status_code == 200
        assert [ask("Bearer secret-1").status_code for _ in range(2)] == [200, 200]
        refused = ask("Bearer secret-1")
        refusal(refused, 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/v1/models").status_code == 401
        assert httpx.get(server.url + "/metrics").status_code == 401


BAD_KEYS = [None, "no json", "[]", '{"ann": ""}', '{"ann": 5}', "{}"]


@pytest.mark.parametrize("text", BAD_KEYS)
def test_bad_key_files_are_named_and_not_shown(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "keys.json").write_text(text)
    with pytest.raises(InputError, match=r"keys"):
        KeyRing.load(Keys(file=str(tmp_path / "keys.json")))


MODEL = {"engine": "cllm", "path": "x"}
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({}, "models"),
    ({"models": {}}, "models"),
    ({"models": {"a": MODEL | {"engine": "tgi"}}}, "engine"),
    ({"models": {"a": {"path": "x"}}}, "engine"),
    ({"models": {"a": MODEL | {"gpus": 9}}}, "gpus"),
    ({"models": {"a": MODEL | {"gpus": 2, "shards": 3}}}, "shards=3 does not fit gpus=2"),
    ({"models": {"a": {"engine": "vllm", "path": "x"}}}, "options"),
    ({"models": {"a": {"engine": "vllm", "path": "x", "options": {"method": "beam"}}}}, "method"),
    ({"models": {"a": {"engine": "vllm", "path": "x", "options": {"method": "ar", "window": 3}}}}, "window"),
    ({"models": {"a": {"engine": "vllm", "path": "x", "options": {"method": "ar"}, "precision": "bf16"}}}, "precision"),
    ({"models": {"a": MODEL | {"replicas": 0}}}, "replicas"),
    ({"models": {"a": MODEL | {"replicas": {"min_replicas": 5}}}}, "min_replicas=5 is more than max_replicas=4"),
    ({"models": {"a": MODEL | {"replicas": {"most": 5}}}}, "most"),
    ({"models": {"a": MODEL | {"max_queue": 0}}}, "max_queue"),
    ({"models": {"a": MODEL | {"options": {"windw": 3}}}}, "windw"),
    ({"models": {"a": MODEL}, "limts": {}}, "limts"),
]


@pytest.mark.parametrize(("data", "named"), BAD_CONFIGS, ids=lambda value: str(value)[:40])
def test_bad_configs_are_one_clear_line(data: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        AppConfig.from_data(data, where="args")
    assert "\n" not in str(error.value)


def test_more_gpus_than_the_cluster_has() -> None:
    config = AppConfig.from_data({"models": {"a": MODEL | {"gpus": 1, "replicas": 3}, "b": MODEL}}, where="args")
    config.check_fits({"GPU": 3})
    with pytest.raises(InputError, match=r"need 3 GPUs \(a 1 x 3\), the cluster has 2"):
        config.check_fits({"GPU": 2})
    config.model_copy(update={"wait_for_gpus": True}).check_fits({})


def test_a_replica_has_its_gpus_on_one_node() -> None:
    config = AppConfig.from_data({"models": {"a": MODEL | {"gpus": 4}}}, where="args")
    config.check_fits({"GPU": 4}, largest_node=4)
    with pytest.raises(InputError, match=r"models\.a: a replica needs 4 GPUs of one node, none has more than 2"):
        config.check_fits({"GPU": 4}, largest_node=2)


def test_settings_of_vllm_that_contradict_each_other_are_named() -> None:
    options = {"method": "medusa"}
    config = AppConfig.from_data({"models": {"m": {"engine": "vllm", "path": "x", "options": options}}}, where="args")
    with pytest.raises(InputError, match=r"models\.m: draft: method medusa needs draft checkpoint"):
        check_model("m", config.models["m"])
