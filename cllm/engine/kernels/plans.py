"""How a projection of a few tokens is launched: the candidates to try, and the one to take untried.

Shapes: T tokens, I inputs, O outputs (of a gated projection: of one half).
"""

from dataclasses import dataclass
from typing import Literal

import triton

Op = Literal["linear", "linear_add_norm", "gated_linear"]

# Plans are kept for these T; a T in between takes the next larger one's. Beyond the last, cuBLAS is as good.
TOKEN_BUCKETS = (1, 16, 32, 64, 128)
_UNTRIED_LIMIT = 64  # no plan of ours above it without having been measured
_FEWEST_COLUMNS = 16  # of a tensor core's right operand
_SHARED_MEMORY = 228 * 1024  # bytes of a Hopper processor; what a smaller GPU refuses, tuning passes over
_RESERVED = 1024  # of it, for each program


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a plan is chosen for."""

    op: Op
    tokens: int  # one of TOKEN_BUCKETS
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A launch of `kernels.projection`. `programs` equal to the number of tiles makes it write results, not parts."""

    block_t: int
    block_o: int
    block_i: int
    stages: int
    warps: int
    programs: int


@dataclass(frozen=True, slots=True)
class _Tile:
    block_o: int
    block_i: int
    stages: int
    warps: int = 4

    def shared_memory(self, block_t: int, halves: int) -> int:
        """Bytes that a program of two-byte elements takes, that of writing parts included: to a few KB, as compiled."""
        # Hopper's tensor cores read a stage from shared memory while the next ones arrive; tiles too low for them are
        # copied to registers first and need a stage less.
        buffers = self.stages if self.block_o >= 64 else self.stages - 1
        operands = (self.block_o * halves + block_t) * self.block_i * 2 * buffers
        return operands + self.block_o * min(block_t, 32) * 4 + _RESERVED


# Many bytes in flight for each program; larger tiles for more tokens, because every tile reads all of x again.
_TILES = {
    16: (
        _Tile(64, 128, 4),
        _Tile(64, 128, 5),
        _Tile(32, 256, 4),
        _Tile(64, 256, 4),
        _Tile(128, 128, 3),
        _Tile(32, 128, 6),
    ),
    32: (_Tile(64, 128, 4), _Tile(128, 64, 5), _Tile(128, 128, 4, 8), _Tile(64, 128, 3), _Tile(128, 64, 4)),
    64: (_Tile(128, 64, 4), _Tile(128, 128, 4, 8), _Tile(64, 128, 4), _Tile(256, 64, 4, 8), _Tile(128, 64, 6, 8)),
    128: (_Tile(128, 64, 4, 8), _Tile(256, 64, 4, 8), _Tile(128, 128, 3, 8)),
}
_GATED_TILES = {  # a tile is of both halves
    16: (_Tile(64, 128, 3), _Tile(64, 64, 5), _Tile(32, 128, 5), _Tile(32, 256, 4), _Tile(64, 128, 5)),
    32: (_Tile(64, 64, 5), _Tile(64, 128, 3), _Tile(64, 128, 4), _Tile(128, 64, 4, 8), _Tile(64, 128, 5)),
    64: (_Tile(64, 64, 4), _Tile(128, 64, 4, 8), _Tile(64, 64, 6), _Tile(64, 128, 4, 8)),
    128: (_Tile(64, 64, 4, 8), _Tile(128, 64, 4, 8)),
}


def bucket(num_tokens: int) -> int | None:
    """The smallest of TOKEN_BUCKETS that is enough, or None."""
    return next((tokens for tokens in TOKEN_BUCKETS if num_tokens <= tokens), None)


def candidates(key: PlanKey, processors: int) -> list[Plan]:
    """Plans worth measuring on a GPU with so many processors."""
    return [plan for tile in _tiles(key) for plan in _launches(tile, key, processors)]


def untried(key: PlanKey, processors: int) -> Plan | None:
    """The plan to take without a measurement; None stands for cuBLAS."""
    if key.tokens > _UNTRIED_LIMIT:
        return None
    plans = _launches(_tiles(key)[0], key, processors)
    return plans[0] if plans[0].programs >= processors else plans[-1]


def _tiles(key: PlanKey) -> tuple[_Tile, ...]:
    return (_GATED_TILES if key.op == "gated_linear" else _TILES)[_block_t(key)]


def _block_t(key: PlanKey) -> int:
    return max(_FEWEST_COLUMNS, key.tokens)


def _launches(tile: _Tile, key: PlanKey, processors: int) -> list[Plan]:
    """One program a tile, then as many programs as are resident at once, with equal shares of the work."""
    tiles, chunks = triton.cdiv(key.outputs, tile.block_o), triton.cdiv(key.inputs, tile.block_i)
    resident = _SHARED_MEMORY // tile.shared_memory(_block_t(key), 2 if key.op == "gated_linear" else 1)
    shared = [processors * each for each in range(1, resident + 1) if processors * each <= tiles * chunks]
    return [
        Plan(_block_t(key), tile.block_o, tile.block_i, tile.stages, tile.warps, programs)
        for programs in dict.fromkeys([tiles, *shared])
    ]
