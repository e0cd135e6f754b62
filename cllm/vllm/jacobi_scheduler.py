"""vLLM's scheduler with a window that follows the batch and the acceptance; loaded by name (`--scheduler-cls`)."""

import time
from typing import Any

from vllm import __version__

from cllm.vllm.jacobi_hooks import SCHEDULER_HOOKS, JacobiPart, check_config, check_hooks, check_scheduler
from cllm.vllm.jacobi_timing import receive
from cllm.vllm.window import make_policy

check_hooks(__version__, SCHEDULER_HOOKS)  # before the import below, which cannot say what moved

from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402


class JacobiScheduler(JacobiPart, AsyncScheduler):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Reserves room for the guesses of every decoding row; how many is decided anew for every step.

    The guesses themselves never leave the worker: here they are placeholders.

    Attributes:
        step_costs: what steps of each window take, as the worker measured it; None with policy "fixed".
        latest_window: of the step whose results came last, its widest row's.

    Raises:
        InputError: this vLLM, or this configuration of it, does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = check_config(self.vllm_config)
        check_scheduler(__version__, self)
        window = self.num_spec_tokens + 1
        self.step_costs = receive(self.vllm_config) if options.policy == "adaptive" else None
        self._windows = make_policy(window, self.step_costs)
        self.latest_window = 1
        self._batch_before: tuple[int, int] | None = None  # rows and window of the step before, if they all decoded
        self._admits = False  # the step scheduled last has new rows
        self._read_at = time.perf_counter()
        # vLLM's own table of guesses by batch size. With one it does not pad new rows to the widest window, which
        # would keep a narrowed batch from being uniform; the policy overrides what it says.
        self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self._windows.forget(request_id)
        self._admits = bool(scheduler_output.scheduled_new_reqs)
        guessing = self._rows_to_guess(scheduler_output.num_scheduled_tokens)
        scheduler_output.num_spec_tokens_to_schedule = self._windows.choose(guessing) - 1
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[request_id]
            if request.use_structured_output:
                # Its grammar must see every token before the next one is drawn, and it cannot see the guesses, which
                # are in the worker: such a row decodes by AR.
                request.spec_token_ids = []

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        committed = model_runner_output.sampled_token_ids
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        self.latest_window = 1 + max(map(len, scheduled.values()), default=0)
        self._time(scheduler_output)
        for request_id, guesses in scheduled.items():
            tokens = committed[model_runner_output.req_id_to_index[request_id]] if committed else []
            if tokens and request_id in self.requests:  # a finished row's last step says nothing of its guesses
                self._windows.observe(request_id, len(guesses) + 1, len(tokens))
        return outputs

    def _time(self, scheduler_output: Any) -> None:
        """Tell the policy what a step took, if nothing else was done beside it and the step before was like it.

        The step that follows has been launched by then, so its new rows are part of the time as well.
        """
        widths = {1 + len(guesses) for guesses in scheduler_output.scheduled_spec_decode_tokens.values()} or {1}
        rows = scheduler_output.num_scheduled_tokens
        batch = (
            (len(rows), self.latest_window) if rows and set(rows.values()) == widths == {self.latest_window} else None
        )
        now = time.perf_counter()
        if batch is not None and batch == self._batch_before and not self._admits:
            self._windows.measured(*batch, 1000 * (now - self._read_at))
        self._batch_before, self._read_at = batch, now

    def _rows_to_guess(self, num_scheduled_tokens: dict[str, int]) -> list[str]:
        """Rows that will decode with guesses after this step: their prompts are read, and they have no grammar."""

        def guesses(request_id: str, tokens: int) -> bool:
            request = self.requests[request_id]
            known = request.num_tokens + request.num_output_placeholders
            return request.num_computed_tokens + tokens >= known and not request.use_structured_output

        return [request_id for request_id, tokens in num_scheduled_tokens.items() if guesses(request_id, tokens)]
