"""Streams of tokens give the tokenizer's own text, however they are cut, and end where a stop string completes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cllm.engine.detokenize import StreamDecoder
from cllm.tasks.tokenizer import train_tokenizer

TEXTS = [
    "SELECT name FROM users WHERE id = 12; don't stop",
    "Grüße aus Köln, naïve café – 12 €",
    "日本語のテキスト、你好世界",
    "👩‍👩‍👧‍👦 family 🇩🇪 flags 🏳️‍🌈 é (combining)",
    "العربية हिन्दी ไทย",
    "spaces   and\n\n\tlines \ufffd kept",
]


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts the tokens that it decodes."""

    decoded = 0

    def decode(self, token_ids, *args, **kwargs):
        self.decoded += len(token_ids)
        return super().decode(token_ids, *args, **kwargs)


def byte_level():
    """Byte-level BPE with few merges: characters outside ASCII spread over several tokens."""
    return CountingTokenizer(
        tokenizer_object=train_tokenizer(TEXTS[:3] * 4, 330).backend_tokenizer, bos_token="<|bos|>", eos_token="<|eos|>"
    )


def byte_fallback():
    """Like Llama 2: the first token loses the space in front, and bytes become text only when a character is whole."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz,;=-üé日本", "▁the", "▁stop", "▁a", "er", "<unk>"]
    vocab = {token: i for i, token in enumerate([f"<0x{byte:02X}>" for byte in range(256)] + words)}
    merges = [("e", "r")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return CountingTokenizer(tokenizer_object=backend, unk_token="<unk>")


BYTE_LEVEL, BYTE_FALLBACK = byte_level(), byte_fallback()


def whole_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(ids, rng, longest):
    """The ids in pushes of 0 to `longest` tokens."""
    pushes, start = [], 0
    while start < len(ids):
        size = rng.randint(0, longest)
        pushes.append(ids[start : start + size])
        start += size
    return pushes


def stream(tokenizer, pushes):
    """All pieces; each of them is final when it comes."""
    decoder = StreamDecoder(tokenizer, ())
    pieces = [decoder.push(push) for push in pushes] + [decoder.finish()]
    assert not decoder.stopped
    return "".join(pieces)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=40), seed=st.integers(0, 999), longest=st.integers(1, 9))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
def test_any_text_in_any_pushes(tokenizer, text, seed, longest):
    ids = tokenizer.encode(text.replace(" ", "▁") if tokenizer is BYTE_FALLBACK else text)
    assert stream(tokenizer, cut(ids, random.Random(seed), longest)) == whole_text(tokenizer, ids)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=60),
    seed=st.integers(0, 999),
    longest=st.integers(1, 9),
)
def test_any_tokens_of_a_byte_level_tokenizer(ids, seed, longest):
    """Most of these are no UTF-8, and special tokens are among them."""
    assert stream(BYTE_LEVEL, cut(ids, random.Random(seed), longest)) == whole_text(BYTE_LEVEL, ids)


def byte_token(tokenizer, byte):
    """The token of one byte: its printable character, or, for the others, one counted up from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [other for other in range(256) if other not in printable]
    return tokenizer.convert_tokens_to_ids(chr(byte if byte in printable else 256 + others.index(byte)))


UTF8_EDGES = [b"\x80", b"\xc3", b"\xe6\x97", b"\xe6", b"\xa5", b"\xf0\x9f\x98", b"\xf0\x9f", b"\x80", b"\xed", b"a"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(parts=st.lists(st.sampled_from(UTF8_EDGES), max_size=30), seed=st.integers(0, 999), longest=st.integers(1, 9))
def test_broken_characters_of_a_byte_level_tokenizer(parts, seed, longest):
    ids = [byte_token(BYTE_LEVEL, byte) for part in parts for byte in part]
    whole = whole_text(BYTE_LEVEL, ids)
    assert whole == b"".join(parts).decode(errors="replace")
    assert stream(BYTE_LEVEL, cut(ids, random.Random(seed), longest)) == whole


def test_special_tokens_do_not_come_between_the_bytes_of_a_character():
    first, *others = (byte_token(BYTE_LEVEL, byte) for byte in "日".encode())
    ids = [first, *[BYTE_LEVEL.eos_token_id] * 6, *others]
    assert stream(BYTE_LEVEL, [[token] for token in ids]) == whole_text(BYTE_LEVEL, ids) == "日"


def test_text_comes_as_soon_as_its_characters_are_whole():
    ids = BYTE_LEVEL.encode("日本語 ok", add_special_tokens=False)
    decoder = StreamDecoder(BYTE_LEVEL, ())
    for count, token in enumerate(ids, start=1):
        before, after = (whole_text(BYTE_LEVEL, ids[:n]).rstrip("\ufffd") for n in (count - 1, count))
        assert decoder.push([token]) == after[len(before) :]
    assert decoder.finish() == ""


def test_a_byte_run_that_goes_wrong_keeps_its_whole_characters():
    """The documented exception: byte fallback turns the whole run into replacement characters afterwards."""
    decoder = StreamDecoder(BYTE_FALLBACK, ())
    you = list("你".encode())
    assert [decoder.push([byte]) for byte in you] == ["", "", "你"]
    rest = decoder.push([0xFF]) + decoder.push(BYTE_FALLBACK.encode("a")) + decoder.finish()
    assert rest.endswith("a")
    assert set(rest[:-1]) == {"\ufffd"}


def naive_stop(tokenizer, ids, stops, min_tokens=0):
    """Text before the stop that completes first behind the first `min_tokens` tokens, it, and its token's index; by
    decoding every prefix.
    """
    early = 0
    for index in range(len(ids)):
        text = whole_text(tokenizer, ids[: index + 1]).rstrip("\ufffd")
        if index < min_tokens:
            early = len(text)
            continue
        ends = [(text.find(stop, max(0, early - len(stop) + 1)) + len(stop), stop) for stop in stops]
        hits = [(end, -len(stop), stop) for end, stop in ends if end >= len(stop)]
        if hits:
            end, _, stop = min(hits)
            return text[: end - len(stop)], stop, index
    return whole_text(tokenizer, ids), None, None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data(), text=st.text("abc é日👩 ", max_size=30), seed=st.integers(0, 999), longest=st.integers(1, 9))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
