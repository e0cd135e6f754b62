"""The sampler's kernel against its twin in plain torch: on a GPU, else on Triton's interpreter. Needs no vLLM."""

import pytest
import torch

from cllm.vllm import jacobi

pytest.importorskip("triton", reason="Triton is not installed")

from cllm.vllm import jacobi_kernel
from cllm.vllm.jacobi import Committed, Rows, Slots, Verified
from tests.devices import DEVICES, assert_compiles

SLOTS, LENGTH, TOKENS = 9, 40, 3  # so few tokens that guesses hold often


def random_step(device: torch.device, window: int, seed: int) -> tuple[Rows, Slots]:
    """Rows of any width in any slots, amid their prompts, at their ends or behind them."""
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=draw)

    batch = int(integers(1, SLOTS + 1, 1))
    is_decoding_B = integers(0, 4, batch) > 0
    widths_B = torch.where(is_decoding_B, integers(1, window + 1, batch), 1)
    inputs_B = torch.where(is_decoding_B, widths_B, integers(1, 9, batch))
    ends_B = inputs_B.cumsum(0)
    logits_indices_F = torch.cat(
        [torch.arange(int(end - width), int(end)) for end, width in zip(ends_B, widths_B, strict=True)]
    )
    inputs = int(ends_B[-1])
    rows = Rows(
        predictions_F=integers(0, TOKENS, len(logits_indices_F)),
        num_sampled_B=is_decoding_B.int(),
        inputs_T=integers(0, TOKENS, inputs).int(),
        positions_T=integers(0, LENGTH, inputs),
        logits_indices_F=logits_indices_F,
        offsets_B1=torch.cat([torch.zeros(1), widths_B.cumsum(0)]).int(),
        slots_B=torch.randperm(SLOTS, generator=draw)[:batch].int(),
    )
    prompts_S = integers(1, LENGTH // 2, SLOTS).int()
    slots = Slots(
        draft_tokens_SG=integers(0, TOKENS, SLOTS, window - 1),
        prefill_lengths_S=prompts_S,
        prompt_lengths_S=prompts_S.clone(),
        seeds_S=integers(-(2**62), 2**62, SLOTS),
        tokens_SL=integers(0, 1000, SLOTS, LENGTH).int(),
    )
    return Rows(*(t.to(device) for t in rows)), Slots(*(t.to(device) for t in slots))


def by_twin(rows: Rows, slots: Slots, histogram: torch.Tensor, pad_id: int | None) -> Committed:
    def fresh_BG(verified: Verified, seeds_B: torch.Tensor) -> torch.Tensor:
        if pad_id is not None:
            return torch.full_like(verified.carried_BG, pad_id)
        return jacobi.prompt_refill_BG(rows, slots, verified, seeds_B)

    return jacobi.commit_and_refill(rows, slots, histogram, fresh_BG)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [2, 5, 16])
@pytest.mark.parametrize("pad_id", [None, 7])
def test_the_kernel_commits_and_refills_as_its_twin(device: torch.device, window: int, pad_id: int | None) -> None:
    most = 0
    for seed in range(20):
        rows, slots = random_step(device, window, seed)
        copied = Slots(*(tensor.clone() for tensor in slots))
        counted, wanted_counts = (torch.zeros((window + 1) ** 2, dtype=torch.long, device=device) for _ in range(2))
        found = jacobi_kernel.commit_and_refill(rows, slots, counted, pad_id)
        wanted = by_twin(rows, copied, wanted_counts, pad_id)
        torch.testing.assert_close(found.counts_B, wanted.counts_B)
        torch.testing.assert_close(found.rejected_B, wanted.rejected_B)
        torch.testing.assert_close(counted, wanted_counts)
        for tensor, other in zip(slots, copied, strict=True):
            torch.testing.assert_close(tensor, other)
        for row, count in enumerate(found.counts_B.tolist()):
            assert found.tokens_BW[row, :count].tolist() == wanted.tokens_BW[row, :count].tolist()
        most = max(most, int(found.counts_B.max()))
    assert most > 1, "no guess ever held: the test shows nothing"


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_without_a_slot_touches_none(device: torch.device) -> None:
    rows, slots = random_step(device, 5, 0)
    before = [tensor.clone() for tensor in slots]
    rows = rows._replace(slots_B=torch.full_like(rows.slots_B, -1))
    jacobi_kernel.commit_and_refill(rows, slots, torch.zeros(36, dtype=torch.long, device=device), 7)
    for tensor, other in zip(slots, before, strict=True):
        torch.testing.assert_close(tensor, other)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from cllm.vllm.jacobi_kernel import _kernel

wide = {"predictions_ptr", "positions_ptr", "logits_indices_ptr", "drafts_ptr", "seeds_ptr", "out_tokens_ptr"}
wide.add("histogram_ptr")
names = [parameter.name for parameter in _kernel.params]
for prompt in (False, True):
    values = {"PROMPT": prompt, "WINDOW": 16, "BLOCK": 16}
    types = {name: "*i64" if name in wide else "*i32" if name.endswith("_ptr") else "i32" for name in names}
    types |= dict.fromkeys(values, "constexpr")
    places = {(names.index(name),): value for name, value in values.items()}
    compile(ASTSource(_kernel, types, places), target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile it")
def test_the_kernel_compiles_for_a_gpu() -> None:
    assert_compiles(COMPILE)
