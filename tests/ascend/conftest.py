"""Compiles once a session what the tests of AscendC kernels run."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_kernels import compiled


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("run_kernels.cpp", tmp_path_factory)
