"""Tokens a second and MFU against a calculation by hand, on a clock of our own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cllm.training.draft import DraftObjective
from cllm.training.forward import PackedObjective
from cllm.training.medusa import MedusaHeads, MedusaObjective
from cllm.training.throughput import Throughput, peak_flops, training_flops
from tests.fakes import tiny_model


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_rates_are_those_since_the_last_measurement():
    objective, clock = PackedObjective(tiny_model(0), "forward_kl"), Clock()
    parameters = size(objective.model)
    throughput = Throughput(objective, 4, 1e9, clock)
    clock.seconds += 2
    throughput.add(600, refinements=0)
    throughput.add(600, refinements=3)
    # 6 FLOPs a parameter and token; 2 more for each of the three forward passes over the second step
    flops = 600 * parameters * 6 + 600 * parameters * (6 + 3 * 2)
    assert throughput.measure() == pytest.approx({"tokens_per_s": 600, "mfu": flops / 2 / 4e9})
    clock.seconds += 1
    throughput.add(50, refinements=0)
    assert throughput.measure() == pytest.approx({"tokens_per_s": 50, "mfu": 50 * parameters * 6 / 4e9})


def test_there_is_no_mfu_on_hardware_of_unknown_peak():
    assert peak_flops(torch.device("cpu")) is None
    throughput = Throughput(PackedObjective(tiny_model(0), "forward_kl"), 1, None)
    throughput.add(10, refinements=0)
    assert throughput.measure().keys() == {"tokens_per_s"}


def test_frozen_weights_that_the_gradient_passes_cost_a_third_less():
    model = tiny_model(0)
    frozen = size(model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert training_flops(PackedObjective(model, "forward_kl")) == 4 * frozen + 6 * (size(model) - frozen)


def test_a_teacher_without_gradient_costs_its_forward_pass():
    draft, teacher = tiny_model(1, layers=1), tiny_model(0)
    assert training_flops(DraftObjective(draft, teacher, "jsd")) == 6 * size(draft) + 2 * size(teacher)


@pytest.mark.parametrize(("variant", "factor"), [(1, 2), (2, 6)])
def test_medusa_heads_cost_as_what_is_trained(variant, factor):
    model = tiny_model(0)
    heads = MedusaHeads.of(model, 3)
    objective = MedusaObjective(model, heads, variant=variant, decay=0.8)
    assert training_flops(objective) == factor * size(model) + 6 * size(heads)
