"""From the commits of an engine to the chunks of a response."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from transformers import PreTrainedTokenizerBase

from cllm.decoding.records import Commit, SamplingParams, TokenLogprob
from cllm.engine.detokenize import StreamDecoder
from serving.errors import ReplicaFailedError
from serving.messages import Chunk, Given, ScoredToken
from serving.pieces import Pieces


class Transcript:
    """Text, stop strings, and what the client already has.

    Args:
        tokenizer: of the model.
        sampling: its stop texts end the response, behind its `min_tokens`.
        num_prompt_tokens: for the chunks.
        given: what the client has.
        repeats: the engine decodes the given tokens once more; else it begins behind them.
        guesses: texts of guessed tokens; None: the chunks tell no guesses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingParams,
        num_prompt_tokens: int,
        given: Given,
        *,
        repeats: bool,
        guesses: Pieces | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, sampling.stop, sampling.min_tokens)
        self._num_prompt_tokens = num_prompt_tokens
        self._repeated = list(given.token_ids) if repeats else []
        self._text_ahead = given.num_characters
        self._guesses = guesses
        if not repeats:
            self._unseen(self._decoder.push(given.token_ids))

    def add(self, commits: Sequence[Commit]) -> Chunk | None:
        """The chunk of commits of successive steps, at least one; None if the client has all of it.

        Raises:
            ReplicaFailedError: a repeated token differs from the given one.
        """
        token_ids = [token for commit in commits for token in commit.token_ids]
        finish_reason = commits[-1].finish_reason
        text = self._decoder.push(token_ids)
        if self._decoder.stop_index is not None:
            token_ids, finish_reason = token_ids[: self._decoder.stop_index + 1], "stop"
        elif finish_reason is not None:
            text += self._decoder.finish()
            finish_reason = "stop" if self._decoder.stopped else finish_reason
        new_ids, new_text = self._fresh(token_ids), self._unseen(text)
        if not new_ids and finish_reason is None:
            return None
        logprobs = tuple(found for commit in commits for found in commit.logprobs or ())
        return Chunk(
            tuple(new_ids),
            new_text,
            self._num_prompt_tokens,
            finish_reason,
            scores=self._scores(new_ids, logprobs[: len(token_ids)]),
            guesses=self._guessed(commits[-1]) if finish_reason is None else (),
            accepted=_accepted(commits, len(token_ids) - len(new_ids), len(token_ids)),
        )

    def _fresh(self, token_ids: list[int]) -> list[int]:
        count = min(len(self._repeated), len(token_ids))
        if token_ids[:count] != self._repeated[:count]:
            raise ReplicaFailedError("a repeated response differs from what the client was given")
        self._repeated = self._repeated[count:]
        return token_ids[count:]

    def _scores(self, token_ids: list[int], logprobs: tuple[TokenLogprob, ...]) -> tuple[ScoredToken, ...]:
        """Of the last tokens of the commits, which are the new ones."""
        if not logprobs:
            return ()
        recent = logprobs[len(logprobs) - len(token_ids) :]
        return tuple(
            ScoredToken(self._name(token), found.logprob, tuple((self._name(other), p) for other, p in found.top))
            for token, found in zip(token_ids, recent, strict=True)
        )

    def _guessed(self, commit: Commit) -> tuple[str, ...]:
        return () if self._guesses is None else tuple(map(self._guesses.text, commit.guesses))

    def _name(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))

    def _unseen(self, text: str) -> str:
        """The text without the characters that the client has."""
        count = min(self._text_ahead, len(text))
        self._text_ahead -= count
        return text[count:]


def _accepted(commits: Sequence[Commit], start: int, end: int) -> tuple[int, ...]:
    """How many of the tokens from `start` to `end` each commit has, without those that have none of them."""
    ends = [min(end, max(start, count)) for count in accumulate(len(commit.token_ids) for commit in commits)]
    return tuple(after - before for before, after in pairwise([start, *ends]) if after > before)
