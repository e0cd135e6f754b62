"""Engines over tiny random models, and requests for them."""

from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.attention import Attention, TorchAttention
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
    attention: Attention | None = None,
    **settings: object,
) -> Engine:
    """An engine with room for a few short rows, other settings as given."""
    defaults = {"max_rows": 4, "max_tokens": 96, "block_tokens": 4, "prefill_tokens": 16}
    config = EngineConfig.model_validate(defaults | settings)
    lean = model_from_transformers(model, ops=TorchOps(), attention=attention or TorchAttention())
    return Engine(lean, config, eos_ids=[EOS], pad_id=PAD, num_blocks=num_blocks, policy=policy, tokenizer=tokenizer)


def check_books(engine: Engine) -> None:
    """Slots and blocks are consistent; if nothing is left to decode, all blocks are back."""
    engine.scheduler.check()
    free = set(range(engine.config.max_rows)) - {row.place for row in engine.scheduler.running}
    assert engine.sampler.work(free) == "greedy", "a slot that nobody has still asks for work"
    if engine.num_unfinished == 0:
        pool = engine.scheduler.pool
        assert pool.num_available == pool.num_blocks - 1


@st.composite
def requests(draw):
    """1 to 7 requests; some share a prompt's beginning."""
    common = draw(st.lists(st.integers(2, 23), min_size=1, max_size=16))
    prompts = st.lists(st.integers(2, 23), min_size=1, max_size=20)
    return [
        DecodeRequest(
            tuple(draw(st.sampled_from([[], common])) + draw(prompts)),
            draw(st.integers(1, 24)),
            SamplingParams(
                temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.3])),
                top_k=draw(st.sampled_from([0, 3])),
                top_p=draw(st.sampled_from([1.0, 0.8])),
                seed=draw(st.integers(0, 2**63)),
            ),
        )
        for _ in range(draw(st.integers(1, 7)))
    ]
