"""One worker's steps, each packed and on its way to the device while the step before it is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cllm.recipe import OptimConfig
from cllm.training.batches import RowOfDocuments, RowStream
from cllm.training.packing import PackedRows, pack
from cllm.training.worker import Worker


def count_labels(rows: Sequence[RowOfDocuments]) -> tuple[int, int]:
    """Tokens that bear an AR loss and a consistency loss."""
    documents = [document for row in rows for document in row]
    return sum(d.num_ar_labels for d in documents), sum(d.num_consistency_labels for d in documents)


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one optimiser step.

    Attributes:
        parts: this worker's rows, one part for each accumulated pass, as documents and packed on the device.
        num_ar, num_second: by how many tokens the losses of all workers' rows are divided.
    """

    parts: list[tuple[Sequence[RowOfDocuments], PackedRows]]
    num_ar: int
    num_second: int


class StepFeed:
    """Steps from a stream, prepared one ahead where `prepare` is called.

    A GPU computes while the host prepares, in the same thread: packing in another one would only take turns with the
    thread that launches kernels. `state` is the place behind the last step that was taken, not the last prepared one.

    Args:
        count: the `num_ar` and `num_second` of rows.
    """

    def __init__(
        self,
        stream: RowStream,
        config: OptimConfig,
        pad_id: int,
        worker: Worker,
        count: Callable[[Sequence[RowOfDocuments]], tuple[int, int]] = count_labels,
    ) -> None:
        self._stream = stream
        self._config = config
        self._pad_id = pad_id
        self._worker = worker
        self._count = count
        self._ahead: tuple[dict[str, int], Step] | None = None  # the stream's state before the step, and the step

    def prepare(self) -> None:
        """Make the next step now, if it is not made yet."""
        if self._ahead is None:
            state = self._stream.state
            self._ahead = state, self._make(self._stream.take(self._config.rows_per_step))

    def take(self) -> Step:
        """The next step."""
        self.prepare()
        assert self._ahead is not None
        _, step = self._ahead
        self._ahead = None
        return step

    @property
    def state(self) -> dict[str, int]:
        return self._stream.state if self._ahead is None else self._ahead[0]

    def restore(self, state: dict[str, int]) -> None:
        self._ahead = None
        self._stream.restore(state)

    def pack(self, rows: Sequence[RowOfDocuments]) -> PackedRows:
        """Rows as the model reads them, on this worker's device."""
        return pack(rows, self._config.row_tokens, self._pad_id).to(self._worker.device)

    def _make(self, rows: Sequence[RowOfDocuments]) -> Step:
        mine = rows[self._worker.rank :: self._worker.world]
        size = len(mine) // self._config.accumulation
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        return Step([(part, self.pack(part)) for part in parts], *self._count(rows))
