"""Everything a training run needs that no paper prints in its algorithm box. See docs/engine.md."""
import inspect
from collections.abc import Callable
from pathlib import Path

from engine import distributed
from engine.config import Config, flag, numbers, step_size
from engine.errors import Failure, Misuse, one_sentence
from engine.run import Run

__all__ = ["Config", "Failure", "Misuse", "Run", "flag", "launch", "numbers", "step_size"]


def launch(main: Callable[[Config], None], config: type[Config], doc: str | None) -> None:
    """Runs a training script: parses the command line, and turns every error a user can meet into one sentence.

    Raises:
        SystemExit: also where METHOD is still that of the script from which this one was copied: each would go on with the other's runs.
    """
    with distributed.leaving(), one_sentence():
        script, owner = Path(inspect.getfile(main)), f"train_{config.METHOD.replace('-', '_')}.py"
        if script.name != owner and script.with_name(owner).is_file():
            raise Misuse(f"METHOD = {config.METHOD!r} in {script.name} is the name of {owner}, whose runs it would go on with: give it one of its own")
        main(config.parse(doc))
