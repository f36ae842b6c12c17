"""Heads that draft from the target's hidden states: what their folders say, their weights, their forwards."""

from pearl.heads.config import (
    HEAD_NAMES,
    EagleConfig,
    HeadConfig,
    MedusaConfig,
    head_kind,
    lone_head,
    read_head,
    require_same,
)
from pearl.heads.eagle import EagleHead
from pearl.heads.loader import Head, load_head
from pearl.heads.medusa import MedusaHead

__all__ = [
    "HEAD_NAMES",
    "EagleConfig",
    "EagleHead",
    "Head",
    "HeadConfig",
    "MedusaConfig",
    "MedusaHead",
    "head_kind",
    "load_head",
    "lone_head",
    "read_head",
    "require_same",
]
