"""`marrq inspect`: what runs each linear of an ONNX file; how a linear of an artifact was made."""

from pathlib import Path

from marrq.cli import common, inspect_options
from marrq.errors import MarrqError
from marrq.files import check_artifact


def inspect(
    path: inspect_options.FileOrArtifact,
    strict: inspect_options.Strict = False,
    provider: common.ProviderOption = "cpu",
    optimization: inspect_options.Optimization = "all",
    json_file: inspect_options.Json = None,
    plot: inspect_options.Plot = None,
) -> None:
    """Show what really runs each linear of an ONNX file, and why; or how an artifact was quantized.

    marrq inspect model.onnx --strict
    marrq inspect artifact --plot alpha.svg
    """
    if not path.exists():
        raise MarrqError(
            f"{str(path)!r} does not exist: give an ONNX file, or an artifact's folder"
        )
    if path.is_file() and plot is not None:
        raise MarrqError(f"--plot draws how alpha was found: give an artifact, not {str(path)!r}")
    if path.is_file():
        _inspect_file(path, strict, json_file, provider, optimization)
    elif strict or json_file is not None or (provider, optimization) != ("cpu", "all"):
        raise MarrqError(
            "--strict, --json, --provider and --optimization are about an ONNX file: export "
            f"{str(path)!r} first"
        )
    else:
        _inspect_artifact(path, plot)


def _inspect_file(
    file: Path, strict: bool, json_file: Path | None, provider: str, optimization: str
) -> None:
    from runtime.audit.inspect import inspect_file
    from runtime.audit.rows import demand_integers
    from runtime.report.inspection import audit_table, inspection_table
    from runtime.session import SessionSettings

    report = inspect_file(file, SessionSettings(provider, optimization=optimization))
    common.write_report(json_file, report.to_json())
    common.stdout.print(audit_table(report.audit))
    common.stdout.print(inspection_table(report))
    if strict:
        demand_integers(report.audit)


def _inspect_artifact(artifact: Path, plot: Path | None) -> None:
    from runtime.report.plots import check_plot, plot_alphas

    check_artifact(artifact)
    if plot is not None:
        check_plot(plot)
    # From here on torch is imported, which takes seconds.
    from marrq.artifact.folder import REPORTS, read_config
    from runtime.quantization import Refinement, read_quantization
    from runtime.report.inspection import quantization_table

    try:
        found = read_config(artifact)["refinement"]
        refinement = None if found is None else Refinement(**found)
    except (KeyError, TypeError) as error:
        raise MarrqError(
            f"artifact {str(artifact)!r} is damaged ({error}): quantize the model again"
        ) from error
    modules = read_quantization(artifact / REPORTS)
    if plot is not None:
        plot_alphas(modules, plot)
    common.stdout.print(quantization_table(modules))
    if refinement is not None:
        common.stdout.print(f"refined {refinement.sentence}", soft_wrap=True)
