"""AR and consistency losses (paper eq. 4-6). Pure functions of logits.

Shapes: T tokens that bear a loss, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def divergence_T(teacher_TV: torch.Tensor, student_TV: torch.Tensor, kind: Divergence) -> torch.Tensor:
    """Divergence in nats between the two predictions of each token, float32 [T]; no gradient reaches the teacher.

    forward_kl is KL(teacher || student), reverse_kl the other way round, jsd the Jensen-Shannon divergence (at most
    log 2); choices as in generalised knowledge distillation (arXiv 2306.13649).
    """
    log_p = teacher_TV.detach().float().log_softmax(-1)
    log_q = student_TV.float().log_softmax(-1)
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (_kl(log_p, log_m) + _kl(log_q, log_m))


def _kl(log_p_TV: torch.Tensor, log_q_TV: torch.Tensor) -> torch.Tensor:
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)


def ar_loss_T(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each token, float32 [T] (eq. 6)."""
    return F.cross_entropy(logits_TV.float(), labels_T, reduction="none")


@dataclass(frozen=True, slots=True)
class LossSums:
    """Losses summed over the tokens of some rows, and over how many tokens; sums of parts add up to the whole's.

    Every objective has two: the AR loss, and a second one that `Objective.second_loss` names.
    """

    ar: torch.Tensor
    second: torch.Tensor
    num_ar: int
    num_second: int

    @property
    def stacked(self) -> torch.Tensor:
        """AR and second sums without gradient, float32 [2]."""
        return torch.stack([self.ar.detach(), self.second.detach()])
