"""A recipe describes a whole run: task, models, collection, training, evaluation. Frozen, typed, strict."""

from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from cllm.config import Config
from cllm.decoding.config import GuessKind
from cllm.errors import InputError
from cllm.tasks.registry import TaskConfig
from cllm.tasks.spider import SpiderConfig


class PromptConfig(Config):
    """How examples become token prompts (`cllm.tasks.prompts`)."""

    template: Literal["plain", "chat"] = "plain"  # chat: the tokenizer's chat template
    max_prompt_tokens: int = Field(512, ge=1)
    max_response_tokens: int = Field(256, ge=1)
    too_long: Literal["skip", "error"] = "skip"
    validation_fraction: float = Field(0.05, gt=0, lt=0.5)  # carved out of train where the source has no such split
    max_train: int | None = None  # keep at most so many rows a split, drawn by hashed id
    max_validation: int | None = None
    max_test: int | None = None


class LlamaShape(Config):
    """Sizes of a Llama-style model of our own, but for its vocabulary."""

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 6
    max_positions: int = 512
    rope_theta: float = 10000.0


class ScratchConfig(LlamaShape):
    """A Llama-style model of our own, trained from random weights with a tokenizer trained on the task."""

    vocab_size: int = Field(512, ge=280)


class ModelConfig(Config):
    """The teacher: a Hugging Face path or id, or one of our own trained from scratch (exactly one of the two)."""

    path: str | None = None
    revision: str | None = None
    scratch: ScratchConfig | None = None

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give exactly one of path and scratch")
        return self


class OptimConfig(Config):
    """Warm-up and a cosine schedule; `steps` optimiser steps of `rows_per_step` packed rows.

    `optimizer`: adamw; or muon for the matrices of the decoder layers, with AdamW for all else (one worker only), which
    learns about a third faster from random weights.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    min_learning_rate_ratio: float = Field(0.0, ge=0, le=1)  # the cosine's end over its start
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    max_grad_norm: float = Field(1.0, gt=0)
    row_tokens: int = Field(1024, ge=16)  # length of one packed row
    rows_per_step: int = Field(8, ge=1)  # over all workers and accumulation steps
    accumulation: int = Field(1, ge=1)  # forward passes a step and worker
    checkpoint_every: int = Field(200, ge=1)  # steps
    log_every: int = Field(20, ge=1)  # steps

    def check_rows(self, key: str, num_workers: int) -> None:
        """Raise InputError, naming this section by its key, if the workers cannot share the rows of a step evenly."""
        if self.rows_per_step % (num_workers * self.accumulation):
            raise InputError(
                f"{key}.rows_per_step={self.rows_per_step} is no multiple of {key}.accumulation={self.accumulation} x "
                f"{num_workers} workers"
            )


class CollectConfig(Config):
    """Jacobi trajectories of the teacher (paper algorithm 1), or its responses alone."""

    block_size: int = Field(16, ge=2)
    # Decode by Jacobi iteration and keep all states. A student that draws its own ones (train.loss.states=guess) needs
    # none of them: without, the same responses come by AR decoding, for a fraction of the arithmetic.
    record: bool = True
    num_prompts: int | None = None  # None: all of the train split
    max_new_tokens: int = Field(256, ge=1)
    # Responses a prompt: the greedy one, and others drawn at `temperature`, so that few prompts make many trajectories.
    samples: int = Field(1, ge=1)
    temperature: float = Field(0.7, gt=0)
    guess: GuessKind = "prompt"  # initial guess of a block
    shard_prompts: int = Field(256, ge=1)  # prompts of one output file, the unit of resumption
    batch_size: int = Field(64, ge=1)  # rows decoded together by one actor
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_token_repeat: int | None = 10  # drop a response with a longer run of one token; None: keep
    max_sentence_repeat: int | None = 3  # drop a response with a sentence (or line) more often; None: keep
    drop_unfinished: bool = True  # drop responses cut off by the length limit
    augment: float = Field(0.0, ge=0, le=1)  # share of later wrong tokens corrected in copies of the states; 0: off


class LoraConfig(Config):
    """Low-rank adapters (peft) on the linear layers; merged on export."""

    rank: int = Field(16, ge=1)
    alpha: int = 32
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FinetuneConfig(Config):
    """AR fine-tuning of the teacher on the reference answers."""

    optim: OptimConfig
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the hardware multiplies it natively
    validate_every: int | None = Field(None, ge=1)  # steps; None: at the end only
    lora: LoraConfig | None = None  # not for a teacher from scratch
    gradient_checkpointing: bool = False

    @model_serializer(mode="wrap", when_used="json")
    def _without_later_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As JSON, of which fingerprints are made, without the keys that came later where they change nothing: so a
        teacher trained before them is still the recipe's."""
        off = {"lora": None, "gradient_checkpointing": False}
        data: dict[str, Any] = serialize(self)
        return {key: value for key, value in data.items() if key not in off or value != off[key]}


