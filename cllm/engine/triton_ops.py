"""`Ops` in Triton kernels, for forwards of few tokens: a decoding step is bound by reading the weights once.

Up to 128 tokens the projections are our own kernel, launched by a plan: a measured one after `TritonOps.tune`, else a
static guess. Where cuBLAS measured faster, and for more tokens, cuBLAS multiplies. The choice depends on shapes alone:
CUDA graphs capture it.

Shapes: T tokens of a forward, E hidden size, I inputs and O outputs of a linear layer, F intermediate size, C channels
of query, key and value together, H query heads, K key-value heads, D head size, N cache blocks, S tokens of a block,
P positions, Q partial sums.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from triton.runtime.errors import OutOfResources

from cllm.engine.kernels import plans, tuning
from cllm.engine.kernels.finish import norm_kernel, sum_kernel
from cllm.engine.kernels.plans import Op, Plan, PlanKey
from cllm.engine.kernels.projection import Share, projection_kernel, share_out
from cllm.engine.kernels.rotary import rotate_and_store_kernel
from cllm.engine.ops import Heads, Linear, Norm, Pages
from cllm.errors import InputError

_SUM_BLOCK = 1024
_HEADS_A_PROGRAM = 8
_PREFETCH_STEPS = 4
_WHOLE = Share(programs=1, tiles=1, chunks=1, base=1, extra=0, parts=1, direct=True)


@dataclass(frozen=True, slots=True)
class _Sums:
    """A projection that `kernels.finish` completes: parts [Q, T, O], how it was cut, and the bias still to add."""

    parts_QTO: torch.Tensor
    share: Share = _WHOLE
    tile: int = 1
    bias_O: torch.Tensor | None = None


class TritonOps:
    """Implements `Ops` for CUDA tensors (or, under Triton's interpreter, for CPU tensors).

    Args:
        pdl: let a kernel start while the one before it ends (programmatic dependent launch); ignored before Hopper.
        plans: plans known from before, None standing for cuBLAS; others come from `tune` or a static guess.
    """

    def __init__(self, *, pdl: bool = True, plans: Mapping[PlanKey, Plan | None] | None = None) -> None:
        self._plans = dict(plans or {})
        self._pdl = pdl and _has_dependent_launch()

    @property
    def plans(self) -> Mapping[PlanKey, Plan | None]:
        """The plans given and measured so far."""
        return dict(self._plans)

    def tune(
        self, op: Op, linears: Sequence[Linear], num_tokens: Sequence[int]
    ) -> dict[PlanKey, dict[Plan | None, float]]:
        """Measure the plans of an operation and keep the best: seconds of work, before the first capture.

        Args:
            linears: layers of one shape, such as the same one of all decoder layers.
            num_tokens: T of the forwards to come; each stands for its bucket.

        Returns:
            Microseconds of each plan tried; none for weights that are stored in another form (int8).

        Raises:
            InputError: no layers, or of different shapes.
        """
        if len({linear.weight_OI.shape for linear in linears}) != 1:
            raise InputError("linears: layers of one shape are needed")
        if not _is_plain(linears[0].weight_OI):
            return {}
        weights = tuning.weights_for_calls([linear.weight_OI for linear in linears])
        layers = [Linear(weight_OI, linears[0].bias_O) for weight_OI in weights]
        measured = {}
        for tokens in dict.fromkeys(filter(None, map(plans.bucket, num_tokens))):
            key = _key(op, tokens, linears[0])
            if key.inputs % 16:
                continue
            tries = [None, *plans.candidates(key, _processors(weights[0].device))]
            measured[key] = {plan: self._microseconds(key, plan, layers) for plan in tries}
            self._plans[key] = min(measured[key], key=measured[key].__getitem__)
        return measured

    def adopt(self, key: PlanKey, plan: Plan | None) -> None:
        """Launch such projections by this plan from now on; None: by cuBLAS."""
        self._plans[key] = plan

    def untried(self, key: PlanKey, device: torch.device) -> Plan | None:
        """The plan taken where none was measured."""
        return plans.untried(key, _processors(device))

    def norm(self, x_TE: torch.Tensor, norm: Norm) -> torch.Tensor:
        rows_TE = x_TE.reshape(-1, x_TE.shape[-1])
        return self._norm(_Sums(rows_TE[None]), None, norm, x_TE.dtype)[0].view(x_TE.shape)

    def add_norm(self, x_TE: torch.Tensor, residual_TE: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, sum): sum = residual + x, both [T, E]."""
        return self._norm(_Sums(x_TE[None]), residual_TE, norm, x_TE.dtype)

    def linear(self, x_TI: torch.Tensor, linear: Linear) -> torch.Tensor:
        return self._linear(x_TI, linear, self._plan("linear", x_TI, linear))

    def linear_add_norm(
        self, x_TI: torch.Tensor, linear: Linear, residual_TE: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan = self._plan("linear_add_norm", x_TI, linear)
        return self._linear_add_norm(x_TI, linear, residual_TE, norm, plan)

    def gated_linear(self, x_TE: torch.Tensor, gate_up: Linear) -> torch.Tensor:
        return self._gated_linear(x_TE, gate_up, self._plan("gated_linear", x_TE, gate_up))

    def rotate_and_store(
        self,
        qkv_TC: torch.Tensor,
        heads: Heads,
        positions_T: torch.Tensor,
        cos_sin_PD: torch.Tensor,
        pages: Pages,
        slots_T: torch.Tensor,
    ) -> torch.Tensor:
        _check_rotation(qkv_TC, heads, cos_sin_PD, pages)
        tokens, stacked = len(qkv_TC), heads.num_queries + 2 * heads.num_kv
        q_THD = qkv_TC.new_empty(tokens, heads.num_queries, heads.size)
        block = min(_HEADS_A_PROGRAM, triton.next_power_of_2(stacked))
        q_norm, k_norm = heads.query_norm, heads.key_norm
        rotate_and_store_kernel[(tokens, triton.cdiv(stacked, block))](
            qkv_TC,
            q_norm.weight if q_norm else qkv_TC,
            k_norm.weight if k_norm else qkv_TC,
            positions_T,
            cos_sin_PD,
            slots_T,
            q_THD,
            pages.keys_NSKD,
            pages.values_NSKD,
            qkv_TC.stride(0),
            pages.keys_NSKD.stride(1),
            pages.values_NSKD.stride(1),
            q_norm.eps if q_norm else 0.0,
            k_norm.eps if k_norm else 0.0,
            NUM_QUERIES=heads.num_queries,
            NUM_KV=heads.num_kv,
            HEAD_SIZE=heads.size,
            HAS_NORM=q_norm is not None and k_norm is not None,
            BLOCK_X=block,
            BLOCK_HALF=triton.next_power_of_2(heads.size // 2),
            **self._launch(num_warps=4),
        )
        return q_THD

    def _linear(self, x_TI: torch.Tensor, linear: Linear, plan: Plan | None) -> torch.Tensor:
        if plan is None:
            return F.linear(x_TI, linear.weight_OI, linear.bias_O)
        share = _share(plan, *linear.weight_OI.shape)
        if share.direct:
            out_TO = x_TI.new_empty(len(x_TI), len(linear.weight_OI))
            self._project(x_TI, linear, plan, share, out_TO)
            return out_TO
        return self._sum(self._partial_sums(x_TI, linear, plan, share), x_TI.dtype, gated=False)

    def _linear_add_norm(
        self, x_TI: torch.Tensor, linear: Linear, residual_TE: torch.Tensor, norm: Norm, plan: Plan | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if plan is None:
            sums = _Sums(F.linear(x_TI, linear.weight_OI, linear.bias_O)[None])
        else:
            sums = self._partial_sums(x_TI, linear, plan, _share(plan, *linear.weight_OI.shape))
        return self._norm(sums, residual_TE, norm, x_TI.dtype)

    def _gated_linear(self, x_TE: torch.Tensor, gate_up: Linear, plan: Plan | None) -> torch.Tensor:
        if plan is None:
            return self._sum(_Sums(F.linear(x_TE, gate_up.weight_OI, gate_up.bias_O)[None]), x_TE.dtype, gated=True)
        outputs = len(gate_up.weight_OI) // 2
        share = _share(plan, outputs, x_TE.shape[1])
        if share.direct:
            out_TF = x_TE.new_empty(len(x_TE), outputs)
            self._project(x_TE, gate_up, plan, share, out_TF, gated=True)
            return out_TF
        return self._sum(self._partial_sums(x_TE, gate_up, plan, share, gated=True), x_TE.dtype, gated=True)

    def _partial_sums(
        self, x_TI: torch.Tensor, linear: Linear, plan: Plan, share: Share, *, gated: bool = False
    ) -> _Sums:
        shape = (share.parts, len(x_TI), len(linear.weight_OI))
        parts_QTO = torch.empty(shape, dtype=torch.float32, device=x_TI.device)
        self._project(x_TI, Linear(linear.weight_OI), plan, share, parts_QTO, gated=gated)
        return _Sums(parts_QTO, share, plan.block_o, linear.bias_O)

    def _project(
        self, x_TI: torch.Tensor, linear: Linear, plan: Plan, share: Share, out: torch.Tensor, *, gated: bool = False
    ) -> None:
        rows, inputs = linear.weight_OI.shape
        projection_kernel[(share.programs,)](
            x_TI,
            linear.weight_OI,
            linear.weight_OI if linear.bias_O is None else linear.bias_O,
            out,
            len(x_TI),
            rows // 2 if gated else rows,
            inputs,
            x_TI.stride(0),
            share.chunks,
            share.base,
            share.extra,
            BLOCK_T=plan.block_t,
            BLOCK_O=plan.block_o,
            BLOCK_I=plan.block_i,
            STAGES=plan.stages,
            PREFETCH=_PREFETCH_STEPS,
            EVEN_I=inputs % plan.block_i == 0,
            DIRECT=share.direct,
            GATED=gated,
            HAS_BIAS=linear.bias_O is not None,
            **self._launch(num_warps=plan.warps),
        )

    def _sum(self, sums: _Sums, dtype: torch.dtype, *, gated: bool) -> torch.Tensor:
        parts, tokens, columns = sums.parts_QTO.shape
        outputs = columns // 2 if gated else columns
        out_TO = torch.empty(tokens, outputs, dtype=dtype, device=sums.parts_QTO.device)
        sum_kernel[(tokens, triton.cdiv(outputs, _SUM_BLOCK))](
            sums.parts_QTO,
            sums.parts_QTO if sums.bias_O is None else sums.bias_O,
            out_TO,
            tokens,
            outputs,
            sums.parts_QTO.stride(1),
            sums.share.chunks,
            sums.share.base,
            sums.share.extra,
            TILE=sums.tile,
            PARTS=parts,
            GATED=gated,
            HAS_BIAS=sums.bias_O is not None,
            BLOCK=_SUM_BLOCK,
            **self._launch(num_warps=4),
        )
        return out_TO

    def _norm(
        self, sums: _Sums, residual_TE: torch.Tensor | None, norm: Norm, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, sum); without a residual the second is not to be used."""
        parts, tokens, size = sums.parts_QTO.shape
        out_TE = torch.empty(tokens, size, dtype=dtype, device=sums.parts_QTO.device)
        sum_TE = out_TE if residual_TE is None else torch.empty_like(out_TE)
        block = triton.next_power_of_2(size)
        norm_kernel[(tokens,)](
            sums.parts_QTO,
            norm.weight if sums.bias_O is None else sums.bias_O,
            sum_TE if residual_TE is None else residual_TE,
            norm.weight,
            sum_TE,
            out_TE,
            tokens,
            size,
            sums.parts_QTO.stride(1),
            0 if residual_TE is None else residual_TE.stride(0),
            norm.eps,
            sums.share.chunks,
            sums.share.base,
            sums.share.extra,
            TILE=sums.tile,
            PARTS=parts,
            HAS_BIAS=sums.bias_O is not None,
            HAS_RESIDUAL=residual_TE is not None,
            BLOCK=block,
            **self._launch(num_warps=min(max(block // 256, 1), 16)),
        )
        return out_TE, sum_TE

    def _launch(self, num_warps: int) -> dict[str, int | bool]:
        """The part of a launch that all kernels share."""
        options = {"launch_pdl": True} if self._pdl else {}
        return {"num_warps": num_warps, "PDL": self._pdl, **options}

    def _plan(self, op: Op, x_TI: torch.Tensor, linear: Linear) -> Plan | None:
        """What to launch; None stands for cuBLAS, or for what torch does with weights stored in another form."""
        _check_linear(x_TI, linear)
        tokens = plans.bucket(len(x_TI))
        if tokens is None or x_TI.shape[1] % 16 or not _is_plain(linear.weight_OI):
            return None
        key = _key(op, tokens, linear)
        return self._plans[key] if key in self._plans else self.untried(key, x_TI.device)

    def _microseconds(self, key: PlanKey, plan: Plan | None, layers: Sequence[Linear]) -> float:
        """Of one call; infinite where the GPU has too little shared memory for the plan."""
        weight_OI = layers[0].weight_OI
        x_TI = torch.randn(key.tokens, key.inputs, device=weight_OI.device).to(weight_OI.dtype)
        residual_TE = x_TI.new_zeros(key.tokens, key.outputs)
        norm = Norm(x_TI.new_ones(key.outputs), 1e-5)
        run = {
            "linear": lambda layer: self._linear(x_TI, layer, plan),
            "linear_add_norm": lambda layer: self._linear_add_norm(x_TI, layer, residual_TE, norm, plan),
            "gated_linear": lambda layer: self._gated_linear(x_TI, layer, plan),
        }[key.op]
        try:
            return tuning.microseconds([functools.partial(run, layer) for layer in layers])
        except OutOfResources:
            return float("inf")


def _is_plain(weight_OI: torch.Tensor) -> bool:
    """Whether the tensor's memory holds its numbers: that of int8 weights, for one, is a tensor subclass's affair."""
    return type(weight_OI) is torch.Tensor or type(weight_OI) is torch.nn.Parameter


def _key(op: Op, tokens: int, linear: Linear) -> PlanKey:
    rows, inputs = linear.weight_OI.shape
    return PlanKey(op, tokens, rows // 2 if op == "gated_linear" else rows, inputs)


def _share(plan: Plan, outputs: int, inputs: int) -> Share:
    return share_out(plan.programs, triton.cdiv(outputs, plan.block_o), triton.cdiv(inputs, plan.block_i))


@functools.cache
def _processors(device: torch.device) -> int:
    # The interpreter runs programs one by one: any number will do.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _has_dependent_launch() -> bool:
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability()[0] >= 9


def _check_linear(x_TI: torch.Tensor, linear: Linear) -> None:
    weight_OI = linear.weight_OI
    if x_TI.ndim != 2 or x_TI.shape[1] != weight_OI.shape[1] or x_TI.dtype != weight_OI.dtype:
        raise InputError(
            f"x_TI: {x_TI.dtype} {list(x_TI.shape)} does not fit a weight of {weight_OI.dtype} {list(weight_OI.shape)}"
        )
    if x_TI.stride(1) != 1 or not weight_OI.is_contiguous():
        raise InputError("x_TI and weight_OI: the last dimension must be contiguous, and all of the weight")


def _check_rotation(qkv_TC: torch.Tensor, heads: Heads, cos_sin_PD: torch.Tensor, pages: Pages) -> None:
    channels = (heads.num_queries + 2 * heads.num_kv) * heads.size
    if qkv_TC.shape[1:] != (channels,) or qkv_TC.stride(1) != 1:
        raise InputError(f"qkv_TC: rows of {channels} contiguous channels are needed, not {list(qkv_TC.shape)}")
    if cos_sin_PD.dtype != torch.float32 or not cos_sin_PD.is_contiguous() or cos_sin_PD.shape[1] != heads.size:
        raise InputError(f"cos_sin_PD: contiguous float32 rows of {heads.size} are needed")
    for name, pages_NSKD in (("keys_NSKD", pages.keys_NSKD), ("values_NSKD", pages.values_NSKD)):
        block, slot, *inner = pages_NSKD.stride()
        fits = pages_NSKD.dtype == qkv_TC.dtype and pages_NSKD.shape[2:] == (heads.num_kv, heads.size)
        if not fits or block != pages_NSKD.shape[1] * slot or inner != [heads.size, 1]:
            raise InputError(
                f"{name}: {qkv_TC.dtype} slots of {heads.num_kv} contiguous heads of size {heads.size}, evenly apart, "
                f"are needed"
            )
