"""The paper's settings (arXiv 2403.00835), at 7B on A100s. They were not run here.

Certainty is marked behind each value: [P] the paper, its blog or the model cards; [C] the authors' code or its README;
[E] our estimate, because no source gives it. Where the sources and this system differ:

- The paper trains on one block a row with three forward passes; here a response is one packed row (one pass), so the
  same epoch has fewer and larger optimiser steps. `_one_epoch` counts them from estimated lengths [E]: prompt plus
  response for fine-tuning; prompt plus twice the response (a state and its fixed point) for distillation.
- The AR loss of the authors' code has a label smoothing of 0.1, which the paper does not mention; ours has none.
- What the CLLM is compared with, a draft model and Medusa-2, takes as many steps over the same responses; see
  `_baselines`.
- Data sources are Hugging Face datasets or local files; change them with `--set task.source=...`.
"""

import math
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
    ResourceConfig,
    TrainConfig,
)
from cllm.tasks.codesearchnet import CodeSearchNetConfig
from cllm.tasks.gsm8k import Gsm8kConfig
from cllm.tasks.sharegpt import ShareGptConfig
from cllm.tasks.spider import SpiderConfig

ROW_TOKENS = 2048  # model_max_length [C]
ROWS_PER_STEP = 4  # one row on each of 4 GPUs, no accumulation [C]
MAX_NEW_TOKENS = 512  # max_new_seq_len [C]; the released trajectory sets used 256 or 512 [P]


def paper_gsm8k() -> Recipe:
    """GSM8K, n = 16, 7k prompts [P]; ABEL-7B-001, a LLaMA-2-7B already fine-tuned on it [P, C]."""
    steps = _one_epoch(7_000, tokens=100 + 2 * 160)
    return Recipe(
        name="paper-gsm8k",
        output="runs/paper-gsm8k",
        task=Gsm8kConfig(name="gsm8k", source="openai/gsm8k:main"),
        prompts=_prompts(),
        teacher=ModelConfig(path="GAIR/Abel-7B-001"),
        collect=_collect(block_size=16, num_prompts=7_000),
        train=_train(steps),
        baselines=_baselines(steps),
        evaluate=_evaluate(block_size=16, num_prompts=1_319),
        resources=ResourceConfig(gpus=4),
    )


def paper_spider() -> Recipe:
    """Spider, n = 16, 7k prompts [P]; the teacher is first fine-tuned on the 7,000 training pairs.

    "Deepseek-Coder-7B-instruct" [P] has two candidates; v1.5 carries 7B in its name [E]. The authors' own fine-tuned
    teacher is cllm/deepseek-7b-instruct-spider [C]: `--set teacher.path=... --set finetune=null` takes it as it comes.
    """
    steps = _one_epoch(7_000, tokens=400 + 2 * 50)
    return Recipe(
        name="paper-spider",
        output="runs/paper-spider",
        task=SpiderConfig(name="spider", source="data/spider"),
        prompts=_prompts(),
        teacher=ModelConfig(path="deepseek-ai/deepseek-coder-7b-instruct-v1.5"),
        finetune=_finetune(steps=_one_epoch(7_000, tokens=400 + 50)),
        collect=_collect(block_size=16, num_prompts=7_000),
        train=_train(steps),
        baselines=_baselines(steps),
        evaluate=_evaluate(block_size=16, num_prompts=1_034),
        resources=ResourceConfig(gpus=4),
    )


def paper_codesearchnet() -> Recipe:
    """CodeSearchNet-Python, n = 32, 50k prompts, a tenth of the set [P]; the teacher is first fine-tuned on it.

    The authors' teacher is cllm/deepseekcoder_6.7b_codesearch_net_python_epoch_3 [C], hence the 6.7B base and three
    epochs [E].
    """
    steps = _one_epoch(50_000, tokens=100 + 2 * 200)
    return Recipe(
        name="paper-codesearchnet",
        output="runs/paper-codesearchnet",
        task=CodeSearchNetConfig(name="codesearchnet", source="code-search-net/code_search_net:python"),
        prompts=_prompts(),
        teacher=ModelConfig(path="deepseek-ai/deepseek-coder-6.7b-instruct"),
        finetune=_finetune(steps=3 * _one_epoch(50_000, tokens=100 + 200)),
        collect=_collect(block_size=32, num_prompts=50_000),
        train=_train(steps),
        baselines=_baselines(steps),
        evaluate=_evaluate(block_size=32, num_prompts=500),
        resources=ResourceConfig(gpus=4),
    )


