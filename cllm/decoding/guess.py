"""Initial guesses for tokens about which nothing is known yet. Any guess is lossless; a good one saves forwards."""

from cllm.decoding.config import GuessKind

_MASK = 0xFFFFFFFF


def _hash(seed: int, position: int) -> int:
    """A 32-bit hash of two integers; plain integers, so that a guess costs no tensor operation."""
    x = (seed * 0x9E3779B1 ^ position * 0x85EBCA77) & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


class Guesser:
    """Guesses the token at a position of one request: a pure function of (kind, prompt, seed, position).

    Args:
        kind: prompt: a random token of the prompt (paper, algorithm 1); pad: `pad_id`.
    """

    def __init__(self, kind: GuessKind, prompt_ids: tuple[int, ...], pad_id: int, seed: int) -> None:
        self.kind = kind
        self.prompt_ids = prompt_ids
        self.pad_id = pad_id
        self.seed = seed

    def guess(self, start: int, count: int) -> list[int]:
        """Tokens for positions start .. start+count-1."""
        if self.kind == "pad":
            return [self.pad_id] * count
        size = len(self.prompt_ids)
        return [self.prompt_ids[_hash(self.seed, position) % size] for position in range(start, start + count)]
