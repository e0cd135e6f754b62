"""vLLM's GPU worker with the Jacobi sampler; vLLM loads it by name (`--worker-cls`).

Nothing of vLLM is patched: the worker replaces two objects of the model runner that it owns, the sampler after the
weights are loaded and the CUDA-graph manager before graphs are captured.
"""

from typing import Any

from vllm import __version__

from cllm.vllm.jacobi_hooks import WORKER_HOOKS, JacobiPart, check_config, check_graphs, check_hooks, check_runner
from cllm.vllm.jacobi_sampler import JacobiSampler
from cllm.vllm.jacobi_timing import publish, time_steps
from cllm.vllm.versions import warn_if_untested
from cllm.vllm.window import window_widths

check_hooks(__version__, WORKER_HOOKS)  # before the imports below, which cannot say what moved

from vllm.v1.worker.gpu_worker import Worker  # noqa: E402

from cllm.vllm.jacobi_graphs import WindowGraphs  # noqa: E402


class JacobiHooks(JacobiPart):
    """What turns a worker of vLLM into one for Jacobi decoding; comes before it in the bases."""

    vllm_config: Any
    model_runner: Any
    rank: int

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights, and put the Jacobi sampler in.

        Raises:
            InputError: this vLLM, or this configuration of it, does not fit.
        """
        warn_if_untested(__version__)
        options = check_config(self.vllm_config)
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # of the worker
        check_runner(__version__, self.model_runner)
        self.model_runner.sampler = JacobiSampler(self.model_runner.sampler, self._window, options)

    def compile_or_warm_up_model(self) -> Any:
        """Capture CUDA graphs for every width of the window, warm up, and time the widths."""
        runner = self.model_runner
        if runner.cudagraph_manager is not None and runner.cudagraph_manager.needs_capture():
            check_graphs(__version__, runner.cudagraph_manager)
            runner.cudagraph_manager = WindowGraphs(
                runner.vllm_config,
                runner.device,
                runner.cudagraph_manager.cudagraph_mode,
                decode_query_len=runner.decode_query_len,
                lora_capture_cases=runner.cudagraph_manager.lora_capture_cases,
            )
        result = super().compile_or_warm_up_model()  # type: ignore[misc]  # of the worker
        if check_config(self.vllm_config).policy == "adaptive":
            self._time_widths()
        runner.sampler.reset_counts()  # the warm-up's
        return result

    def jacobi_counts(self) -> list[list[int]]:
        """Entry [w][a]: row-steps with w inputs that committed a tokens. For `collective_rpc`."""
        return self.model_runner.sampler.counts()

    @property
    def _window(self) -> int:
        return self.vllm_config.num_speculative_tokens + 1

    def _time_widths(self) -> None:
        limits = self.vllm_config.scheduler_config
        costs = time_steps(
            self.model_runner, window_widths(self._window), limits.max_num_seqs, limits.max_num_batched_tokens
        )
        if self.rank == 0:  # all ranks take part in the steps, one tells
            publish(self.vllm_config, costs)


class JacobiWorker(JacobiHooks, Worker):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The GPU worker for Jacobi decoding."""
