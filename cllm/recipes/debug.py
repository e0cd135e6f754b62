"""The smallest run of the whole pipeline: every stage does its work, nothing is learnt. For tests."""

from cllm.recipe import (
    BaselinesConfig,
    CollectConfig,
    DraftConfig,
    EvaluateConfig,
    FinetuneConfig,
    LlamaShape,
    MedusaConfig,
    ModelConfig,
    OptimConfig,
    PromptConfig,
    Recipe,
    ResourceConfig,
    ScratchConfig,
    TrainConfig,
)
from cllm.tasks.synthetic_sql import SyntheticSqlConfig

_SCRATCH = ScratchConfig(
    vocab_size=512, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=2, max_positions=512
)
_OPTIM = OptimConfig(steps=10, learning_rate=1e-3, row_tokens=512, rows_per_step=4, checkpoint_every=5, log_every=5)


def debug() -> Recipe:
    """200 prompts, 48 of them collected; 10 steps; 2 layers, 32 wide. Responses are noise: unfinished ones are kept."""
    return Recipe(
        name="debug",
        output="runs/debug",
        task=SyntheticSqlConfig(num_train=200, num_validation=40, num_test=40, databases="runs/debug/databases"),
        prompts=PromptConfig(
            max_prompt_tokens=256, max_response_tokens=64, max_train=160, max_validation=20, max_test=20
        ),
        teacher=ModelConfig(scratch=_SCRATCH),
        finetune=FinetuneConfig(optim=_OPTIM),
        collect=CollectConfig(
            block_size=8,
            num_prompts=48,
            max_new_tokens=32,
            shard_prompts=16,  # three shards, so that resumption has something to skip
            batch_size=16,
            max_token_repeat=None,
            max_sentence_repeat=None,
            drop_unfinished=False,
        ),
        train=TrainConfig(optim=_OPTIM, validate_every=5),
        baselines=BaselinesConfig(
            draft=DraftConfig(
                scratch=LlamaShape(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=2),
                optim=_OPTIM,
                validate_every=5,
            ),
            medusa=MedusaConfig(num_heads=3, optim=_OPTIM),
        ),
        evaluate=EvaluateConfig(
            num_prompts=16, max_new_tokens=32, block_size=8, batch_size=16, speed_prompts=4, speed_repeats=1
        ),
        resources=ResourceConfig(cpus_per_worker=1, max_failures=1),
    )
