"""Medusa heads: losses as the equations say, a frozen teacher that stays so, heads that learn, exact resumption."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cllm.errors import InputError
from cllm.training.checkpoint import full_model_state, load_checkpoint, save_checkpoint
from cllm.training.documents import Document
from cllm.training.medusa import MedusaHeads, MedusaObjective, head_labels_T, save_heads
from cllm.training.packing import pack
from cllm.vllm.config import PeerConfig
from cllm.vllm.drafts import check_draft
from tests.fakes import PAD, tiny_model
from tests.training.baselines import answered, is_same, make_trainer, snapshot, train

HEADS = 3
# Neighbours in a row, among them a prompt of one token and responses shorter than the heads look ahead.
DOCUMENTS = [Document((3, 4), (5, 6)), Document((7,), (8, 9, 10, 11, 12)), Document((13, 2, 3), (4,))]


def make_objective(variant=1, *, seed=0, scale=0.3, **settings):
    model = tiny_model(seed, scale=scale)
    return MedusaObjective(model, MedusaHeads.of(model, HEADS), variant=variant, decay=0.8, **settings)


def randomised(heads):
    torch.manual_seed(5)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


def reference_loss(objective, document):
    """One token and one head at a time, with an unpacked forward for each prefix."""
    tokens, prompt = document.prompt_ids + document.response_ids, len(document.prompt_ids)
    total = torch.zeros(())
    for place in range(prompt - 1, len(tokens) - 1):
        prefix = torch.tensor([tokens[: place + 1]])
        hidden_E = objective.model.base_model(input_ids=prefix).last_hidden_state[0, -1]
        for k in range(1, HEADS + 1):
            if place + k + 1 < len(tokens):
                block, projection = objective.heads.blocks[k - 1].layers[0], objective.heads.lm_heads[k - 1]
                x_E = block.weight @ hidden_E + block.bias
                logits_V = projection.weight @ (hidden_E + x_E * torch.sigmoid(x_E))
                total = total - 0.8**k * logits_V.log_softmax(-1)[tokens[place + k + 1]]
    return total


@pytest.mark.parametrize("variant", [1, 2])
def test_losses_and_gradients_equal_those_token_by_token(variant):
    objective = make_objective(variant)
    randomised(objective.heads)
    sums = objective(pack([DOCUMENTS[:2], DOCUMENTS[2:]], 16, PAD))
    expected = sum(reference_loss(objective, document) for document in DOCUMENTS)
    torch.testing.assert_close(sums.second, expected)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert any(name.startswith("model.") for name in trained) == (variant == 2)
    packed, slow = (
        torch.autograd.grad(loss, list(trained.values()), allow_unused=True) for loss in (sums.second, expected)
    )
    for name, a, b in zip(trained, packed, slow, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_no_head_looks_into_the_next_document():
    rows = pack([DOCUMENTS], 16, PAD)
    for head in range(6):
        labels = [label for label in head_labels_T(rows, head).tolist() if label >= 0]
        assert labels == [token for document in DOCUMENTS for token in document.response_ids[head + 1 :]]


def test_untrained_heads_say_what_the_model_says():
    objective = make_objective()
    hidden_TE = torch.randn(4, 32)
    for head in range(HEADS):
        assert torch.equal(objective.heads.logits_TV(hidden_TE, head), objective.model.lm_head(hidden_TE))


def test_medusa_1_leaves_the_teacher_as_it_is_and_learns():
    documents = answered(tiny_model(0))
    trainer = make_trainer(make_objective(), documents)
    teacher = snapshot(trainer.objective.model)
    start = hit_rates(trainer.objective, documents)
    train(trainer)
    assert is_same(trainer.objective.model, teacher)
    assert not trainer.objective.model.training
    random = make_objective()
    randomised(random.heads)
    learnt, by_chance = hit_rates(trainer.objective, documents), hit_rates(random, documents)
    for head in range(HEADS):
        assert learnt[head] > 0.8
        assert learnt[head] > max(start[head], by_chance[head]) + 0.3


def test_medusa_2_trains_the_model_at_its_own_rate():
    documents = answered(tiny_model(0))
    frozen = train(make_trainer(make_objective(1), documents, steps=30))
    joint = make_trainer(make_objective(2, model_scale=0.25), documents, ar_weight=5.0, steps=30)
    before = snapshot(joint.objective.model)
    joint.train_step()
    rates = [{group["lr"] for group in optimizer.param_groups} for optimizer in joint.optimizers]
    assert rates[1] == {0.25 * rate for rate in rates[0]}
    train(joint)
    assert not is_same(joint.objective.model, before)
    assert joint.validate([documents[:3]])[1] < frozen.validate([documents[:3]])[1]
    held = [id(p) for optimizer in joint.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in joint.objective.parameters())


@torch.inference_mode()
def hit_rates(objective, documents):
    """For each head, how often its likeliest token is the response's."""
    rows = pack([[document] for document in documents], 96, PAD)
    hidden_TE = objective.model.base_model(
        input_ids=rows.tokens_RL, position_ids=rows.positions_RL
    ).last_hidden_state.flatten(0, 1)[rows.ar_T]
    rates = []
    for head in range(HEADS):
        labels_T = head_labels_T(rows, head)
        hits_T = objective.heads.logits_TV(hidden_TE[: len(labels_T)], head).argmax(-1) == labels_T
        rates.append(float(hits_T[labels_T >= 0].float().mean()))
    return rates


