"""What images hold that a viewer would show otherwise than a model is given it.

A note is taken while an image is read, since only then is the file open. Every subset of an image
set writes into the notes of the whole set, and a file that is read twice counts once.
"""

from dataclasses import dataclass, field

ORIENTATION = "have an EXIF orientation, which is not applied"
FRAMES = "have several frames, of which the first is taken"
DEPTH = "are grey in more than 8 bits, of which the upper 8 are taken"
DROPPED = "are transparent in part, which is dropped"
ON_WHITE = "are transparent in part, and are laid on white"


@dataclass
class Notes:
    """Names of the files that were read, and of those of which something is noted, by the note;
    and sentences about the whole set."""

    read: set[str] = field(default_factory=set)
    found: dict[str, set[str]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)

    def add(self, file: object, *notes: str) -> None:
        """A file was read, and this is noted of it."""
        # Sets: evaluation reads the same files once for each model.
        self.read.add(str(file))
        for note in notes:
            self.found.setdefault(note, set()).add(str(file))

    def sentences(self) -> tuple[str, ...]:
        """One for each note, with the number of files."""
        noted = (
            f"{len(files)} of the {len(self.read)} images that were read {note}"
            for note, files in sorted(self.found.items())
        )
        return (*sorted(self.whole), *noted)