class LossConfig(Config):
    """L = consistency + ar_weight * AR (paper eq. 4-6; noisy context and schedule: Jacobi Forcing)."""

    target: Literal["global", "local"] = "global"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    ar_weight: float = Field(10.0, ge=0)
    ar_labels: Literal["teacher", "reference"] = "teacher"  # whose answers the AR loss learns
    context: Literal["clean", "noisy"] = "clean"  # what precedes a noisy block: fixed points or earlier noisy blocks
    schedule: Literal["random", "progressive"] = "random"  # which state of a block is drawn
    schedule_window: int = Field(4, ge=1)  # blocks of one cycle of the progressive schedule, and of noisy context
    states_per_block: int = Field(1, ge=1)
    # trajectory: recorded states; guess: initial guesses for windows at random places, as the sliding window meets them
    states: Literal["trajectory", "guess"] = "trajectory"
    on_policy_iterations: int = Field(0, ge=0)  # up to so many Jacobi iterations of the student refine drawn states

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "LossConfig":
        """What would have no effect is refused: it would give the same student another fingerprint."""
        if self.states == "guess":
            self._require_defaults("target", "context", "schedule", "schedule_window", reason="states=guess")
        elif self.context == "clean" and self.schedule == "random":
            self._require_defaults("schedule_window", reason="context=clean and schedule=random")
        if self.target == "local" and self.on_policy_iterations > 0:
            raise ValueError("target=local is the next recorded state; on_policy_iterations leaves the recorded ones")
        return self

    def _require_defaults(self, *keys: str, reason: str) -> None:
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}={getattr(self, key)} has no effect with {reason}")


class TrainConfig(Config):
    """Consistency distillation (paper algorithm 2), one packed forward for AR, teacher and student logits."""

    optim: OptimConfig
    loss: LossConfig = LossConfig()
    lora: LoraConfig | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    validate_every: int | None = Field(None, ge=1)  # steps; None: at the end only
    # Validations in a row without a better one that end the training, and the best weights are exported; None: all
    # steps are taken, and the last one's weights are exported.
    patience: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _patience_needs_validations(self) -> "TrainConfig":
        if self.patience is not None and self.validate_every is None:
            raise ValueError(f"patience={self.patience} counts validations: set validate_every")
        return self


class DraftConfig(Config):
    """A draft model for speculative decoding: the teacher's student on the collected responses.

    It begins at a Hugging Face path or id with the teacher's vocabulary, or as a Llama of our own from random weights
    (exactly one of the two).
    """

    path: str | None = None
    revision: str | None = None
    scratch: LlamaShape | None = None
    optim: OptimConfig
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"  # from the teacher's distribution
    ar_weight: float = Field(0.0, ge=0)  # of the AR loss on the teacher's response; the loss is divergence + it
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validate_every: int | None = Field(None, ge=1)  # steps; None: at the end only

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "DraftConfig":
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give exactly one of path and scratch")
        return self


class MedusaConfig(Config):
    """Medusa heads on the teacher, trained on the collected responses; `optim.learning_rate` is that of the heads."""

    variant: Literal[1, 2] = 1  # 1: the teacher is frozen; 2: it is trained with the heads, and exported beside them
    num_heads: int = Field(5, ge=1)
    optim: OptimConfig
    decay: float = Field(0.8, gt=0, le=1)  # head k's loss weighs decay^k
    ar_weight: float = Field(5.0, ge=0)  # variant 2: of the AR loss; the loss is the heads' + it
    teacher_learning_rate: float | None = Field(None, gt=0)  # variant 2; None: a quarter of the heads'
    gradient_checkpointing: bool = False  # variant 2
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validate_every: int | None = Field(None, ge=1)  # steps; None: at the end only

    @model_validator(mode="after")
    def _consistent(self) -> "MedusaConfig":
        if self.variant == 1 and self.teacher_learning_rate is not None:
            raise ValueError("teacher_learning_rate is for variant 2; variant 1 freezes the teacher")
        if self.optim.optimizer != "adamw":
            raise ValueError(f"Medusa heads train with optim.optimizer=adamw, not {self.optim.optimizer}")
        return self


class BaselinesConfig(Config):
    """The methods that the CLLM is compared with: same prompts, same teacher, same responses (`jobs/baselines.py`)."""

    draft: DraftConfig | None = None
    medusa: MedusaConfig | None = None


