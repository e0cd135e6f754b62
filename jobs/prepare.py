"""Turn the task's source into prompts with splits, and train the tokenizer of a teacher from scratch.

python jobs/prepare.py --recipe demo
"""

import argparse
import json
import sys
from collections.abc import Sequence

import ray
from transformers import PreTrainedTokenizerBase

from cllm.artifacts import write_artifact
from cllm.errors import InputError
from cllm.models import context_length, load_tokenizer
from cllm.provenance import collect_provenance
from cllm.recipe import Recipe
from cllm.tasks.base import SPLITS, Example
from cllm.tasks.prompts import Prompt, tokenize, tokenizer_hash, write_prompts
from cllm.tasks.registry import load_task
from cllm.tasks.splits import assign_splits
from cllm.tasks.tokenizer import train_tokenizer
from jobs import stages
from jobs.cli import main, stage
from jobs.cluster import connect

TOKENIZER_EXAMPLES = 20_000  # more text does not change a small vocabulary


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    connect(recipe)
    with stage(f"prompts: {recipe.task.name}"):
        ray.get(prepare.remote(recipe, sys.argv))


@ray.remote(num_cpus=1)
def prepare(recipe: Recipe, command: Sequence[str]) -> None:
    """The whole stage, on one core of any node that sees the run's storage."""
    task = load_task(recipe.placed_task)
    examples, counts = assign_splits(
        task.examples(), validation_fraction=recipe.prompts.validation_fraction, seed=recipe.seed
    )
    output = stages.prepare(recipe)
    with write_artifact(
        output.path, kind=output.kind, inputs=output.inputs, provenance=collect_provenance(command)
    ) as folder:
        tokenizer, context = make_tokenizer(recipe, examples), teachers_context(recipe)
        prompts, tokenized = tokenize(examples, tokenizer, recipe.prompts, task_name=task.name, context=context)
        counts |= dict(task.counts) | tokenized
        empty = [split for split in SPLITS if counts[split] == 0 and needed(recipe, split)]
        if empty:
            raise InputError(f"task {task.name}: no prompts left in split {', '.join(empty)}; counts: {counts}")
        if context is not None:
            check_responses_fit(recipe, prompts, context)
        tokenizer.save_pretrained(folder / "tokenizer")
        write_prompts(folder / "prompts.parquet", prompts, {"tokenizer_hash": tokenizer_hash(tokenizer)})
        (folder / "counts.json").write_text(json.dumps(counts, indent=1))
    print(", ".join(f"{name} {count}" for name, count in counts.items()), flush=True)


def make_tokenizer(recipe: Recipe, examples: Sequence[Example]) -> PreTrainedTokenizerBase:
    """The teacher's own, or one trained on the train split for a teacher from scratch."""
    if recipe.teacher.scratch is None:
        assert recipe.teacher.path is not None
        return load_tokenizer(recipe.teacher.path, recipe.teacher.revision)
    train = [example for example in examples if example.split == "train"][:TOKENIZER_EXAMPLES]
    texts = ["\n".join(turn.content for turn in example.turns) + example.response for example in train]
    return train_tokenizer(texts, recipe.teacher.scratch.vocab_size)


def teachers_context(recipe: Recipe) -> int | None:
    """The most tokens that a loaded teacher can read; None for one from scratch, which the recipe itself checks.

    Raises:
        InputError: the teacher has no usable configuration, or no room for a response.
    """
    if recipe.teacher.path is None:
        return None
    context, response = context_length(recipe.teacher.path, recipe.teacher.revision), recipe.prompts.max_response_tokens
    if response >= context:
        raise InputError(
            f"prompts.max_response_tokens={response}: {recipe.teacher.path} reads {context} tokens "
            "(max_position_embeddings), prompt and response together"
        )
    return context


def check_responses_fit(recipe: Recipe, prompts: Sequence[Prompt], context: int) -> None:
    """Find now what would stop collection or evaluation later, when a teacher has been trained.

    Raises:
        InputError: their responses are longer than `prompts.max_response_tokens`, and do not fit behind the prompts.
    """
    sections = (
        ("collect", "train", recipe.collect.max_new_tokens),
        ("evaluate", "test", recipe.evaluate.max_new_tokens),
    )
    for name, split, new in sections:
        longest = max((len(prompt.prompt_ids) for prompt in prompts if prompt.split == split), default=0)
        if longest + new > context:
            raise InputError(
                f"{name}.max_new_tokens={new}: prompts in split {split} have up to {longest} tokens, and "
                f"{recipe.teacher.path} reads {context} (max_position_embeddings)"
            )


def needed(recipe: Recipe, split: str) -> bool:
    """A run without training on references still needs prompts to collect from and to be tested on."""
    return split != "validation" or recipe.finetune is not None


if __name__ == "__main__":
    sys.exit(main(run, __doc__))
