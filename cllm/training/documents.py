"""What training reads: a prompt, its response, and noisy spans of the response with the fixed point as their target."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Span:
    """A run of noisy tokens of one response, standing where its clean tokens stand.

    Token i of the span has the position of response token `start + i`. It sees the prompt, the clean response tokens
    before `start`, and the span's own tokens up to itself. A span is one block's state (clean context), or the states
    of several neighbouring blocks (noisy context).

    Attributes:
        target: the token that each noisy token's prediction is held against is found at the same offset of this span
            (local loss); None: of the clean response (global loss).
    """

    start: int
    tokens: tuple[int, ...]
    target: "Span | None" = None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + (0 if self.target is None else len(self.target.tokens))


@dataclass(frozen=True, slots=True)
class Document:
    """One training example. AR fine-tuning has no spans.

    Attributes:
        response_ids: the fixed points, concatenated; ends with the end-of-sequence token unless it was cut off.
        learn_response: whether the AR loss covers the response (not where it learns a reference answer instead, which
            is then a document of its own).
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    learn_response: bool = True

    @property
    def num_tokens(self) -> int:
        """Tokens this document takes in a packed row."""
        return len(self.prompt_ids) + len(self.response_ids) + sum([span.num_tokens for span in self.spans])

    def fitted(self, max_tokens: int) -> "Document":
        """This document with as many of its first spans as fit; its prompt and response stay whole even if too long."""
        excess, count = self.num_tokens - max_tokens, len(self.spans)
        while excess > 0 and count:
            count -= 1
            excess -= self.spans[count].num_tokens
        return self if count == len(self.spans) else replace(self, spans=self.spans[:count])

    @property
    def num_ar_labels(self) -> int:
        return len(self.response_ids) if self.learn_response else 0

    @property
    def num_consistency_labels(self) -> int:
        return sum([len(span.tokens) for span in self.spans])
