"""What an ablation's outcomes are called and how they are written; which settings matter, in sentences."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cllm.ablation.document import Outcome
from cllm.ablation.effects import Effects


@dataclass(frozen=True, slots=True)
class Shown:
    """An outcome in tables: its name, its unit (a figure is multiplied by it), and the format of an effect on it."""

    name: str
    unit: float
    form: str

    def effect(self, value: float) -> str:
        return f"{self.unit * value:{self.form}}"

    def level(self, value: float) -> str:
        """The outcome itself: without the sign of a difference."""
        return f"{self.unit * value:{self.form.removeprefix('+z')}}"


OUTCOMES: Mapping[Outcome, Shown] = MappingProxyType(
    {
        "tpf": Shown("tokens/forward", 1, "+z.2f"),
        "speedup": Shown("× AR", 1, "+z.2f"),
        "accuracy": Shown("accuracy, points", 100, "+z.1f"),
        "reference_perplexity": Shown("perplexity of references, ×", 1, ".2f"),
    }
)


def sentences(effects: Mapping[Outcome, Effects]) -> list[str]:
    """For each outcome the levels that change it beyond noise, the strongest first."""
    return [f"{OUTCOMES[outcome].name}: {_beyond_noise(outcome, fitted)}" for outcome, fitted in effects.items()]


def _beyond_noise(outcome: Outcome, fitted: Effects) -> str:
    if any(effect.low is None for effect in fitted.effects):
        return "no intervals, for there are no more students than levels"
    strong = sorted((e for e in fitted.effects if e.matters), key=lambda e: -abs(e.value - e.neutral))
    named = [f"{effect.factor}={effect.level} ({OUTCOMES[outcome].effect(effect.value)})" for effect in strong]
    return ", ".join(named) or "no level differs from the centre beyond noise"
