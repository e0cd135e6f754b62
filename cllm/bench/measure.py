"""One cell measured: responses and their scores, then the same load again for its speed.

The prompts are answered once for accuracy, tokens a forward and equality with other methods, which also warms up what
is timed afterwards: `speed_prompts` of them, `repeats` times over, in a closed loop at the cell's concurrency.

Conversations take two passes: all first turns, then the second turns, whose prompts hold the first answers. The timed
repeats ask the same prompts again, those of the second turns included, and the time is that of both passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from cllm.bench.bandwidth import copy_bandwidth, weight_bytes_of
from cllm.bench.closed_loop import Decoder
from cllm.bench.energy import EnergyCounter, energy_counter
from cllm.bench.engines import memory_in_use
from cllm.bench.facts import corpus_perplexities, reference_perplexity, trajectory_counts
from cllm.bench.matrix import Cell
from cllm.bench.methods import JacobiMethod, Room
from cllm.bench.parameters import model_parameters, trained_parameters
from cllm.bench.prompts import Run, categories, draw_questions, longest_request, second_turns
from cllm.bench.served import Served, percentile, serve
from cllm.bench.shelf import Shelf
from cllm.config import digest
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.evaluation.outputs import response_text
from cllm.evaluation.subject import SubjectName, checkpoint, prompt_tokenizer
from cllm.models import default_device, eos_token_ids, load_generation_config, resolve_dtype
from cllm.recipe import Recipe
from cllm.tasks.base import JUDGED
from cllm.tasks.prompts import Prompt, second_turn_id
from cllm.tasks.registry import load_task

Passes = list[list[DecodeRequest]]


def requests_of(cell: Cell, prompts: Sequence[Prompt]) -> list[DecodeRequest]:
    """The cell's requests. Their seeds depend on prompt and cell's seed alone, so methods meet the same noise."""
    load = cell.load
    assert load.max_new_tokens is not None
    return [
        DecodeRequest(
            prompt.prompt_ids,
            load.max_new_tokens,
            SamplingParams(temperature=load.temperature, top_p=load.top_p, seed=int(prompt.prompt_id, 16) + cell.seed),
        )
        for prompt in prompts
    ]


@dataclass(frozen=True, slots=True)
class _Asked:
    """The prompts of a cell's passes, and what came back.

    Attributes:
        passes: one, or two where conversations go on.
        texts: the responses, pass by pass, as are `served`'s.
    """

    passes: tuple[Sequence[Prompt], ...]
    served: Served
    texts: tuple[str, ...]

    @property
    def prompts(self) -> list[Prompt]:
        return [prompt for asked in self.passes for prompt in asked]

    def first(self, count: int) -> list[list[Prompt]]:
        """The passes of the first so many prompts, with the second turns that belong to them."""
        first = list(self.passes[0][:count])
        ids = {second_turn_id(prompt.prompt_id) for prompt in first}
        second = [prompt for later in self.passes[1:] for prompt in later if prompt.prompt_id in ids]
        return [part for part in (first, second) if part]


class Workbench:
    """Measures cells one after the other; model and decoder stay for the next cell that can use them."""

    def __init__(self) -> None:
        self.device = default_device()
        self.shelf = Shelf(self.device)
        self._bandwidth: float | None = None
        self._prompts: tuple[tuple[object, ...], tuple[Prompt, ...]] | None = None
        self._facts: dict[tuple[object, ...], Any] = {}

    def measure(self, cell: Cell, run: Run) -> dict[str, Any]:
        """The figures of a cell, plain data.

        Raises:
            InputError: the model cannot be loaded or cannot keep the cell's settings.
        """
        prompts = self._drawn(cell, run)
        assert cell.load.max_new_tokens is not None
        room = Room(cell.concurrency, longest_request(run, prompts, cell.load.max_new_tokens))
        facts = self._facts_of(cell, run, prompts, room)
        decoder = self.shelf.decoder(cell, run, room)
        asked = self._ask(decoder, cell, run, prompts, room)
        timed = [requests_of(cell, part) for part in asked.first(cell.load.speed_prompts)]
        return {
            **facts,
            "parameters": model_parameters(cell.model, run.recipe),
            "trained_parameters": trained_parameters(cell.method, cell.model, run.recipe),
            **_speeds(decoder, timed, cell, energy_counter(self.device)),
            "tpf": asked.served.load.tokens_per_forward,
            "memory_gib": memory_in_use(self.device),
            "floor_ms": 1000 * self._weight_bytes(cell.model, run.recipe) / self._copy_bandwidth(),
            **_quality(asked, run),
        }

    def close(self) -> None:
        """Give all memory back, that of vLLM's processes included."""
        self.shelf.close()

    def _drawn(self, cell: Cell, run: Run) -> tuple[Prompt, ...]:
        key = (cell.run_key, cell.data, cell.load.num_prompts)
        if self._prompts is None or self._prompts[0] != key:
            self._prompts = key, draw_questions(run, cell.load.num_prompts).prompts
        return self._prompts[1]

    def _facts_of(self, cell: Cell, run: Run, prompts: Sequence[Prompt], room: Room) -> dict[str, Any]:
        """What does not depend on the number of requests, found once, and before a decoder takes the memory."""
        method = cell.method
        subject = partial(self.shelf.subject, cell, run)
        facts: dict[str, Any] = {}
        if isinstance(method, JacobiMethod) and method.is_paper:
            requests = requests_of(cell, prompts)
            facts |= self._once(
                ("trajectories", cell.group, cell.data, cell.load, cell.seed, method),
                lambda: trajectory_counts(method, subject(), requests, room),
            )
        if method.kind == "ar":
            facts["reference_perplexity"] = self._once(
                ("references", cell.group, cell.data), lambda: reference_perplexity(subject(), prompts)
            )
        if cell.corpora:
            facts |= self._once(
                ("corpora", cell.group, cell.corpora), lambda: corpus_perplexities(subject(), cell, run)
            )
        return facts

    def _once(self, key: tuple[object, ...], find: Callable[[], Any]) -> Any:
        if key not in self._facts:
            self.shelf.close_decoder()
            self._facts[key] = find()
        return self._facts[key]

    def _ask(self, decoder: Decoder, cell: Cell, run: Run, prompts: Sequence[Prompt], room: Room) -> _Asked:
        tokenizer = prompt_tokenizer(run.recipe)
        eos_ids = eos_token_ids(load_generation_config(*checkpoint(cell.model, run.recipe)), tokenizer)

        def texts(served: Served) -> tuple[str, ...]:
            return tuple(response_text(tokens, eos_ids, tokenizer) for tokens in served.tokens)

        served = serve(decoder, requests_of(cell, prompts), cell.concurrency)
        answers = texts(served)
        assert cell.load.max_new_tokens is not None
        later = second_turns(run, prompts, answers, room.tokens - cell.load.max_new_tokens)
        if not later:
            return _Asked((prompts,), served, answers)
        second = serve(decoder, requests_of(cell, later), cell.concurrency)
        return _Asked((prompts, later), served + second, answers + texts(second))

    def _weight_bytes(self, model: SubjectName, recipe: Recipe) -> int:
        dtype = resolve_dtype(recipe.evaluate.precision, self.device)
        path, revision = checkpoint(model, recipe)
        config = AutoConfig.from_pretrained(path, revision=revision)
        return weight_bytes_of(config) * dtype.itemsize // torch.bfloat16.itemsize

    def _copy_bandwidth(self) -> float:
        if self._bandwidth is None:
            self._bandwidth = copy_bandwidth(self.device)
        return self._bandwidth


