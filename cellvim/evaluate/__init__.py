"""Evaluation of profiles: AnnData in, measures out, without torch. `evaluate_profiles` computes all of them."""

from cellvim.evaluate.evaluation import TASKS, Evaluation, evaluate_profiles

__all__ = ["TASKS", "Evaluation", "evaluate_profiles"]
