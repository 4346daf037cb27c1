"""How commands convert: what is wanted, what is said before the work, the weights, and the predictor after them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from svdengine.commands.calibrate import calibrate_file
from svdengine.commands.progress import StageProgress

if TYPE_CHECKING:
    from svdengine.converters.forecast import Forecast
    from svdengine.converters.sized_conversion import SizedModel
    from svdengine.files.model_file import ModelFile
    from svdengine.kernels.formats import WeightFormat
    from svdengine.models.config import ModelConfig

_CALIBRATED = {"q4", "q6"}  # formats whose weights are rounded for what they read
_OF_PREDICTOR = ("rank", "thresholds", "share", "ablation", "text")  # fields of Wanted that calibration takes


@dataclass(frozen=True)
class Wanted:
    """What a checkpoint is to become; the options of `svdengine convert`."""

    dtype: str = "q8"
    bits: float | None = None  # a weight, on average: formats are chosen for it
    size: int | None = None  # bytes of the whole file, likewise
    embedding_dtype: str | None = None
    down_dtype: str | None = None
    activation: str | None = None
    kind: str | None = None  # of the predictor; None: the default one, where the model has zeros to skip
    rank: int | None = None
    thresholds: str = "error"
    share: float | None = None
    ablation: str | None = None
    text: tuple[Path, ...] = ()
    check: bool = True  # whether the activation is checked by measuring
    quick: bool = False  # weights of q4 and q6 are rounded to nearest, without text
    verbose: bool = False

    @property
    def calibrates_weights(self) -> bool:
        """Whether text decides how weights are rounded."""
        return self.chooses_formats or (
            not self.quick and not _CALIBRATED.isdisjoint((self.dtype, self.embedding_dtype, self.down_dtype))
        )

    @property
    def chooses_formats(self) -> bool:
        """Whether each tensor gets the format in which it pays."""
        return self.bits is not None or self.size is not None

    @property
    def format(self) -> str:
        """The formats, in a word."""
        if self.bits is not None:
            return f"{self.bits:g} bits"
        return self.dtype if self.size is None else "mixed formats"

    def predictor_kind(self, config: ModelConfig) -> str | None:
        """The kind of predictor that a model gets. Raises UsageError on one that it has no use for."""
        from svdengine.converters.calibration_size import default_kind
        from svdengine.files.predictor_file import why_not_sparse

        if self.kind == "none":
            return None
        if config.sparse_ffn:
            return self.kind or default_kind(config, self.rank, self.thresholds)
        if self.kind is not None:
            raise click.UsageError(f"--predictor {self.kind}: {why_not_sparse(config)}")
        return None

    def variant(self, kind: str | None) -> str:
        """A short name that tells conversions of one checkpoint apart: q8-lowbit, q4-down-q8."""
        parts = [self.dtype]
        if self.chooses_formats:
            parts = [f"{self.bits:g}-bits" if self.bits is not None else f"{(self.size or 0) / 2**20:.6g}M"]
        parts += [f"embedding-{self.embedding_dtype}"] if self.embedding_dtype else []
        parts += [f"down-{self.down_dtype}"] if self.down_dtype else []
        parts += [self.activation.replace(":", "-")] if self.activation else []
        parts += ["quick"] if self.quick else []
        if kind is not None:
            parts.append(kind)
            parts += [str(self.rank)] if self.rank is not None else []
            parts += [self.thresholds] if self.thresholds != "error" else []
            parts += [f"s{self.share:g}"] if self.share is not None else []
            parts += [self.ablation] if self.ablation is not None else []
        if self.text and (kind is not None or self.calibrates_weights):
            parts.append(hashlib.sha256(json.dumps([str(t) for t in self.text]).encode()).hexdigest()[:6])
        return "-".join(parts)


def convert_file(
    source: Path,
    output: Path,
    wanted: Wanted,
    kind: str | None,
    *,
    weights: Path | None = None,
    hub: Mapping[str, Any] | None = None,
) -> None:
    """Write the model file `output`, and then a predictor of that kind into it.

    With `weights`, the file without a predictor has that name until the predictor is made, so that whatever is called
    `output` is whole; one that is there already is taken. `hub` is kept in the file (models_folder.py).
    Raises ConversionError.
    """
    first = output if weights is None or kind is None else weights
    if weights is None or not first.exists():
        (_convert_to_size if wanted.chooses_formats else _convert_weights)(source, first, wanted, kind, hub)
    if kind is not None:
        _calibrate(first, output, kind, wanted)


def forecast_of(config: ModelConfig, wanted: Wanted) -> Forecast:
    """What a conversion will come to on this machine."""
    from svdengine.converters.default_formats import calibrated_formats
    from svdengine.converters.forecast import forecast
    from svdengine.measuring.machine import usable_cores

    if wanted.chooses_formats:
        cores, predictor = usable_cores(), wanted.predictor_kind(config) is not None
        return forecast(config, "q8", predictor=predictor, cores=cores, bits=wanted.bits, size=wanted.size)
    dtype = cast("WeightFormat", wanted.dtype)
    embedding = cast("WeightFormat | None", wanted.embedding_dtype)
    down = cast("WeightFormat | None", wanted.down_dtype)
    if wanted.calibrates_weights:
        embedding, down = calibrated_formats(config, dtype, embedding, down)
    return forecast(
        config,
        dtype,
        embedding,
        down,
        predictor=wanted.predictor_kind(config) is not None,
        cores=usable_cores(),
    )


def working_bytes(config: ModelConfig, wanted: Wanted) -> int:
    """Bytes that converting takes beside the file for as long as it works, before a predictor is made."""
    from svdengine.converters.forecast import forecast
    from svdengine.converters.sized_conversion import FORMATS

    if not wanted.chooses_formats:
        return 0
    return sum(forecast(config, one, one, predictor=False).file_bytes for one in FORMATS)


def announce(config: ModelConfig, wanted: Wanted, notes: Sequence[str] = ()) -> None:
    """Say what will come: the file, the memory to run it, whether it runs sparse and why, and how long that takes.

    notes: what the checkpoint has to say besides.
    """
    from svdengine.files.residency import usable_memory

    for note in notes:
        _say(f"note: {note}")
    told, memory = forecast_of(config, wanted), usable_memory()
    short = ""
    if memory is not None and told.memory_bytes > memory:
        short = f"; {shown_bytes(memory)} are free, so it will be slow: parts are read from storage for every token"
    _say(
        f"{config.family}, {_shown_count(told.parameters)} parameters: in {wanted.format} a file of"
        f" {shown_bytes(told.file_bytes)}, which takes {shown_bytes(told.memory_bytes)} of memory to run{short}"
    )
    exact = "; without a predictor it computes all gates, and skips what they leave at zero"
    more = exact if told.sparse and told.calibration_seconds is None else ""
    _say(f"runs {'sparse' if told.sparse else 'dense'}: {told.why}{more}")
    if told.calibration_seconds is not None:
        _say(f"calibrating its predictor takes about {shown_time(told.calibration_seconds)}")


def check_room(*needs: tuple[Path, int]) -> None:
    """Raise SvdEngineError when what is to be written into folders has no room on their disks, together."""
    from svdengine.errors import SvdEngineError

    wanted: dict[int, int] = {}
    for folder, count in needs:
        folder = _existing(folder)
        disk = folder.stat().st_dev
        wanted[disk] = wanted.get(disk, 0) + count
        free = shutil.disk_usage(folder).free
        if wanted[disk] > free:
            raise SvdEngineError(
                f"no room for it on the disk of {folder}: {shown_bytes(wanted[disk])} are needed for download and model"
                f" file, and {shown_bytes(free)} are free; free some, or set HF_HOME and SVDENGINE_MODELS to another"
            )


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def shown_bytes(count: float) -> str:
    """A size for people, in the units in which disks are sold."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} bytes"


