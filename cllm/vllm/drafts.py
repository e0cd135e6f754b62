"""Whether a draft belongs to its target, told by configurations and tokenizers before vLLM loads either."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from cllm.errors import InputError
from cllm.models import load_tokenizer, vocabulary_size
from cllm.vllm.config import WITH_DRAFT, PeerConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def check_draft(config: PeerConfig) -> None:
    """Check the draft of methods that have one, be it a folder or a name on the Hugging Face hub.

    Raises:
        InputError: a draft is missing, superfluous or unreadable, has another vocabulary or tokenizer than the target,
            or heads have another hidden size, or are too few.
    """
    if (config.draft is not None) != (config.method in WITH_DRAFT):
        rule = "needs" if config.method in WITH_DRAFT else "takes no"
        raise InputError(f"draft: method {config.method} {rule} draft checkpoint")
    if config.draft is None:
        return
    where = f"draft {config.draft}"
    if config.method == "draft_model":
        _check_equal(where, "vocab_size", vocabulary_size(config.draft), vocabulary_size(config.model))
        _check_tokenizers(where, config.draft, config.model)
        return
    heads, target = _read(config.draft), _read(config.model)
    if config.method == "medusa":
        for key in ("hidden_size", "vocab_size"):  # heads in their authors' format state neither
            _check_equal(where, key, heads.get(key), target.get(key))
        count = heads.get("medusa_num_heads", heads.get("num_heads"))
        if count is not None and count < config.guesses:
            raise InputError(f"{where}: {count} Medusa heads cannot make guesses={config.guesses}")
    else:
        key = "target_hidden_size" if "target_hidden_size" in heads else "hidden_size"
        _check_equal(where, key, heads.get(key), target.get("hidden_size"))


def _read(path: str) -> dict[str, Any]:
    """A checkpoint's configuration as it is written; formats of heads are not among those that transformers knows."""
    try:
        data, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no usable model configuration: {str(error).splitlines()[0]}") from error
    return data


def _check_equal(where: str, key: str, draft: int | None, target: int | None) -> None:
    """What one of them does not state is not compared."""
    if draft is not None and target is not None and draft != target:
        raise InputError(f"{where}: {key} is {draft}, the target's is {target}")


def _check_tokenizers(where: str, draft: str, target: str) -> None:
    """Equal vocabulary sizes do not make equal vocabularies."""
    if not (_has_tokenizer(draft) and _has_tokenizer(target)):
        return
    ours, theirs = load_tokenizer(draft).get_vocab(), load_tokenizer(target).get_vocab()
    if ours != theirs:
        token = next(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
        raise InputError(
            f"{where}: another tokenizer than the target's: {token!r} is {ours.get(token)}, there {theirs.get(token)}"
        )


def _has_tokenizer(path: str) -> bool:
    """A folder may hold a model alone, for requests of tokens."""
    folder = Path(path)
    return not folder.is_dir() or any((folder / name).exists() for name in _TOKENIZER_FILES)
