"""Whether images that judge a model have calibrated it too, which flatters the model."""

from collections.abc import Iterable
from pathlib import Path

from marrq.errors import MarrqError
from marrq.models.images import ImageSet, find_images
from marrq.quantized_model import CalibrationRecord


def calibrated_on(record: CalibrationRecord, labels: tuple[str, ...]) -> ImageSet | None:
    """The images that an artifact was calibrated on; None if they are gone, or are other ones now.

    labels: of the model, without the classes of an export."""
    try:
        drawn = find_images(record.data, "train", labels).draw(record.samples, record.seed)
    # A folder that has moved is no fault of who asks.
    except MarrqError:
        return None
    # The same name may mean other images by now.
    return drawn if drawn.sha256 == record.files_sha256 else None


def flattered(calibrating: Iterable[ImageSet], judging: ImageSet) -> list[str]:
    """A sentence if some images do both, as a list."""
    used = set[Path]().union(*map(_places, calibrating))
    shared = len(used & _places(judging))
    if not shared:
        return []
    return [
        f"{shared:,} of the {len(judging):,} images that judge have calibrated too, so the figures "
        "flatter: put images to judge by into val/, others into train/"
    ]


def flattered_by_record(
    record: CalibrationRecord, labels: tuple[str, ...], judging: ImageSet
) -> list[str]:
    """The same of an artifact's calibration. labels: as for `calibrated_on`."""
    drawn = calibrated_on(record, labels)
    return flattered([] if drawn is None else [drawn], judging)


def _places(images: ImageSet) -> set[Path]:
    # The same folder may have been named in two ways. An image of the demo lies in a file.
    return {Path(str(file)).resolve() for file in images.files}
