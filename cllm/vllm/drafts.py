"""Whether a draft belongs to its target, read from configuration and tokenizer files before vLLM loads either."""

import json
from pathlib import Path
from typing import Any

from cllm.errors import InputError
from cllm.vllm.config import WITH_DRAFT, PeerConfig


def check_draft(config: PeerConfig) -> None:
    """Check the draft of methods that have one.

    Folders are checked; of names on the Hugging Face hub vLLM checks what it can.

    Raises:
        InputError: a draft is missing or superfluous, has another vocabulary or tokenizer than the target, or Medusa
            heads have another hidden size, or too few heads.
    """
    if (config.draft is not None) != (config.method in WITH_DRAFT):
        rule = "needs" if config.method in WITH_DRAFT else "takes no"
        raise InputError(f"draft: method {config.method} {rule} draft checkpoint")
    if config.draft is None:
        return
    target, draft = _read(config.model), _read(config.draft)
    if target is None or draft is None:
        return
    where = f"draft {config.draft}"
    if config.method == "draft_model":
        _check_equal(where, "vocab_size", draft, target)
        _check_tokenizers(Path(config.draft), Path(config.model))
    elif config.method == "medusa":
        _check_equal(where, "hidden_size", draft, target)
        _check_equal(where, "vocab_size", draft, target)
        heads = draft.get("medusa_num_heads", draft.get("num_heads"))
        if heads is not None and heads < config.guesses:
            raise InputError(f"{where}: {heads} Medusa heads cannot make guesses={config.guesses}")
    elif config.method == "eagle3":
        _check_equal(where, "hidden_size", draft, target, optional=True)


def _read(path: str) -> dict[str, Any] | None:
    """A checkpoint folder's configuration; None for what is no folder."""
    if not Path(path).is_dir():
        return None
    try:
        return json.loads((Path(path) / "config.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no config.json") from None
    except ValueError as error:
        raise InputError(f"{path}/config.json: not valid JSON ({error})") from error


def _check_equal(
    where: str, key: str, draft: dict[str, Any], target: dict[str, Any], *, optional: bool = False
) -> None:
    if optional and key not in draft:
        return
    if draft.get(key) != target.get(key):
        raise InputError(f"{where}: {key} is {draft.get(key)}, the target's is {target.get(key)}")


def _check_tokenizers(draft: Path, target: Path) -> None:
    """Equal vocabulary sizes do not make equal vocabularies."""
    ours, theirs = _vocabulary(draft), _vocabulary(target)
    if ours is not None and theirs is not None and ours != theirs:
        token = next(token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token))
        raise InputError(
            f"draft {draft}: another tokenizer than the target's: "
            f"{token!r} is {ours.get(token)}, there {theirs.get(token)}"
        )


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Token to id of a fast tokenizer; None where there is no such file."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((t[0], i) for i, t in enumerate(vocabulary))
    return dict(pairs) | {token["content"]: token["id"] for token in data.get("added_tokens", [])}