def paper_sharegpt() -> Recipe:
    """ShareGPT, n = 32, 48k prompts, first turns [P]; the authors' LLaMA-2-7B fine-tuned on these conversations [C].

    The paper evaluates on MT-bench with a judge [P]; here the metric is agreement with the reference.
    """
    steps = _one_epoch(48_000, tokens=80 + 2 * 350)
    return Recipe(
        name="paper-sharegpt",
        output="runs/paper-sharegpt",
        task=ShareGptConfig(name="sharegpt", source="cllm/sharegpt_20230521_2k_clean_lang_split_identity_gpt4"),
        prompts=_prompts(template="chat"),
        teacher=ModelConfig(path="cllm/vicuna-7b-sharegpt-gpt4-48k"),
        collect=_collect(block_size=32, num_prompts=48_000),
        train=_train(steps),
        baselines=_baselines(steps),
        evaluate=_evaluate(block_size=32, num_prompts=500),
        resources=ResourceConfig(gpus=4),
    )


def _prompts(template: Literal["plain", "chat"] = "plain") -> PromptConfig:
    # A packed row must hold the prompt and twice the response: 1024 + 2 * 512 = 2048.
    return PromptConfig(
        template=template,
        max_prompt_tokens=ROW_TOKENS - 2 * MAX_NEW_TOKENS,
        max_response_tokens=MAX_NEW_TOKENS,
    )


def _one_epoch(num_prompts: int, *, tokens: int) -> int:
    """Optimiser steps that see `num_prompts` prompts of `tokens` packed tokens each once."""
    return math.ceil(num_prompts * tokens / (ROW_TOKENS * ROWS_PER_STEP))


def _optim(steps: int, learning_rate: float = 2e-5) -> OptimConfig:
    return OptimConfig(
        steps=steps,
        learning_rate=learning_rate,  # 2e-5 [C]
        warmup_ratio=0.03,  # [C], then a cosine to zero
        weight_decay=0.0,  # [C]
        betas=(0.9, 0.999),  # the trainer's default, which the authors' script does not change [C]
        row_tokens=ROW_TOKENS,
        rows_per_step=ROWS_PER_STEP,
    )


def _finetune(steps: int) -> FinetuneConfig:
    """The sources give no settings for fine-tuning the teachers; those of distillation are taken [E]."""
    return FinetuneConfig(optim=_optim(steps), precision="bf16", gradient_checkpointing=True)


def _collect(block_size: int, num_prompts: int) -> CollectConfig:
    return CollectConfig(
        block_size=block_size,
        num_prompts=num_prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        guess="prompt",  # tokens drawn from the prompt [C]
        precision="bf16",  # [C]
    )


def _train(steps: int) -> TrainConfig:
    return TrainConfig(
        optim=_optim(steps),
        loss=LossConfig(target="global", divergence="forward_kl", ar_weight=10.0),  # [P]
        precision="bf16",  # [C]
        gradient_checkpointing=True,  # [C]
    )


def _baselines(steps: int) -> BaselinesConfig:
    """Speculative decoding with a distilled LLaMA-160M, and Medusa-2 [P]; how they were trained is not given.

    A draft needs the teacher's vocabulary, which LLaMA-160M shares with LLaMA-2 only. So it has the shape, and starts
    from random weights [E], which makes it a weaker draft than the paper's. Where the vocabularies agree, start at the
    pretrained one: --set baselines.draft.path=JackFram/llama-160m --set baselines.draft.scratch=null.

    Medusa-2 follows its authors: five heads, the AR loss beside theirs, a smaller learning rate for the teacher than
    for the heads; the teacher's is that of distillation [E].
    """
    return BaselinesConfig(
        draft=DraftConfig(
            scratch=LlamaShape(
                hidden_size=768,
                intermediate_size=3072,
                num_layers=12,
                num_heads=12,
                num_kv_heads=12,
                max_positions=ROW_TOKENS,
            ),
            optim=_optim(steps, 3e-4),  # [E]
            precision="bf16",
        ),
        medusa=MedusaConfig(
            variant=2,  # [P]
            num_heads=5,
            optim=_optim(steps, 1e-3),  # of the heads
            teacher_learning_rate=2e-5,
            gradient_checkpointing=True,
            precision="bf16",
        ),
    )


def _evaluate(block_size: int, num_prompts: int) -> EvaluateConfig:
    return EvaluateConfig(
        num_prompts=num_prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        block_size=block_size,
        guess="prompt",
        precision="bf16",
    )
