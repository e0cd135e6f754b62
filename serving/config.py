"""What an application serves: models, their engines and replicas, keys and limits."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from cllm.config import Config
from cllm.engine.config import EngineConfig
from cllm.errors import InputError
from cllm.models import Precision
from cllm.vllm.config import PeerOptions

PositiveInt = Annotated[int, Field(ge=1)]


class Autoscaling(Config):
    """Between `min_replicas` and `max_replicas`, so that each has about `target_ongoing` requests."""

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)
    target_ongoing: float = Field(16, gt=0)
    upscale_delay_s: float = Field(10, ge=0)
    downscale_delay_s: float = Field(300, ge=0)

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        return self


def _kind_of_replicas(value: object) -> str:
    """Tells which of the two is meant, so that an error speaks of that one alone."""
    return "between" if isinstance(value, dict | Autoscaling) else "number"


Replicas = Annotated[
    Annotated[PositiveInt, Tag("number")] | Annotated[Autoscaling, Tag("between")], Discriminator(_kind_of_replicas)
]


class Model(Config):
    """A model and its replicas: what all kinds of engines have in common."""

    path: str  # local folder, the same on every node, or Hugging Face id
    revision: str | None = None
    options: EngineConfig | PeerOptions
    replicas: Replicas = 1
    gpus: int = Field(0, ge=0, le=8)  # of one replica, all on one node; the model is divided among them
    shards: PositiveInt | None = None  # processes that the model is divided among; None: one a GPU
    cpus: float = Field(1, ge=0)
    max_ongoing: int | None = Field(None, ge=1)  # requests in one replica; None: a few more than decode together
    max_queue: int = Field(256, ge=1)  # requests that wait for a replica, per ingress; more are refused
    routing: Literal["balanced", "prefix"] = "balanced"  # prefix: prompts that begin alike go to the same replica
    messages_per_s: float = Field(1000, gt=0)  # of one replica, all its streams together: more streams, larger chunks
    stall_s: float = Field(60, gt=0)  # an engine whose steps stand still for longer is restarted
    start_s: float = Field(1800, gt=0)  # loading the model takes at most this long
    drain_s: float = Field(300, ge=0)  # a replica that is replaced may finish its requests for so long

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        if self.gpus and self.shards not in (None, self.gpus):
            raise ValueError(f"shards={self.shards} does not fit gpus={self.gpus}: on GPUs each has one")
        return self

    @property
    def world(self) -> int:
        """Processes that the model is divided among."""
        return self.shards or max(1, self.gpus)

    @property
    def ongoing(self) -> int:
        """Requests in one replica: a freed row is to have its next request at hand."""
        return self.max_ongoing or self.options.max_rows + max(1, self.options.max_rows // 8)

    @property
    def fewest_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas.min_replicas

    @property
    def most_replicas(self) -> int:
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max_replicas


class CllmModel(Model):
    """Our own engine; with `options.window` 1 it decodes AR."""

    engine: Literal["cllm"]
    options: EngineConfig = EngineConfig()
    precision: Precision = "auto"
    quantization: Literal["none", "int8"] = "none"


class VllmModel(Model):
    """vLLM, by the method that `options` name: AR, one of its speculative methods, or Jacobi decoding inside it."""

    engine: Literal["vllm"]
    options: PeerOptions
    engine_args: dict[str, Any] = Field(default_factory=dict)  # vLLM's own; they take precedence over the options


AnyModel = Annotated[CllmModel | VllmModel, Field(discriminator="engine")]


class Limits(Config):
    """Of one request."""

    body_bytes: int = Field(1 << 20, ge=1)
    body_s: float = Field(30, gt=0)  # for the whole body to arrive
    choices: int = Field(16, ge=1)  # prompts times n
    new_tokens: int | None = Field(None, ge=1)  # None: what the engine's context allows


class Keys(Config):
    """Who may ask, and how often. Limits hold per key and ingress replica.

    Attributes:
        file: JSON, name -> key, read by every ingress replica.
        env: name of an environment variable with keys between commas.
    """

    file: str | None = None
    env: str | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    concurrent: int | None = Field(None, ge=1)


class Ingress(Config):
    """The deployment that speaks HTTP."""

    replicas: int = Field(1, ge=1)
    cpus: float = Field(0.5, ge=0)
    connections: int = Field(2000, ge=1)  # requests that one ingress replica handles at a time
    attempts: int = Field(5, ge=1)  # replicas tried in a row that die without giving a token
    resume_s: float = Field(60, ge=0)  # a response that lost its replica waits so long for room in another one
    retry_after_s: int = Field(1, ge=1)  # told to a client that is refused


class AppConfig(Config):
    """A Serve application. `keys` None: anybody may ask."""

    models: dict[Annotated[str, Field(min_length=1)], AnyModel] = Field(min_length=1)
    keys: Keys | None = None
    limits: Limits = Limits()
    ingress: Ingress = Ingress()
    wait_for_gpus: bool = False  # an autoscaling cluster starts its GPU nodes only when they are asked for

    def check_fits(self, available: dict[str, float], largest_node: float | None = None) -> None:
        """Refuse at once what Serve would wait for without end.

        Args:
            available: resources of the whole cluster.
            largest_node: GPUs of the node that has most; None: not known.

        Raises:
            InputError: the replicas need more GPUs than the cluster has, or one replica more than any node.
        """
        needed = sum(model.gpus * model.fewest_replicas for model in self.models.values())
        present = available.get("GPU", 0)
        if needed > present and not self.wait_for_gpus:
            asked = ", ".join(f"{name} {m.gpus} x {m.fewest_replicas}" for name, m in self.models.items() if m.gpus)
            raise InputError(f"models: the replicas need {needed} GPUs ({asked}), the cluster has {present:g}")
        for name, model in self.models.items():
            if largest_node is not None and model.gpus > largest_node and not self.wait_for_gpus:
                raise InputError(
                    f"models.{name}: a replica needs {model.gpus} GPUs of one node, none has more than {largest_node:g}"
                )