def shown_time(seconds: float) -> str:
    """A rough time for people."""
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _shown_count(count: int) -> str:
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def _convert_to_size(
    source: Path, output: Path, wanted: Wanted, kind: str | None, hub: Mapping[str, Any] | None
) -> None:
    """Convert with the formats that the wanted size is best spent on."""
    from svdengine.converters.forecast import predictor_bytes
    from svdengine.converters.sized_conversion import Wish, convert_to_size
    from svdengine.converters.weight_calibration import WeightCalibration

    def beside(config: ModelConfig) -> int:
        return 0 if kind is None else predictor_bytes(config, kind, wanted.rank, wanted.thresholds)

    made = convert_to_size(
        source,
        output,
        Wish(wanted.bits, wanted.size, beside),
        wanted.activation,
        StageProgress(),
        calibration=WeightCalibration(text=wanted.text),
        hub=hub,
        look=_check if wanted.check else None,
    )
    if wanted.verbose:
        click.echo("\n".join(_costs(made)))


def _costs(made: SizedModel) -> Iterator[str]:
    """Of each tensor what it loses in each format, alone, and which it got; those that cost most a byte come first."""
    from svdengine.converters.sized_conversion import FORMATS

    def rate(name: str) -> float:
        """Nats lost a byte saved, in the smallest format."""
        of = made.options[name]
        return of[-1].loss / (of[0].size - of[-1].size)

    others = FORMATS[1:]
    columns = [f"{one}: MB | lost" for one in others]
    yield f"| tensor | chosen | {FORMATS[0]}: MB | {' | '.join(columns)} | lost a MB saved |"
    yield f"| --- | --- | ---: |{' ---: | ---: |' * len(others)} ---: |"
    for name in sorted(made.options, key=rate, reverse=True):
        exact, *rest = made.options[name]
        cells = [f"{option.size / 1e6:.1f} | {1e3 * option.loss:.2f}" for option in rest]
        chosen = made.choice.formats[name]
        yield f"| {name} | {chosen} | {exact.size / 1e6:.1f} | {' | '.join(cells)} | {1e9 * rate(name):.3f} |"
    yield ""
    yield (
        "lost: what that tensor in the format adds to the divergence from the checkpoint's own weights, in 0.001 nats a"
        f" token. All of it in {FORMATS[0]} has {1e3 * made.base:.2f}; what was chosen should have"
        f" {1e3 * (made.base + made.choice.loss):.2f}, and has {1e3 * made.loss:.2f}."
    )


