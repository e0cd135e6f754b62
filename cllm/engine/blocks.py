"""Blocks of the key-value cache: who owns which, and which hold the beginning of a prompt seen before. No tensors.

A block is free, owned by one or more sequences, or idle: owned by none, but kept for its content until room is needed.
Only blocks full of tokens that never change are shared, so no block is ever copied.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

NULL_BLOCK = 0  # takes the writes of tokens that nobody reads; never owned
_ROOT = b""


class BlockPool:
    """Numbers 1 .. num_blocks - 1, handed out and taken back.

    Args:
        num_blocks: blocks of the cache, the null block included.
        block_tokens: S, tokens of a block.
        reuse_prefixes: keep blocks with a known beginning of a prompt for later prompts.
    """

    def __init__(self, num_blocks: int, block_tokens: int, *, reuse_prefixes: bool = True) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be >= 2 (block 0 is never handed out), got {num_blocks}")
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.reuse_prefixes = reuse_prefixes
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._owners = [0] * num_blocks
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out."""
        return len(self._free) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for a new owner, or None if there are not so many; idle ones lose their content last."""
        if count > self.num_available:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take back one ownership of each."""
        for block in reversed(blocks):  # the end of a prefix is the first to lose its content
            self._owners[block] -= 1
            if self._owners[block] > 0:
                continue
            if block in self._digest_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def digests(self, tokens: Sequence[int], end: int, known: list[bytes]) -> list[bytes]:
        """One digest for each block that the first `end` tokens fill; it covers all tokens up to the block's end.

        Args:
            known: those of earlier calls for these tokens, to which the others are added: nothing is hashed twice.
        """
        if not self.reuse_prefixes:
            return []
        size = self.block_tokens
        for start in range(len(known) * size, end - size + 1, size):
            content = array("q", tokens[start : start + size]).tobytes()
            parent = known[-1] if known else _ROOT
            known.append(hashlib.blake2b(parent + content, digest_size=16).digest())
        return known[: end // size]

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Own the blocks that hold the longest known beginning of the tokens with these digests."""
        found = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        for block in found:
            self._idle.pop(block, None)
            self._owners[block] += 1
        return found

    def publish(self, digests: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Make known which blocks hold the tokens with these digests; a content that is known stays where it was."""
        for digest, block in zip(digests, blocks, strict=True):
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def check(self, owned: Sequence[Sequence[int]]) -> None:
        """Assert that the books are right, given the blocks of all owners."""
        counts = [0] * self.num_blocks
        for blocks in owned:
            for block in blocks:
                counts[block] += 1
        assert counts == self._owners, "owners differ from what sequences hold"
        assert counts[NULL_BLOCK] == 0, "the null block is owned"
        unowned = sorted([*self._free, *self._idle])
        assert unowned == [b for b in range(1, self.num_blocks) if counts[b] == 0], "a block leaked or is held twice"
        assert {d: b for b, d in self._digest_of.items()} == self._block_of, "prefix tables disagree"
        assert set(self._idle) <= set(self._digest_of), "an idle block has no content"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block
