"""Loading, creating and saving causal language models and their tokenizers. The only file that chooses their settings.

Supported: decoder-only models of transformers in the style of Llama, Mistral, Qwen2 and Qwen3, stored as safetensors.
Code from a checkpoint is never run (`trust_remote_code` stays off).
"""

import gc
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cllm.artifacts import MANIFEST_NAME, WEIGHTS_SUFFIX, file_hash
from cllm.errors import InputError
from cllm.recipe import LlamaShape

Precision = Literal["auto", "fp32", "bf16"]
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or Hugging Face id.

    Raises:
        InputError: none there, or one without an end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no usable tokenizer: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no end-of-sequence token")
    return tokenizer


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: torch.device | None = None,
    empty: bool = False,
) -> PreTrainedModel:
    """The model of a local folder or Hugging Face id, in eval mode on `device` (default: the CPU).

    Args:
        empty: without its weights, on the meta device.

    Raises:
        InputError: no such model, an unsupported architecture, or weights that are missing, damaged or not safetensors.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
        if config.model_type not in SUPPORTED:
            raise InputError(f"{path}: model type {config.model_type!r}; supported: {', '.join(SUPPORTED)}")
        if empty:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )
    except InputError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds, some of them bare Exception
        raise InputError(f"{path}: no usable model: {_first_line(error)}") from error
    if device is not None:
        torch.nn.Module.to(model, device)
    return model.eval()


def create_model(
    config: LlamaShape, tokenizer: PreTrainedTokenizerBase, seed: int, *, vocab_size: int | None = None
) -> LlamaForCausalLM:
    """A Llama with random weights for `tokenizer`; `vocab_size`: its embeddings where they are more than its tokens."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size or len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A plain Hugging Face checkpoint that transformers and vLLM load."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_tokenizer_fits(vocab_size: int, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise InputError if the tokenizer can produce ids that a model of `vocab_size` has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise InputError(
            f"{where}: the tokenizer does not belong to the model: {len(tokenizer)} tokens, {vocab_size} embeddings"
        )


def context_length(path: str, revision: str | None = None) -> int:
    """The most tokens that a checkpoint's model can read.

    Raises:
        InputError: no usable configuration there.
    """
    return _configured(path, revision, "max_position_embeddings")


def vocabulary_size(path: str, revision: str | None = None) -> int:
    """How many embeddings a checkpoint's model has, which may be more than its tokenizer has tokens.

    Raises:
        InputError: no usable configuration there.
    """
    return _configured(path, revision, "vocab_size")


def _configured(path: str, revision: str | None, key: str) -> int:
    try:
        value = getattr(AutoConfig.from_pretrained(path, revision=revision), key)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: no usable model configuration: {_first_line(error)}") from error
    assert isinstance(value, int)
    return value


def check_context_fits(path: str, revision: str | None, *, prompt_tokens: int, new_tokens: int) -> None:
    """Raise InputError if prompt and response are longer than the model can read: it would answer with noise."""
    limit = context_length(path, revision)
    if prompt_tokens + new_tokens > limit:
        raise InputError(
            f"{path}: prompts of up to {prompt_tokens} tokens and max_new_tokens={new_tokens} make "
            f"{prompt_tokens + new_tokens}, the model has max_position_embeddings={limit}"
        )


def load_generation_config(path: str, revision: str | None = None) -> GenerationConfig | None:
    """The generation config of a checkpoint, or None if it has none."""
    try:
        return GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:
        return None


def eos_token_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All tokens that end a response: the generation config's (chat models have several) and the tokenizer's."""
    configured = generation.eos_token_id if generation else None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None}))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end token for tokenizers without one (padding is masked out everywhere)."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release_memory(device: torch.device) -> None:
    """Give back the memory of models and engines that nothing refers to any more, before the next one is made."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def resolve_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of decoding. auto: bfloat16 on GPUs; float32 on CPUs, where outputs must not depend on the batch."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def resolve_training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of training's matrix products. auto: bfloat16 where the hardware multiplies it natively (GPUs, and CPUs
    with AMX, where it saves a fifth of the time), float32 elsewhere. Weights and optimiser state stay float32."""
    if precision == "auto" and device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32
    return resolve_dtype(precision, device)


def _cpu_multiplies_bf16() -> bool:
    # before torch 2.12 there is no way to ask; float32 is always right
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16", False))


def weights_revision(path: str, revision: str | None = None) -> str:
    """What identifies a checkpoint's content: a hash over a local folder's weights and configuration, or else the
    Hugging Face id with the commit that its revision is at now, for a branch moves.

    Raises:
        InputError: neither a folder, nor on the hub or, without network, in its cache.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{_commit(path, revision)}"
    digest = hashlib.sha256()
    for file in _content_files(folder):
        digest.update(file.name.encode())
        digest.update(bytes.fromhex(_recorded_hash(file) or file_hash(file)))
    return digest.hexdigest()[:16]


def _recorded_hash(file: Path) -> str | None:
    """The SHA-256 in the manifest of a finished stage, for hashing the weights of a 7B model takes a minute; None where
    there is none, or the file may be another one by now."""
    manifest = file.parent / MANIFEST_NAME
    try:
        entries = json.loads(manifest.read_text())["files"]
        entry = next(entry for entry in entries if entry["path"] == file.name)
        now = file.stat()
        same = now.st_size == entry["num_bytes"] and now.st_mtime_ns <= manifest.stat().st_mtime_ns
        return entry["sha256"] if same else None
    except (OSError, ValueError, KeyError, TypeError, StopIteration):  # none there, or somebody else's
        return None


def _commit(path: str, revision: str | None) -> str:
    """The commit of a model on the hub; the cache keeps each in a folder of that name."""
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["config.json"])).name
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: neither a folder nor a model on the hub: {_first_line(error)}") from error


def _content_files(folder: Path) -> Iterable[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix == WEIGHTS_SUFFIX or p.name == "config.json")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
