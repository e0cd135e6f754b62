"""What the models of a run are asked: the run's own held-out prompts, or another test set.

Another test set goes through the same place as the run's own (`cllm.tasks.prompts`), with the run's tokenizer and
template. A conversation of two turns is asked in two passes: the prompt of its second turn holds the model's own first
answer, so all first turns are answered before any second one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cllm.errors import InputError
from cllm.evaluation.corpora import CorpusConfig
from cllm.evaluation.subject import prompt_tokenizer
from cllm.layout import RunLayout
from cllm.recipe import PromptConfig, Recipe
from cllm.tasks.base import CATEGORY, FOLLOW_UP
from cllm.tasks.prompts import Prompt, draw_prompts, second_turn, tokenize
from cllm.tasks.registry import TaskConfig, load_task
from cllm.tasks.splits import assign_splits

_NO_LIMIT = 1 << 30
_MOST_TOKENS = 4  # of one character: tokenizers take rare ones byte by byte


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run with what its models are asked.

    Attributes:
        test: another test set than the run's own.
        max_prompt_tokens: of the test set's prompts; None: as the run's own.
        corpora: that its models' perplexity is measured on.
    """

    recipe: Recipe
    test: TaskConfig | None = None
    max_prompt_tokens: int | None = None
    corpora: tuple[CorpusConfig, ...] = ()

    @property
    def task(self) -> TaskConfig:
        """The task that scores the responses, with the folder of its databases."""
        if self.test is None:
            return self.recipe.placed_task
        return self.recipe.model_copy(update={"task": self.test}).placed_task

    @property
    def prompt_config(self) -> PromptConfig:
        """Of the test set: references are never decoded, so their length does not matter."""
        prompts = self.recipe.prompts
        limit = self.max_prompt_tokens or prompts.max_prompt_tokens
        changed = {"max_prompt_tokens": limit, "max_response_tokens": _NO_LIMIT, "too_long": "skip", "max_test": None}
        return prompts.model_copy(update=changed)


@dataclass(frozen=True, slots=True)
class Questions:
    """First turns in a random but fixed order, and how many were left out because they are too long."""

    prompts: tuple[Prompt, ...]
    too_long: int = 0


def draw_questions(run: Run, count: int) -> Questions:
    """The first `count` test prompts by hashed id.

    Raises:
        InputError: no usable file or test set, no prompts in it, or conversations for a template that takes one turn.
    """
    if run.test is None:
        path = RunLayout.of(run.recipe).prompts_file
        questions, where = Questions(tuple(draw_prompts(path, "test", count))), str(path)
    else:
        questions, where = _draw_test_set(run, count), f"test set {run.test.name}"
    if not questions.prompts:
        left_out = f" ({questions.too_long} of them too long)" if questions.too_long else ""
        raise InputError(f"{where}: no prompts in split test{left_out}")
    if run.recipe.prompts.template == "plain" and any(FOLLOW_UP in prompt.context for prompt in questions.prompts):
        raise InputError(f"{where}: conversations of two turns need a run with prompts.template=chat")
    return questions


def second_turns(run: Run, prompts: Sequence[Prompt], answers: Sequence[str], most_tokens: int) -> list[Prompt]:
    """The prompts that follow on those first turns that have a second one, of at most `most_tokens` tokens.

    An answer is read as text, which may come to more tokens than were decoded; where it does not fit then, it loses
    its end.

    Raises:
        InputError: the chat template refuses one, or the questions alone are too long.
    """
    if not any(FOLLOW_UP in prompt.context for prompt in prompts):
        return []
    tokenizer, config = (
        prompt_tokenizer(run.recipe),
        run.prompt_config.model_copy(update={"max_prompt_tokens": _NO_LIMIT}),
    )

    def follow_up(prompt: Prompt, answer: str) -> Prompt:
        while True:
            made = second_turn(prompt, answer, tokenizer, config)
            excess = len(made.prompt_ids) - most_tokens
            if excess <= 0:
                return made
            if not answer:
                raise InputError(f"{prompt.origin}: its two questions have {excess} tokens too many")
            answer = answer[: -math.ceil(excess / _MOST_TOKENS)]

    pairs = zip(prompts, answers, strict=True)
    return [follow_up(prompt, answer) for prompt, answer in pairs if FOLLOW_UP in prompt.context]


def longest_request(run: Run, prompts: Sequence[Prompt], max_new_tokens: int) -> int:
    """Tokens of the longest prompt with its response. A second turn's holds a first answer of full length."""
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + max_new_tokens
    # An answer of one word stands for any, because templates may refuse an empty one.
    later = second_turns(run, prompts, ["Yes"] * len(prompts), _NO_LIMIT)
    return max([longest, *(len(prompt.prompt_ids) + 2 * max_new_tokens for prompt in later)])


def categories(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """One per prompt; () where the task has none."""
    found = tuple(prompt.context[CATEGORY] for prompt in prompts if CATEGORY in prompt.context)
    return found if len(found) == len(prompts) else ()


def _draw_test_set(run: Run, count: int) -> Questions:
    task, tokenizer = load_task(run.task), prompt_tokenizer(run.recipe)
    rows = [example for example in task.examples() if example.split == "test"]
    unique, _ = assign_splits(rows, validation_fraction=run.recipe.prompts.validation_fraction, seed=run.recipe.seed)
    config = run.prompt_config.model_copy(update={"max_test": count})
    prompts, counts = tokenize(unique, tokenizer, config, task_name=task.name)
    return Questions(tuple(sorted(prompts, key=lambda prompt: prompt.prompt_id)), counts["too_long"])
