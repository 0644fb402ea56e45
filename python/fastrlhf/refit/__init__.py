"""REFIT: a trainer's live weights into a running engine: planned once, copied once, never half."""

from .catalogue import Builder, Catalogue, PlanError
from .plan import Plan, make_plan
from .session import Refit, Session, Target, Transfer
from .states import PeerLost, Poisoned, RefitError, StaleEpoch, State, Weights

__all__ = [
    "Builder",
    "Catalogue",
    "PeerLost",
    "Plan",
    "PlanError",
    "Poisoned",
    "Refit",
    "RefitError",
    "Session",
    "StaleEpoch",
    "State",
    "Target",
    "Transfer",
    "Weights",
    "make_plan",
]
