"""What users get wrong. Needs no vLLM, but for the parts that say so."""

import json
import warnings
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from cllm.errors import InputError
from cllm.tasks.tokenizer import train_tokenizer
from cllm.vllm import versions
from cllm.vllm.arguments import engine_arguments
from cllm.vllm.config import PeerConfig
from cllm.vllm.drafts import check_draft
from cllm.vllm.jacobi_hooks import (
    SCHEDULER_HOOKS,
    WORKER_HOOKS,
    Hook,
    JacobiPart,
    check_config,
    check_graphs,
    check_hooks,
    check_runner,
    check_scheduler,
)
from cllm.vllm.llm import VllmBackend
from cllm.vllm.metrics import acceptance_of_counts
from cllm.vllm.versions import warn_if_untested
from tests.vllm.making import make_medusa, make_model

has_vllm = find_spec("vllm") is not None


def config(**settings: object) -> PeerConfig:
    return PeerConfig.model_validate({"method": "ar", "model": "somewhere"} | settings)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "target"
    make_model(folder)
    return folder


def test_a_missing_vllm_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install -e \.\[gpu\], or \.\[cpu\]"):
        VllmBackend(config())


@pytest.mark.parametrize("version", ["0.25.1", "0.30.0", "1.0.0", "nightly"])
def test_an_untested_version_warns_and_says_of_what(version: str) -> None:
    with pytest.warns(UserWarning, match=r"0\.26 to 0\.29; untested are .*Jacobi"):
        warn_if_untested(version)


@pytest.mark.parametrize("version", ["0.26.0", "0.28.1rc1", "0.29.0+cpu"])
def test_a_tested_version_is_silent(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(version)


def test_an_unknown_key_and_a_missing_or_superfluous_draft_are_named() -> None:
    with pytest.raises(InputError, match="num_guesses"):
        PeerConfig.from_data({"method": "ar", "model": "x", "num_guesses": 3}, where="peer")
    with pytest.raises(InputError, match="draft: method medusa needs"):
        VllmBackend(config(method="medusa"))
    with pytest.raises(InputError, match="draft: method ngram takes no"):
        VllmBackend(config(method="ngram", draft="x"))
    with pytest.raises(InputError, match="ngram_min=6 exceeds"):
        VllmBackend(config(method="ngram", ngram_min=6))


def test_jacobi_without_async_scheduling_is_refused() -> None:
    with pytest.raises(InputError, match="async_scheduling"):
        VllmBackend(config(method="jacobi", async_scheduling=False))


@pytest.mark.skipif(find_spec("arctic_inference") is not None, reason="arctic-inference is installed")
def test_suffix_decoding_names_its_package() -> None:
    with pytest.raises(InputError, match="pip install arctic-inference"):
        VllmBackend(config(method="suffix"))


def test_a_draft_of_another_vocabulary_or_tokenizer(target: Path, tmp_path: Path) -> None:
    folder, draft = tmp_path / "target", tmp_path / "draft"
    make_model(folder)
    make_model(draft, seed=1)
    fits = config(method="draft_model", model=str(folder), draft=str(draft))
    check_draft(fits)  # models alone, for requests of tokens
    train_tokenizer(("ab",) * 4, 262).save_pretrained(folder)
    check_draft(fits)
    train_tokenizer(("cd",) * 4, 262).save_pretrained(draft)
    with pytest.raises(InputError, match=r"another tokenizer than the target's: '\w+' is \w+, there \w+"):
        check_draft(fits)
    settings = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(settings | {"vocab_size": 32}))
    with pytest.raises(InputError, match="vocab_size is 32, the target's is 64"):
        check_draft(fits)


