"""vLLM under the same closed loop as our engine. Needs the extra `cpu` or `gpu`."""

from collections.abc import Iterable
from typing import Any

from cllm.decoding.records import DecodeRequest
from cllm.errors import InputError


class VllmServer:
    """vLLM's engine as a `cllm.bench.closed_loop.Server`.

    Args:
        path: checkpoint folder; with `dummy` only its configuration is read and the weights are random.
        max_rows: requests that run together.
        max_tokens: longest request.
        options: further engine arguments, e.g. `speculative_config`.

    Raises:
        InputError: vLLM is not installed.
    """

    def __init__(self, path: str, *, max_rows: int, max_tokens: int, dummy: bool = False, **options: Any) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise InputError(f"vLLM cannot be imported ({error}): pip install 'cllm[gpu]' or 'cllm[cpu]'") from error
        self.llm = LLM(
            model=path,
            load_format="dummy" if dummy else "auto",
            skip_tokenizer_init=True,
            max_num_seqs=max_rows,
            max_model_len=max_tokens,
            enable_prefix_caching=False,
            **options,
        )
        self.engine = self.llm.llm_engine
        self._next = 0

    def add(self, request: DecodeRequest) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=request.sampling.temperature,
            max_tokens=request.max_new_tokens,
            ignore_eos=request.sampling.ignore_eos,
            seed=request.sampling.seed if request.sampling.temperature > 0 else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(str(self._next), TokensPrompt(prompt_token_ids=list(request.prompt_ids)), sampling)
        self._next += 1

    def step(self) -> Iterable[tuple[int, bool]]:
        return [(len(output.outputs[0].token_ids), output.finished) for output in self.engine.step()]

    @property
    def description(self) -> dict[str, Any]:
        """Version, model runner and scheduling, which differ by method and release."""
        import vllm

        config = self.engine.vllm_config
        return {
            "version": vllm.__version__,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "v2_model_runner": bool(getattr(config, "use_v2_model_runner", False)),
        }
