"""Prompts by hand, and a run folder as the stages before the evaluation leave it, with tiny random models."""

from pathlib import Path

from cllm.layout import RunLayout
from cllm.models import create_model, save_model
from cllm.recipe import Recipe
from cllm.recipes import get_recipe
from cllm.tasks.prompts import Prompt, tokenizer_hash, write_prompts
from cllm.tasks.tokenizer import train_tokenizer

QUESTIONS = ("list the names of nurses", "count pets", "how old is the oldest student in the school", "sum of stock")


def make_prompt(number: int, prompt_ids: tuple[int, ...], reference_ids: tuple[int, ...]) -> Prompt:
    return Prompt(f"{number:016x}", "test", None, prompt_ids, reference_ids, "question", "answer", {}, f"test:{number}")


def make_run(folder: Path, *, num_prompts: int = 4) -> Recipe:
    """A run of the debug recipe up to a student, without manifests; teacher and student differ in their weights."""
    overrides = ["evaluate.max_new_tokens=12", "evaluate.batch_size=3", "evaluate.speed_repeats=3"]
    recipe = get_recipe("debug").with_overrides([f"output={folder}", *overrides])
    layout = RunLayout.of(recipe)
    tokenizer = train_tokenizer(QUESTIONS, 300)
    prompts = []
    for number in range(num_prompts):
        question = QUESTIONS[number % len(QUESTIONS)]
        ids, answer = tuple(tokenizer.encode(question)), tuple(tokenizer.encode("SELECT 1", add_special_tokens=False))
        reference = (*answer, tokenizer.eos_token_id)
        prompts.append(
            Prompt(f"{number:016x}", "test", None, ids, reference, question, "SELECT 1", {}, f"test:{number}")
        )
    tokenizer.save_pretrained(layout.tokenizer)
    write_prompts(layout.prompts_file, prompts, {"tokenizer_hash": tokenizer_hash(tokenizer)})
    assert recipe.teacher.scratch is not None
    for seed, path in enumerate((layout.finetuned, layout.student)):
        model = create_model(recipe.teacher.scratch.model_copy(update={"vocab_size": 300}), tokenizer, seed)
        for parameter in model.parameters():
            parameter.data.mul_(8)  # spreads the logits, so that rounding never decides an argmax
        save_model(path, model, tokenizer)
    return recipe
