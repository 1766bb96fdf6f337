"""Evaluation: AnnData in, figures out; never torch. `evaluate_profiles` does all of it."""

from cellvim.evaluate.evaluation import TASKS, Evaluation, evaluate_profiles

__all__ = ["TASKS", "Evaluation", "evaluate_profiles"]
