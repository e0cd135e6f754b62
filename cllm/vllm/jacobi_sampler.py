"""The sampler of Jacobi decoding inside vLLM's model runner V2.

vLLM draws a token from every logit of the window with noise that is a function of (request seed, position), so, as in
`cllm.decoding.sampling`, the Jacobi fixed point under this noise is the AR sample: acceptance is an equality test for
greedy and sampled requests alike, and the output law is AR's. Penalties and the like need nothing of their own: vLLM
applies them to every place of the window, counting the guesses before it as tokens of the response.

Shapes: see `cllm.vllm.jacobi`.
"""

from dataclasses import replace
from typing import Any

import torch

from cllm.vllm.config import JacobiGuess, JacobiOptions
from cllm.vllm.jacobi import (
    Verified,
    append_predictions,
    next_guesses_BG,
    ngram_guesses_BG,
    prompt_guesses_BG,
    verify,
)


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
        self._guess: JacobiGuess = options.guess
        self._pad_id = options.pad_id
        # how often a row with w logits committed a tokens: entry [w, a]
        self._histogram = torch.zeros((window + 1) ** 2, dtype=torch.long, device=base.req_states.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        """vLLM's SamplerOutput for [F, V] logits: 1 to w tokens for a row, none for one amid its prompt."""
        states = self._base.req_states
        output = self._base(logits, input_batch)
        offsets_B1 = input_batch.cu_num_logits
        inputs_F = input_batch.input_ids[input_batch.logits_indices]
        verified = verify(output.sampled_token_ids.flatten(), inputs_F, offsets_B1, self._window)
        slots_B = input_batch.idx_mapping.long()
        seeds_B = input_batch.positions[input_batch.logits_indices[offsets_B1[:-1].long()]]
        if self._window > 1:
            fresh_BG = self._fresh_guesses_BG(input_batch, slots_B, seeds_B, verified)
            is_first_B = seeds_B < states.prefill_len.gpu[slots_B]
            states.draft_tokens[slots_B] = next_guesses_BG(verified, states.draft_tokens[slots_B], fresh_BG, is_first_B)
        is_decoding_B = output.num_sampled > 0
        counts_B = torch.where(is_decoding_B, verified.counts_B, 0)
        self._histogram.scatter_add_(0, verified.widths_B * (self._window + 1) + counts_B, is_decoding_B.long())
        rejected_B = torch.where(is_decoding_B, verified.widths_B - counts_B, 0)
        return replace(
            output,
            sampled_token_ids=verified.tokens_BW,
            num_sampled=counts_B.to(output.num_sampled.dtype),
            num_rejected=rejected_B.to(output.num_sampled.dtype),
        )

    def counts(self) -> list[list[int]]:
        """Entry [w][a]: row-steps with w logits that committed a tokens, since the start. Waits for the device."""
        return self._histogram.view(self._window + 1, -1).tolist()

    def reset_counts(self) -> None:
        self._histogram.zero_()

    def _fresh_guesses_BG(
        self, input_batch: Any, slots_B: torch.Tensor, seeds_B: torch.Tensor, verified: Verified
    ) -> torch.Tensor:
        states = self._base.req_states
        width = self._window - 1
        if self._guess == "pad":
            return verified.carried_BG.new_full((slots_B.shape[0], width), self._pad_id)
        ahead_G = torch.arange(width, device=slots_B.device)
        positions_BG = (seeds_B + 1 + verified.counts_B)[:, None] + ahead_G
        random_BG = prompt_guesses_BG(
            states.all_token_ids.gpu,
            states.prompt_len.gpu[slots_B],
            slots_B,
            self._base.sampling_states.seeds.gpu[slots_B],
            positions_BG,
        )
        if self._guess == "prompt":
            return random_BG
        room = int(input_batch.seq_lens_cpu_upper_bound.max()) + self._window + 1
        known_BL = states.all_token_ids.gpu[slots_B, : min(room, states.all_token_ids.gpu.shape[1])]
        known_BL = torch.nn.functional.pad(known_BL, (0, room - known_BL.shape[1]))
        known_BL, lengths_B = append_predictions(known_BL, seeds_B, verified)
        copied_BG, is_found_B = ngram_guesses_BG(known_BL, lengths_B, width)
        # the first place to refill continues the text; those before it hold predictions
        first_B1 = verified.is_carried_BG.sum(1, keepdim=True)
        copied_BG = copied_BG.gather(1, (ahead_G - first_B1).clamp_min(0))
        return torch.where(is_found_B[:, None], copied_BG, random_BG)
