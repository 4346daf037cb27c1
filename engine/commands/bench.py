"""svdengine bench: tokens a second, and how much of the memory's bandwidth that is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.help_pages import Command, option
from svdengine.commands.options import measuring_options, open_model, predictor_option

if TYPE_CHECKING:
    from svdengine.llm import LLM
    from svdengine.measuring.benchmark import BenchRow
    from svdengine.models.config import ModelConfig


EXAMPLES = (
    "svdengine bench smollm2.svdp",
    "svdengine bench relu.svdp --ffn both -p 0 -n 96 -r 8",
)


@click.command("bench", cls=Command, examples=EXAMPLES)
@measuring_options
@predictor_option
@option("-p", "--pp", type=click.IntRange(min=0), default=512, show_default=True, help="Tokens of the prompt.")
@option("-n", "--tg", type=click.IntRange(min=0), default=128, show_default=True, help="Tokens to decode.")
@option(
    "-d",
    "--depth",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens in the context before each test; they are not timed.",
)
@option(
    "--parallel",
    type=click.IntRange(1, 256),
    multiple=True,
    default=(1,),
    show_default=True,
    metavar="N",
    help="Sequences to decode together. Repeat it to compare numbers of them.",
)
@option(
    "-r",
    "--repetitions",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Of each test, to tell how much it varies.",
)
@option("--faults", is_flag=True, help="Count page faults and what storage reads, for a model larger than memory.")
@option("--json", "as_json", is_flag=True, help="Print a list of rows instead of a table.")
def command(
    pp: int,
    tg: int,
    depth: int,
    parallel: tuple[int, ...],
    repetitions: int,
    faults: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure MODEL, a .svdp file or a name on a hub: reading a prompt (pp) and decoding (tg).

    --ffn both measures the dense and the sparse path in turn, and also the FFNs of all layers alone (ffn). MB/token is
    what a token reads of weights, predictor and KV cache. On the sparse path it counts the neurons that the measured
    tokens listed. Where several sequences list the same neurons, it is an upper bound. Of a mixture of experts lines
    below the table say how evenly the tokens of each test used them. With --faults and --memory, experts that were
    chosen are counted: those kept in memory, and at most how many came from storage.
    """
    from svdengine.measuring.benchmark import run_benchmark
    from svdengine.measuring.machine import usable_cores

    if not pp and not tg:
        raise click.UsageError("there is nothing to measure: --pp and --tg are both 0")
    with open_model(options, context=max(depth + max(pp, tg), 2), sequences=max(parallel)) as llm:
        threads = options["threads"] or usable_cores()
        rows = run_benchmark(
            llm,
            pp,
            tg,
            repetitions,
            _progress if sys.stderr.isatty() else None,
            parallel=parallel,
            paths=("dense", "sparse") if options["ffn"] == "both" else (options["ffn"],),
            sparsity_bias=options["sparsity_bias"] or 0.0,
            faults=faults,
            depth=depth,
        )
        facts, config = _facts(llm, threads), llm.config
    bandwidth = _bandwidth(facts)  # the model has given its memory back
    if as_json:
        click.echo(json.dumps([{**facts, **asdict(row), "read_bandwidth": bandwidth} for row in rows], indent=2))
    else:
        click.echo("\n".join([_table(facts, rows, bandwidth), *_expert_lines(config, rows)]))


def _facts(llm: LLM, threads: int) -> dict[str, Any]:
    from svdengine.measuring.memory_traffic import parameter_count

    formats = set(llm.model_file.formats.values())
    return {
        "model": f"{llm.config.family} {'/'.join(sorted(formats))}",
        "size_bytes": llm.model_file.size_bytes,
        "parameters": parameter_count(llm.config),
        "backend": llm.executor.name,
        "threads": threads,
        **_placement(llm),
    }


