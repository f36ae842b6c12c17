"""What decoding methods are expected to bring, before anything is run."""

from pearl.planning.forecast import Costs, Forecast, forecast
from pearl.planning.hardware import GPUS, Gpu, costs_on

__all__ = ["GPUS", "Costs", "Forecast", "Gpu", "costs_on", "forecast"]
