"""The table of published sparse models in docs/models.md: sizes are what this program makes of their settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from published_settings import (
    AFM,
    BITNET,
    FALCON_40B,
    MINICPM_S,
    NEMOTRON_MINI,
    OPT,
    PROSPARSE,
    RELULLAMA,
    SAKANA_2B,
    SMALLTHINKER_4B,
    SMALLTHINKER_21B,
    SPARSE_QWEN2,
    TURBOSPARSE,
    TURBOSPARSE_MIXTRAL,
    sizes,
)

from svdengine.converters.forecast import forecast
from svdengine.files.hub_name import HubName, parse_model
from svdengine.kernels.formats import WeightFormat
from svdengine.models import config_from_hf

ROOT = Path(__file__).parents[2]
OPT_67B = {"ffn_dim": 16384, "hidden_size": 4096, "num_hidden_layers": 32, "word_embed_proj_dim": 4096}
PUBLISHED: dict[str, dict[str, Any]] = {
    "openbmb/MiniCPM-S-1B-sft": MINICPM_S,
    "SakanaAI/SparseLM2B": SAKANA_2B,
    "SparseLLM/prosparse-llama-2-7b": PROSPARSE,
    "SparseLLM/prosparse-llama-2-13b": PROSPARSE | sizes(5120, 13824, 40, 40, 40, 32000, 4096),
    "SparseLLM/ReluLLaMA-7B": RELULLAMA,
    "SparseLLM/ReluLLaMA-13B": RELULLAMA | sizes(5120, 13824, 40, 40, 40, 32000, 4096),
    "SparseLLM/ReluLLaMA-70B": RELULLAMA | sizes(8192, 28672, 80, 64, 8, 32000, 4096),
    "Tiiny/TurboSparse-Mistral-Instruct": TURBOSPARSE,
    "Tiiny/Bamboo-base-v0_1": TURBOSPARSE | {"vocab_size": 32000},
    "Tiiny/SparseQwen2-7B": SPARSE_QWEN2,
    "facebook/opt-1.3b": OPT,
    "facebook/opt-6.7b": OPT | OPT_67B,
    "SparseLLM/ReluFalcon-40B": FALCON_40B | {"hidden_act": "relu"},
    "arcee-ai/AFM-4.5B": AFM,
    "nvidia/Nemotron-Mini-4B-Instruct": NEMOTRON_MINI,
    "microsoft/bitnet-b1.58-2B-4T": BITNET,
    "Tiiny/SmallThinker-4BA0.6B-Instruct": SMALLTHINKER_4B,
    "Tiiny/SmallThinker-21BA3B-Instruct": SMALLTHINKER_21B,
    "Tiiny/TurboSparse-Mixtral-Instruct": TURBOSPARSE_MIXTRAL,
}


def rows() -> dict[str, list[str]]:
    """Cells of the table, by name."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = text.partition("\n## Published sparse models\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `([^`]+)` \|(.*)\|$", table, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


def expected(settings: dict[str, Any]) -> list[str]:
    """Parameters, size of the file, and memory, as the table has them: q4, and q8 in brackets. BitNet is ternary."""
    config = config_from_hf(settings)
    formats: tuple[WeightFormat, ...] = ("ternary",) if config.family == "bitnet" else ("q4", "q8")
    found = [forecast(config, dtype) for dtype in formats]
    shown = ([x.file_bytes for x in found], [x.memory_bytes for x in found])
    cells = [" GB (".join(f"{size / 1e9:.1f}" for size in each) for each in shown]
    return [f"{found[0].parameters / 1e9:.1f} B", *(cell + (")" if "(" in cell else " GB") for cell in cells)]


def test_the_table_has_them_all() -> None:
    assert list(rows()) == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes(name: str) -> None:
    assert rows()[name][:3] == expected(PUBLISHED[name])
    assert isinstance(parse_model(name), HubName)


def test_the_readme_begins_with_one_of_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"^## Sparse models\n.*?^\$ svdengine \w+ (\S+)", text, flags=re.MULTILINE | re.DOTALL)
    assert first is not None and first[1] in PUBLISHED