class EvaluateConfig(Config):
    """Teacher and CLLM on the same held-out prompts."""

    num_prompts: int = Field(500, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    block_size: int = Field(16, ge=2)
    guess: GuessKind = "prompt"
    batch_size: int = Field(64, ge=1)
    speed_prompts: int = Field(50, ge=1)  # prompts timed one at a time
    speed_repeats: int = Field(3, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class ResourceConfig(Config):
    """What the jobs ask Ray for. `gpus`: 0 runs on CPUs; otherwise each training worker or decoding actor owns one."""

    gpus: int = Field(0, ge=0)
    workers: int = Field(1, ge=1)  # training workers on CPU, on one node or several; on GPUs there is one a GPU
    cpus_per_worker: int = Field(2, ge=1)  # threads of one training worker on CPU
    cpus_per_actor: int = Field(1, ge=1)  # threads of one collection or evaluation actor on CPU
    wait_s: float = Field(900, ge=0)  # how long a job waits for a cluster that grows to have what it asks for
    max_failures: int = Field(3, ge=0)  # restarts of a training job after lost workers
    compile: bool = False  # training through torch.compile: faster steps after a minute; losses differ by rounding

    @model_validator(mode="after")
    def _workers_are_for_cpus(self) -> "ResourceConfig":
        if self.gpus and self.workers > 1:
            raise ValueError(f"workers={self.workers} is for CPUs; gpus={self.gpus} makes one worker a GPU")
        return self

    @property
    def training_workers(self) -> int:
        """How many processes train together."""
        return self.gpus or self.workers


class Recipe(Config):
    """One run, from prompts to report. Every output folder holds the recipe that made it."""

    name: str
    output: str  # root folder of the run's artefacts (shared storage on a cluster)
    storage: str | None = None  # URI where finished stages are copied to (`cllm.storage`); None: nowhere
    seed: int = 0
    task: TaskConfig
    prompts: PromptConfig = PromptConfig()
    teacher: ModelConfig
    finetune: FinetuneConfig | None = None  # None: the teacher is used as it comes
    collect: CollectConfig
    train: TrainConfig
    baselines: BaselinesConfig | None = None  # no stage of the pipeline; None: not made
    evaluate: EvaluateConfig = EvaluateConfig()
    resources: ResourceConfig = ResourceConfig()

    @model_validator(mode="after")
    def _scratch_needs_finetuning(self) -> "Recipe":
        if self.teacher.scratch is None:
            return self
        if self.finetune is None:
            raise ValueError("a teacher from scratch needs a finetune section")
        if self.finetune.lora is not None:
            raise ValueError("finetune.lora adapts a trained model; a teacher from scratch learns all weights")
        return self

    @field_validator("output")
    @classmethod
    def _output_is_a_folder(cls, output: str) -> str:
        if "://" in output:
            raise ValueError("output is a folder; for copies of finished stages in a bucket, set storage")
        return output

    @field_validator("storage")
    @classmethod
    def _storage_is_a_uri_without_credentials(cls, storage: str | None) -> str | None:
        if storage is not None and "://" not in storage:
            raise ValueError("storage is a URI: s3://bucket/prefix, gs://bucket/prefix or file:///folder")
        if storage is not None and "@" in storage.partition("://")[2].partition("/")[0]:
            raise ValueError("credentials belong into the environment: recipes are kept beside their results")
        return storage

    @model_validator(mode="after")
    def _muon_trains_on_one_worker(self) -> "Recipe":
        sections: dict[str, FinetuneConfig | TrainConfig | DraftConfig | None]
        sections = {"finetune": self.finetune, "train": self.train}
        if self.baselines is not None:
            sections["baselines.draft"] = self.baselines.draft
        asked = f"resources.gpus={self.resources.gpus}, resources.workers={self.resources.workers}"
        for name, section in sections.items():
            if section is not None and section.optim.optimizer == "muon" and self.resources.training_workers > 1:
                raise ValueError(f"{name}.optim.optimizer=muon trains on one worker, not with {asked}")
        return self

    @model_validator(mode="after")
    def _workers_share_the_rows(self) -> "Recipe":
        """Of the pipeline's trainings; the job of the baselines asks for its own."""
        if self.finetune is not None:
            self.finetune.optim.check_rows("finetune.optim", self.resources.training_workers)
        self.train.optim.check_rows("train.optim", self.resources.training_workers)
        return self

    @model_validator(mode="after")
    def _states_that_are_drawn_are_there(self) -> "Recipe":
        if self.collect.augment > 0 and self.train.loss.states == "guess":
            raise ValueError(f"collect.augment={self.collect.augment} has no effect with train.loss.states=guess")
        if self.train.loss.states == "trajectory" and not self.collect.record:
            raise ValueError("train.loss.states=trajectory draws recorded states; collect.record=false keeps none")
        return self

    @model_validator(mode="after")
    def _responses_fit_models_from_scratch(self) -> "Recipe":
        """A model that is loaded knows its limit itself: `cllm.models.check_context_fits`."""
        shapes: dict[str, LlamaShape | None] = {"teacher": self.teacher.scratch}
        if self.baselines is not None and self.baselines.draft is not None:
            shapes["baselines.draft"] = self.baselines.draft.scratch
        prompt = self.prompts.max_prompt_tokens
        sections = {"collect": self.collect.max_new_tokens, "evaluate": self.evaluate.max_new_tokens}
        for (model, shape), (name, new) in product(shapes.items(), sections.items()):
            if shape is not None and prompt + new > shape.max_positions:
                raise ValueError(
                    f"prompts.max_prompt_tokens={prompt} + {name}.max_new_tokens={new} is more than "
                    f"{model}.scratch.max_positions={shape.max_positions}"
                )
        return self

    @property
    def placed_task(self) -> TaskConfig:
        """The task section with the folder of its databases: below `output`, unless the recipe names another."""
        if isinstance(self.task, SpiderConfig) and self.task.databases is None:
            return self.task.model_copy(update={"databases": str(Path(self.output) / "databases")})
        return self.task
