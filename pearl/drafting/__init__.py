"""Drafters: what proposes the tokens that the target verifies."""

from pearl.drafting.drafter import Drafter
from pearl.drafting.eagle_drafter import EagleDrafter
from pearl.drafting.medusa_drafter import MedusaDrafter
from pearl.drafting.model_drafter import ModelDrafter
from pearl.drafting.ngram_drafter import NGramDrafter

__all__ = ["Drafter", "EagleDrafter", "MedusaDrafter", "ModelDrafter", "NGramDrafter"]
