"""A step's ends as kernels against the state in plain torch: on a GPU, else on Triton's interpreter."""

import pytest
import torch

from cllm.engine.state import DeviceState

pytest.importorskip("triton", reason="Triton is not installed")

from cllm.engine.triton_state import TritonState
from tests.devices import DEVICES, assert_compiles

ROWS, LONGEST, MARGIN, BLOCK, TOKENS = 6, 30, 9, 4, 3  # so few tokens that guesses hold often


def random_states(device: torch.device, seed: int) -> tuple[TritonState, DeviceState]:
    """Two states alike: rows short, long and full, at the ends of their blocks and before them."""
    draw = torch.Generator().manual_seed(seed)
    shape = {"num_rows": ROWS, "max_tokens": LONGEST, "margin": MARGIN, "block_tokens": BLOCK, "fill_id": 0}
    kernels, twin = (made(**shape, device=device) for made in (TritonState, DeviceState))
    lengths_R = torch.randint(1, LONGEST + 1, (ROWS,), generator=draw)
    ends_R = torch.where(
        torch.rand(ROWS, generator=draw) < 0.5,
        twin.block_end_R[:ROWS].cpu(),
        lengths_R + torch.randint(1, MARGIN, (ROWS,), generator=draw),
    )
    drawn = {
        "tokens_RL": torch.randint(0, TOKENS, (ROWS, twin.tokens_RL.shape[1]), generator=draw),
        "tables_RM": torch.randint(1, 99, (ROWS, twin.tables_RM.shape[1]), generator=draw).int(),
        "length_R": lengths_R,
        "limit_R": torch.minimum(lengths_R + torch.randint(0, 5, (ROWS,), generator=draw), torch.tensor(LONGEST)),
        "block_end_R": ends_R,
        "block_size_R": torch.randint(2, MARGIN, (ROWS,), generator=draw),
    }
    for state in (kernels, twin):
        for name, value in drawn.items():
            getattr(state, name)[:ROWS] = value.to(device)
    return kernels, twin


def assert_alike(kernels: DeviceState, twin: DeviceState) -> None:
    for name in ("tokens_RL", "length_R", "block_end_R", "limit_R", "tables_RM", "block_size_R"):
        torch.testing.assert_close(getattr(kernels, name), getattr(twin, name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 5, MARGIN])
def test_windows_lie_where_the_twin_says(device: torch.device, width: int) -> None:
    for seed in range(5):
        kernels, twin = random_states(device, seed)
        slots_B = torch.tensor([[4], [0], [ROWS], [2]], device=device)[:, 0]
        longest = int(twin.length_R.max()) + width
        for num_blocks in (-(-longest // BLOCK), twin.tables_RM.shape[1], twin.tables_RM.shape[1] + 3):
            window_BW, places = kernels.window(slots_B, width, num_blocks)
            wanted_BW, wanted = twin.window(slots_B, width, num_blocks)
            torch.testing.assert_close(window_BW, wanted_BW)
            for name in ("starts_B", "positions_BW", "stored_BW", "tables_BM"):
                torch.testing.assert_close(getattr(places, name), getattr(wanted, name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 5, MARGIN])
def test_rows_commit_what_the_twin_commits(device: torch.device, width: int) -> None:
    most = 0
    for seed in range(10):
        kernels, twin = random_states(device, seed)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(6):
            slots_B = torch.randperm(ROWS, generator=draw)[:4].to(device)
            window_BW, _ = twin.window(slots_B, width, twin.tables_RM.shape[1])
            predictions_BW = torch.randint(0, TOKENS, (4, width), generator=draw).to(device)
            found_BX, wanted_BX = (s.accept(slots_B, window_BW, predictions_BW) for s in (kernels, twin))
            torch.testing.assert_close(found_BX, wanted_BX)
            assert_alike(kernels, twin)
            most = max(most, int(found_BX[:, 0].max()))
    assert most > min(1, width - 1), "no guess ever held: the test shows nothing"


@pytest.mark.parametrize("device", DEVICES)
def test_idle_rows_that_share_a_slot_commit_nothing(device: torch.device) -> None:
    kernels, _ = random_states(device, 0)
    slots_B = torch.full((3,), kernels.idle_slot, device=device)
    window_BW, _ = kernels.window(slots_B, 5, 8)
    assert kernels.accept(slots_B, window_BW, torch.ones_like(window_BW))[:, 0].tolist() == [0, 0, 0]
    assert int(kernels.length_R[kernels.idle_slot]) == 1


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cllm.engine.kernels.state import accept_kernel, window_kernel

narrow = {"tables_ptr", "starts_ptr", "out_tables_ptr"}
for kernel, values, warps in (
    (window_kernel, {"BLOCK_TOKENS": 16, "WIDTH": 9, "BLOCK_W": 16, "BLOCK_M": 256}, 4),
    (accept_kernel, {"WIDTH": 9, "BLOCK_W": 16}, 1),
):
    names = [parameter.name for parameter in kernel.params]
    types = {name: "i32" if not name.endswith("_ptr") else "*i32" if name in narrow else "*i64" for name in names}
    types |= dict.fromkeys(values, "constexpr")
    places = {(names.index(name),): value for name, value in values.items()}
    compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile them")
def test_the_kernels_compile_for_a_gpu() -> None:
    assert_compiles(COMPILE)
