"""Attention over a paged cache: the torch twin against plain per-row softmax, the GPU implementations against the twin.

Without a GPU our Triton kernel runs on Triton's interpreter.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from cllm.decoding.branches import Branches
from cllm.engine.attention import Attention, TorchAttention, WindowMask, Windows
from cllm.engine.backends import attention_for
from cllm.engine.flash_attention import FlashAttention3
from cllm.engine.ops import Pages
from cllm.errors import InputError

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from cllm.engine.triton_attention import TritonAttention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Tensors = tuple[torch.Tensor, Pages, Windows]
interpreted = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs triton, and a machine where its interpreter runs kernels"
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@dataclass(frozen=True)
class Case:
    """A batch: where each row's window starts, the window's width, heads, head size, and tokens of a block."""

    starts: tuple[int, ...]
    width: int
    heads: tuple[int, int] = (4, 4)
    size: int = 32
    block: int = 16

    def tensors(
        self, device: torch.device, dtype: torch.dtype, unused: float = 0.0, spare: int = 3
    ) -> tuple[torch.Tensor, Pages, Windows]:
        """Queries, pages and windows; blocks in random order; `unused` wherever no row has a token.

        `spare` table entries behind the longest row's are 0, as are those behind a shorter row's own.
        """
        generator = torch.Generator().manual_seed(0)
        needed = [-(-(start + self.width) // self.block) for start in self.starts]
        numbers = (1 + torch.randperm(sum(needed), generator=generator)).split(needed)
        tables_BM = torch.zeros(len(needed), max(needed) + spare, dtype=torch.int32)
        keys, values = (torch.full((1 + sum(needed), self.block, self.heads[1], self.size), unused) for _ in range(2))
        for row, (start, blocks) in enumerate(zip(self.starts, numbers, strict=True)):
            tables_BM[row, : len(blocks)] = blocks
            for cache in (keys, values):
                filled = torch.randn(start + self.width, self.heads[1], self.size, generator=generator)
                cache[blocks] = fill_blocks(cache[blocks], filled)
        q_THD = torch.randn(len(needed) * self.width, self.heads[0], self.size, generator=generator)
        windows = Windows(torch.tensor(self.starts, dtype=torch.int32).to(device), tables_BM.to(device), self.width)
        return q_THD.to(device, dtype), Pages(keys.to(device, dtype), values.to(device, dtype)), windows


def fill_blocks(blocks: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    flat = blocks.flatten(0, 1).clone()
    flat[: len(tokens)] = tokens
    return flat.view(blocks.shape)


def sees(windows: Windows, token: int, other: int) -> bool:
    """Whether a token of a window sees another one of it."""
    return other <= token if windows.mask is None else bool(windows.mask.visible_WW[token, other])


def masked(tensors: Tensors) -> Tensors:
    """The same with a random mask that lets tokens see later ones, too; all see the first one."""
    q_THD, pages, windows = tensors
    generator = torch.Generator().manual_seed(1)
    visible_WW = torch.rand(windows.width, windows.width, generator=generator) < 0.3
    visible_WW[:, 0] = True
    return q_THD, pages, replace(windows, mask=WindowMask.of(visible_WW.to(q_THD.device)))


def by_definition(q_THD: torch.Tensor, pages: Pages, windows: Windows) -> torch.Tensor:
    """Softmax attention in float64, one token and head at a time, walking the row's table by hand."""
    out = torch.zeros(q_THD.shape, dtype=torch.float64)
    keys, values, group = pages.keys_NSKD, pages.values_NSKD, q_THD.shape[1] // pages.keys_NSKD.shape[2]
    size = keys.shape[1]
    for token in range(len(q_THD)):
        row, offset = divmod(token, windows.width)
        start = int(windows.starts_B[row])
        seen = [*range(start), *(start + other for other in range(windows.width) if sees(windows, offset, other))]
        table = windows.tables_BM[row].tolist()
        for head in range(q_THD.shape[1]):
            k = torch.stack([keys[table[p // size], p % size, head // group] for p in seen]).double()
            v = torch.stack([values[table[p // size], p % size, head // group] for p in seen]).double()
            scores = k @ q_THD[token, head].double() / q_THD.shape[2] ** 0.5
            out[token, head] = scores.softmax(0) @ v
    return out


CASES = {
    "ar": Case((0, 5, 70), 1),
    "first-window": Case((0,), 16),
    "grouped": Case((3, 0, 40, 17), 3, heads=(8, 2)),
    "one-kv-head": Case((30, 9), 16, heads=(6, 1)),
    "three-per-group": Case((21, 63), 5, heads=(6, 2)),
    "blocks-of-32": Case((100, 31), 16, block=32),
    "blocks-of-64": Case((65, 0, 190), 3, block=64, heads=(4, 2)),
    "head-of-80": Case((50, 12), 3, size=80, heads=(2, 2)),
    "head-of-8": Case((40,), 3, size=8),
    "head-of-256": Case((33, 5), 3, size=256, heads=(2, 1)),
    "long-window": Case((7, 90), 40, heads=(4, 2)),
    "several-tiles": Case((0, 33), 150, heads=(2, 1)),
    "long-cache": Case((400, 3, 129), 16, heads=(2, 1)),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.parametrize("name", ["ar", "grouped", "blocks-of-64", "head-of-80", "long-window"])
def test_the_twin_is_softmax_attention(name: str) -> None:
    tensors = CASES[name].tensors(CPU, torch.float32)
    expected = by_definition(*tensors)
    torch.testing.assert_close(TorchAttention()(*tensors).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["first-window", "grouped", "blocks-of-64", "long-window"])
def test_the_twin_reads_masks(name: str) -> None:
    tensors = masked(CASES[name].tensors(CPU, torch.float32))
    expected = by_definition(*tensors)
    torch.testing.assert_close(TorchAttention()(*tensors).double(), expected, rtol=1e-5, atol=1e-5)


@interpreted
@all_cases
@pytest.mark.parametrize("num_programs", [1, 256], ids=["one-program", "shared-keys"])
def test_the_kernel_reads_masks(case: Case, num_programs: int) -> None:
    tensors = masked(case.tensors(CPU, torch.float32))
    attention = TritonAttention(CPU, num_programs=num_programs)
    torch.testing.assert_close(attention(*tensors), TorchAttention()(*tensors), rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("num_programs", [1, 256])
def test_the_kernel_reads_the_mask_of_lookahead_decoding(num_programs: int) -> None:
    """Most of its tokens see few of the window; nothing that no row has written is read."""
    branches = Branches(7, 4, 5)
    case = Case((0, 61, 300), branches.num_inputs, heads=(4, 2))
    q_THD, pages, windows = case.tensors(CPU, torch.float32, unused=float("nan"))
    windows = replace(windows, mask=WindowMask.of(branches.visible_TT))
    clean = Pages(pages.keys_NSKD.nan_to_num(), pages.values_NSKD.nan_to_num())
    out = TritonAttention(CPU, num_programs=num_programs)(q_THD, pages, windows)
    torch.testing.assert_close(out, TorchAttention()(q_THD, clean, windows), rtol=1e-5, atol=1e-5)


@interpreted
@all_cases
@pytest.mark.parametrize("num_programs", [1, 256], ids=["one-program", "shared-keys"])
def test_the_kernel_equals_the_twin(case: Case, num_programs: int) -> None:
    tensors = case.tensors(CPU, torch.float32)
    attention = TritonAttention(CPU, num_programs=num_programs)
    torch.testing.assert_close(attention(*tensors), TorchAttention()(*tensors), rtol=1e-5, atol=1e-5)


@interpreted
def test_a_call_leaves_nothing_behind_for_the_next() -> None:
    """Six, two and one programs work on the tiles of a far, a middle and a near row, and again in the second call."""
    q_THD, pages, windows = Case((368, 100, 3), 16, heads=(2, 1)).tensors(CPU, torch.float32)
    attention = TritonAttention(CPU)
    for queries in (q_THD, q_THD.flip(0)):
        expected = TorchAttention()(queries, pages, windows)
        torch.testing.assert_close(attention(queries, pages, windows), expected, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("num_programs", [1, 256])
def test_what_no_row_has_written_is_not_read(num_programs: int) -> None:
    case = CASES["long-cache"]
    expected = TorchAttention()(*case.tensors(CPU, torch.float32))
    out = TritonAttention(CPU, num_programs=num_programs)(*case.tensors(CPU, torch.float32, unused=float("nan")))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@interpreted
def test_queries_and_pages_may_be_views() -> None:
    """Queries as a slice of the stacked projection, keys and values as two halves of one cache."""
    q_THD, pages, windows = CASES["grouped"].tensors(CPU, torch.float32)
    stacked = torch.cat([q_THD, torch.full_like(q_THD, float("nan"))], dim=1)
    both = torch.stack([pages.keys_NSKD, pages.values_NSKD], dim=1)
    out = TritonAttention(CPU)(stacked[:, : q_THD.shape[1]], Pages(both[:, 0], both[:, 1]), windows)
    torch.testing.assert_close(out, TorchAttention()(q_THD, pages, windows), rtol=1e-5, atol=1e-5)


@interpreted
def test_inputs_that_the_kernel_would_misread_are_refused() -> None:
    q_THD, pages, windows = CASES["grouped"].tensors(CPU, torch.float32)
    attention = TritonAttention(CPU)
    bad = {
        "tokens": (q_THD[:-1], pages, windows),
        "heads": (q_THD[:, :7], pages, windows),
        "strides": (q_THD, Pages(pages.keys_NSKD, pages.values_NSKD.mT.contiguous().mT), windows),
        "dtype": (q_THD.bfloat16(), pages, windows),
        "int32": (q_THD, pages, Windows(windows.starts_B.long(), windows.tables_BM, windows.width)),
        "tables": (q_THD, pages, Windows(windows.starts_B, windows.tables_BM[:-1], windows.width)),
        "mask of 4": (q_THD, pages, replace(windows, mask=WindowMask.of(torch.ones(4, 4, dtype=torch.bool)))),
        "contiguous": (q_THD.mT.contiguous().mT, pages, windows),
    }
    for word, arguments in bad.items():
        with pytest.raises(InputError, match=word):
            attention(*arguments)


@pytest.mark.parametrize("width", [1, 3, 63, 64, 65, 130])
def test_the_bits_of_a_mask(width: int) -> None:
    visible_WW = torch.rand(width, width, generator=torch.Generator().manual_seed(0)) < 0.5
    visible_WW[:, 0] = True
    for row, words in zip(visible_WW.tolist(), WindowMask.of(visible_WW).bits_WX.tolist(), strict=True):
        bits = sum((word % 2**64) << (64 * place) for place, word in enumerate(words))
        expected = [True] * 64 + row + [False] * 64
        assert [bool(bits >> place & 1) for place in range(len(expected))] == expected
        assert bits >> len(expected) == 0


@pytest.mark.parametrize("bad", [torch.ones(3, 3), torch.ones(3, 4).bool(), torch.eye(3).bool()])
def test_masks_that_no_kernel_can_read(bad: torch.Tensor) -> None:
    with pytest.raises(InputError, match="visible_WW"):
        WindowMask.of(bad)


def test_a_cpu_gets_the_twin() -> None:
    assert isinstance(attention_for(CPU), TorchAttention)


def test_flash_attention_is_refused_where_it_cannot_run() -> None:
    assert not FlashAttention3.available(CPU)
    with pytest.raises(InputError, match="FlashAttention-3"):
        FlashAttention3(CPU)


def gpu_attention(name: str, dtype: torch.dtype) -> Attention:
    if name == "best":
        return attention_for(CUDA, dtype)
    if name == "triton":
        return TritonAttention(CUDA)
    if name == "shared-keys":
        return TritonAttention(CUDA, num_programs=2048, split_keys=16)
    if dtype == torch.float32 or not FlashAttention3.available(CUDA):
        pytest.skip("FlashAttention-3 needs its package, a Hopper GPU and 16-bit tensors")
    return FlashAttention3(CUDA)


@pytest.mark.gpu
@on_gpu
@all_cases
@pytest.mark.parametrize("name", ["best", "triton", "shared-keys", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", [tuple, masked], ids=["causal", "masked"])
def test_on_the_gpu(case: Case, name: str, dtype: torch.dtype, mask: Callable[[Tensors], Tensors]) -> None:
    attention = gpu_attention(name, dtype)
    tensors = mask(case.tensors(CUDA, dtype))
    exact = TorchAttention()(*mask(case.tensors(CPU, dtype)))
    # Both round their inputs to bfloat16 alike; what differs is rounding inside: weights near 1, values near 3.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(attention(*tensors).cpu(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ["triton", "flash"])
@pytest.mark.parametrize("width", [1, 16])
def test_a_captured_graph_follows_the_rows(name: str, width: int) -> None:
    """A graph captured at one set of lengths and tables replays right at another."""
    attention = gpu_attention(name, torch.bfloat16)
    captured, replayed = (
        Case(starts, width, heads=(32, 8), size=128).tensors(CUDA, torch.bfloat16) for starts in ((900, 20), (20, 900))
    )
    q_THD, pages, windows = captured
    attention(*captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_THD = attention(*captured)
    for ours, theirs in (
        (q_THD, replayed[0]),
        (windows.starts_B, replayed[2].starts_B),
        (windows.tables_BM, replayed[2].tables_BM),
        (pages.keys_NSKD, replayed[1].keys_NSKD),
        (pages.values_NSKD, replayed[1].values_NSKD),
    ):
        ours.copy_(theirs)
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(out_THD, TorchAttention()(*replayed), rtol=2e-2, atol=2e-2)