def _placement(llm: LLM) -> dict[str, Any]:
    """Where the weights lie, of an executor that has a device's memory to share out."""
    memory = getattr(llm.executor, "memory", None)
    if memory is None:
        return {}
    return {"gpu_weight_bytes": memory.weights, "host_weight_bytes": memory.host, "placement": memory.describe()}


def _table(facts: dict[str, Any], rows: list[BenchRow], bandwidth: float | None) -> str:
    """A markdown table that can be pasted. Columns that no row has anything for are left out."""
    model = {
        "model": facts["model"],
        "size": f"{facts['size_bytes'] / 2**20:.1f} MiB",
        "params": f"{facts['parameters'] / 1e6:.1f} M",
        "backend": facts["backend"],
        "threads": str(facts["threads"]),
    }
    records = [{**model, **_cells(row, bandwidth)} for row in rows]
    head = [name for name in records[0] if any(record[name] for record in records)]
    cells = [[record[name] or "-" for name in head] for record in records]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [head, ["-" * width for width in widths], *cells]
    table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    if "placement" in facts:
        table += ["", f"{facts['placement']}."]
    if bandwidth:
        cpu = f"The memory of this machine reads {bandwidth:.1f} GB/s with {facts['threads']} threads."
        gpu = f"The memory of the GPU reads {bandwidth:.1f} GB/s."
        table += ["", gpu if facts["backend"] == "cuda" else cpu]
    return "\n".join(table)


def _expert_lines(config: ModelConfig, rows: list[BenchRow]) -> Iterator[str]:
    """How evenly the tests used the experts of a mixture: the first of each name, since paths choose alike."""
    first = {row.test: row for row in reversed(rows) if row.busiest_expert is not None}
    if not first:
        return
    experts = len(config.expert_layers) * config.expert_count
    yield (
        f"\nA token has {config.active_experts} of {config.expert_count} experts in a layer; an even choice gives each"
        f" {100 * config.active_experts / config.expert_count:.0f} % of the tokens."
    )
    for name in dict.fromkeys(row.test for row in rows if row.test in first):
        row = first[name]
        unused = f", and {row.unused_experts:,} of {experts:,} are unused" if row.unused_experts else ""
        yield f"{name}: the busiest expert of a layer has {100 * (row.busiest_expert or 0):.0f} %{unused}."


def _bandwidth(facts: dict[str, Any]) -> float | None:
    """Read bandwidth of the memory that the weights were in, in GB/s."""
    from svdengine.measuring.machine import gpu_bandwidth, measured_bandwidth

    if facts["backend"] == "cuda":
        return gpu_bandwidth()
    return measured_bandwidth(facts["threads"]) if facts["backend"] == "cpu" else None


def _cells(row: BenchRow, bandwidth: float | None) -> dict[str, str]:
    """What a row shows; empty where there is nothing to say."""

    def shown(value: float | None, scale: float, form: str) -> str:
        return "" if value is None else format(scale * value, form)

    return {
        "ffn": row.ffn,
        "test": row.test,
        "tokens/s": f"{row.tokens_per_second:.2f} ± {row.stddev:.2f}",
        "of dense": shown(row.speedup, 1, ".2f"),
        "MB/token": f"{row.bytes_per_token / 1e6:.2f}",
        "GB/s": f"{row.gb_per_second:.2f}",
        "of memory": f"{100 * row.gb_per_second / bandwidth:.0f} %" if bandwidth else "",
        "predicted %": shown(row.predicted_density, 100, ".1f"),
        "computed %": shown(row.active_density, 100, ".1f"),
        "faults/token": shown(row.faults_per_token, 1, ".1f"),
        "major": shown(row.major_faults_per_token, 1, ".1f"),
        "disk MB/token": shown(row.disk_bytes_per_token, 1e-6, ".2f"),
        "experts/token": shown(row.experts_per_token, 1, ".1f"),
        "kept %": shown(row.kept_experts, 100, ".1f"),
        "read %": shown(row.read_experts, 100, ".1f"),
    }


def _progress(text: str) -> None:
    click.echo(f"\r{text} ", err=True, nl=False)
