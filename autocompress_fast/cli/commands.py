"""The commands and their options. Standard output carries results alone; progress and errors go to standard error."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from autocompress_fast.cli import missing_package

__all__ = ["commands"]

_STOPPED = 130  # what a shell reports after Ctrl-C


class _Commands(TyperGroup):
    """Turns errors into one line and an exit code: 2 for what the user can change, 1 for what went wrong."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # who reads the output has seen enough
            raise
        except KeyboardInterrupt:
            _say("stopped")
            raise typer.Exit(_STOPPED) from None
        except (ValueError, OSError, ImportError, ArithmeticError, AssertionError, RuntimeError) as error:
            code = _exit_code(error)
            if code is None or ctx.params.get("debug"):
                raise
            text = (isinstance(error, ImportError) and missing_package(error)) or str(error)
            _say(f"error: {' '.join(text.split())}")
            raise typer.Exit(code) from None


def _exit_code(error: Exception) -> int | None:
    """None for errors that nobody foresaw: they keep their traceback."""
    from autocompress_fast.engine import VerificationError

    if isinstance(error, (ValueError, OSError)):
        return 2
    if isinstance(error, ImportError):
        return None if missing_package(error) is None else 1
    foreseen = isinstance(error, (ArithmeticError, VerificationError)) or (
        isinstance(error, AssertionError) and bool(str(error))
    )
    return 1 if foreseen else None


commands = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes trained convolutional networks many times smaller, and runs them without torch.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads; all by default.")]
Model = Annotated[str, typer.Argument(help="A name such as lenet5, or package.module:callable of your own.")]
_PATTERN = "a layer's path, or that of a part of the network; a glob; re:REGEX; type:CLASS. May be repeated."
Select = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help=f"Layers to prune, all others stay as they are: {_PATTERN}")
]
Exclude = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help=f"Layers that stay as they are: {_PATTERN}")]


def _version(wanted: bool) -> None:
    if wanted:
        from autocompress_fast import __version__

        typer.echo(__version__)
        raise typer.Exit


