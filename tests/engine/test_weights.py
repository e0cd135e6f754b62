"""Checkpoints become models, and what is wrong with one is named.

Shapes: B rows, L tokens of a row, V vocabulary.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from cllm.engine.model import DecoderModel, Shard
from cllm.engine.weights import build_model, load_model, model_from_transformers, random_model, tensor_shapes
from cllm.errors import InputError
from tests.engine.paged import SIZES, full_logits, paged_logits, random_tokens, transformers_model
from tests.engine.test_model import assert_same_logits, logits_of_ranks

CPU = torch.device("cpu")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
}


def load(folder: Path) -> DecoderModel:
    return load_model(str(folder), torch.float32, CPU)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a Llama."""
    transformers_model(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several files."""
    transformers_model(LlamaConfig(**SIZES)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_comes_back(name: str, max_shard_size: str, tmp_path: Path) -> None:
    reference = transformers_model(CONFIGS[name]())
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (max_shard_size == "20KB")
    tokens_BL = random_tokens((2, 9), SIZES["vocab_size"])
    logits_BLV = paged_logits(load(tmp_path), tokens_BL)
    assert_same_logits(logits_BLV, full_logits(reference, tokens_BL))
    assert torch.equal(logits_BLV, paged_logits(model_from_transformers(reference), tokens_BL))


def test_two_ranks_load_their_parts(sharded: Path) -> None:
    tokens_BL = random_tokens((2, 9), SIZES["vocab_size"])
    ranks = logits_of_ranks(2, lambda **options: load_model(str(sharded), torch.float32, CPU, **options), tokens_BL)
    assert torch.equal(*ranks)
    assert_same_logits(ranks[0], paged_logits(load(sharded), tokens_BL))


class CountingSource:
    """Counts the elements read of each tensor."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.read_elements: dict[str, int] = {}

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        tensor = self.tensors[name][part]
        self.read_elements[name] = self.read_elements.get(name, 0) + tensor.numel()
        return tensor


def test_a_rank_reads_only_its_part_of_a_layer() -> None:
    reference = transformers_model(CONFIGS["llama"]())
    source = CountingSource(reference.state_dict())
    build_model(reference.config, source, torch.float32, CPU, shard=Shard(1, 2), all_reduce=lambda part: part)
    total = {name: tensor.numel() for name, tensor in source.tensors.items()}
    for name, elements in total.items():
        if name.endswith("_proj.weight"):
            assert source.read_elements[name] == elements // 2, name
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            assert name not in source.read_elements, name
    assert source.read_elements["lm_head.weight"] == total["lm_head.weight"]


def test_weights_are_cast(folder: Path) -> None:
    model = load_model(str(folder), torch.bfloat16, CPU)
    tensors = [model.weights.embedding_VE, model.weights.layers[0].qkv.weight_OI, model.weights.norm.weight]
    assert {tensor.dtype for tensor in tensors} == {model.dtype} == {torch.bfloat16}
    assert torch.equal(tensors[0], load(folder).weights.embedding_VE.bfloat16())


def test_tied_embeddings_are_one_tensor() -> None:
    model = model_from_transformers(transformers_model(CONFIGS["llama-tied"]()))
    assert model.weights.head.weight_OI is model.weights.embedding_VE


def test_a_copy_does_not_follow_the_training_of_its_origin() -> None:
    reference = transformers_model(CONFIGS["qwen2"]())
    model = model_from_transformers(reference)
    tokens_BL = random_tokens((1, 6), SIZES["vocab_size"])
    before_BLV = paged_logits(model, tokens_BL)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.zero_()
    assert torch.equal(paged_logits(model, tokens_BL), before_BLV)


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def test_what_follows_from_the_rest_may_stand_in_a_checkpoint(tmp_path: Path) -> None:
    reference = transformers_model(CONFIGS["llama-tied"]())
    reference.save_pretrained(tmp_path)
    extras = {"lm_head.weight": torch.zeros(40, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(extras))
    tokens_BL = random_tokens((1, 6), SIZES["vocab_size"])
    assert_same_logits(paged_logits(load(tmp_path), tokens_BL), full_logits(reference, tokens_BL))


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(f"{DOWN}.weight"), f"tensor {DOWN}.weight is missing"),
        (lambda tensors: tensors.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (lambda tensors: tensors.update({f"{DOWN}.bias": torch.ones(32)}), f"tensor {DOWN}.bias is not part"),
        (lambda tensors: tensors.update({"model.layers.3.x": torch.ones(1)}), "tensor model.layers.3.x is not part"),
        (
            lambda tensors: tensors.update({f"{DOWN}.weight": torch.ones(48, 32)}),
            rf"tensor {DOWN}.weight has shape \[48, 32\], the model needs \[32, 48\]",
        ),
        (
            lambda tensors: tensors.update({f"{DOWN}.weight": torch.ones(32, 48, dtype=torch.int8)}),
            f"tensor {DOWN}.weight is int8",
        ),
    ],
)
def test_wrong_tensors_are_named(edit: Callable[[dict[str, torch.Tensor]], object], message: str, folder: Path) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder}: ")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_damaged_file_is_named(size: int, folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:size])
    with pytest.raises(InputError, match=f"{SINGLE} cannot be read"):
        load(folder)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=f"{lost.name} cannot be read"):
        load(sharded)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"x": 1}}'])