def test_a_draft_named_by_id_is_read_as_well(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not skipped: where the hub has none, that is said."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for method in ("draft_model", "medusa", "eagle3"):
        with pytest.raises(InputError, match="no-such-org/no-such-model: no usable model configuration"):
            check_draft(config(method=method, model=str(target), draft="no-such-org/no-such-model"))


def edit_config(folder: Path, **changes: object) -> None:
    """What is None is taken out."""
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_medusa_heads_of_another_model(target: Path, tmp_path: Path) -> None:
    make_medusa(tmp_path / "narrow", hidden=64)
    make_medusa(tmp_path / "few", heads=2)
    with pytest.raises(InputError, match="hidden_size is 64, the target's is 128"):
        check_draft(config(method="medusa", model=str(target), draft=str(tmp_path / "narrow")))
    with pytest.raises(InputError, match="2 Medusa heads cannot make guesses=5"):
        check_draft(config(method="medusa", model=str(target), draft=str(tmp_path / "few")))


def test_medusa_heads_in_their_authors_format_state_no_sizes(target: Path, tmp_path: Path) -> None:
    """FasterDecoding's configuration: base_model_name_or_path, medusa_num_heads, medusa_num_layers, and no more."""
    make_medusa(tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps({"medusa_num_heads": 5, "medusa_num_layers": 1}))
    old = config(method="medusa", model=str(target), draft=str(tmp_path / "old"))
    check_draft(old)
    edit_config(tmp_path / "old", medusa_num_heads=4)
    with pytest.raises(InputError, match="4 Medusa heads"):
        check_draft(old)


def test_an_eagle_head_is_compared_by_its_targets_size(target: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "head")
    head = config(method="eagle3", model=str(target), draft=str(tmp_path / "head"))
    check_draft(head)
    edit_config(tmp_path / "head", hidden_size=64, target_hidden_size=128)
    check_draft(head)
    edit_config(tmp_path / "head", hidden_size=128, target_hidden_size=256)
    with pytest.raises(InputError, match="target_hidden_size is 256, the target's is 128"):
        check_draft(head)
    edit_config(tmp_path / "head", hidden_size=64, target_hidden_size=None)
    with pytest.raises(InputError, match="hidden_size is 64, the target's is 128"):
        check_draft(head)


class Ours(JacobiPart):
    """Stands for the worker and for the scheduler of Jacobi decoding."""


class JacobiSchedulerOfSomebodyElse:
    """Has the name, and nothing else."""


OURS = f"{__name__}.Ours"


def scheduler(cls: type = Ours, **changes: object) -> SimpleNamespace:
    fields = {"scheduler_cls": cls, "get_scheduler_cls": lambda: cls, "async_scheduling": True}
    return SimpleNamespace(**(fields | changes))


def parallel(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**({"pipeline_parallel_size": 1, "worker_cls": OURS} | changes))


def built(**changes: object) -> SimpleNamespace:
    """A built vLLM configuration that fits, as far as the check reads it."""
    fields = {
        "use_v2_model_runner": True,
        "speculative_config": None,
        "num_speculative_tokens": 15,
        "parallel_config": parallel(),
        "scheduler_config": scheduler(),
        "device_config": SimpleNamespace(device_type="cuda"),
        "additional_config": {"jacobi": {"guess": "pad"}},
    }
    return SimpleNamespace(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_v2_model_runner": False}, "VLLM_USE_V2_MODEL_RUNNER"),
        ({"speculative_config": object()}, "speculative_config"),
        ({"num_speculative_tokens": 0}, "diffusion_config"),
        ({"parallel_config": parallel(pipeline_parallel_size=2)}, "pipeline_parallel_size"),
        ({"parallel_config": parallel(worker_cls="builtins.object")}, "worker_cls.*builtins.object would accept"),
        ({"scheduler_config": scheduler(object)}, "scheduler_cls.*fall back to AR"),
        ({"scheduler_config": scheduler(JacobiSchedulerOfSomebodyElse)}, "scheduler_cls.*fall back to AR"),
        ({"scheduler_config": scheduler(async_scheduling=False)}, "async_scheduling"),
        ({"additional_config": {"jacobi": {"gues": "pad"}}}, r"additional_config\.jacobi: gues"),
    ],
)
def test_an_engine_that_would_not_decode_by_jacobi_is_refused(changes: dict[str, object], named: str) -> None:
    assert check_config(built()).guess == "pad"
    with pytest.raises(InputError, match=named):
        check_config(built(**changes))


