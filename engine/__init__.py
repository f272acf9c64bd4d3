"""Everything a training run needs that no paper prints in its algorithm box. See docs/engine.md."""
from collections.abc import Callable

from engine import distributed
from engine.config import Config, flag, numbers, step_size
from engine.errors import Failure, Misuse, one_sentence
from engine.run import Run

__all__ = ["Config", "Failure", "Misuse", "Run", "flag", "launch", "numbers", "step_size"]


def launch(main: Callable[[Config], None], config: type[Config], doc: str | None) -> None:
    """Runs a training script: parses the command line, and turns every error a user can meet into one sentence."""
    with distributed.leaving(), one_sentence():
        main(config.parse(doc))
