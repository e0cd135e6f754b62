"""Weights for the engine's model: from a Hugging Face checkpoint, from a transformers model, or random.

All three are sources of named tensors, and one function builds the model from a source. It reads of each tensor only
what its rank needs, one tensor at a time, so loading takes little more memory than the model.

Shapes: O outputs and I inputs of a linear layer.
"""

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from cllm.engine.attention import Attention, TorchAttention
from cllm.engine.model import AllReduce, DecoderModel, Layer, ModelShape, Shard, Weights
from cllm.engine.ops import Linear, Norm, Ops, TorchOps
from cllm.errors import InputError

Quantization = Literal["none", "int8"]
"""int8: the layers' matrices are stored as int8 with one scale an output (symmetric); embedding and head stay whole."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class ModelOptions(TypedDict, total=False):
    """Optional arguments of all functions that make a model.

    Attributes:
        ops: default: plain torch.
        attention: default: plain torch.
        quantization: of the weights; default: none.
        max_positions: longest context that will be used; default: the model's.
        shard: this process's part of the model; default: all of it.
        all_reduce: sum over the ranks; needed where there are several.
    """

    ops: Ops
    attention: Attention
    quantization: Quantization
    max_positions: int | None
    shard: Shard
    all_reduce: AllReduce | None


class TensorSource(Protocol):
    """Tensors by the names that transformers gives them."""

    def names(self) -> Iterable[str]:
        """All names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; `name` is one of `names`."""

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor, on any device and in any dtype; it may share memory with the source."""


def load_model(
    path: str, dtype: torch.dtype, device: torch.device, *, revision: str | None = None, **options: Unpack[ModelOptions]
) -> DecoderModel:
    """The model of a local folder or Hugging Face id, in safetensors.

    Raises:
        InputError: no such checkpoint, an unsupported architecture, a shard that does not divide the model, or a file
            or tensor that is missing, damaged, of the wrong shape or not the model's.
    """
    folder = _folder(path, revision)
    try:
        with _open_files(folder) as source:
            return build_model(_config(folder), source, dtype, device, **options)
    except (InputError, SafetensorError) as error:
        raise InputError(f"{path}: {error}") from error


def model_from_transformers(model: PreTrainedModel, **options: Unpack[ModelOptions]) -> DecoderModel:
    """A copy of a transformers model, with its dtype and on its device.

    Raises:
        InputError: an unsupported architecture.
    """
    return build_model(model.config, _StateSource(model.state_dict()), model.dtype, model.device, **options)


def random_model(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0, **options: Unpack[ModelOptions]
) -> DecoderModel:
    """A model with random weights, drawn on `device`. The ranks of one seed hold parts of one model.

    Raises:
        InputError: an unsupported architecture.
    """
    shapes = tensor_shapes(ModelShape.of(config, options.get("max_positions")))
    source = _RandomSource(shapes, config.initializer_range, dtype, device, seed)
    return build_model(config, source, dtype, device, **options)


def build_model(
    config: PretrainedConfig,
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device,
    **options: Unpack[ModelOptions],
) -> DecoderModel:
    """The model of a configuration with the tensors of a source, cast to `dtype`, on `device`.

    Raises:
        InputError: an unsupported architecture; a tensor that is missing, of the wrong shape or unknown, named.
    """
    shape = ModelShape.of(config, options.get("max_positions"))
    shard = options.get("shard", Shard())
    shard.check_divides(shape)
    _check_tensors(tensor_shapes(shape), source)
    reader = _Reader(source, shard, dtype, device, options.get("quantization", "none"))
    return DecoderModel(
        shape,
        _weights(shape, reader),
        ops=options.get("ops") or TorchOps(),
        attention=options.get("attention") or TorchAttention(),
        shard=shard,
        all_reduce=options.get("all_reduce"),
    )


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (shape.vocab_size, shape.hidden_size)}
    for index in range(shape.num_layers):
        shapes |= {f"model.layers.{index}.{name}": size for name, size in _layer_shapes(shape).items()}
    shapes[_NORM] = (shape.hidden_size,)
    if not shape.tied_embeddings:
        shapes[_HEAD] = (shape.vocab_size, shape.hidden_size)
    return shapes


