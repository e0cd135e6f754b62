"""vLLM's GPU worker with the Jacobi sampler; vLLM loads it by name (`--worker-cls`).

Nothing of vLLM is patched: the worker replaces two objects of the model runner that it owns, the sampler after the
weights are loaded and the CUDA-graph manager before graphs are captured.
"""

from typing import Any

from vllm import __version__
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.gpu_worker import Worker

from cllm.vllm.jacobi_hooks import check_config, check_hooks, check_runner
from cllm.vllm.jacobi_sampler import JacobiSampler
from cllm.vllm.versions import warn_if_untested
from cllm.vllm.window import window_widths


class JacobiHooks:
    """What turns a worker of vLLM into one for Jacobi decoding; comes before it in the bases."""

    vllm_config: Any
    model_runner: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights, and put the Jacobi sampler in.

        Raises:
            InputError: this vLLM, or this configuration of it, does not fit.
        """
        warn_if_untested(__version__)
        check_hooks(__version__)
        options = check_config(self.vllm_config)
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # of the worker
        check_runner(self.model_runner)
        self.model_runner.sampler = JacobiSampler(
            self.model_runner.sampler, self.vllm_config.num_speculative_tokens + 1, options
        )

    def compile_or_warm_up_model(self) -> Any:
        """Capture CUDA graphs for every width of the window, and warm up."""
        runner = self.model_runner
        if runner.cudagraph_manager is not None and runner.cudagraph_manager.needs_capture():
            runner.cudagraph_manager = WindowGraphs(
                runner.vllm_config,
                runner.device,
                runner.cudagraph_manager.cudagraph_mode,
                decode_query_len=runner.decode_query_len,
                lora_capture_cases=runner.lora_capture_cases,
            )
        result = super().compile_or_warm_up_model()  # type: ignore[misc]  # of the worker
        runner.sampler.reset_counts()  # the warm-up's
        return result

    def jacobi_counts(self) -> list[list[int]]:
        """Entry [w][a]: row-steps with w inputs that committed a tokens. For `collective_rpc`."""
        return self.model_runner.sampler.counts()


class JacobiWorker(JacobiHooks, Worker):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The GPU worker for Jacobi decoding."""


class WindowGraphs(ModelCudaGraphManager):  # type: ignore[misc]
    """CUDA graphs of whole steps for every width that the scheduler may choose, not for the widest alone.

    Without them a narrowed step, and with it AR decoding at large batches, would run in pieces between graphs.
    """

    decode_query_len: int
    _candidates: dict[Any, list[Any]]
    _capture_descs: dict[Any, list[Any]]

    def _init_candidates(self) -> None:
        widest = self.decode_query_len
        candidates: dict[Any, list[Any]] = {}
        captures: dict[Any, list[Any]] = {}
        for width in window_widths(widest):
            self.decode_query_len = width
            super()._init_candidates()
            for tables, more in ((candidates, self._candidates), (captures, self._capture_descs)):
                for key, graphs in more.items():
                    known = tables.setdefault(key, [])
                    known += [graph for graph in graphs if graph not in known]
            self._candidates, self._capture_descs = {}, {}
        self.decode_query_len = widest
        for graphs in candidates.values():  # the first that fits is taken: whole steps before pieces
            graphs.sort(key=lambda graph: (graph.uniform_token_count is None, graph.num_tokens))
        for graphs in captures.values():
            graphs.sort(key=lambda graph: graph.num_tokens, reverse=True)
        self._candidates, self._capture_descs = candidates, captures
