"""How many threads the default is: cores, or what a control group leaves of their time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from svdengine.kernels import control_groups
from svdengine.kernels.cores import default_threads


@pytest.mark.parametrize(
    ("membership", "quotas", "expected"),
    [
        ("0::/\n", {}, 64),
        ("0::/app\n", {"app/cpu.max": "max 100000"}, 64),
        ("0::/app\n", {"app/cpu.max": "250000 100000"}, 2),
        ("0::/app/inner\n", {"app/cpu.max": "150000 100000", "app/inner/cpu.max": "400000 100000"}, 1),
        ("0::/app\n", {"app/cpu.max": "20000 100000"}, 1),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
        ("0::/app\n", {"app/cpu.max": "nonsense"}, 64),
    ],
)
def test_a_control_groups_share_of_time_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, quotas: dict[str, str], expected: int
) -> None:
    (tmp_path / "membership").write_text(membership)
    for name, text in quotas.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    monkeypatch.setattr(control_groups, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert default_threads() == expected
