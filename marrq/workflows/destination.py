"""Where `marrq quantize` writes an artifact, and what it may find there.

Nothing here imports torch unless an unfinished run is found, so that a mistake is told at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from marrq.errors import MarrqError
from marrq.methods.spec import MethodSpec
from marrq.outputs import Inputs, check_output, check_place, no_artifact
from marrq.schemes import Scheme


@dataclass(frozen=True)
class Destination:
    """Where an artifact is written, and what may be found there.

    overwrite: replace an artifact, and forget an unfinished run.
    resume: go on with an unfinished run; do nothing if the artifact is complete.
    work_dir: folder for memory-mapped tokens and for the checkpoint; None: tokens stay in memory,
    and the checkpoint lies beside the artifact.
    inputs: what the run reads, which must not meet the artifact.
    """

    folder: Path
    overwrite: bool = False
    resume: bool = False
    work_dir: Path | None = None
    inputs: Inputs = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """The folder of the blocks that are done."""
        parent = self.folder.parent if self.work_dir is None else self.work_dir
        return parent / f".{self.folder.name}.checkpoint"

    def check(self, scheme: Scheme, method: MethodSpec, samples: int | None, seed: int) -> None:
        """Raise MarrqError if a new run would replace what may not be replaced, or if an artifact
        can have no place there.

        scheme, method, samples, seed: of the new run; they tell whether it could go on with an
        unfinished one. samples: None for the default number, which the images decide.
        """
        # With `resume`, what may be there depends on the settings, which is_complete is told.
        if self.resume:
            check_place(self.folder, self.inputs)
            return
        check_output(self.folder, self.overwrite, no_artifact, self.inputs)
        # The module that knows checkpoints imports torch; most of the time there is none.
        if self.checkpoint.exists():
            from marrq.artifact.checkpoint import is_checkpoint, remove_checkpoint, settings_in

            if self.checkpoint.is_symlink():
                raise MarrqError(
                    f"checkpoint {str(self.checkpoint)!r} is a link: remove it, or pass another "
                    "--work-dir"
                )
            if not is_checkpoint(self.checkpoint):
                return
            if self.overwrite:
                remove_checkpoint(self.checkpoint)
                return
            found = settings_in(self.checkpoint)
            record = found.calibration
            chosen = (scheme, method.unrefined, samples or record.samples, seed)
            if (found.scheme, found.method, record.samples, record.seed) == chosen:
                # The widths of a mixed scheme follow from the budget.
                same = " and the same budget" if scheme.mixed else ""
                raise MarrqError(
                    f"an unfinished run is in {str(self.checkpoint)!r}: pass --resume{same} to go "
                    "on with it, or --force to begin again"
                )
            raise MarrqError(
                f"an unfinished run with other options is in {str(self.checkpoint)!r}: choose "
                "another output, or pass --force to begin again"
            )

    def is_complete(self, about: dict[str, Any]) -> bool:
        """Whether the folder holds the artifact that this run would write.

        about: what that artifact is a function of. Raises MarrqError if the folder holds something
        else that may not be replaced.
        """
        from marrq.artifact.folder import is_artifact, read_config

        if not self.resume:
            return False
        # The config has more keys, such as the hash of the tensors.
        if is_artifact(self.folder) and about.items() <= read_config(self.folder).items():
            return True
        check_output(self.folder, self.overwrite, no_artifact)
        return False


def folders_read(model: str, data: str | None) -> Inputs:
    """The folders that a command reads, from the names of its model and its images as a user gives
    them. A model of a hub and the built-in images are in no folder of the user's."""
    # A name of a hub is no path, but may be one by chance: what exists here is kept.
    names = {"MODEL": model.removeprefix("local-dir:"), "--data": data or "demo"}
    return {
        option: Path(name)
        for option, name in names.items()
        if name != "demo" and Path(name).exists()
    }