def test_any_stops_in_any_pushes(tokenizer, data, text, seed, longest):
    ids = tokenizer.encode(text.replace(" ", "▁") if tokenizer is BYTE_FALLBACK else text)
    stops = tuple(data.draw(st.lists(st.text("abc é日👩 ", min_size=1, max_size=4), max_size=3)))
    min_tokens = data.draw(st.sampled_from([0, 0, 1, 3, 8]))
    text, stop, stop_token = naive_stop(tokenizer, ids, stops, min_tokens)
    decoder, got, seen = StreamDecoder(tokenizer, stops, min_tokens), "", 0
    for push in cut(ids, random.Random(seed), longest):
        got += decoder.push(push)
        assert text.startswith(got)
        if decoder.stopped:
            assert decoder.stop_index is not None
            assert seen + decoder.stop_index == stop_token
            break
        seen += len(push)
    assert got + decoder.finish() == text
    assert decoder.stop == stop


@pytest.mark.parametrize("stop", ["stop", "naïve", "日本", "👧", "é – "])
def test_a_stop_at_every_split_point(stop):
    text = f"before s st sto 👩‍👩‍ {stop} behind"
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    first = next(i for i in range(len(ids)) if stop in whole_text(BYTE_LEVEL, ids[: i + 1]))
    for split in range(len(ids) + 1):
        decoder = StreamDecoder(BYTE_LEVEL, ("never", stop))
        got = decoder.push(ids[:split])
        assert decoder.stopped == (split > first)
        got += decoder.push(ids[split:])
        assert (got, decoder.stop) == (text[: text.index(stop)], stop)
        assert decoder.stop_index == (first if split > first else first - split)
        assert decoder.push(ids) + decoder.finish() == ""  # nothing comes behind a stop


def test_the_beginning_of_a_stop_is_held_back_until_it_is_none():
    decoder = StreamDecoder(BYTE_LEVEL, ("aab", "abx"))
    pieces = [decoder.push(BYTE_LEVEL.encode(letter, add_special_tokens=False)) for letter in "xaaay"]
    assert pieces == ["x", "", "", "a", "aay"]
    assert decoder.push(BYTE_LEVEL.encode("a", add_special_tokens=False)) == ""
    assert decoder.finish() == "a"


@pytest.mark.parametrize("push_size", [1, 2, 9])
def test_a_stop_counts_from_the_first_token_behind_min_tokens(push_size):
    """It may begin before; and a shorter one that was complete before does not count for a longer one's sake."""
    ids = [BYTE_LEVEL.encode(letter, add_special_tokens=False)[0] for letter in "abcabcd"]
    for min_tokens, stops, text, stop in [
        (0, ("bc",), "a", "bc"),
        (2, ("bc",), "a", "bc"),
        (3, ("bc",), "abca", "bc"),
        (3, ("bc", "bcabx"), "abca", "bc"),
        (6, ("bc",), "abcabcd", None),
        (9, ("d",), "abcabcd", None),
    ]:
        decoder = StreamDecoder(BYTE_LEVEL, stops, min_tokens)
        got = "".join(decoder.push(ids[start : start + push_size]) for start in range(0, 7, push_size))
        assert (got + decoder.finish(), decoder.stop) == (text, stop)


def test_a_stop_that_only_the_end_completes():
    """The replacement character is certain only when no further byte can come."""
    decoder = StreamDecoder(BYTE_LEVEL, ("\ufffd",))
    half = BYTE_LEVEL.encode("日", add_special_tokens=False)[:1]
    assert decoder.push(BYTE_LEVEL.encode("a", add_special_tokens=False) + half) == "a"
    assert not decoder.stopped
    assert decoder.finish() == ""
    assert (decoder.stop, decoder.stop_index) == ("\ufffd", None)


@pytest.mark.parametrize("kind", ["text", "continuation bytes", "replacement characters", "one word"])
@pytest.mark.parametrize("push_size", [1, 5])
def test_the_work_is_linear(kind, push_size):
    tokenizer = byte_level()
    sources = {"text": " ".join(TEXTS) * 40, "replacement characters": "\ufffd" * 2000, "one word": "x" * 3000}
    continuation = [byte_token(tokenizer, 0x80)] * 3000
    ids = tokenizer.encode(sources[kind], add_special_tokens=False) if kind in sources else continuation
    pushes = [ids[i : i + push_size] for i in range(0, len(ids), push_size)]
    assert stream(tokenizer, pushes) == PreTrainedTokenizerFast.decode(tokenizer, ids)
    assert len(ids) >= 1000
    assert tokenizer.decoded < 40 * len(ids)
