"""Tables of answers for people: accuracy of classifiers, likeness and retrieval of embeddings,
errors of dense outputs. Nothing is measured or computed here."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from runtime.measure.accuracy import Accuracy, BaselineDrop
from runtime.measure.cosines import Cosines
from runtime.measure.dense import OutputError
from runtime.measure.embedded import Embedding
from runtime.measure.measured import Agreement
from runtime.measure.retrieval import MeanDrop, MeanPrecision, QueryShare, Retrieval


def empty_table(caption: str, first: str, headings: tuple[str, ...]) -> Table:
    """A first column that folds, and a column to the right for each heading that does not."""
    result = Table(
        caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    result.add_column(first, min_width=11, overflow="fold")
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    return result


def evaluation_tables(
    found: Mapping[str, Accuracy | Agreement | Embedding], images: str
) -> list[Table]:
    """The tables of an evaluation: of one kind for all models. images: name of the image set."""
    accuracies = {name: one for name, one in found.items() if isinstance(one, Accuracy)}
    agreements = {name: one for name, one in found.items() if isinstance(one, Agreement)}
    embeddings = {name: one for name, one in found.items() if isinstance(one, Embedding)}
    return [
        *([accuracy_table(accuracies, images)] if accuracies else []),
        *([agreement_table(agreements, images)] if agreements else []),
        *embedding_tables(embeddings, images),
    ]


def accuracy_table(accuracies: Mapping[str, Accuracy], images: str) -> Table:
    """A row for each model by its name; the first one is what the others are compared with.

    images: name of the image set.
    """
    headings = ("\ntop-1 % (95 %)", "\ntop-5 %", "agree\n%", "\ndivergence")
    count = next(iter(accuracies.values())).images
    result = empty_table(f"{count} images of {images}", "\nmodel", headings)
    for place, (name, accuracy) in enumerate(accuracies.items()):
        # The agreement of the first model with itself would say nothing.
        own = place == 0 or accuracy.agreement is None or accuracy.divergence is None
        result.add_row(
            name,
            interval(accuracy.top1_low, accuracy.top1, accuracy.top1_high),
            f"{100 * accuracy.top5:.1f}",
            "–" if own else f"{100 * (accuracy.agreement or 0):.1f}",
            "–" if own else f"{accuracy.divergence:.4f}",
        )
    return result


def agreement_table(agreements: Mapping[str, Agreement], images: str) -> Table:
    """A row for each model: how alike it and the float model answer."""
    count = next(iter(agreements.values())).images
    caption = f"{count} images of {images}, whose classes are not known"
    result = empty_table(caption, "\nmodel", ("agree\n%", "\ndivergence"))
    for name, found in agreements.items():
        result.add_row(name, share(found.agreement), f"{found.divergence:.4f}")
    return result


def embedding_tables(embeddings: Mapping[str, Embedding], images: str) -> list[Table]:
    """Likeness to the float model, if it is known, and what embeddings find, if classes are."""
    found = []
    if any(one.likeness is not None for one in embeddings.values()):
        found.append(_likeness_table(embeddings, images))
    if any(one.retrieval is not None for one in embeddings.values()):
        found.append(_retrieval_table(embeddings, images))
    return found


def _likeness_table(embeddings: Mapping[str, Embedding], images: str) -> Table:
    headings = ("cosine (95 %)", "1 %", "least", "neighbours %", "divergence")
    result = empty_table(f"embeddings beside fp32's, {images}", "model", headings)
    for name, one in embeddings.items():
        if one.likeness is not None:
            alike = one.likeness
            result.add_row(
                name,
                mean_cosine(alike),
                f"{alike.cosine_p1:.4f}",
                f"{alike.least_cosine:.4f}",
                share(alike.overlap),
                f"{alike.divergence:.4f}",
            )
    return result


def _retrieval_table(embeddings: Mapping[str, Embedding], images: str) -> Table:
    known = [one.retrieval for one in embeddings.values() if one.retrieval is not None]
    among = f"{known[0].gallery:,} {'others' if known[0].leave_one_out else 'images of train'}"
    headings = ("k = 1", "k = 20", "recall@1", "mAP")
    caption = f"{images}: top-1 of k-NN among {among}, and retrieval, in %"
    result = empty_table(f"{caption}; 95 % interval; drop in points", "model", headings)
    for name, one in embeddings.items():
        if one.retrieval is None:
            continue
        cells = _found_by(one.retrieval)
        result.add_row(name, *(_bounded(cell) for cell in cells))
        # What is lost has a row of its own: beside it, four columns would be too wide.
        if any(cell is not None and cell.against is not None for cell in cells):
            result.add_row("  lost", *(_bounded(cell and cell.against) for cell in cells))
    return result


def _found_by(seen: Retrieval) -> list[QueryShare | MeanPrecision | None]:
    return [seen.knn1, seen.knn20, seen.recall1, seen.mean_average_precision]


def _bounded(found: QueryShare | MeanPrecision | BaselineDrop | MeanDrop | None) -> str:
    """A share or a drop in percent or points, and its 95 % interval on a second line."""
    if found is None:
        return "–"
    if isinstance(found, BaselineDrop | MeanDrop):
        ends = (found.drop_low, found.drop, found.drop_high)
    elif isinstance(found, QueryShare):
        ends = (found.low, found.share, found.high)
    else:
        ends = (found.low, found.mean, found.high)
    low, value, high = (f"{100 * end:.1f}" for end in ends)
    return f"{value}\n{low}…{high}"


def output_table(outputs: Mapping[str, Sequence[OutputError]], images: str) -> Table:
    """A row for each model and output."""
    headings = ("output", "cosine (95 %)", "least", "relative error", "agree %")
    result = empty_table(f"outputs beside fp32's, {images}", "model", headings)
    for name, rows in outputs.items():
        for row in rows:
            result.add_row(
                name,
                row.output,
                mean_cosine(row),
                f"{row.least_cosine:.4f}",
                f"{row.relative_error:.4f}",
                share(row.agreement),
            )
    return result


def mean_cosine(found: Cosines) -> str:
    """The mean with its 95 % interval."""
    return f"{found.cosine:.4f} ({found.cosine_low:.4f}–{found.cosine_high:.4f})"


def interval(low: float, value: float, high: float) -> str:
    """A share with its 95 % interval, in percent."""
    return f"{100 * value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def share(found: float | None) -> str:
    """A share in percent."""
    return "–" if found is None else f"{100 * found:.1f}"


def lost(against: BaselineDrop | MeanDrop) -> str:
    """A drop with its 95 % interval, in points."""
    low, drop, high = (100 * x for x in (against.drop_low, against.drop, against.drop_high))
    return f"{drop:.1f} ({low:.1f}…{high:.1f})"
