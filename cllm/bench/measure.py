"""One cell measured: responses and their scores, then the same load again for its speed.

The prompts are answered once for accuracy, tokens a forward and equality with other methods, which also warms up what
is timed afterwards: the first of them, `repeats` times over, in a closed loop at the cell's concurrency.

Conversations take two passes: all first turns, then the second turns, whose prompts hold the first answers. The timed
repeats ask the same prompts again, those of the second turns included, and the time is that of both passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig

from cllm.bench.bandwidth import copy_bandwidth, weight_bytes_of
from cllm.bench.drafts import Placed, placed
from cllm.bench.energy import energy_counter
from cllm.bench.engines import memory_in_use, release
from cllm.bench.facts import FactFinder, Facts
from cllm.bench.matrix import Cell
from cllm.bench.memory import memory_needed
from cllm.bench.methods import Room, gpus_of
from cllm.bench.parameters import model_parameters, trained_parameters
from cllm.bench.prompts import Run, categories, draw_questions, longest_request, second_turns
from cllm.bench.requests import requests_of
from cllm.bench.result import CellResult, EngineFacts
from cllm.bench.served import Served, serve
from cllm.bench.shelf import Shelf
from cllm.bench.timing import Speeds, time_repeats
from cllm.config import digest
from cllm.decoding.backend import Backend
from cllm.evaluation.outputs import response_text
from cllm.evaluation.subject import checkpoint, prompt_tokenizer
from cllm.models import default_device, eos_token_ids, load_generation_config, resolve_dtype
from cllm.tasks.base import JUDGED
from cllm.tasks.prompts import Prompt, second_turn_id
from cllm.tasks.registry import load_task


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


@dataclass(frozen=True, slots=True)
class _Machine:
    """What a cell's result says of the machine and of what served it."""

    floor_ms: float
    device_memory_gib: float | None
    engine: EngineFacts


class Workbench:
    """Measures cells one after the other; model and decoder stay for the next cell that can use them.

    Args:
        bandwidth: bytes a second that a device copies. It is asked while no decoder is open, for it takes memory.
    """

    def __init__(self, bandwidth: Callable[[torch.device], float] = copy_bandwidth) -> None:
        self.device = default_device()
        self.shelf = Shelf(self.device)
        self._facts = FactFinder(self.shelf)
        self._measure_bandwidth = bandwidth
        self._bandwidth: float | None = None
        self._prompts: tuple[tuple[object, ...], tuple[Prompt, ...]] | None = None

    def measure(self, cell: Cell, run: Run) -> CellResult:
        """The figures of a cell.

        Raises:
            InputError: the model cannot be loaded or cannot keep the cell's settings.
        """
        prompts = self._drawn(cell, run)
        assert cell.load.max_new_tokens is not None
        room = Room(cell.concurrency, longest_request(run, prompts, cell.load.max_new_tokens))
        facts = self._facts.find(cell, run, prompts, room)
        found = placed(cell.method, run.recipe, cell.model)
        floor_ms = self._floor_ms(cell, found) if cell.load.timed else 0.0
        decoder = self.shelf.decoder(cell, run, room)
        before = decoder.stats()
        asked = self._ask(decoder, cell, run, prompts, room)
        speeds = self._time(decoder, cell, asked)
        machine = _Machine(floor_ms, memory_in_use(self.device), EngineFacts.of(decoder.stats().since(before)))
        needed = memory_needed(found, room, self._dtype(cell))
        return _result(cell, run, asked, facts, speeds, machine, needed)

    def close(self) -> None:
        """Give all memory back, that of vLLM's processes included."""
        self.shelf.close()

    def _drawn(self, cell: Cell, run: Run) -> tuple[Prompt, ...]:
        key = (cell.run_key, cell.data, cell.load.num_prompts)
        if self._prompts is None or self._prompts[0] != key:
            self._prompts = key, draw_questions(run, cell.load.num_prompts).prompts
        return self._prompts[1]

    def _ask(self, decoder: Backend, cell: Cell, run: Run, prompts: Sequence[Prompt], room: Room) -> _Asked:
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

    def _time(self, decoder: Backend, cell: Cell, asked: _Asked) -> Speeds:
        passes = [requests_of(cell, part) for part in asked.first(cell.load.timed_prompts(cell.concurrency))]
        energy = energy_counter(self.device) if gpus_of(cell.method) == 1 else None  # it counts one GPU
        return time_repeats(decoder, passes, concurrency=cell.concurrency, repeats=cell.load.repeats, energy=energy)

    def _floor_ms(self, cell: Cell, found: Placed) -> float:
        config = AutoConfig.from_pretrained(found.path, revision=found.revision)
        size = weight_bytes_of(config) * self._dtype(cell).itemsize // torch.bfloat16.itemsize
        if self._bandwidth is None:
            self.shelf.close_decoder()
            self._bandwidth = self._measure_bandwidth(self.device)
            release(self.device)
        return 1000 * size / self._bandwidth

    def _dtype(self, cell: Cell) -> torch.dtype:
        return resolve_dtype(cell.precision, self.device)


def _result(
    cell: Cell, run: Run, asked: _Asked, facts: Facts, speeds: Speeds, machine: _Machine, needed: int | None
) -> CellResult:
    """Everything together, with the task's scores and what tells each response from others."""
    task, prompts, served = load_task(run.task), asked.prompts, asked.served
    scores = task.score(asked.texts, [p.reference_text for p in prompts], [p.context for p in prompts])
    counts, perplexities = facts.trajectories, facts.corpora.items()
    return CellResult(
        metric=task.metric,
        tokens_per_s=speeds.tokens_per_s,
        energy_j=speeds.energy_j,
        tpf=served.load.tokens_per_forward,
        latency_ms=speeds.latency_ms,
        step_ms=speeds.step_ms,
        floor_ms=machine.floor_ms,
        memory_gib=None if needed is None else needed / 2**30,
        device_memory_gib=machine.device_memory_gib,
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        scores=tuple(scores),
        response_digests=tuple(digest(tokens) for tokens in served.tokens),
        response_tokens=tuple(map(len, served.tokens)),
        response_forwards=served.forwards,
        mean_response_tokens=sum(map(len, served.tokens)) / len(served.tokens),
        categories=categories(prompts),
        responses=asked.texts if task.metric == JUDGED else (),
        parameters=model_parameters(cell.model, run.recipe),
        trained_parameters=trained_parameters(cell.method, cell.model, run.recipe),
        fast_forwarded=counts and counts.fast_forwarded,
        stationary=counts and counts.stationary_per_block,
        reference_perplexity=facts.reference_perplexity,
        # Of a broken model, corpora without a finite figure are left out.
        perplexity={name: found.token for name, found in perplexities if found.token is not None},
        word_perplexity={name: found.word for name, found in perplexities if found.word is not None},
        engine=machine.engine,
    )