@commands.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@commands.command()
def demo(
    workdir: Annotated[Path | None, typer.Option(help="Keep the files here; a temporary folder by default.")] = None,
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Compress a small network on real handwritten digits, save it, and run it without torch: under a minute."""
    from autocompress_fast.cli.demo import run_demo

    if workdir is not None:
        outcome = run_demo(workdir, seed)
    else:
        with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
            outcome = run_demo(Path(folder), seed)
    _show(outcome, as_json)


@commands.command()
def compress(
    model: Model,
    data: Annotated[str, typer.Option(help='Folder with a data set, or "digits" for those of scikit-learn.')],
    target: Annotated[
        str | None,
        typer.Option(
            help="20x (all weights), conv=40, macs=4, 3x faster, latency_ms=2.5, bytes=100k, or several with commas."
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of validation accuracy to lose at most; without --target, as small as that allows."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="mnist, fashion-mnist, cifar10, cifar100, folder; recognised by default.")
    ] = None,
    structure: Annotated[
        str, typer.Option(help="What is pruned: filter+column, filter-then-column, filter, column or element.")
    ] = "filter+column",
    seed: Seed = 0,
    workdir: Annotated[Path | None, typer.Option(help="For checkpoints and results; runs/... by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="The compressed network; model.acf there by default.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of the trained network; without it, it is trained first.")
    ] = None,
    as_json: Json = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; train and write nothing.")] = False,
    method: Annotated[
        str | None,
        typer.Option(help="admm, or shrink (element, column, filter+column), which finds the rates while it trains."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How many times to prune and compact.")] = None,
    search: Annotated[
        int | None,
        typer.Option(min=0, help="Candidates to try, every round, for the rates of the layers; none by default."),
    ] = None,
    search_steps: Annotated[
        int | None, typer.Option(min=0, help="Of training before a candidate is scored; 25 by default.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=SHARE",
            help="Share of its weights that a layer keeps at least, or LEAST:MOST. May be repeated.",
        ),
    ] = None,
    search_workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that score candidates at the same time; one by default.")
    ] = None,
    admm_epochs: Annotated[int | None, typer.Option(min=1, help="Of ADMM training, every round.")] = None,
    shrink_epochs: Annotated[int | None, typer.Option(min=1, help="Of training in which weights shrink.")] = None,
    retrain_epochs: Annotated[int | None, typer.Option(min=0, help="After pruning, every round but the last.")] = None,
    final_epochs: Annotated[int | None, typer.Option(min=1, help="After the last pruning.")] = None,
    purify_rounds: Annotated[
        int | None, typer.Option(min=0, help="Of purification after the target is met; none by default.")
    ] = None,
    purify_tolerance: Annotated[
        float | None, typer.Option(min=0, help="Points of validation accuracy it may cost before it is retrained.")
    ] = None,
    purify_epochs: Annotated[int | None, typer.Option(min=0, help="Of retraining after each of its rounds.")] = None,
    admm_lr: Annotated[float | None, typer.Option(help="Learning rate of ADMM training.")] = None,
    shrink_lr: Annotated[float | None, typer.Option(help="Learning rate while weights shrink.")] = None,
    retrain_lr: Annotated[float | None, typer.Option(help="Peak learning rate after pruning.")] = None,
    final_lr: Annotated[float | None, typer.Option(help="Peak learning rate after the last pruning.")] = None,
    purify_lr: Annotated[float | None, typer.Option(help="Peak learning rate after purification.")] = None,
    bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PATTERN=]BITS",
            help="1 to 8, of every weight that is left, or of those of some layers (may be repeated); FEWEST:MOST to "
            "have a search choose; float32 by default.",
        ),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="equal, power, ternary or binary.")] = None,
    quantize_epochs: Annotated[
        int | None, typer.Option(min=0, help="Of each of the ten trainings that bring weights to levels.")
    ] = None,
    quantize_lr: Annotated[float | None, typer.Option(help="Peak learning rate of these.")] = None,
    level_epochs: Annotated[
        int | None, typer.Option(min=0, help="Of a training after them, in which weights may go to other levels.")
    ] = None,
    level_lr: Annotated[float | None, typer.Option(help="Peak learning rate of it.")] = None,
    activation_bits: Annotated[
        int | None, typer.Option(help="8: weights and activations of 8 bits at the end; float32 by default.")
    ] = None,
    activation_epochs: Annotated[int | None, typer.Option(min=0, help="Of training with their rounding.")] = None,
    activation_lr: Annotated[float | None, typer.Option(help="Peak learning rate of it.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd or adam.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="While compressing.")] = None,
    distillation: Annotated[
        float | None, typer.Option(help="Share of the loss that compares with the dense network, 0 to 1.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Of the inputs of fully connected layers but the last, in the final training.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Of every training.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--channels-first", help="Memory layout of images while training.")
    ] = None,
    compile: Annotated[  # noqa: A002  the name of the option
        bool | None,
        typer.Option("--compile/--no-compile", help="Train through torch.compile: quicker from minutes on."),
    ] = None,
    augment: Annotated[bool, typer.Option("--augment/--no-augment", help="Vary images while compressing.")] = True,
    elastic: Annotated[
        float, typer.Option(min=0, help="Distort images then as well, smoothly, by about so many pixels.")
    ] = 0.0,
    base_epochs: Annotated[int | None, typer.Option(min=1, help="Of the training without --checkpoint.")] = None,
    base_augment: Annotated[
        bool | None,
        typer.Option("--base-augment/--no-base-augment", help="In that training; like --augment by default."),
    ] = None,
    base_lr: Annotated[float | None, typer.Option(help="Its peak learning rate.")] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Training images that decide instead: count or share; a tenth, at most 5000, by default."),
    ] = None,
    select: Select = None,
    exclude: Exclude = None,
    threads: Threads = None,
) -> None:
    """Compress a network, until it meets the target or as far as its accuracy holds; a stopped run goes on."""
    from autocompress_fast.cli.job import Job, bits_asked, shares, threads_set

    recipe = {
        "structure": structure,
        "method": method,
        "rounds": rounds,
        "search": search,
        "search_steps": search_steps,
        "keep": shares(keep) if keep else None,
        "search_workers": search_workers,
        "admm_epochs": admm_epochs,
        "shrink_epochs": shrink_epochs,
        "retrain_epochs": retrain_epochs,
        "final_epochs": final_epochs,
        "purify_rounds": purify_rounds,
        "purify_tolerance": purify_tolerance,
        "purify_epochs": purify_epochs,
        "admm_lr": admm_lr,
        "shrink_lr": shrink_lr,
        "retrain_lr": retrain_lr,
        "final_lr": final_lr,
        "purify_lr": purify_lr,
        "bits": bits_asked(bits) if bits else None,
        "levels": levels,
        "quantize_epochs": quantize_epochs,
        "quantize_lr": quantize_lr,
        "level_epochs": level_epochs,
        "level_lr": level_lr,
        "activation_bits": activation_bits,
        "activation_epochs": activation_epochs,
        "activation_lr": activation_lr,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "distillation": distillation,
        "dropout": dropout,
        "batch_size": batch_size,
        "precision": precision,
        "channels_last": channels_last,
        "compile": compile,
        "seed": seed,
    }
    with threads_set(threads):
        job = Job.prepared(
            model,
            data,
            target,
            max_drop=max_drop,
            dataset=dataset,
            validation=validation,
            augment=augment,
            elastic=elastic,
            base_augment=augment if base_augment is None else base_augment,
            recipe={name: value for name, value in recipe.items() if value is not None},
            base={name: value for name, value in (("epochs", base_epochs), ("lr", base_lr)) if value is not None},
            checkpoint=checkpoint,
            workdir=workdir,
            select=select,
            exclude=exclude,
        )
        if dry_run:
            outlook = job.outlook()
            _show(outlook, as_json)
            raise typer.Exit(0 if outlook.to_json()["can_be_met"] else 2)
        try:
            outcome = job.run(output)
        except KeyboardInterrupt:
            _say(f"stopped; the finished epochs are in {job.folder}: the same command goes on from there")
            raise typer.Exit(_STOPPED) from None
    _show(outcome, as_json)
    _say(f"everything is in {job.folder}")


@commands.command()
def inspect(
    model: Model,
    input_shape: Annotated[
        str | None, typer.Option(help="C,H,W of an image, such as 1,28,28; that of a named model by default.")
    ] = None,
    select: Select = None,
    exclude: Exclude = None,
    groups: Annotated[
        bool, typer.Option("--groups", help="Show every set of tied layers, and all their names.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a network's layers, what of them can be pruned, what is frozen and why, and what uniform pruning leaves."""
    from autocompress_fast.cli.job import inspected

    _show(inspected(model, input_shape, select=select, exclude=exclude, groups=groups), as_json)


@commands.command()
def predict(
    file: Annotated[Path, typer.Argument(help="A compressed network, .acf.")],
    inputs: Annotated[list[Path] | None, typer.Argument(help="Images (read with Pillow) or .npy arrays.")] = None,
    data: Annotated[str | None, typer.Option(help="A data set, whose test part is classified instead.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Which data set, where the folder holds several.")] = None,
    as_json: Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the cut, for data without a test part of its own.")] = 0,
    threads: Threads = None,
) -> None:
    """Classify images, or a data set's test part, with a compressed network; torch is not needed."""
    from autocompress_fast.cli.prediction import classify_data, classify_files

    if (data is None) == (not inputs):
        raise ValueError("predict needs either INPUT files or --data with a data set")
    if data is None:
        _show(classify_files(file, inputs or [], threads), as_json)
    else:
        _show(classify_data(file, data, dataset, seed, threads), as_json)


@commands.command()
def bench(
    file: Annotated[Path, typer.Argument(help="A compressed network, .acf.")],
    dense: Annotated[
        str | None, typer.Option(help="The dense network: a model's name or module:callable; measured beside it.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another runtime, onnxruntime or openvino; those installed by default; several allowed."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Samples of a call; 1 by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each, in turns.")] = 50,
    data: Annotated[str | None, typer.Option(help="A data set, for the accuracy on its test part.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Which data set, where the folder holds several.")] = None,
    as_json: Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the cut, for data without a test part of its own.")] = 0,
    threads: Threads = None,
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16: of ours where that is quicker, and of OpenVINO.")
    ] = "float32",
    tune: Annotated[bool, typer.Option("--tune", help="Measure first in which way every layer is quickest.")] = False,
) -> None:
    """Measure how fast a compressed network runs, beside the dense one and other runtimes."""
    from autocompress_fast.cli.benchmark import measured

    _show(
        measured(
            file,
            dense=dense,
            against=against,
            samples=batch or [1],
            rounds=rounds,
            data=data,
            dataset=dataset,
            seed=seed,
            threads=threads,
            precision=precision,
            tune=tune,
        ),
        as_json,
    )


@commands.command()
def quantize(
    file: Annotated[Path, typer.Argument(help="A network in float32, .acf.")],
    inputs: Annotated[
        list[Path] | None, typer.Argument(help="Images (read with Pillow) or .npy arrays to look at, without --data.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the network, .acf.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A data set: its training part is looked at, its validation part gives the accuracies."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Which data set, where the folder holds several.")] = None,
    method: Annotated[str, typer.Option(help="How ranges are chosen: mse, minmax or percentile.")] = "mse",
    percentile: Annotated[float, typer.Option(help="Of the activations that --method percentile keeps.")] = 99.99,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers that stay in float32: a name, or a glob. May be repeated."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="To look at, at most.")] = 512,
    residual_bits: Annotated[
        int, typer.Option(help="Of what is added to the results of convolutions: 8, or 32 for float32.")
    ] = 8,
    as_json: Json = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the cut of the data into parts.")] = 0,
    threads: Threads = None,
) -> None:
    """Give a network 8-bit weights and activations, from what it computes on some samples; nothing is trained."""
    from autocompress_fast.cli.quantization import quantized

    if output is None:
        raise ValueError("quantize needs -o with the file to write")
    if (data is None) == (not inputs):
        raise ValueError("quantize needs either --data with a data set or INPUT files")
    outcome = quantized(
        file,
        output,
        inputs=inputs or [],
        data=data,
        dataset=dataset,
        seed=seed,
        threads=threads,
        method=method,
        percentile=percentile,
        skip=skip or [],
        samples=samples,
        residual_bits=residual_bits,
    )
    _show(outcome, as_json)


@commands.command()
def export(
    file: Annotated[Path, typer.Argument(help="A compressed network, .acf.")],
    output: Annotated[Path, typer.Argument(help="Where to write the ONNX model.")],
) -> None:
    """Write a compressed network as an ONNX model, for other runtimes."""
    from autocompress_fast.engine import load

    if output.suffix.lower() != ".onnx":
        raise ValueError(f"{output} must end in .onnx")
    load(file).export_onnx(output)
    _say(f"wrote {output}")


def _show(document: Any, as_json: bool) -> None:
    """Print a `Document`, or its JSON."""
    if as_json:
        typer.echo(json.dumps(document.to_json(), indent=1, allow_nan=False))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(document)
    else:
        typer.echo(str(document))


def _say(text: str) -> None:
    typer.echo(text, err=True)
