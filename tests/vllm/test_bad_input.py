"""What users get wrong. Needs no vLLM, but for the parts that say so."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from cllm.errors import InputError
from cllm.vllm.config import PeerConfig
from cllm.vllm.drafts import check_draft
from cllm.vllm.jacobi_hooks import Hook, check_config, check_hooks
from cllm.vllm.llm import VllmBackend, acceptance_of_counts, engine_arguments
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


@pytest.mark.skipif(has_vllm, reason="vLLM is installed")
def test_a_missing_vllm_names_the_extras() -> None:
    with pytest.raises(InputError, match=r"pip install cllm\[gpu\], or cllm\[cpu\]"):
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
    draft = tmp_path / "draft"
    make_model(draft, seed=1)
    fits = config(method="draft_model", model=str(target), draft=str(draft))
    check_draft(fits)
    for folder, second in ((target, "b"), (draft, "c")):
        vocabulary = {"model": {"vocab": {"a": 0, second: 1}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match="another tokenizer than the target's: 'c' is 1, there None"):
        check_draft(fits)
    (target / "tokenizer.json").unlink()
    settings = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(settings | {"vocab_size": 32}))
    with pytest.raises(InputError, match="vocab_size is 32, the target's is 64"):
        check_draft(fits)


def test_medusa_heads_of_another_model(target: Path, tmp_path: Path) -> None:
    make_medusa(tmp_path / "narrow", hidden=64)
    make_medusa(tmp_path / "few", heads=2)
    with pytest.raises(InputError, match="hidden_size is 64, the target's is 128"):
        check_draft(config(method="medusa", model=str(target), draft=str(tmp_path / "narrow")))
    with pytest.raises(InputError, match="2 Medusa heads cannot make guesses=5"):
        check_draft(config(method="medusa", model=str(target), draft=str(tmp_path / "few")))


def scheduler(**changes: object) -> SimpleNamespace:
    fields = {"scheduler_cls": "cllm.vllm.jacobi_scheduler.JacobiScheduler", "async_scheduling": True}
    return SimpleNamespace(**(fields | changes))


def built(**changes: object) -> SimpleNamespace:
    """A built vLLM configuration that fits, as far as the check reads it."""
    fields = {
        "use_v2_model_runner": True,
        "speculative_config": None,
        "num_speculative_tokens": 15,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
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
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline_parallel_size"),
        ({"scheduler_config": scheduler(scheduler_cls=None)}, "scheduler_cls.*fall back to AR"),
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


@pytest.mark.skipif(not has_vllm, reason="vLLM is not installed: pip install cllm[cpu]")
def test_this_vllm_has_all_hooks() -> None:
    check_hooks("installed")


def test_jacobi_uses_documented_engine_arguments_only() -> None:
    arguments = engine_arguments(config(method="jacobi", guesses=15))
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
