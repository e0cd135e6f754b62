"""One forward over packed rows gives all losses; the slow twin makes one forward for every part of every document.

Shapes: R rows, L row length, N = R * L, E hidden size, T tokens that bear a loss, V vocabulary.
"""

import torch
from transformers import PreTrainedModel

from cllm.training.documents import Document
from cllm.training.losses import Divergence, LossSums, ar_loss_T, divergence_T
from cllm.training.masks import attention_mask
from cllm.training.objective import Objective
from cllm.training.packing import PackedRows


class PackedObjective(Objective):
    """AR and consistency losses of a CLLM, or the AR loss alone where documents have no spans."""

    def __init__(self, model: PreTrainedModel, divergence: Divergence) -> None:
        super().__init__()
        self.model = model
        self.divergence: Divergence = divergence

    def forward(self, rows: PackedRows, predict_T: torch.Tensor | None = None) -> LossSums | torch.Tensor:
        """Loss sums, or with `predict_T` (indices into the flattened rows) the likeliest next token at each."""
        if predict_T is None:
            return packed_losses(self.model, rows, self.divergence)
        hidden_NE = hidden_states_RLE(self.model, rows).flatten(0, 1)
        return output_head(self.model)(hidden_NE[predict_T]).argmax(-1)


def packed_losses(model: PreTrainedModel, rows: PackedRows, divergence: Divergence) -> LossSums:
    """Loss sums of packed rows by a single forward pass. Never waits for the GPU: all places are known beforehand."""
    hidden_NE = hidden_states_RLE(model, rows).flatten(0, 1)
    head = output_head(model)
    ar = ar_loss_T(head(hidden_NE[rows.ar_T]), rows.tokens_RL.flatten()[rows.ar_T + 1]).sum()
    consistency = ar.new_zeros(())  # a CLLM's second loss
    if len(rows.student_T):
        with torch.no_grad():
            teacher_TV = head(hidden_NE[rows.teacher_T])
        consistency = divergence_T(teacher_TV, head(hidden_NE[rows.student_T]), divergence).sum()
    return LossSums(ar, consistency, len(rows.ar_T), len(rows.student_T))


def hidden_states_RLE(model: PreTrainedModel, rows: PackedRows) -> torch.Tensor:
    """Last hidden states of the packed rows."""
    mask = attention_mask(rows, model.config._attn_implementation)
    return model.base_model(
        input_ids=rows.tokens_RL, position_ids=rows.positions_RL, attention_mask=mask, use_cache=False
    ).last_hidden_state


def document_losses(model: PreTrainedModel, document: Document, divergence: Divergence) -> LossSums:
    """The slow twin: the same losses of one document, unpacked, as the equations are written."""
    device = model.device
    prompt = len(document.prompt_ids)
    clean = document.prompt_ids + document.response_ids
    clean_LV = _logits_LV(model, clean)
    ar = clean_LV.new_zeros(())
    if document.learn_response:
        ar = ar_loss_T(clean_LV[prompt - 1 : -1], torch.tensor(document.response_ids, device=device)).sum()
    consistency = clean_LV.new_zeros(())
    for span in document.spans:
        start, count = prompt + span.start, len(span.tokens)
        student_LV = _logits_LV(model, clean[:start] + span.tokens)
        teacher_LV = clean_LV if span.target is None else _logits_LV(model, clean[:start] + span.target.tokens)
        part = slice(start, start + count)
        consistency = consistency + divergence_T(teacher_LV[part], student_LV[part], divergence).sum()
    return LossSums(ar, consistency, document.num_ar_labels, document.num_consistency_labels)


def _logits_LV(model: PreTrainedModel, tokens: tuple[int, ...]) -> torch.Tensor:
    return model(input_ids=torch.tensor([tokens], device=model.device)).logits[0]


def output_head(model: PreTrainedModel) -> torch.nn.Module:
    """The projection from hidden states to logits."""
    head = model.get_output_embeddings()
    assert head is not None
    return head
