"""`marrq demo`: quantize, export and bench the small ViT inside the package, without a network."""

from pathlib import Path
from typing import Annotated

from marrq.cli import common
from marrq.cli.bench import bench
from marrq.cli.quantize import quantize
from marrq.outputs import check_report, no_report


def demo(
    output: Annotated[
        Path,
        common.output_option(
            "-o",
            "--output",
            metavar="FOLDER",
            help="Folder for the artifact, the ONNX file and the report.",
        ),
    ] = Path("marrq-demo"),
    force: common.ForceOption = False,
) -> None:
    """Quantize, export and bench the built-in ViT on digits, in about two minutes on two cores.

    marrq demo -o marrq-demo
    """
    # Raises BenchError at once if ONNX Runtime is missing.
    import runtime.session  # noqa: F401
    from exporters.replacing import check_model_file
    from marrq.workflows.export import export

    artifact, file, report = output / "artifact", output / "model.onnx", output / "bench.json"
    # All three places are checked before the first minute of work.
    check_report(report, no_report)
    check_model_file(file, force)
    # The model demo has its own images, so no command needs --data.
    quantize("demo", output=artifact, force=force)
    done = export(artifact, file, force=force, say=common.say)
    common.say(f"wrote {done.path} as {done.flavor}: {done.size_bytes / 1e6:.2f} MB")
    bench([file], json_file=report)
    common.say(
        f"files are in {output}: {', '.join(path.name for path in (artifact, file, report))}"
    )
