"""What a run ends with: how long it took, how good the student is, how sparse it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of a run, and the student after it."""

    name: str
    seconds: float
    tokens: int  # that were trained on, each as often as it was
    perplexity: float  # on held-out text
    zeros: float  # share of the gates


@dataclass(frozen=True)
class Report:
    """The whole run. The first stage is the teacher, the second ReLU in place of SiLU and nothing else."""

    source: str
    text: str  # what was trained on, in words
    activation: str  # of ACTIVATIONS
    threshold: float  # of fatrelu
    stages: tuple[Stage, ...]
    layer_zeros: tuple[float, ...]  # share of the gates of each layer of the student
    held_out_tokens: int


def table(report: Report) -> str:
    """The stages as a table that can be pasted."""
    head = ("step", "time", "tokens", "held-out perplexity", "of the teacher's", "zeros in the gates")
    first = report.stages[0].perplexity
    rows = [
        (
            stage.name,
            duration(stage.seconds) if stage.seconds else "",
            f"{stage.tokens:,}" if stage.tokens else "",
            f"{stage.perplexity:,.2f}",
            f"{stage.perplexity / first:.3f}",
            f"{stage.zeros:.1%}" if index else "",
        )
        for index, stage in enumerate(report.stages)
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [_line(head, widths), _line(tuple("-" * w for w in widths), widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)])


def summary(report: Report) -> str:
    """The table, and the layers."""
    zeros = " ".join(f"{100 * z:.0f}" for z in report.layer_zeros)
    return f"{table(report)}\n\nZeros per layer, first to last, in %: {zeros}"


def card(report: Report) -> str:
    """The README of the output: what it is, how it was made, how good it is."""
    data = json.dumps(asdict(report), indent=2)
    how = {
        "fatrelu": "while the share of gates below a threshold rose (FATReLU)",
        "relu": "with a penalty that drove the gates to zero",
    }[report.activation]
    return f"""# {report.source}, with ReLU in its FFNs

Made by `python -m svdengine.tools.relufy` from {report.source} by self-distillation: SiLU in the FFNs gave way to
ReLU, the FFNs learned layer by layer to lead to the original's hidden states, then end to end to give its next-token
distribution, {how}. Trained on {report.text};
measured on {report.held_out_tokens:,} tokens that were held out.

{summary(report)}

Convert it with `svdengine convert`.{_for_transformers(report) if report.activation == "fatrelu" else ""}

<details><summary>The figures as JSON</summary>

```json
{data}
```

</details>
"""


def _for_transformers(report: Report) -> str:
    return f""" For transformers, which has no FATReLU, say first:

```python
from torch.nn import Threshold
from transformers.activations import ACT2FN

ACT2FN["fatrelu"] = Threshold, {{"threshold": {report.threshold!r}, "value": 0.0}}
```"""


def duration(seconds: float) -> str:
    """Seconds as 42 s, 12 min or 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
