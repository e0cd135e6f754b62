"""The model and the decoder that cells use one after the other. Loading, capturing and starting vLLM take their time.

A decoder with room for many requests serves fewer as well: a step's work depends on the requests in flight, not on the
room. So cells come with the most requests first, and a decoder is opened again only where it is too small.
"""

from dataclasses import dataclass

import torch

from cllm.bench.closed_loop import Decoder
from cllm.bench.drafts import placed
from cllm.bench.engines import release
from cllm.bench.matrix import Cell
from cllm.bench.methods import MethodConfig, Room, VllmMethod, open_decoder, open_vllm
from cllm.bench.prompts import Run
from cllm.evaluation.subject import Subject, checkpoint, load_subject, prompt_tokenizer
from cllm.models import eos_token_ids, load_generation_config, pad_token_id, resolve_dtype
from cllm.vllm.llm import VllmBackend


@dataclass(slots=True)
class _Open:
    """A decoder, and what it was opened for."""

    decoder: Decoder
    group: tuple[str, str, bool]
    method: MethodConfig
    room: Room

    def serves(self, cell: Cell, room: Room) -> bool:
        same = (self.group, self.method, self.room.tokens) == (cell.group, cell.method, room.tokens)
        return same and self.room.rows >= room.rows


class Shelf:
    """Holds one model and one decoder at most, because two may not fit into memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._subject: tuple[tuple[str, str, bool], Subject] | None = None
        self._open: _Open | None = None

    def subject(self, cell: Cell, run: Run) -> Subject:
        """The cell's model.

        Raises:
            InputError: it cannot be loaded.
        """
        if self._subject is None or self._subject[0] != cell.group:
            self.close()
            self._subject = cell.group, load_subject(cell.model, run.recipe, self.device)
        return self._subject[1]

    def decoder(self, cell: Cell, run: Run, room: Room) -> Decoder:
        """The cell's decoder, with at least that room.

        Raises:
            InputError: the model cannot keep the settings, or there is too little memory.
        """
        if self._open is None or not self._open.serves(cell, room):
            self.close_decoder()
            opened = self._start_vllm if isinstance(cell.method, VllmMethod) else self._build
            self._open = _Open(opened(cell, run, room), cell.group, cell.method, room)
        return self._open.decoder

    def close_decoder(self) -> None:
        """Give its memory back; the model stays."""
        opened, self._open = self._open, None
        if opened is not None and isinstance(opened.decoder, VllmBackend):
            opened.decoder.close()
        del opened
        release(self.device)

    def close(self) -> None:
        """Give all memory back."""
        self.close_decoder()
        self._subject = None
        release(self.device)

    def _build(self, cell: Cell, run: Run, room: Room) -> Decoder:
        return open_decoder(cell.method, self.subject(cell, run), room)

    def _start_vllm(self, cell: Cell, run: Run, room: Room) -> Decoder:
        self.close()  # vLLM wants the memory
        method = placed(cell.method, run.recipe, cell.model)
        assert isinstance(method, VllmMethod)
        path, revision = checkpoint(cell.model, run.recipe)
        tokenizer = prompt_tokenizer(run.recipe)
        eos_ids = eos_token_ids(load_generation_config(path, revision), tokenizer)
        dtype = resolve_dtype(cell.precision, self.device)
        return open_vllm(method, path, room, eos_ids=eos_ids, pad_id=pad_token_id(tokenizer), dtype=dtype)
