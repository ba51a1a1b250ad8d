"""One trial on one rank: build, train, write. Runs under Ray, or by hand: ``torchrun -m models.trainer DIR``."""

from models.trainer.attempt import start, train
from models.trainer.world import World

__all__ = ["World", "start", "train"]
