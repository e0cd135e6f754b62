"""What rented machines cost: published prices, each with its source and the day it was read. They change."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cllm.errors import InputError

_AWS = "AWS price list, on demand, us-east-1 (github.com/datareceipts/data-receipts, 109-gpu-pricing)"
_GCP = "Google Cloud price list, on demand, us-central1 (github.com/Cyclenerd/google-cloud-pricing-cost-calculator)"


@dataclass(frozen=True, slots=True)
class Price:
    """One machine.

    Attributes:
        instance: the cloud's name for it.
        gpu: what the names of its GPUs contain, as the driver tells them; None: it has none.
        gpus: how many.
        dollars_per_hour: of the whole machine, whether or not all its GPUs work.
        source: who says so.
        date: when (ISO 8601).
    """

    instance: str
    gpu: str | None
    gpus: int
    dollars_per_hour: float
    source: str
    date: str

    @property
    def devices(self) -> int:
        """What a speed is counted for: GPUs, or the machine itself if it has none."""
        return max(1, self.gpus)


PRICES: Mapping[str, Price] = MappingProxyType(
    {
        price.instance: price
        for price in (
            Price("p4d.24xlarge", "A100", 8, 21.957642, _AWS, "2026-11-09"),  # 40 GB a GPU
            Price("p4de.24xlarge", "A100", 8, 27.44705, _AWS, "2026-11-09"),  # 80 GB a GPU
            Price("p5.48xlarge", "H100", 8, 55.04, _AWS, "2026-11-09"),
            Price("a2-highgpu-8g", "A100", 8, 29.38708, _GCP, "2025-03-06"),  # 8 times a2-highgpu-1g
        )
    }
)


def price_of(instance: str) -> Price:
    """The price of `instance` in `PRICES`.

    Raises:
        InputError: it is not there; the known ones are listed.
    """
    if instance not in PRICES:
        raise InputError(
            f"--instance {instance}: no price known; known are {', '.join(PRICES)}; "
            "for another one give --dollars-per-hour, --gpu and --gpus-per-instance"
        )
    return PRICES[instance]
