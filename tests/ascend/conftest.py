"""Compiles once a session what the tests of AscendC kernels run."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_kernels import HERE, compile_host, missing_compiler


def compiled(name: str, factory: pytest.TempPathFactory) -> Path:
    """The executable of a source of this folder. Skips the test when there is no compiler."""
    reason = missing_compiler()
    if reason:
        pytest.skip(reason)
    return compile_host(HERE / name, factory.mktemp("ascend"))


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("run_kernels.cpp", tmp_path_factory)
