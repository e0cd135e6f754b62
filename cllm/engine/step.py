"""A step between the host, which plans it and reads its result, and the device, which computes it.

Shapes: B rows, P predictions read of a row, X entries of a row's input or result, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from cllm.engine.costs import Work
from cllm.engine.sampler import Logprobs
from cllm.engine.sequence import Sequence


class Step(Protocol):
    """What a step computes on the device, without waiting for it; shapes follow from those of its arguments.

    Attributes:
        width: tokens fed for each row.
        idle_input: the input of a row that fills up a batch.
    """

    @property
    def width(self) -> int: ...

    @property
    def idle_input(self) -> list[int]: ...

    def predict(self, inputs_BX: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's part: tokens [B, P] that predictions are read behind, int64, and their logits [B, P, V].

        Args:
            inputs_BX: int64, what the host gives for each row; the slot first.
            num_blocks: of each row's table, as far as they are needed.
        """

    def finish(
        self, inputs_BX: torch.Tensor, fed_BP: torch.Tensor, logits_BPV: torch.Tensor, *, greedy: bool
    ) -> tuple[torch.Tensor, Logprobs | None]:
        """Pick tokens; an int64 result for each row [B, ...], and log-probabilities of the picks where they are asked.

        Args:
            greedy: the argmax is all that any row needs.
        """


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way to the host: `results` waits for it.

    Attributes:
        rows: the sequences, each with the admission that the step was launched for.
        width: tokens that it fed for each.
        result_BX: host memory that will hold what the step says of each row.
        logprobs: of its predictions, where a row asks for them; on the host as well.
        event: when all of it is there; None: it is.
        work: what its draw takes.
        alone: nothing else was launched since the step before.
    """

    rows: tuple[tuple[Sequence, int], ...]
    width: int
    result_BX: torch.Tensor
    logprobs: Logprobs | None
    event: "torch.cuda.Event | None"
    work: Work
    alone: bool

    def results(self) -> list[tuple[int, Sequence, list[int]]]:
        """Place in the step, row and result, for rows that were not finished, aborted or preempted since. `logprobs`
        are there then, too.
        """
        if self.event is not None:
            self.event.synchronize()
        results = zip(self.rows, self.result_BX[: len(self.rows)].tolist(), strict=True)
        return [
            (place, row, result)
            for place, ((row, admission), result) in enumerate(results)
            if row.slot is not None and row.admissions == admission
        ]
