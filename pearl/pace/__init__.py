"""Pace: which mode of decoding a round runs, and how many tokens it drafts for each request."""

from pearl.pace.auto import AutoPace
from pearl.pace.curves import Sizes
from pearl.pace.policy import BalancedPace, FixedPace, PacePolicy, PreparingPace
from pearl.pace.rounds import Load, MeasuredRound, Pace, Progressed

__all__ = [
    "AutoPace",
    "BalancedPace",
    "FixedPace",
    "Load",
    "MeasuredRound",
    "Pace",
    "PacePolicy",
    "PreparingPace",
    "Progressed",
    "Sizes",
]