def _layer_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_queries * shape.head_size, shape.num_kv * shape.head_size
    linears = {
        "self_attn.q_proj": (queries, hidden, shape.qkv_bias),
        "self_attn.k_proj": (keys, hidden, shape.qkv_bias),
        "self_attn.v_proj": (keys, hidden, shape.qkv_bias),
        "self_attn.o_proj": (hidden, queries, shape.output_bias),
        "mlp.gate_proj": (inner, hidden, shape.mlp_bias),
        "mlp.up_proj": (inner, hidden, shape.mlp_bias),
        "mlp.down_proj": (hidden, inner, shape.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if shape.head_norms:
        norms |= {"self_attn.q_norm": shape.head_size, "self_attn.k_norm": shape.head_size}
    return {
        **{f"{name}.weight": (rows, columns) for name, (rows, columns, _) in linears.items()},
        **{f"{name}.bias": (rows,) for name, (rows, _, bias) in linears.items() if bias},
        **{f"{name}.weight": (size,) for name, size in norms.items()},
    }


def _check_tensors(expected: Mapping[str, tuple[int, ...]], source: TensorSource) -> None:
    found = set(source.names())
    for name, size in expected.items():
        if name not in found:
            raise InputError(f"tensor {name} is missing")
        if source.shape(name) != size:
            raise InputError(f"tensor {name} has shape {list(source.shape(name))}, the model needs {list(size)}")
    unknown = sorted(name for name in found - expected.keys() if not _is_harmless(name))
    if unknown:
        raise InputError(f"tensor {unknown[0]} is not part of the model ({len(unknown)} such in all)")


def _is_harmless(name: str) -> bool:
    """Follows from the configuration or another tensor. A head is among the unknown only where embeddings are tied."""
    return name == _HEAD or name.endswith("rotary_emb.inv_freq")


class _Reader:
    """Reads one rank's parts of tensors."""

    def __init__(
        self, source: TensorSource, shard: Shard, dtype: torch.dtype, device: torch.device, quantization: Quantization
    ) -> None:
        self.source = source
        self.shard = shard
        self.dtype = dtype
        self.device = device
        self.quantization = quantization

    def whole(self, name: str) -> torch.Tensor:
        return self._read(name, ())

    def share(self, name: str, dim: int) -> torch.Tensor:
        """This rank's part along a dimension."""
        size = self.source.shape(name)[dim] // self.shard.world
        own = slice(self.shard.rank * size, (self.shard.rank + 1) * size)
        return self._read(name, (slice(None),) * dim + (own,))

    def norm(self, name: str, eps: float) -> Norm:
        return Norm(self.whole(f"{name}.weight"), eps)

    def divided_outputs(self, names: Iterable[str], bias: bool) -> Linear:
        """Layers over the same input, stacked; each rank computes a part of every layer's outputs."""
        weight_OI = torch.cat([self.share(f"{name}.weight", 0) for name in names])
        bias_O = torch.cat([self.share(f"{name}.bias", 0) for name in names]) if bias else None
        return self._linear(weight_OI, bias_O)

    def divided_inputs(self, name: str, bias: bool) -> Linear:
        """A layer whose outputs are sums over the ranks: rank 0 alone adds the bias."""
        bias_O = self.whole(f"{name}.bias") if bias and self.shard.rank == 0 else None
        return self._linear(self.share(f"{name}.weight", 1), bias_O)

    def _linear(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Linear:
        return Linear(_to_int8(weight_OI) if self.quantization == "int8" else weight_OI, bias_O)

    def _read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        tensor = self.source.read(name, part)
        if tensor.dtype not in _FLOATS:
            raise InputError(f"tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point")
        # a copy even where nothing changes: the model must not follow another model's training or a mapped file
        return tensor.to(self.device, self.dtype, copy=True).contiguous()


def _weights(shape: ModelShape, reader: _Reader) -> Weights:
    embedding_VE = reader.whole(_EMBEDDING)
    return Weights(
        embedding_VE=embedding_VE,
        layers=tuple(_layer(shape, reader, f"model.layers.{index}") for index in range(shape.num_layers)),
        norm=Norm(reader.whole(_NORM), shape.norm_eps),
        head=Linear(embedding_VE if shape.tied_embeddings else reader.whole(_HEAD)),
    )


def _layer(shape: ModelShape, reader: _Reader, prefix: str) -> Layer:
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return Layer(
        attention_norm=reader.norm(f"{prefix}.input_layernorm", shape.norm_eps),
        qkv=reader.divided_outputs([f"{attention}.{part}_proj" for part in "qkv"], shape.qkv_bias),
        heads=replace(
            reader.shard.heads(shape),
            query_norm=reader.norm(f"{attention}.q_norm", shape.norm_eps) if shape.head_norms else None,
            key_norm=reader.norm(f"{attention}.k_norm", shape.norm_eps) if shape.head_norms else None,
        ),
        output=reader.divided_inputs(f"{attention}.o_proj", shape.output_bias),
        mlp_norm=reader.norm(f"{prefix}.post_attention_layernorm", shape.norm_eps),
        gate_up=reader.divided_outputs([f"{mlp}.gate_proj", f"{mlp}.up_proj"], shape.mlp_bias),
        down=reader.divided_inputs(f"{mlp}.down_proj", shape.mlp_bias),
    )


def _to_int8(weight_OI: torch.Tensor) -> torch.Tensor:
    """A tensor that stores int8 and multiplies as `weight_OI` would, nearly; torch's linear function knows it."""
    try:
        torchao = importlib.import_module("torchao.quantization")  # optional, and has no types
    except ImportError as error:
        raise InputError("quantization int8 needs the package torchao") from error
    holder = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
    holder.weight = torch.nn.Parameter(weight_OI, requires_grad=False)
    torchao.quantize_(holder, torchao.Int8WeightOnlyConfig())
    return holder.weight.detach()


class _StateSource:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        return self.tensors[name][part]


class _RandomSource:
    """Normal matrices and biases, and norms of ones."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], std: float, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self.shapes = shapes
        self.std = std
        self.dtype = dtype
        self.device = device
        self.seed = seed

    def names(self) -> Iterable[str]:
        return self.shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtype, device=self.device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1)[part]
        # a seed per tensor, and the whole tensor drawn, so that no rank's numbers depend on what it reads
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
        return tensor.normal_(0, self.std, generator=generator)[part]


class _FileSource:
    """Tensors of opened safetensors files, by name."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.files = files

    def names(self) -> Iterable[str]:
        return self.files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        return self.files[name].get_slice(name)[part or slice(None)]


@contextmanager
def _open_files(folder: Path) -> Iterator[_FileSource]:
    files: dict[str, Any] = {}
    with ExitStack() as stack:
        for path in _weight_files(folder):
            opened = stack.enter_context(_open_file(path))
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in files:
                    raise InputError(f"tensor {name} is in two files, one of them {path.name}")
                files[name] = opened
        yield _FileSource(files)


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path.name} cannot be read: {_first_line(error)}") from error


def _weight_files(folder: Path) -> list[Path]:
    """One file, or those that an index names. Like transformers, the one file wins where a folder has both."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"has neither {single.name} nor {index.name}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index.name} is not an index of safetensors files: {_first_line(error)}") from error
    outside = next((file for file in files if file.parent != folder), None)
    if outside is not None:
        raise InputError(f"{index.name} names a file of another folder: {outside}")
    return files


def _folder(path: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        # other files of a repository may hold the same weights once more
        return Path(
            snapshot_download(
                path,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json"],
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: neither a folder nor a model on the hub: {_first_line(error)}") from error


def _config(folder: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds
        raise InputError(f"no usable config.json: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
