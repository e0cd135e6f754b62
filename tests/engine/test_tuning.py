"""Which launches tuning tries and keeps; times themselves are a matter of a GPU (`tests/gpu`)."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
from cllm.engine import tuning
from cllm.engine.kernels.plans import Plan, PlanKey, untried
from cllm.engine.triton_ops import TritonOps
from cllm.engine.weights import model_from_transformers
from tests.devices import interpreted
from tests.fakes import tiny_model

CPU = torch.device("cpu")


def test_a_choice_is_made_given_those_before_it() -> None:
    """Alone "fast" wins for both; beside a fast first one, the second does better slow."""
    cost = {("fast", "fast"): 9, ("fast", "slow"): 6, ("slow", "fast"): 10, ("slow", "slow"): 7}
    adopted = {"first": "slow", "second": "fast"}
    tuning.choose_in_turn(
        {"first": ["slow", "fast"], "second": ["fast", "slow"]},
        adopted.__setitem__,
        lambda: cost[adopted["first"], adopted["second"]],
    )
    assert adopted == {"first": "fast", "second": "slow"}


def test_plans_that_cannot_run_are_not_tried_in_place_and_the_untried_one_is() -> None:
    key = PlanKey("linear", 16, 256, 128)
    plans = [Plan(16, 32, 64, 3, 4, programs) for programs in range(8, 15)]
    times: dict[Plan | None, float] = {plan: 10.0 - place for place, plan in enumerate(plans)}
    times |= {None: 1.0, plans[-1]: float("inf")}
    tried = tuning._worth_trying(TritonOps(), key, times, CPU)
    assert tried == [None, plans[5], plans[4], plans[3], untried(key, 4)]


@interpreted
def test_the_forward_that_is_measured_reads_and_writes_a_cache_of_its_own() -> None:
    model = model_from_transformers(tiny_model(3, layers=2), ops=TritonOps())
    hidden_TE = tuning._forward(model, 16)()
    assert hidden_TE.shape == (16, model.shape.hidden_size)
    assert hidden_TE.isfinite().all()