def test_a_hook_that_is_gone_is_named() -> None:
    here = Hook("cllm.vllm.config", "PeerConfig", "from_data", "exists")
    check_hooks("0.99", [here])
    with pytest.raises(InputError, match=r"vLLM 0\.99 has no cllm\.vllm\.config\.PeerConfig\.gone, which moves"):
        check_hooks("0.99", [here, Hook("cllm.vllm.config", "PeerConfig", "gone", "moves")])
    with pytest.raises(InputError, match=r"no cllm\.vllm\.nowhere\.PeerConfig\.from_data, which moves"):
        check_hooks("0.99", [Hook("cllm.vllm.nowhere", "PeerConfig", "from_data", "moves")])


def built_runner() -> SimpleNamespace:
    """What the sampler reads and writes of a built model runner."""
    names = ("draft_tokens", "all_token_ids", "prompt_len", "prefill_len")
    states = SimpleNamespace(**dict.fromkeys(names))
    sampling = SimpleNamespace(seeds=None)
    return SimpleNamespace(sampler=SimpleNamespace(req_states=states, sampling_states=sampling, use_flashinfer=True))


@pytest.mark.parametrize("path", ["req_states.draft_tokens", "sampling_states.seeds", "use_flashinfer"])
def test_an_attribute_that_would_be_set_without_effect_is_named(path: str) -> None:
    runner = built_runner()
    check_runner("0.99", runner)
    *owners, name = path.split(".")
    owner = runner.sampler
    for part in owners:
        owner = getattr(owner, part)
    delattr(owner, name)
    with pytest.raises(InputError, match=rf"vLLM 0\.99 has no model runner with sampler\.{path}"):
        check_runner("0.99", runner)


def test_what_is_set_in_the_scheduler_and_read_of_the_graphs_must_be_there() -> None:
    check_scheduler("0.99", SimpleNamespace(dynamic_sd_lookup=None))
    with pytest.raises(InputError, match="no scheduler with dynamic_sd_lookup"):
        check_scheduler("0.99", SimpleNamespace())
    names = ("_candidates", "_capture_descs", "decode_query_len", "cudagraph_mode", "lora_capture_cases")
    check_graphs("0.99", SimpleNamespace(**dict.fromkeys(names)))
    with pytest.raises(InputError, match="no CUDA-graph manager with _capture_descs"):
        check_graphs("0.99", SimpleNamespace(**dict.fromkeys(names[:1])))


@pytest.mark.skipif(not has_vllm, reason="vLLM is not installed: pip install -e .[cpu]")
def test_this_vllm_has_all_hooks() -> None:
    check_hooks("installed", (*WORKER_HOOKS, *SCHEDULER_HOOKS))


@pytest.mark.skipif(not has_vllm, reason="vLLM is not installed: pip install -e .[cpu]")
@pytest.mark.parametrize("method", ["ar", "ngram", "jacobi"])
def test_vllm_has_every_argument_that_it_is_given(method: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    given = engine_arguments(config(method=method, max_tokens=9, cache_bytes=9, async_scheduling=True))
    assert given.keys() <= {field.name for field in fields(EngineArgs)}


def test_jacobi_is_turned_on_by_four_arguments() -> None:
    arguments = engine_arguments(config(method="jacobi", guesses=15))
    assert arguments["worker_cls"].startswith("cllm.vllm.")
    assert arguments["diffusion_config"] == {"canvas_length": 15}
    assert arguments["scheduler_cls"].startswith("cllm.vllm.")
    assert "speculative_config" not in arguments


def test_acceptance_counts_rows_with_guesses_only() -> None:
    counts = [[0] * 5 for _ in range(5)]
    counts[1][1] = 7  # prompts, and AR steps
    counts[4][1], counts[4][3], counts[2][2] = 2, 1, 3
    acceptance = acceptance_of_counts(counts)
    assert (acceptance.steps, acceptance.proposed, acceptance.accepted) == (6, 12, 5)
    assert acceptance.accepted_at == (4, 1, 0)
    assert acceptance.tokens_per_step == pytest.approx(1 + 5 / 6)
