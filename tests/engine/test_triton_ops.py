"""The Triton operations against their torch twins: on a GPU in bfloat16, else in float32 on Triton's interpreter."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map

from cllm.engine.ops import Heads, Linear, Norm, Pages, TorchOps
from cllm.errors import InputError

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
from cllm.engine.kernels.plans import TOKEN_BUCKETS, Op, Plan, PlanKey, bucket, candidates, untried
from cllm.engine.kernels.projection import share_out
from cllm.engine.triton_ops import TritonOps
from tests.devices import DEVICES, on_gpu

# 144 outputs and 208 inputs: neither tiles of 32 rows nor chunks of 64 columns come out even.
OUTPUTS, INPUTS = 144, 208
TILES, CHUNKS = 5, 4


def plan(programs: int, tokens: int) -> Plan:
    return Plan(max(16, tokens), block_o=32, block_i=64, stages=3, warps=4, programs=programs)


class Maker:
    """Random tensors on one device, in bfloat16 on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def linear(self, outputs: int, inputs: int, *, bias: bool) -> Linear:
        return Linear(self(outputs, inputs, scale=inputs**-0.5), self(outputs) if bias else None)

    def norm(self, size: int) -> Norm:
        return Norm(self(size), 1e-5)


@pytest.fixture(params=DEVICES)
def make(request: pytest.FixtureRequest) -> Maker:
    return Maker(request.param)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` comes from the twin on float32 copies of the same numbers."""
    limit = 1e-2 if actual.dtype == torch.bfloat16 else 1e-5
    assert actual.shape == expected.shape
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < limit, f"relative error {error:.2e}"


def exact(linear: Linear) -> Linear:
    return Linear(linear.weight_OI.float(), None if linear.bias_O is None else linear.bias_O.float())


def wide(norm: Norm) -> Norm:
    return replace(norm, weight=norm.weight.float())


def ops_with(op: Op, tokens: int, outputs: int, programs: int | None) -> TritonOps:
    """Operations whose `op` is launched with so many programs; None for cuBLAS."""
    rounded = bucket(tokens)
    assert rounded is not None
    key = PlanKey(op, rounded, outputs, INPUTS)
    return TritonOps(plans={key: None if programs is None else plan(programs, rounded)})


# Whole tiles, one part of each, two or more parts, tiles of several programs that share programs, and a step each.
PROGRAMS = [TILES, 1, 2 * TILES, 3, 7, TILES * CHUNKS, None]


@pytest.mark.parametrize(("tokens", "bias"), [(1, True), (5, False), (33, True)])
@pytest.mark.parametrize("programs", PROGRAMS)
class TestProjections:
    def test_linear(self, make: Maker, programs: int | None, tokens: int, bias: bool) -> None:
        linear, x_TI = make.linear(OUTPUTS, INPUTS, bias=bias), make(tokens, INPUTS)
        actual = ops_with("linear", tokens, OUTPUTS, programs).linear(x_TI, linear)
        assert actual.dtype == x_TI.dtype
        assert_close(actual, TorchOps().linear(x_TI.float(), exact(linear)))

    def test_linear_add_norm(self, make: Maker, programs: int | None, tokens: int, bias: bool) -> None:
        linear, x_TI = make.linear(OUTPUTS, INPUTS, bias=bias), make(tokens, INPUTS)
        residual_TE, norm = make(tokens, OUTPUTS), make.norm(OUTPUTS)
        ops = ops_with("linear_add_norm", tokens, OUTPUTS, programs)
        normed_TE, total_TE = ops.linear_add_norm(x_TI, linear, residual_TE, norm)
        expected = TorchOps().linear_add_norm(x_TI.float(), exact(linear), residual_TE.float(), wide(norm))
        assert_close(normed_TE, expected[0])
        assert_close(total_TE, expected[1])

    def test_gated_linear(self, make: Maker, programs: int | None, tokens: int, bias: bool) -> None:
        gate_up, x_TE = make.linear(2 * OUTPUTS, INPUTS, bias=bias), make(tokens, INPUTS)
        actual = ops_with("gated_linear", tokens, OUTPUTS, programs).gated_linear(x_TE, gate_up)
        assert_close(actual, TorchOps().gated_linear(x_TE.float(), exact(gate_up)))


def test_rows_of_the_input_may_lie_apart(make: Maker) -> None:
    linear, x_TI = make.linear(OUTPUTS, INPUTS, bias=False), make(4, 3 * INPUTS)[:, INPUTS : 2 * INPUTS]
    ops = ops_with("linear", 4, OUTPUTS, 7)
    assert_close(ops.linear(x_TI, linear), TorchOps().linear(x_TI.float(), exact(linear)))


@pytest.mark.parametrize("inputs", [INPUTS, 24])
def test_without_a_plan(make: Maker, inputs: int) -> None:
    """More tokens than any plan is for, and inputs that no vector load fits, included."""
    linear = make.linear(OUTPUTS, inputs, bias=True)
    for tokens in (2, TOKEN_BUCKETS[-1] + 1):
        x_TI = make(tokens, inputs)
        assert_close(TritonOps().linear(x_TI, linear), TorchOps().linear(x_TI.float(), exact(linear)))


class Packed(torch.Tensor):
    """A weight stored in another form, as torchao's int8: no memory of its own that a kernel could read."""

    @staticmethod
    def __new__(cls, stored: torch.Tensor) -> "Packed":
        return torch.Tensor._make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device=stored.device)

    def __init__(self, stored: torch.Tensor) -> None:
        self.stored = stored

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.stored if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def test_weights_stored_in_another_form_are_multiplied_by_torch(make: Maker) -> None:
    plain, gate_up = make.linear(OUTPUTS, INPUTS, bias=True), make.linear(2 * OUTPUTS, INPUTS, bias=False)
    packed, packed_gate_up = (replace(linear, weight_OI=Packed(linear.weight_OI)) for linear in (plain, gate_up))
    x_TI, residual_TE, norm = make(3, INPUTS), make(3, OUTPUTS), make.norm(OUTPUTS)
    ops, twin = TritonOps(), TorchOps()
    assert_close(ops.linear(x_TI, packed), twin.linear(x_TI.float(), exact(plain)))
    assert_close(ops.gated_linear(x_TI, packed_gate_up), twin.gated_linear(x_TI.float(), exact(gate_up)))
    expected = twin.linear_add_norm(x_TI.float(), exact(plain), residual_TE.float(), wide(norm))
    for actual, of_twin in zip(ops.linear_add_norm(x_TI, packed, residual_TE, norm), expected, strict=True):
        assert_close(actual, of_twin)
    assert ops.tune("linear", [packed], [3]) == {}


@pytest.mark.parametrize("programs", [7, 3 * TILES])
def test_the_same_input_gives_the_same_bits(make: Maker, programs: int) -> None:
    linear, x_TI = make.linear(OUTPUTS, INPUTS, bias=False), make(5, INPUTS)
    ops = ops_with("linear", 5, OUTPUTS, programs)
    first = ops.linear(x_TI, linear)
    assert all(torch.equal(first, ops.linear(x_TI, linear)) for _ in range(3))


@pytest.mark.parametrize(("tokens", "size"), [(1, 128), (7, 208)])
def test_norms(make: Maker, tokens: int, size: int) -> None:
    x_TE, residual_TE, norm = make(tokens, size), make(tokens, size), make.norm(size)
    ops, twin = TritonOps(), TorchOps()
    assert_close(ops.norm(x_TE, norm), twin.norm(x_TE.float(), wide(norm)))
    assert_close(ops.norm(x_TE[None], norm)[0], twin.norm(x_TE.float(), wide(norm)))
    expected = twin.add_norm(x_TE.float(), residual_TE.float(), wide(norm))
    for actual, of_twin in zip(ops.add_norm(x_TE, residual_TE, norm), expected, strict=True):
        assert_close(actual, of_twin)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", [(4, 4, 32), (6, 2, 48), (1, 1, 16)])
def test_rotate_and_store(make: Maker, shape: tuple[int, int, int], normed: bool) -> None:
    """Pages as a slice of a larger cache; two tokens share a slot of block 0; other slots keep what they hold."""
    num_queries, num_kv, size = shape
    norms = (make.norm(size), make.norm(size)) if normed else (None, None)
    heads = Heads(num_queries, num_kv, size, *norms)
    qkv_TC = make(6, (num_queries + 2 * num_kv) * size)
    positions_T = torch.tensor([3, 0, 9, 10, 11, 2], device=make.device)
    slots_T = torch.tensor([17, 33, 5, 6, 0, 0], device=make.device)
    cos_sin_PD = torch.randn(12, size, generator=make.generator).to(make.device)
    cache = make(2, 3, 16, num_kv, size)
    pages, expected_pages = Pages(cache[0], cache[1]), Pages(cache[0].float(), cache[1].float())
    expected_heads = Heads(num_queries, num_kv, size, *(None if norm is None else wide(norm) for norm in norms))
    actual = TritonOps().rotate_and_store(qkv_TC, heads, positions_T, cos_sin_PD, pages, slots_T)
    expected = TorchOps().rotate_and_store(
        qkv_TC.float(), expected_heads, positions_T, cos_sin_PD, expected_pages, slots_T
    )
    assert_close(actual, expected)
    for pages_NSKD, twin_NSKD in (
        (pages.keys_NSKD, expected_pages.keys_NSKD),
        (pages.values_NSKD, expected_pages.values_NSKD),
    ):
        assert_close(pages_NSKD.flatten(0, 1)[1:], twin_NSKD.flatten(0, 1)[1:])


def test_bad_input(make: Maker) -> None:
    ops, linear = TritonOps(), make.linear(OUTPUTS, INPUTS, bias=False)
    with pytest.raises(InputError, match="x_TI"):
        ops.linear(make(2, INPUTS + 16), linear)
    with pytest.raises(InputError, match="contiguous"):
        ops.linear(make(INPUTS, 2).T, linear)
    with pytest.raises(InputError, match="linears"):
        ops.tune("linear", [linear, make.linear(OUTPUTS + 16, INPUTS, bias=False)], [1])
    pages = Pages(make(2, 16, 1, 16), make(2, 16, 1, 16))
    wrong = replace(pages, keys_NSKD=make(2, 1, 16, 16))
    index = torch.zeros(1, dtype=torch.long, device=make.device)
    with pytest.raises(InputError, match="cos_sin_PD"):
        ops.rotate_and_store(make(1, 48), Heads(1, 1, 16), index, make(4, 32).float(), pages, index)
    with pytest.raises(InputError, match="keys_NSKD"):
        ops.rotate_and_store(make(1, 48), Heads(1, 1, 16), index, make(4, 16).float(), wrong, index)


@pytest.mark.parametrize(("programs", "tiles", "chunks"), [(1, 3, 4), (3, 3, 4), (5, 3, 4), (12, 3, 4), (99, 3, 4)])
def test_shares_cover_each_step_once_and_differ_by_one(programs: int, tiles: int, chunks: int) -> None:
    share = share_out(programs, tiles, chunks)
    sizes = [share.base + (program < share.extra) for program in range(share.programs)]
    assert sum(sizes) == tiles * chunks
    assert min(sizes) >= 1
    owners = [program for program, size in enumerate(sizes) for _ in range(size)]
    per_tile = [set(owners[tile * chunks : (tile + 1) * chunks]) for tile in range(tiles)]
    assert share.parts == max(map(len, per_tile))
    if share.direct:
        assert owners == [tile for tile in range(tiles) for _ in range(chunks)]


@pytest.mark.parametrize("op", ["linear", "linear_add_norm", "gated_linear"])
@pytest.mark.parametrize("tokens", TOKEN_BUCKETS)
def test_plans_are_launchable(op: Op, tokens: int) -> None:
    """Each candidate has a step for each program, room for all tokens, and fits into a processor's shared memory: of
    Hopper where it is tried before it is used, of an A100 where it is not.
    """
    key = PlanKey(op, tokens, 4096, 11008)
    plans = candidates(key, 132)
    assert len(plans) == len(set(plans))
    for candidate in plans:
        steps = -(-key.outputs // candidate.block_o) * -(-key.inputs // candidate.block_i)
        assert 1 <= candidate.programs <= steps
        assert candidate.block_t >= tokens
        assert operand_bytes(op, candidate) <= 227 * 1024
    guess = untried(key, 108)
    assert (guess is None) == (tokens > 64)
    assert guess is None or operand_bytes(op, guess) <= 163 * 1024


def operand_bytes(op: Op, plan: Plan) -> int:
    """Two-byte elements of all stages of both operands."""
    rows = plan.block_o * (2 if op == "gated_linear" else 1)
    return (rows + plan.block_t) * plan.block_i * 2 * plan.stages


@pytest.mark.gpu
@on_gpu
class TestOnGpu:
    @pytest.mark.parametrize("tokens", [1, 4, 64, 128])
    def test_every_plan_that_tuning_timed_gives_the_product(self, tokens: int) -> None:
        """What tuning keeps is one of them, and one that this GPU can launch."""
        make = Maker(torch.device("cuda"))
        ops, linear, norm = TritonOps(), make.linear(1024, 512, bias=True), make.norm(1024)
        ((key, measured),) = ops.tune("linear_add_norm", [linear], [tokens]).items()
        assert key == PlanKey("linear_add_norm", bucket(tokens) or 0, 1024, 512)
        assert measured[ops.plans[key]] < math.inf
        x_TI, residual_TE = make(tokens, 512), make(tokens, 1024)
        expected = TorchOps().linear_add_norm(x_TI.float(), exact(linear), residual_TE.float(), wide(norm))
        for tried in (plan for plan, microseconds in measured.items() if microseconds < math.inf):
            actual = TritonOps(plans={key: tried}).linear_add_norm(x_TI, linear, residual_TE, norm)
            assert_close(actual[0], expected[0])
            assert_close(actual[1], expected[1])

    @pytest.mark.parametrize("pdl", [False, True])
    def test_graph_replays_give_what_the_eager_calls_give(self, pdl: bool) -> None:
        """A chain of overlapping kernels on reused memory: a missing wait would show as a wrong sum."""
        make = Maker(torch.device("cuda"))
        size, ops = 1024, TritonOps(pdl=pdl)
        layers = [(make.linear(2 * size, size, bias=False), make.linear(size, size, bias=True)) for _ in range(8)]
        norm, x_TE = make.norm(size), make(5, size)

        def chain() -> torch.Tensor:
            hidden_TE, residual_TE = ops.norm(x_TE, norm), x_TE
            for gate_up, down in layers:
                gated_TF = ops.gated_linear(hidden_TE, gate_up)
                hidden_TE, residual_TE = ops.linear_add_norm(gated_TF, down, residual_TE, norm)
            return residual_TE

        expected = chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = chain()
        for _ in range(20):
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(actual, expected)
