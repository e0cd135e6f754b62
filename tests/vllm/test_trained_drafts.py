"""Trained Medusa heads and draft models in real vLLM: AR's output, and more accepted guesses than from random ones."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cllm.training.checkpoint import full_model_state
from cllm.training.draft import DraftObjective
from cllm.training.medusa import MedusaHeads, MedusaObjective, save_heads
from tests.fakes import tiny_model
from tests.training.baselines import answered, make_trainer, train
from tests.vllm.making import HIDDEN, PROMPTS, VOCAB, make_medusa, make_model, requests
from tests.vllm.test_peers import GUESSES, _in_process, answers, open_backend  # noqa: F401 (the fixture acts by itself)

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[cpu]")


@dataclass(frozen=True, slots=True)
class Drafts:
    """Folders of a target, and each of a draft model and of Medusa heads for it; what the target answers."""

    target: Path
    trained: Path
    random: Path
    expected: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Drafts:
    """Trained as the job does it, on the target's answers to the prompts of the test."""
    folder = tmp_path_factory.mktemp("drafts")
    teacher = make_model(folder / "target")
    documents = answered(teacher, PROMPTS, requests()[0].max_new_tokens)
    settings = {"row_tokens": 192, "rows_per_step": 1, "learning_rate": 3e-3}

    trained, random = folder / "trained", folder / "random"
    (trained / "medusa").mkdir(parents=True)
    objective = MedusaObjective(teacher, MedusaHeads.of(teacher, GUESSES), variant=1, decay=0.8)
    save_heads(trained / "medusa", full_model_state(train(make_trainer(objective, documents, **settings))))
    draft = tiny_model(1, vocab_size=VOCAB, hidden=HIDDEN, layers=1, scale=0.05)
    train(make_trainer(DraftObjective(draft, teacher, "forward_kl"), documents, **settings))
    draft.save_pretrained(trained / "draft")

    make_model(random / "draft", seed=1, layers=1)
    make_medusa(random / "medusa", heads=GUESSES)
    return Drafts(folder / "target", trained, random, [document.response_ids for document in documents])


@pytest.mark.parametrize(("method", "name"), [("draft_model", "draft"), ("medusa", "medusa")])
def test_training_makes_vllm_accept_more_guesses(drafts: Drafts, method: str, name: str) -> None:
    shares = []
    for folder in (drafts.random, drafts.trained):
        backend = open_backend(drafts.target, method, draft=str(folder / name))
        assert answers(backend) == drafts.expected
        acceptance = backend.stats().acceptance
        assert acceptance is not None
        shares.append(acceptance.accepted / acceptance.proposed)
        backend.close()
    assert shares[1] > 0.6
    assert shares[1] > shares[0] + 0.3


def test_vllm_computes_the_logits_that_were_trained(drafts: Drafts) -> None:
    """vLLM's own Medusa model, with our export loaded by vLLM, on any hidden states."""
    backend = open_backend(drafts.target, "medusa", draft=str(drafts.trained / "medusa"))
    worker = backend.llm.llm_engine.model_executor.driver_worker.worker  # type: ignore[union-attr]
    theirs = worker.model_runner.drafter.model
    heads = MedusaHeads(HIDDEN, VOCAB, GUESSES)
    heads.load_state_dict(load_file(drafts.trained / "medusa" / "model.safetensors"))
    torch.manual_seed(0)
    hidden_TE = torch.randn(5, HIDDEN)
    with torch.inference_mode():
        logits = theirs.compute_logits(theirs(hidden_TE))
        for head in range(GUESSES):
            torch.testing.assert_close(logits[head], heads.logits_TV(hidden_TE, head), rtol=1e-4, atol=1e-4)
    backend.close()
