"""What outlives a batch: networks, optimizers and tensors, by name, as they are saved and restored."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import Failure, Misuse


class Kept(dict[str, Any]):
    """Everything that `run.keep` was given."""

    def tensors(self) -> Iterator[Tensor]:
        """All of them, those inside networks and optimizers too."""
        for kept in self.values():
            if isinstance(kept, torch.optim.Optimizer):
                yield from (value for state in kept.state.values() for value in state.values() if isinstance(value, Tensor))
            else:
                yield from kept.state_dict().values() if isinstance(kept, nn.Module) else [kept]

    def buffers(self, *, without: str | None = None) -> list[Tensor]:
        """The networks' buffers, of one of them left out where it is named."""
        return [buffer for name, kept in self.items() if isinstance(kept, nn.Module) and name != without for buffer in kept.buffers()]

    def state(self) -> dict[str, Any]:
        """The saved form of all.

        Raises:
            Failure: a script wrote `memory = memory + ...`, and left here the old tensor, which nobody else holds.
        """
        alone = {"only": torch.zeros(0)}  # measured, because how many references Python itself holds is its own affair
        nobody = sys.getrefcount(alone["only"])
        for name in self:
            if sys.getrefcount(self[name]) <= nobody:
                raise Failure(f"{name!r} was given to run.keep and then rebound: update it in place, for example with copy_, "
                              "or a resumed run would start from the old one")
        return {name: state_of(kept) for name, kept in self.items()}

    def restore(self, saved: dict[str, Any], source: object) -> None:
        """Puts the saved form of all back, in place.

        Raises:
            Misuse: `source`, where it is from, belongs to another version of the script.
        """
        if saved.keys() != self.keys():
            raise Misuse(f"{source} keeps {', '.join(saved)}, this run keeps {', '.join(self)}: it is another version's; start again with --resume never")
        for name, kept in self.items():
            restore(kept, saved[name], name)


def state_of(kept: Any) -> Any:
    """The saved form of a network, an optimizer or a tensor."""
    return kept.detach() if isinstance(kept, Tensor) else kept.state_dict()


def restore(kept: Any, saved: Any, name: str) -> None:
    """Puts a saved form back, in place.

    Raises:
        Misuse: it does not fit.
    """
    try:
        if isinstance(kept, Tensor):
            if kept.shape != saved.shape or kept.dtype != saved.dtype:
                raise ValueError(f"{saved.dtype} {tuple(saved.shape)} saved, {kept.dtype} {tuple(kept.shape)} wanted")
            with torch.no_grad():
                kept.copy_(saved)
        elif isinstance(kept, torch.optim.Optimizer):
            here = [{key: group[key] for key in ("capturable", "fused", "foreach") if key in group} for group in kept.param_groups]
            groups = saved["param_groups"]
            groups = [before | how for before, how in zip(groups, here)] + groups[len(here):]  # how it steps is this machine's affair
            kept.load_state_dict(saved | {"param_groups": groups})
        else:
            kept.load_state_dict(saved)
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise Misuse(f"the saved {name!r} does not fit this run ({error}): start again with --resume never") from error
