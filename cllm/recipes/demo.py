"""The main job on a laptop: text to SQL on six databases, from random weights to a CLLM, on two CPU cores."""

from typing import Literal

from cllm.recipe import (
    BaselinesConfig,
    CollectConfig,
    DraftConfig,
    EvaluateConfig,
    FinetuneConfig,
    LlamaShape,
    LossConfig,
    MedusaConfig,
    ModelConfig,
    OptimConfig,
    PromptConfig,
    Recipe,
    ScratchConfig,
    TrainConfig,
)
from cllm.tasks.synthetic_sql import SyntheticSqlConfig


def demo() -> Recipe:
    """1.9M parameters; the teacher sees about 23,000 questions once, the student 6,400 of the teacher's answers.

    The window is guessed with the padding token, and the student is trained on its own first iterations: with the
    recorded states of the paper the same budget gave less speed at the same accuracy (docs/log.md).
    """
    return Recipe(
        name="demo",
        output="runs/demo",
        task=SyntheticSqlConfig(num_train=26_000, num_validation=500, num_test=600, databases="runs/demo/databases"),
        prompts=PromptConfig(max_prompt_tokens=96, max_response_tokens=128),
        teacher=ModelConfig(scratch=ScratchConfig(vocab_size=640)),
        finetune=FinetuneConfig(optim=_optim(630, 2e-3)),
        collect=CollectConfig(
            block_size=16,
            record=False,
            num_prompts=6_400,
            max_new_tokens=128,
            guess="pad",
            shard_prompts=800,
            batch_size=150,
        ),
        train=TrainConfig(
            optim=_optim(740, 1e-3),
            loss=LossConfig(ar_weight=1.5, states="guess", on_policy_iterations=2, states_per_block=2),
        ),
        baselines=BaselinesConfig(
            draft=DraftConfig(
                scratch=LlamaShape(hidden_size=96, intermediate_size=256, num_layers=1, num_heads=3, num_kv_heads=3),
                optim=_optim(820, 2e-3),
            ),
            medusa=MedusaConfig(
                num_heads=4,
                optim=_optim(820, 1e-3, "adamw"),
            ),
        ),
        evaluate=EvaluateConfig(
            num_prompts=600, max_new_tokens=128, block_size=16, guess="pad", batch_size=150, speed_prompts=16
        ),
    )


def _optim(steps: int, learning_rate: float, optimizer: Literal["adamw", "muon"] = "muon") -> OptimConfig:
    return OptimConfig(
        optimizer=optimizer,
        steps=steps,
        learning_rate=learning_rate,
        warmup_ratio=0.05,
        row_tokens=256,
        rows_per_step=8,
        checkpoint_every=400,
        log_every=50,
    )
