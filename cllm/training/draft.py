"""A draft model for speculative decoding, distilled on the teacher's own responses.

The loss is a divergence between the teacher's and the draft's next-token distributions at every token of the response,
as in generalised knowledge distillation (arXiv 2306.13649) on the teacher's outputs: acceptance is agreement with the
teacher's whole distribution, which a response alone does not tell.

Shapes: R rows, L row length, N = R * L, T response tokens, V vocabulary.
"""

import torch
from transformers import PreTrainedModel

from cllm.training.forward import hidden_states_RLE, output_head
from cllm.training.losses import Divergence, LossSums, ar_loss_T, divergence_T
from cllm.training.objective import Objective, count_responses
from cllm.training.packing import PackedRows


class DraftObjective(Objective):
    """Divergence from the frozen teacher, one packed forward each, and the AR loss on its response.

    The teacher belongs to the module so that it is moved and sharded with it; it gets no gradient.
    """

    second_loss = "divergence"

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, divergence: Divergence) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher.requires_grad_(False)
        self.divergence: Divergence = divergence

    count_labels = staticmethod(count_responses)

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return (self.model, self.teacher)

    def train(self, mode: bool = True) -> "DraftObjective":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, rows: PackedRows) -> LossSums:
        with torch.no_grad():
            teacher_TV = response_logits_TV(self.teacher, rows)
        draft_TV = response_logits_TV(self.model, rows)
        ar = ar_loss_T(draft_TV, rows.tokens_RL.flatten()[rows.ar_T + 1]).sum()
        divergence = divergence_T(teacher_TV, draft_TV, self.divergence).sum()
        return LossSums(ar, divergence, len(rows.ar_T), len(rows.ar_T))


def response_logits_TV(model: PreTrainedModel, rows: PackedRows) -> torch.Tensor:
    """Logits that predict the response tokens (`rows.ar_T`)."""
    return output_head(model)(hidden_states_RLE(model, rows).flatten(0, 1)[rows.ar_T])
