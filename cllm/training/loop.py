"""The loop around the optimiser step: logging, validation, checkpoints, the end."""

from typing import Protocol

from cllm.training.session import Session
from cllm.training.trainer import StepLosses


class Reporter(Protocol):
    """What a training tells, and to whom it gives its checkpoints."""

    def note(self, losses: StepLosses) -> None:
        """After every step."""

    def validated(self, ar: float, second: float) -> None:
        """After a validation, with its losses."""

    def tell(self, text: str) -> None:
        """What the user should know."""

    def checkpoint(self) -> None:
        """Save one now; every worker is at this place."""


def run(session: Session, reporter: Reporter) -> None:
    """Train until the last step, or until validation stops improving. With early stopping the trainer is left with its
    best weights, otherwise with its last.

    The measure is the loss that is trained (`Trainer.validate`), both parts weighed as in training. A CLLM buys speed
    with likelihood: the AR loss alone would stop it as soon as it learns anything, and the consistency loss alone when
    all likelihood is lost. Their sum falls as long as the exchange is a gain at the recipe's own price, on prompts that
    are not trained on.
    """
    trainer, stopping = session.trainer, session.stopping
    steps, told = trainer.config.steps, False
    while trainer.step < steps and not (stopping and stopping.ended):
        reporter.note(trainer.train_step())
        if trainer.stream.num_too_long and not told:
            told = True
            reporter.tell(f"warning: documents of more than {trainer.config.row_tokens} tokens are left out")
        if session.is_validation_due:
            _validate(session, reporter)
        if trainer.step % trainer.config.checkpoint_every == 0 and trainer.step < steps:
            reporter.checkpoint()
    if stopping is not None:
        if trainer.step < steps:
            reporter.tell(f"no validation was better than that of step {stopping.best_step}: stopped")
        stopping.restore_best(trainer.objective)


def _validate(session: Session, reporter: Reporter) -> None:
    trainer = session.trainer
    ar, second = trainer.validate(session.validation)
    reporter.validated(ar, second)
    if session.stopping is not None:
        session.stopping.note(trainer.ar_weight * ar + second, trainer.step, trainer.objective)
