"""One Megatron world for the whole test process: building it once is what keeps the model tests cheap."""

import os
import tempfile

import pytest

# Before torch is loaded anywhere: its threads and those of the ranks would fight over the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Also before Ray starts: its workers have the environment that it began with. The user's own key is left alone.
_KEY_FOLDER = tempfile.TemporaryDirectory(prefix="gatesweep-key")
os.environ["GATESWEEP_KEY_FILE"] = f"{_KEY_FOLDER.name}/key"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A single CPU rank. Gangs of several ranks are raised in processes of their own (``ranks.run``)."""
    from models.config import Layout
    from models.trainer import World

    folder = tmp_path_factory.mktemp("world")
    world = World.join(0, Layout(), "cpu", f"file://{folder}/meet")
    yield world
    world.leave()