@pytest.mark.parametrize("variant", [1, 2])
def test_resuming_repeats_the_uninterrupted_run_exactly(tmp_path, variant):
    documents = answered(tiny_model(0))
    whole, first, resumed = (make_trainer(make_objective(variant), documents, ar_weight=1.0) for _ in range(3))
    expected = [whole.train_step() for _ in range(9)]
    for _ in range(5):
        first.train_step()
    save_checkpoint(first, tmp_path)
    load_checkpoint(resumed, tmp_path)
    assert [resumed.train_step() for _ in range(4)] == expected[5:]
    assert is_same(resumed.objective, snapshot(whole.objective))


def test_checkpoints_hold_only_what_is_trained(tmp_path):
    documents = answered(tiny_model(0))
    sizes = []
    for variant in (1, 2):
        folder = tmp_path / str(variant)
        folder.mkdir()
        save_checkpoint(make_trainer(make_objective(variant), documents), folder)
        sizes.append(sum(file.stat().st_size for file in folder.glob("*.distcp")))
    model_bytes = 4 * sum(p.numel() for p in tiny_model(0).parameters())
    assert sizes[1] - sizes[0] >= 0.9 * model_bytes


def test_exported_heads_have_the_layout_that_vllm_loads(tmp_path):
    objective = make_objective()
    trainer = train(make_trainer(objective, answered(objective.model), steps=2))
    target, folder = tmp_path / "target", tmp_path / "medusa"
    folder.mkdir()
    save_heads(folder, full_model_state(trainer))
    tiny_model(0).save_pretrained(target)
    weights = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        name: shape
        for head in range(HEADS)
        for name, shape in (
            (f"blocks.{head}.layers.0.weight", (32, 32)),
            (f"blocks.{head}.layers.0.bias", (32,)),
            (f"lm_heads.{head}.weight", (24, 32)),
        )
    }
    for name, tensor in objective.heads.state_dict().items():
        assert torch.equal(weights[name], tensor)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["MedusaModel"]
    assert (config["num_heads"], config["medusa_fc_bias"], config["dtype"]) == (HEADS, True, "float32")
    settings = PeerConfig(method="medusa", model=str(target), draft=str(folder), guesses=HEADS)
    check_draft(settings)
    with pytest.raises(InputError, match=f"{HEADS} Medusa heads cannot make guesses={HEADS + 1}"):
        check_draft(settings.model_copy(update={"guesses": HEADS + 1}))
