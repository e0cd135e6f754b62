"""Real data with a teacher from scratch: the whole pipeline within minutes on one GPU."""

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
    ResourceConfig,
    ScratchConfig,
    TrainConfig,
)
from cllm.tasks.gsm8k import Gsm8kConfig
from cllm.tasks.registry import TaskConfig
from cllm.tasks.spider import SpiderConfig

_TEACHER = ScratchConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=10,
    num_heads=8,
    num_kv_heads=8,
    max_positions=2048,
)


def gsm8k_small() -> Recipe:
    """A 33M-parameter Llama on GSM8K. It writes well-formed solutions with wrong numbers; what counts is the speed-up
    and whether the CLLM stays the teacher's equal (perplexity, agreement)."""
    return _small(
        "gsm8k-small",
        Gsm8kConfig(source="openai/gsm8k:main"),
        finetune_steps=600,
        max_new_tokens=256,
        temperature=0.15,
        train_steps=4500,
        ar_weight=1.0,
    )


def spider_small() -> Recipe:
    """The same teacher on Spider, held-out questions on databases that train has too: from scratch, nothing can be
    learnt about unseen schemas. Give the folder with the contents: --set task.source=DIR."""
    return _small(
        "spider-small",
        SpiderConfig(source="data/spider", held_out="questions", without_contents="drop"),
        finetune_steps=500,
        max_new_tokens=160,
        temperature=0.3,
        train_steps=5000,
        ar_weight=1.5,
    )


def _small(
    name: str,
    task: TaskConfig,
    *,
    finetune_steps: int,
    max_new_tokens: int,
    temperature: float,
    train_steps: int,
    ar_weight: float,
) -> Recipe:
    return Recipe(
        name=name,
        output=f"runs/{name}",
        task=task,
        prompts=PromptConfig(max_prompt_tokens=768, max_response_tokens=256, validation_fraction=0.04),
        teacher=ModelConfig(scratch=_TEACHER),
        finetune=FinetuneConfig(
            optim=_optim(finetune_steps, 1e-3),
            validate_every=100,
        ),
        collect=CollectConfig(
            block_size=16,
            record=False,
            max_new_tokens=max_new_tokens,
            samples=8,
            temperature=temperature,  # low: near what greedy decoding will write, which is what is to become fast
            guess="pad",
            shard_prompts=1024,
            batch_size=512,
        ),
        train=TrainConfig(
            optim=_optim(train_steps, 8e-4),
            loss=LossConfig(ar_weight=ar_weight, states="guess", on_policy_iterations=2, states_per_block=2),
            validate_every=250,
        ),
        baselines=BaselinesConfig(
            draft=DraftConfig(
                scratch=LlamaShape(
                    hidden_size=256,
                    intermediate_size=704,
                    num_layers=2,
                    num_heads=4,
                    num_kv_heads=4,
                    max_positions=2048,
                ),
                optim=_optim(1500, 1e-3),
            ),
            medusa=MedusaConfig(num_heads=4, optim=_optim(1500, 8e-4)),
        ),
        evaluate=EvaluateConfig(
            num_prompts=1000,
            max_new_tokens=max_new_tokens,
            block_size=16,
            guess="pad",
            batch_size=256,
            speed_prompts=24,
        ),
        resources=ResourceConfig(gpus=1, compile=True),
    )


def _optim(steps: int, learning_rate: float) -> OptimConfig:
    return OptimConfig(
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=0.1,
        row_tokens=2048,
        rows_per_step=8,
        checkpoint_every=1000,
        log_every=100,
    )
