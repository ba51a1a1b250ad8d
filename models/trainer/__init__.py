"""One trial on one rank: build, loop, write. Runs under Ray, or by hand: ``torchrun -m models.trainer ATTEMPT_DIR``."""

from models.trainer.loop import train
from models.trainer.world import World

__all__ = ["World", "train"]