def test_a_damaged_index_is_named(index: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(index)
    with pytest.raises(InputError, match=f"{INDEX} is not an index"):
        load(sharded)


@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors"])
def test_an_index_cannot_name_files_elsewhere(name: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(InputError, match="another folder"):
        load(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(first).items()))
    save_file(load_file(second) | dict([twice]), second)
    with pytest.raises(InputError, match=f"tensor {twice[0]} is in two files"):
        load(sharded)


def test_a_folder_without_weights_or_configuration_is_refused(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"has neither {SINGLE} nor {INDEX}"):
        load(folder)
    (folder / "pytorch_model.bin").rename(folder / SINGLE)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no usable config.json"):
        load(folder)


def test_an_unsupported_architecture_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    )
    with pytest.raises(InputError, match="GPT2LMHeadModel"):
        load(folder)


def test_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder nor a model on the hub"):
        load(tmp_path / "missing")


def test_random_models_differ_by_seed_alone() -> None:
    config = CONFIGS["qwen3"]()
    tokens_BL = random_tokens((2, 9), SIZES["vocab_size"])
    one, same, other = (paged_logits(random_model(config, torch.float32, CPU, seed), tokens_BL) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert one.isfinite().all()


def test_layers_of_a_random_model_differ() -> None:
    first, second, _ = random_model(CONFIGS["llama"](), torch.float32, CPU).weights.layers
    assert not torch.equal(first.qkv.weight_OI, second.qkv.weight_OI)
    assert first.qkv.weight_OI.std() == pytest.approx(0.02, rel=0.1)


def test_ranks_of_a_random_model_hold_parts_of_one() -> None:
    config = CONFIGS["llama"]()
    tokens_BL = random_tokens((2, 9), SIZES["vocab_size"])
    ranks = logits_of_ranks(2, lambda **options: random_model(config, torch.float32, CPU, **options), tokens_BL)
    assert_same_logits(ranks[0], paged_logits(random_model(config, torch.float32, CPU), tokens_BL))


@pytest.mark.parametrize("name", CONFIGS)
def test_expected_tensors_are_those_of_transformers(name: str) -> None:
    reference = transformers_model(CONFIGS[name]())
    shapes = {name: tuple(weight.shape) for name, weight in reference.named_parameters()}
    assert tensor_shapes(model_from_transformers(reference).shape) == shapes


def stored_bytes(tensor: torch.Tensor) -> int:
    """Memory of a tensor, or of the tensors that a subclass is made of."""
    if type(tensor) is torch.Tensor:
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(stored_bytes(getattr(tensor, name)) for name in names)


def matrix_bytes(model: DecoderModel) -> int:
    """Memory of all layers' matrices."""
    linears = [one for layer in model.weights.layers for one in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return sum(stored_bytes(linear.weight_OI) for linear in linears)


def test_int8_halves_the_memory_and_hardly_changes_logits() -> None:
    pytest.importorskip("torchao")
    config = LlamaConfig(**SIZES | {"hidden_size": 256, "intermediate_size": 384}, attention_bias=True)
    tokens_BL = random_tokens((2, 12), SIZES["vocab_size"])
    exact = random_model(config, torch.float32, CPU)
    rounded = random_model(config, torch.float32, CPU, quantization="int8")
    exact_BLV, rounded_BLV = paged_logits(exact, tokens_BL), paged_logits(rounded, tokens_BL)
    assert 0 < (rounded_BLV - exact_BLV).norm() / exact_BLV.norm() < 0.03
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded.weights.embedding_VE, exact.weights.embedding_VE)

    plain = random_model(config, torch.bfloat16, CPU)
    small = random_model(config, torch.bfloat16, CPU, quantization="int8")
    assert matrix_bytes(small) < 0.53 * matrix_bytes(plain)


def test_int8_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match="torchao"):
        random_model(LlamaConfig(**SIZES), torch.float32, CPU, quantization="int8")
