"""The divergences are the mathematics they are named after."""

import math

import pytest
import torch

from cllm.training.losses import ar_loss_T, divergence_T

KINDS = ("forward_kl", "reverse_kl", "jsd")


@pytest.mark.parametrize("kind", KINDS)
def test_identical_predictions_have_no_divergence(kind):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(divergence_T(logits, logits + 3.0, kind), torch.zeros(5), atol=1e-6, rtol=0)


def test_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence_T(p, q, "forward_kl").item() == pytest.approx(forward)
    assert divergence_T(p, q, "reverse_kl").item() == pytest.approx(backward)


def test_jsd_is_symmetric_and_bounded_by_log_2():
    p, q = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]])
    assert divergence_T(p, q, "jsd").item() == pytest.approx(math.log(2))
    a, b = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(divergence_T(a, b, "jsd"), divergence_T(b, a, "jsd"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher(kind):
    teacher, student = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    divergence_T(teacher, student, kind).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_forward_kl_has_the_gradient_of_soft_cross_entropy():
    teacher, student = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    divergence_T(teacher, student, "forward_kl").sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


def test_ar_loss_is_the_negative_log_probability():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert ar_loss_T(logits, torch.tensor([0])).item() == pytest.approx(math.log(4))
