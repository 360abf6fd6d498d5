"""Who writes the shards of a plan: threads of this process, or the nodes of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nxdi_expertscale.checkpoint.parallel import Meter
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.write.destination import Destination
from nxdi_expertscale.checkpoint.write.plan import ShardPlan
from nxdi_expertscale.checkpoint.write.provenance import SourceFile
from nxdi_expertscale.checkpoint.write.staging import ShardRecord, Staging


@dataclass(frozen=True)
class Run:
    """What a run reads, and where it writes.

    Attributes:
        source: What is read.
        files: Its files as they were when the run began, by name.
        destination: What is written to.
        staging: Its hidden folder, which this process alone has.
        meter: Counts the bytes of the source.
    """

    source: Model
    files: Mapping[str, SourceFile]
    destination: Destination
    staging: Staging
    meter: Meter


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to be written; all that it takes beside the source's files.

    Attributes:
        plan: What is written.
        identities: What the file system said of each file of the source that it is made from.
    """

    plan: ShardPlan
    identities: dict[str, str]


class Executor(Protocol):
    """Writes shards."""

    def write(
        self, run: Run, tasks: Sequence[ShardTask], finish: Callable[[ShardRecord], None]
    ) -> None:
        """Write shards to the hidden folder.

        Args:
            run: What is read, and where it is written.
            tasks: The shards.
            finish: Called with the record of each shard that is there, one at a time.

        Raises:
            CheckpointError: The source or the destination is not as it has to be.
            OSError: Reading or writing failed.
        """
