"""Engines over tiny random models."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.engine.attention import TorchAttention
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.ops import TorchOps
from cllm.engine.policy import WindowPolicy
from cllm.engine.weights import model_from_transformers
from tests.fakes import EOS, PAD


def make_engine(
    model: PreTrainedModel,
    *,
    num_blocks: int | None = None,
    policy: WindowPolicy | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: object,
) -> Engine:
    """An engine with room for a few short rows, other settings as given."""
    defaults = {"max_rows": 4, "max_tokens": 96, "block_tokens": 4, "prefill_tokens": 16}
    config = EngineConfig.model_validate(defaults | settings)
    lean = model_from_transformers(model, ops=TorchOps(), attention=TorchAttention())
    return Engine(lean, config, eos_ids=[EOS], pad_id=PAD, num_blocks=num_blocks, policy=policy, tokenizer=tokenizer)


def check_books(engine: Engine) -> None:
    """Slots and blocks are consistent; if nothing is left to decode, all blocks are back."""
    engine.scheduler.check()
    if engine.num_unfinished == 0:
        pool = engine.scheduler.pool
        assert pool.num_available == pool.num_blocks - 1
