"""Pruning: which weights go, when, and what is left of the model."""

from classical.pruning.lottery import Ticket, find_ticket
from classical.pruning.magnitude import gradient_scores, prune
from classical.pruning.masks import Sparsity, finalize, keep_zeros, sparsity
from classical.pruning.psp import StructureScale, StructureSGD, add_structures, structure_parameters
from classical.pruning.schedules import CubicSchedule, MagnitudePruner
from classical.pruning.shrink import ShrinkPlan, shrink, shrink_plan

__all__ = [
    "CubicSchedule",
    "MagnitudePruner",
    "ShrinkPlan",
    "Sparsity",
    "StructureSGD",
    "StructureScale",
    "Ticket",
    "add_structures",
    "finalize",
    "find_ticket",
    "gradient_scores",
    "keep_zeros",
    "prune",
    "shrink",
    "shrink_plan",
    "sparsity",
    "structure_parameters",
]
