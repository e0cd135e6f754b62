"""vLLM's scheduler with a window that follows the batch and the acceptance; loaded by name (`--scheduler-cls`)."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from cllm.vllm.jacobi_hooks import jacobi_options
from cllm.vllm.window import make_policy


class JacobiScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Reserves room for the guesses of every decoding row; how many is decided anew for every step.

    The guesses themselves never leave the worker: here they are placeholders.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._policy = make_policy(
            jacobi_options(self.vllm_config), self.num_spec_tokens + 1, self.scheduler_config.max_num_seqs
        )
        # vLLM's own table of guesses by batch size. With one it does not pad new rows to the widest window, which
        # would keep a narrowed batch from being uniform; the policy overrides what it says.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self._policy.forget(request_id)
        rows = list(scheduler_output.num_scheduled_tokens)
        scheduler_output.num_spec_tokens_to_schedule = self._policy.choose(rows) - 1
        super()._update_after_schedule(scheduler_output)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        committed = model_runner_output.sampled_token_ids
        for request_id, guesses in scheduler_output.scheduled_spec_decode_tokens.items():
            tokens = committed[model_runner_output.req_id_to_index[request_id]] if committed else []
            if tokens and request_id in self.requests:  # a finished row's last step says nothing of its guesses
                self._policy.observe(request_id, len(guesses) + 1, len(tokens))
        return outputs
