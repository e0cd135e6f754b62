"""The sampler of Jacobi decoding inside vLLM's model runner V2.

vLLM draws a token from every logit of the window with noise that is a function of (request seed, position), so, as in
`cllm.decoding.sampling`, the Jacobi fixed point under this noise is the AR sample: acceptance is an equality test for
greedy and sampled requests alike, and the output law is AR's. Penalties and the like need nothing of their own: vLLM
applies them to every place of the window, counting the guesses before it as tokens of the response.

Shapes: see `cllm.vllm.jacobi`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cllm.vllm import jacobi, jacobi_kernel
from cllm.vllm.config import JacobiOptions
from cllm.vllm.jacobi import Rows, Slots, Verified, append_predictions, ngram_guesses_BG, prompt_refill_BG


class JacobiSampler:
    """Stands in for vLLM's sampler: draws, verifies, and leaves the next step's guesses in the request states.

    Args:
        base: vLLM's sampler, checked by `cllm.vllm.jacobi_hooks.check_runner`; all but the call goes to it.
        window: n.
        options: how the window is refilled.
    """

    def __init__(self, base: Any, window: int, options: JacobiOptions) -> None:
        base.use_flashinfer = False  # its noise is not a function of the position, so guesses would hold by luck alone
        self._base = base
        self._window = window
        self._options = options
        # how often a row with w logits committed a tokens: entry [w, a]
        self._histogram = torch.zeros((window + 1) ** 2, dtype=torch.long, device=base.req_states.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        """vLLM's SamplerOutput for [F, V] logits: 1 to w tokens for a row, none for one amid its prompt."""
        output = self._base(logits, input_batch)
        rows = Rows(
            output.sampled_token_ids.flatten(),
            output.num_sampled,
            input_batch.input_ids,
            input_batch.positions,
            input_batch.logits_indices,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
        )
        if self._options.guess == "ngram":
            committed = jacobi.commit_and_refill(
                rows, self._slots(), self._histogram, partial(self._ngrams_BG, rows, input_batch)
            )
        else:
            pad_id = self._options.pad_id if self._options.guess == "pad" else None
            committed = jacobi_kernel.commit_and_refill(rows, self._slots(), self._histogram, pad_id)
        return replace(
            output,
            sampled_token_ids=committed.tokens_BW,
            num_sampled=committed.counts_B,
            num_rejected=committed.rejected_B,
        )

    def counts(self) -> list[list[int]]:
        """Entry [w][a]: row-steps with w logits that committed a tokens, since the start. Waits for the device."""
        return self._histogram.view(self._window + 1, -1).tolist()

    def reset_counts(self) -> None:
        self._histogram.zero_()

    def _slots(self) -> Slots:
        states = self._base.req_states
        return Slots(
            states.draft_tokens,
            states.prefill_len.gpu,
            states.prompt_len.gpu,
            self._base.sampling_states.seeds.gpu,
            states.all_token_ids.gpu,
        )

    def _ngrams_BG(self, rows: Rows, input_batch: Any, verified: Verified, seeds_B: torch.Tensor) -> torch.Tensor:
        """What followed in the rows' own tokens, or else random tokens of their prompts."""
        slots = self._slots()
        random_BG = prompt_refill_BG(rows, slots, verified, seeds_B)
        room = int(input_batch.seq_lens_cpu_upper_bound.max()) + self._window + 1
        known_BL = slots.tokens_SL[rows.slots_B.long(), :room]
        known_BL = torch.nn.functional.pad(known_BL, (0, room - known_BL.shape[1]))
        known_BL, lengths_B = append_predictions(known_BL, seeds_B, verified)
        copied_BG, is_found_B = ngram_guesses_BG(known_BL, lengths_B, self._window - 1)
        # the first place to refill continues the text; those before it hold predictions
        first_B1 = verified.is_carried_BG.sum(1, keepdim=True)
        ahead_G = torch.arange(self._window - 1, device=copied_BG.device)
        copied_BG = copied_BG.gather(1, (ahead_G - first_B1).clamp_min(0))
        return torch.where(is_found_B[:, None], copied_BG, random_BG)
