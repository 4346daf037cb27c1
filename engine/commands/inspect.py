"""svdengine inspect: what is in a model file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.arguments import ModelArgument, kept_file
from svdengine.errors import ModelFileError
from svdengine.files.hub_name import HubName

if TYPE_CHECKING:
    from svdengine.files.model_file import ModelFile


@click.command("inspect")
@click.argument("model", type=ModelArgument())
@click.option("--check", is_flag=True, help="Measure whether the weights were trained with another activation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: HubName | Path, check: bool, as_json: bool) -> None:
    """Show the config, the tokenizer, the tensors and the predictor of MODEL, a .svdp file or a name of `list`.

    With --check a short text is run through the model under each activation that its weights could mean; the exit code
    is 1 where another one than the stated predicts the text far better.
    """
    from svdengine.files.model_file import read_model_file

    with read_model_file(kept_file(model)) as file:
        report = _report(file)
        if check:
            report["activation_check"] = _measured(file)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo("\n".join(_tables(report)))
    if check and report["activation_check"]["better"] is not None:
        raise ModelFileError(f"{model}: {report['activation_check']['verdict']}")


def _measured(file: ModelFile) -> dict[str, Any]:
    """What measuring says of the activation, for people and for programs. Raises ModelFileError without a tokenizer."""
    from dataclasses import asdict

    from svdengine.converters.activation_check import check_activation

    found = check_activation(file)
    if found is None:
        raise ModelFileError(f"{file.path}: --check needs text; the model has no tokenizer, or no room for one")
    return {**asdict(found), "readable": found.readable, "verdict": found.verdict()}


def _report(file: ModelFile) -> dict[str, Any]:
    from svdengine.files.predictor_file import find_predictor
    from svdengine.measuring.predictor_table import predictor_report

    tensors = _tensors(file)
    parameters = sum(tensor["parameters"] for tensor in tensors)
    weight_bytes = sum(tensor["bytes"] for tensor in tensors)
    tokenizer = file.tokenizer_info.to_dict()
    tokenizer["special_tokens"] = len(tokenizer["special_tokens"])
    tokenizer["bytes"] = len(file.tokenizer_bytes)
    tokenizer["chat_template"] = file.chat_template is not None
    predictor = find_predictor(file)
    return {
        "file": str(file.path),
        "config": file.config.to_dict(),
        "tokenizer": tokenizer,
        "generation": dict(file.generation),
        "provenance": _json_or_text(file.metadata.get("provenance", "{}")),
        "tensors": tensors,
        "predictor": predictor_report(predictor, file.config) if predictor is not None else None,
        "totals": {
            "parameters": parameters,
            "weight_bytes": weight_bytes,
            "file_bytes": file.size_bytes,
            "bits_per_weight": 8 * weight_bytes / parameters,
        },
    }


def _tensors(file: ModelFile) -> list[dict[str, Any]]:
    """One row a canonical tensor, with all of its stored parts."""
    import math

    from svdengine.files.model_file import stored_tensors
    from svdengine.models.tensors import tensor_specs

    rows = []
    for spec in tensor_specs(file.config):
        weight_format = file.formats.get(spec.name, "f32")
        parts = stored_tensors(spec, weight_format)
        rows.append(
            {
                "name": spec.name,
                "format": weight_format,
                "shape": list(spec.shape),
                "parameters": math.prod(spec.shape),
                "bytes": sum(file.arrays[part].nbytes for part in parts),
            }
        )
    return rows


def _tables(report: dict[str, Any]) -> list[str]:
    from svdengine.measuring.predictor_table import predictor_lines

    totals = report["totals"]
    lines = [report["file"], "", "config"]
    lines += _pairs(_stated(report["config"]))
    for section in ("tokenizer", "generation"):
        if report[section]:
            lines += ["", section, *_pairs(report[section])]
    lines += ["", f"{'tensor':<24}{'format':<8}{'shape':<22}{'MB':>10}"]
    for tensor in report["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        lines.append(f"{tensor['name']:<24}{tensor['format']:<8}{shape:<22}{tensor['bytes'] / 1e6:>10.2f}")
    lines += ["", *(predictor_lines(report["predictor"]) if report["predictor"] else ["predictor: none"]), ""]
    if "activation_check" in report:
        lines += [*_activation_lines(report["activation_check"]), ""]
    provenance = report["provenance"]
    if isinstance(provenance, dict) and "source" in provenance:
        lines.append(
            f"made from: {_printable(provenance['source'])} by {_printable(provenance.get('tool', 'unknown'))}"
        )
    lines.append(f"parameters: {totals['parameters'] / 1e6:.1f} M at {totals['bits_per_weight']:.2f} bits")
    lines.append(f"file: {totals['file_bytes'] / 1e6:.1f} MB")
    return lines


def _activation_lines(check: dict[str, Any]) -> list[str]:
    """The table of measured activations, the stated one first, and the verdict."""
    rows = (
        f"{score['activation']:<24}{score['perplexity']:>14.4g}{score['bits_per_byte']:>14.3f}"
        for score in check["scores"]
    )
    return [f"{'activation':<24}{'perplexity':>14}{'bits a byte':>14}", *rows, check["verdict"]]


def _stated(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config differs from the defaults."""
    from dataclasses import fields

    from svdengine.models.config import ModelConfig, Rope

    def differing(values: dict[str, Any], kind: type) -> dict[str, Any]:
        defaults = {field.name: field.default for field in fields(kind)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    rope = config["rope"] and differing(config["rope"], Rope)
    return {**differing(config, ModelConfig), "rope": rope}


def _pairs(mapping: dict[str, Any]) -> Iterable[str]:
    """Indented lines, without what is off."""
    for name, value in mapping.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_printable(item)}" for key, item in value.items())
        if value not in (None, False, "", [], ()):
            yield f"  {_printable(name):<24}{_printable(value)}"


def _printable(value: Any) -> str:
    """Text from a file, without characters that would steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(value))[:200]


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
