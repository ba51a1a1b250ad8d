"""One Megatron world for the whole test process: building it once is what keeps the model tests cheap."""

import os

import pytest

# Before torch is loaded anywhere: its threads and those of the ranks would fight over the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A single CPU rank. Gangs of several ranks are raised in processes of their own (``ranks.run``)."""
    from models.config import Layout
    from models.trainer import World

    folder = tmp_path_factory.mktemp("world")
    world = World.join(0, Layout(), "cpu", f"file://{folder}/meet")
    yield world
    world.leave()
