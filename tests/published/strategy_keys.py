"""What the parameters of LAS-AT's published strategy network are called in ours: for comparisons with their code alone.

    theirs = ResNet18_Strategy(args)
    ours = models.StrategyNetwork({"method": 1, "epsilon": 13, "steps": 12, "alpha": 5})
    ours.load_state_dict(renamed(theirs.state_dict()))

With these actions in this order, beta last for LAS-TRADES, both draw the same random numbers: the same seed gives the
same initial weights, and sampling the heads in turn the same actions.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS = {
    "Attack_method": "method",  # one option: the attack is always the same
    "Attack_epsilon": "epsilon",
    "Attack_iters": "steps",
    "Attack_step_size": "alpha",
    "Attack_beta_size": "beta",
}


def renamed(state: Mapping[str, Any], heads: Mapping[str, str] = HEADS) -> dict[str, Any]:
    """Values by published parameter name (a state_dict, gradients, momentum) by our names, in the same order.

    heads: our action by the published name of its head. Those that are not in it are left out.
    """
    ours = {}
    for key, value in state.items():
        layer, _, parameter = key.partition(".")
        if layer in heads:
            ours[f"heads.{heads[layer]}.{parameter}"] = value
        elif layer not in HEADS:
            ours[key] = value
    return ours
