"""Save and restore a trial exactly: model, optimizer, step and random state, in Megatron's distributed format.

A checkpoint is written into a hidden folder, synced with the size and checksum of every file, and renamed when every
rank is done: one that has its name is whole, also after a power cut, and what a disk did to it later is found out.
Tensors are saved by their place in the whole model, so that any layout loads what another has written.
Megatron's own ``save`` starts a multiprocessing manager and forks a writer: 1.7 s for the smallest model, a fork of a
process with threads, and a hang when the writer dies. Here a thread writes. Read ``saving``, ``manifest``, ``state``.
"""

from models.checkpoint.background import Writer
from models.checkpoint.loading import load, load_weights
from models.checkpoint.manifest import CheckpointError, UntrustedCheckpoint
from models.checkpoint.saving import Saver

__all__ = ["CheckpointError", "Saver", "UntrustedCheckpoint", "Writer", "load", "load_weights"]
