"""Tokens to text while they arrive: only text that later tokens cannot change, and nothing from a stop string on.

A token has no text of its own: a character may spread over several tokens, and some tokenizers drop the space in front
of the first token they see. So tokens are decoded together with the ones before them, in a window that moves on
whenever the text ends in whole characters; the work is linear in the number of tokens.
"""

import copy
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what decoders write for bytes that are no UTF-8, among them the first bytes of a character
_LONGEST = 4  # bytes of a character, hence the most tokens it can spread over


class StreamDecoder:
    """The text of one response, piece by piece. Together the pieces are `tokenizer.decode` of all tokens, without
    special tokens and without cleaning up spaces, cut off before the stop string that completes first. One that
    completes with the first `min_tokens` tokens is text like any other.

    One exception: byte tokens of a tokenizer with byte fallback (Llama 2) that form whole characters and then go on
    with invalid bytes. `decode` turns all of them into replacement characters, here the whole characters stay.

    Attributes:
        stopped: whether a stop string came up; text behind it is dropped.
        stop: that string.
        stop_index: index, within its push, of the token that completed it; None if only `finish` could see it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = (), min_tokens: int = 0) -> None:
        self._text = _Text(tokenizer)
        self._scanner = _StopScanner(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self.stop_index: int | None = None

    @property
    def stopped(self) -> bool:
        return self._scanner.found is not None

    @property
    def stop(self) -> str | None:
        return self._scanner.found

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make final; empty after a stop."""
        if self.stopped:
            return ""
        num_early = max(0, self._min_tokens - self._num_tokens)
        self._num_tokens += len(token_ids)
        early = self._scanner.push(self._text.push(token_ids[:num_early]), may_stop=False)
        before = copy.copy(self._text), copy.copy(self._scanner)
        released = self._feed(token_ids[num_early:])
        if self._scanner.found is None:
            return early + released
        # The same once more, token by token: which of them was it?
        self._text, self._scanner = before
        released = early
        for index, token in enumerate(token_ids[num_early:], num_early):
            released += self._feed([token])
            if self._scanner.found is not None:
                self.stop_index = index
                break
        return released

    def finish(self) -> str:
        """The rest of the text; no tokens may follow."""
        may_stop = self._num_tokens > self._min_tokens
        return self._scanner.push(self._text.finish(), may_stop=may_stop) + self._scanner.finish()

    def _feed(self, token_ids: Sequence[int]) -> str:
        return self._scanner.push(self._text.push(token_ids))


class _Text:
    """Final text of a growing list of tokens.

    The window's tokens up to `_whole` end in whole characters; the first `_released` characters of the window's text
    have been handed out. Copies are independent, for no list is changed in place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._window: list[int] = []
        self._whole = 0
        self._released = 0

    def push(self, token_ids: Sequence[int]) -> str:
        new = [token for token in token_ids if token not in self._special]
        if not new:
            return ""
        self._window = self._window + new
        size, text = len(self._window), self._decode(self._window)
        whole, settled = self._last_whole(text)
        if size - whole >= _LONGEST:  # broken for good, but for the last bytes: they may begin a character
            released = self._release(text[:-1])
            self._drop(size - _LONGEST, size, text)
            self._whole = 0
        else:
            released = self._release(max(settled, text.rstrip(_BROKEN), key=len))
            if whole > self._whole:
                start = self._whole
                self._drop(start, whole, settled)
                self._whole = whole - start
        return released

    def finish(self) -> str:
        return self._release(self._decode(self._window))

    def _last_whole(self, text: str) -> tuple[int, str]:
        """The most tokens of the window that end in whole characters, and their text; `_whole` if not near its end."""
        size = len(self._window)
        for count in range(size, max(size - _LONGEST, self._whole), -1):
            settled = text if count == size else self._decode(self._window[:count])
            if not settled.endswith(_BROKEN):
                return count, settled
        return self._whole, ""

    def _release(self, final: str) -> str:
        released = final[self._released :]
        self._released += len(released)
        return released

    def _drop(self, start: int, end: int, text: str) -> None:
        """Let the window begin at `start`; `text` is that of its tokens up to `end`, shorter by what goes."""
        self._released -= len(text) - len(self._decode(self._window[start:end]))
        self._window = self._window[start:]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _StopScanner:
    """Passes text on until one of the stop strings completes; keeps back what may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """The text that is certain now.

        Args:
            may_stop: a stop string that completes in this text counts; else only one that begins in it may, later.
        """
        if self.found is not None:
            return ""
        known, text = len(self._held), self._held + text
        if may_stop:
            # The first to complete wins, the longest of those: what reading character by character would find.
            found = [(text.find(stop, max(0, known - len(stop) + 1)), stop) for stop in self._stop]
            hits = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
            if hits:
                _, start, self.found = min(hits)
                self._held = ""
                return text[:start]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            lengths = range(min(len(stop) - 1, len(text)), longest, -1)
            longest = next((length for length in lengths if text.endswith(stop[:length])), longest)
        return longest