def _convert_weights(source: Path, output: Path, wanted: Wanted, _: str | None, hub: Mapping[str, Any] | None) -> None:
    from svdengine.converters import convert
    from svdengine.converters.weight_calibration import WeightCalibration

    changed: dict[str, list[float]] = {}
    stage, progress = f"converting to {wanted.dtype}, MB", StageProgress()
    convert(
        source,
        output,
        cast("WeightFormat", wanted.dtype),
        wanted.activation,
        lambda done, total: progress(stage, done // 1_000_000, max(1, total // 1_000_000)),
        embedding_dtype=cast("WeightFormat | None", wanted.embedding_dtype),
        down_dtype=cast("WeightFormat | None", wanted.down_dtype),
        hub=hub,
        calibration=WeightCalibration(text=wanted.text) if wanted.calibrates_weights else None,
        observe=(lambda name, _, share: changed.setdefault(name, []).append(share)) if wanted.verbose else None,
        look=_check if wanted.check else None,
    )
    if changed:
        click.echo("\n".join(_changes(changed, output)))


def _changes(changed: Mapping[str, Sequence[float]], output: Path) -> Iterator[str]:
    """Of each tensor its format, its size, and what rounding changed: a share of its output's energy."""
    from svdengine.files.model_file import read_model_file
    from svdengine.kernels.formats import gather_parts

    yield "| tensor | format | MB | changed, mean of layers | worst layer |"
    yield "| --- | --- | ---: | ---: | ---: |"
    with read_model_file(output) as file:
        for name, shares in sorted(changed.items(), key=lambda item: -sum(item[1]) / len(item[1])):
            size = sum(part.nbytes for part in gather_parts(file.arrays, name).values()) / 1e6
            worst = max(range(len(shares)), key=shares.__getitem__)
            mean = sum(shares) / len(shares)
            layer = f"{shares[worst]:.3%} in {worst}" if len(shares) > 1 else ""
            yield f"| {name} | {file.formats[name]} | {size:.1f} | {mean:.3%} | {layer} |"


def _check(file: ModelFile) -> None:
    """Raise ConversionError where measuring says that the activation is another one."""
    from svdengine.converters.activation_check import check_activation
    from svdengine.errors import ConversionError, SvdEngineError

    _say("Checking the activation; --no-check leaves it out")
    try:
        found = check_activation(file)
    except SvdEngineError as error:  # of the device: the file is as good as before
        _say(f"warning: the activation was not checked: {error}")
        return
    if found is None:
        _say("warning: the activation was not checked: there is no tokenizer, or no room for a text")
    elif found.better is not None:
        raise ConversionError(f"{found.verdict()}, or go on with --no-check")
    else:
        _say(found.verdict())


def _calibrate(model: Path, output: Path, kind: str, wanted: Wanted) -> None:
    from svdengine.errors import ConversionError, SvdEngineError

    _say(f"Calibrating a predictor ({kind}); svdengine convert --predictor none leaves it out")
    chosen = {
        name: value
        for name, value in asdict(wanted).items()
        if name in ("rank", "thresholds", "share", "ablation", "text")
    }
    try:
        calibrate_file(model, output, kind=kind, **chosen)
    except SvdEngineError as error:
        raise ConversionError(f"{model} is complete, but has no predictor: {error}") from error
    if model != output:
        model.unlink()


def _existing(folder: Path) -> Path:
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - without following links
    return next(path for path in (folder, *folder.parents) if path.exists())


def _say(text: str) -> None:
    click.echo(text, err=True)
