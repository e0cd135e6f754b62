"""Token-forwards that distillation spends on a trained block: packed rows against three forwards a block.

A token-forward is one token that goes through the model once. Backward passes and the quadratic part of attention are
left out on both sides.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cllm.recipe import LossConfig
from cllm.training.batches import RowOfDocuments, RowStream
from cllm.training.sources import DocumentSource


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What some training spends, and on how much.

    Attributes:
        token_forwards: tokens times forward passes, padding included.
        blocks: noisy blocks trained.
        noisy_tokens: tokens of these blocks that bear a consistency loss.
    """

    token_forwards: float
    blocks: int
    noisy_tokens: int

    @property
    def per_block(self) -> float:
        return self.token_forwards / self.blocks

    @property
    def per_noisy_token(self) -> float:
        return self.token_forwards / self.noisy_tokens

    def __add__(self, other: "TokenCost") -> "TokenCost":
        return TokenCost(
            self.token_forwards + other.token_forwards,
            self.blocks + other.blocks,
            self.noisy_tokens + other.noisy_tokens,
        )


@dataclass(frozen=True, slots=True)
class CostComparison:
    """Both schemes over the same responses."""

    packed: TokenCost
    three_forwards: TokenCost

    @property
    def ratio(self) -> float:
        """Token-forwards a block of three forwards over those of packed training."""
        return self.three_forwards.per_block / self.packed.per_block

    @property
    def ratio_per_noisy_token(self) -> float:
        """The same a noisy token. Unfair to packed training, which leaves out noisy tokens whose loss is zero."""
        return self.three_forwards.per_noisy_token / self.packed.per_noisy_token


def three_forwards_cost(num_prompt: int, num_response: int, block_size: int) -> TokenCost:
    """One pass over one response as the paper's code trains it (algorithm 2): for block b (from 1) a student, a teacher
    and an AR forward, each over the prompt and b blocks."""
    blocks = math.ceil(num_response / block_size)
    forwards = sum(3 * (num_prompt + block * block_size) for block in range(1, blocks + 1))
    return TokenCost(forwards, blocks, num_response)


def mean_forwards(loss: LossConfig) -> float:
    """Mean forward passes of a packed row: the training pass, and 0 to `on_policy_iterations` refinements before it."""
    return 1 + loss.on_policy_iterations / 2


def packed_cost(rows: Sequence[RowOfDocuments], row_tokens: int, block_size: int, loss: LossConfig) -> TokenCost:
    """Cost of packed rows, whose padding goes through the model as well.

    Blocks are the drawn ones. Refinement moves a block on instead of training it twice; what it settles up to the end
    of a response is counted as trained.
    """
    lengths = [len(span.tokens) for row in rows for document in row for span in document.spans]
    # a span of noisy context holds several blocks
    blocks = sum(math.ceil(length / block_size) for length in lengths)
    return TokenCost(len(rows) * row_tokens * mean_forwards(loss), blocks, sum(lengths))


def packed_cost_of_lengths(num_prompt: int, num_response: int, block_size: int, loss: LossConfig) -> TokenCost:
    """Cost of one response from its lengths alone: without padding, and with every noisy token kept."""
    clean = num_prompt + num_response
    noisy = loss.states_per_block * num_response
    tokens = clean + noisy
    if loss.target == "local":
        tokens += noisy
    if loss.ar_labels == "reference":
        tokens += clean  # the reference answer is a document of its own, taken to be as long
    blocks = loss.states_per_block * math.ceil(num_response / block_size)
    return TokenCost(tokens * mean_forwards(loss), blocks, noisy)


def compare_on(source: DocumentSource, row_tokens: int, block_size: int, loss: LossConfig, seed: int) -> CostComparison:
    """Both schemes over the first epoch of `source`. Responses that train no block are left out of the three forwards,
    but not of the packed rows."""
    rows = list(RowStream(source, row_tokens, seed).epoch_rows(0))
    trained = [document for row in rows for document in row if document.spans]
    three = add_costs(three_forwards_cost(len(d.prompt_ids), len(d.response_ids), block_size) for d in trained)
    return CostComparison(packed_cost(rows, row_tokens, block_size, loss), three)


def compare_lengths(num_prompt: int, num_response: int, block_size: int, loss: LossConfig) -> CostComparison:
    """Both schemes for one response of the given lengths in tokens."""
    packed = packed_cost_of_lengths(num_prompt, num_response, block_size, loss)
    return CostComparison(packed, three_forwards_cost(num_prompt, num_response, block_size))


def add_costs(costs: Iterable[TokenCost]) -> TokenCost:
    return sum(costs, TokenCost(0, 0, 0))
