"""N-grams of one request, as a source of guesses. No tensors.

Text repeats itself, and so do the predictions that a step rejects: what stands behind the first disagreement was
predicted at the wrong place, but its tokens often follow each other in the answer (the rejection recycling of Jacobi
Forcing, arXiv 2512.14681).
"""

from collections import OrderedDict
from collections.abc import Sequence

from cllm.errors import InputError


class GuessRace:
    """Who guesses a row's next token better: the model, whose prediction was carried over from the step before, or the
    n-grams. Judged by all rows together, for what decides is mostly the model: a consistency model's carried
    predictions are worth more than n-grams, those of a plain one are not.
    """

    _MEMORY = 100.0  # tokens after which an observation weighs 1/e
    _NEEDED_LEAD = 0.05  # of hits, before n-grams take the place of carried predictions

    def __init__(self) -> None:
        self._lead = 0.0  # hits of the n-grams less those of the model, a token

    def note(self, carried: int, proposed: int, token: int) -> None:
        """A token came, for which both had a guess."""
        self._lead += ((proposed == token) - (carried == token) - self._lead) / self._MEMORY

    @property
    def ngrams_lead(self) -> bool:
        return self._lead > self._NEEDED_LEAD


class NgramPool:
    """Remembers which token came last after every context of 1 .. order - 1 tokens.

    Args:
        order: n, longest n-gram: a token and up to n - 1 before it.
        capacity: contexts kept; those seen longest ago go first.

    Raises:
        InputError: `order` is below 2 or `capacity` below 1.
    """

    def __init__(self, order: int, capacity: int = 1 << 16) -> None:
        if order < 2:
            raise InputError(f"order must be >= 2, got {order}: an n-gram is a context and the token behind it")
        if capacity < 1:
            raise InputError(f"capacity must be >= 1, got {capacity}")
        self.order = order
        self.capacity = capacity
        self._next: OrderedDict[tuple[int, ...], int] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        """Contexts held."""
        return len(self._next)

    def add(self, tokens: Sequence[int]) -> None:
        """Learn every n-gram of a run of tokens: a prompt, committed tokens, or the rejected tail of a step.

        Runs are independent: to learn the n-grams across a seam, begin with the `order - 1` tokens before it.
        """
        for end in range(1, len(tokens)):
            for start in range(max(0, end - self.order + 1), end):
                context = tuple(tokens[start:end])
                self._next[context] = tokens[end]
                self._next.move_to_end(context)
        while len(self._next) > self.capacity:
            self._next.popitem(last=False)

    def continue_from(self, last_tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens to follow `last_tokens`, each the latest known one after the longest known context.

        Ends early where not even the last token alone is known.
        """
        context = list(last_tokens[max(0, len(last_tokens) - self.order + 1) :])
        proposed: list[int] = []
        while len(proposed) < count:
            token = self._latest(context)
            if token is None:
                break
            proposed.append(token)
            context = [*context, token][1 - self.order :]
        return proposed

    def _latest(self, context: list[int]) -> int | None:
        for start in range(len(context)):
            token = self._next.get(tuple(context[start:]))
            if token is not None:
                return token
        return None