def _speeds(decoder: Decoder, passes: Passes, cell: Cell, energy: EnergyCounter | None) -> dict[str, Any]:
    """Speed, energy and latency of the timed repeats."""
    repeats, joules = [], []
    for _ in range(cell.load.repeats):
        before = energy() if energy else 0.0
        served = [serve(decoder, requests, cell.concurrency) for requests in passes]
        repeat = sum(served[1:], start=served[0])
        repeats.append(repeat)
        if energy:
            joules.append((energy() - before) / repeat.load.tokens)
    seconds = [value for repeat in repeats for value in repeat.seconds]
    return {
        "tokens_per_s": [repeat.load.tokens_per_s for repeat in repeats],
        "energy_j": joules,
        "latency_ms": {f"p{percent}": 1000 * percentile(seconds, percent) for percent in (50, 90, 99)},
    }


def _quality(asked: _Asked, run: Run) -> dict[str, Any]:
    """The task's scores, and what tells each response from others."""
    task, prompts, tokens = load_task(run.task), asked.prompts, asked.served.tokens
    references, contexts = [p.reference_text for p in prompts], [p.context for p in prompts]
    return {
        "metric": task.metric,
        "prompt_ids": [prompt.prompt_id for prompt in prompts],
        "scores": task.score(asked.texts, references, contexts),
        "response_digests": [digest(row) for row in tokens],
        "response_tokens": [len(row) for row in tokens],
        "response_forwards": asked.served.forwards,
        "mean_response_tokens": sum(map(len, tokens)) / len(tokens),
        "categories": categories(prompts),
        "responses": asked.texts if task.metric == JUDGED else (),
    }
