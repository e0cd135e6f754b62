"""One student, from the teacher to its figures, in one process on one device."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from cllm.ablation.cell import Figures
from cllm.bench.engines import release
from cllm.errors import InputError
from cllm.evaluation.decode import Engines, decode, methods
from cllm.evaluation.metrics import tokens_per_forward
from cllm.evaluation.outputs import response_text
from cllm.evaluation.perplexity import reference_nll
from cllm.evaluation.subject import Subject, prompt_tokenizer
from cllm.evaluation.timing import time_methods
from cllm.layout import RunLayout
from cllm.models import eos_token_ids, load_model, pad_token_id, resolve_dtype
from cllm.recipe import EvaluateConfig, Recipe
from cllm.tasks.prompts import draw_prompts
from cllm.tasks.registry import load_task
from cllm.training.checkpoint import full_model_state
from cllm.training.session import distill_session
from cllm.training.worker import Worker


def make_student(
    recipe: Recipe, seed: int, evaluations: Sequence[EvaluateConfig], device: torch.device
) -> list[Figures]:
    """Distil the recipe's teacher and measure the student in several ways; then it is thrown away.

    Args:
        recipe: its output holds prompts, teacher and trajectories (`cllm.ablation.data.placed`).
        seed: of training.
        evaluations: in the place of the recipe's own, one for each of the figures.

    Raises:
        InputError: data or teacher that cannot be used, or a loss or gradient that is not finite.
    """
    with tempfile.TemporaryDirectory() as folder:
        seconds, tokens = train_student(recipe, seed, Path(folder), device)
        release(device)
        subject = load_student(recipe, Path(folder), device)
    recipes = [recipe.model_copy(update={"evaluate": evaluation}) for evaluation in evaluations]
    figures = [measure_student(recipe, subject, seconds, tokens) for recipe in recipes]
    del subject
    release(device)
    return figures


def train_student(recipe: Recipe, seed: int, folder: Path, device: torch.device) -> tuple[float, int]:
    """Train all steps and write a checkpoint into `folder`; returns seconds of training and packed tokens."""
    torch.manual_seed(seed)  # adapters begin with random weights
    session = distill_session(recipe, Worker(device=device), seed)
    trainer = session.trainer
    start = time.perf_counter()
    tokens = sum(trainer.train_step().num_tokens for _ in range(recipe.train.optim.steps))
    seconds = time.perf_counter() - start
    session.export(folder, full_model_state(trainer))
    return seconds, tokens


def load_student(recipe: Recipe, folder: Path, device: torch.device) -> Subject:
    """The checkpoint as it would be served."""
    tokenizer = prompt_tokenizer(recipe)
    model = load_model(str(folder), dtype=resolve_dtype(recipe.evaluate.precision, device), device=device)
    return Subject(model, eos_token_ids(model.generation_config, tokenizer), pad_token_id(tokenizer))


def measure_student(recipe: Recipe, subject: Subject, train_seconds: float, train_tokens: int) -> Figures:
    """Quality and tokens a forward over all test prompts, speed over the first of them.

    Raises:
        InputError: there are no test prompts.
    """
    config, tokenizer, task = recipe.evaluate, prompt_tokenizer(recipe), load_task(recipe.placed_task)
    path = RunLayout.of(recipe).prompts_file
    prompts = draw_prompts(path, "test", config.num_prompts)
    if not prompts:
        raise InputError(f"{path}: no prompts in split test")
    ar, _, jacobi = methods(config.block_size)
    engine = Engines(subject, config, prompts, rows=config.batch_size, record=False)[jacobi]
    results = decode(engine, prompts, config)
    texts = [response_text(result.token_ids, subject.eos_ids, tokenizer) for result in results]
    scores = task.score(texts, [prompt.reference_text for prompt in prompts], [prompt.context for prompt in prompts])
    candidates = {method.name: (subject, method) for method in (ar, jacobi)}
    timings = time_methods(candidates, prompts[: config.speed_prompts], config)
    ours, baseline = timings[jacobi.name].repeats, timings[ar.name].repeats
    likelihood = reference_nll(subject.model, prompts, batch_size=config.batch_size, pad_id=subject.pad_id)
    return Figures(
        metric=task.metric,
        tpf=tokens_per_forward(result.accepted for result in results),
        speedups=tuple(mine / other for mine, other in zip(ours, baseline, strict=True)),
        tokens_per_s=ours,
        scores=tuple(scores),
        reference_perplexity=likelihood.perplexity,
        mean_response_tokens=fmean(len(result.token_ids) for result in results),
        train_seconds=round(train_seconds, 2),
        train_tokens=train_tokens,
    )
