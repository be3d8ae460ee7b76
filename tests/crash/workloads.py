"""What is done to volumes: steps of a world, in an order, some of them chosen by the world's seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.crash.world import World


@dataclass(frozen=True)
class Workload:
    """Steps by name, of one line each."""

    name: str
    steps: str
    chosen: int = 0
    """So many more, chosen by chance out of those that there are."""
    windowed: bool = False

    def run(self, world: World) -> None:
        steps = self.steps.split()
        for step in steps:
            world.do(step)
        choices = ANY_WINDOWED if self.windowed else ANY
        for step in world.rng.choices(choices.split(), k=self.chosen):
            world.do(step)


ANY: Final = (
    "write write write write discard flush flush mark sync sync snapshot snapshot drop thin pin unpin rename warm "
    "clone clone_write clone_write clone_flush clone_drop resync restart kill"
)
ANY_WINDOWED: Final = (
    "window window window window settle settle abandoned named_window sync sync snapshot drop thin warm "
    "clone clone_write clone_flush clone_drop restart kill"
)
WORKLOADS: Final = (
    Workload("copy", "write flush write copy write flush"),
    Workload(
        "journal", "copy write write discard flush write write mark write flush write discard write restart write"
    ),
    Workload("syncs", "copy write write flush sync write write discard flush sync write flush sync write sync"),
    Workload("snapshots", "copy write flush snapshot write flush snapshot write sync drop write flush sync drop write"),
    Workload(
        "thinning",
        "copy write flush sync write flush sync write flush snapshot write flush sync pin thin write sync thin",
    ),
    Workload("pins", "copy write flush snapshot pin write flush sync unpin drop snapshot pin restart unpin thin"),
    Workload(
        "names",
        "copy write flush snapshot rename pin write flush sync rename rename drop restart rename thin warm",
    ),
    Workload(
        "clones",
        "copy write flush clone clone_write clone_flush write clone_write flush sync clone clone_write clone_flush "
        "clone_drop drop clone_drop",
    ),
    Workload(
        "indexes",
        "copy write write write write flush warm snapshot write write write flush sync warm write write write flush "
        "sync warm drop kill warm write write sync restart warm thin warm",
    ),
    Workload("resync", "copy write flush resync write flush sync resync write flush"),
    Workload("marks", "copy mark write mark write flush mark mark sync write mark sync mark"),
    Workload(
        "roll",
        "copy write write write write write flush write write write write sync write write flush kill write sync",
    ),
    Workload(
        "windows",
        "window copy window settle window abandoned window settle sync window named_window sync",
        windowed=True,
    ),
    Workload(
        "rotation",
        "copy window window window settle window abandoned abandoned window sync settle sync kill window restart "
        "window sync",
        windowed=True,
    ),
    Workload("mixed", "write copy", chosen=16),
    Workload("mixed windows", "window copy", chosen=16, windowed=True),
)


def workload_named(name: str) -> Workload:
    return next(one for one in WORKLOADS if one.name == name)
