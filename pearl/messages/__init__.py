"""What crosses between the stages of a round. Every message is frozen; token ids are Python ints. Those of which each
request has one in every round are tuples, which are made three times as fast as frozen dataclasses.

Notation: a request has L committed tokens and k pending ones (drafted, not yet verified), at positions
[0, L) and [L, L + k). ``start`` is the position of a work item's first token.
"""

from pearl.messages.answers import DraftProposal, TargetOutput
from pearl.messages.device_windows import DeviceBranch, DeviceWindows, DrawnTokens
from pearl.messages.drafted import Drafted, Ranked, Windows
from pearl.messages.plan import (
    Branch,
    DraftPlan,
    DraftWork,
    ForwardWork,
    PromptRows,
    SchedulerOutput,
    SequenceState,
    TargetPlan,
    TargetStates,
    VerifyWork,
    branch_of,
)
from pearl.messages.timing import NOT_BUSY, Busy, Interval, Mark
from pearl.messages.verdict import Decision, FoundPrompt, PromptLogprobs, TokenLogprobs, VerifyResult

__all__ = [
    "NOT_BUSY",
    "Branch",
    "Busy",
    "Decision",
    "DeviceBranch",
    "DeviceWindows",
    "DraftPlan",
    "DraftProposal",
    "DraftWork",
    "Drafted",
    "DrawnTokens",
    "ForwardWork",
    "FoundPrompt",
    "Interval",
    "Mark",
    "PromptLogprobs",
    "PromptRows",
    "Ranked",
    "SchedulerOutput",
    "SequenceState",
    "TargetOutput",
    "TargetPlan",
    "TargetStates",
    "TokenLogprobs",
    "VerifyResult",
    "VerifyWork",
    "Windows",
    "branch_of",
]
