"""Threads from the cores that are free to the process, seen through the engines' and the doctor's doors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_models

from rmsearch import cores
from rmsearch.cores import Cores, free_cores
from rmsearch.engines import load_scorer
from rmsearch.machine import machine_lines


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 16 cores without quotas; the folder for planted cgroups."""
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def plant(root: Path, own: str, **files: str) -> None:
    """The process's cgroups and files below the root, ``__`` for a slash."""
    (root / "own").write_text(own)
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("cpu_", "cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_affinity_is_what_is_left_without_quotas(sixteen: Path) -> None:
    assert free_cores() == Cores(16, "affinity")
    plant(sixteen, "0::/\n", cpu_max="max 100000\n")
    assert free_cores() == Cores(16, "affinity")


def test_the_tightest_quota_above_the_process_counts(sixteen: Path) -> None:
    quotas = {"pods__cpu_max": "400000 100000\n", "pods__one__cpu_max": "650000 100000\n"}
    plant(sixteen, "0::/pods/one\n", cpu_max="max 100000\n", **quotas)
    assert free_cores() == Cores(4, f"CPU quota of {sixteen}/pods/cpu.max")


def test_part_of_a_core_is_one(sixteen: Path) -> None:
    plant(sixteen, "0::/\n", cpu_max="50000 100000\n")
    assert free_cores().number == 1


def test_quotas_of_version_1_also_where_only_the_containers_own_are_mounted(sixteen: Path) -> None:
    files = {"cpu,cpuacct__cpu_cfs_quota_us": "250000\n", "cpu,cpuacct__cpu_cfs_period_us": "100000\n"}
    plant(sixteen, "3:memory:/x\n2:cpu,cpuacct:/docker/abc\n0::/\n", **files)
    assert free_cores() == Cores(2, f"CPU quota of {sixteen}/cpu,cpuacct/cpu.cfs_quota_us")
    plant(sixteen, "2:cpu,cpuacct:/\n", **{"cpu,cpuacct__cpu_cfs_quota_us": "-1\n"})
    assert free_cores() == Cores(16, "affinity")


def test_the_users_own_number_comes_first(sixteen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(sixteen, "0::/\n", cpu_max="200000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert free_cores() == Cores(3, "OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert free_cores().number == 2


def test_the_doctor_says_the_number_and_where_it_comes_from(sixteen: Path) -> None:
    plant(sixteen, "0::/\n", cpu_max="200000 100000\n")
    (line,) = (line for line in machine_lines() if line.what == "cores")
    assert line.found.startswith(f"2 for threads (CPU quota of {sixteen}/cpu.max)")


def test_a_loaded_model_has_no_more_threads_than_cores(sixteen: Path, tmp_path: Path) -> None:
    import torch

    plant(sixteen, "0::/\n", cpu_max="200000 100000\n")
    folder, before = tiny_models.bert_cross_encoder(tmp_path / "model"), torch.get_num_threads()
    try:
        for former, then in ((8, 2), (1, 1)):
            torch.set_num_threads(former)
            load_scorer(str(folder), engine="transformers").close_sync()
            assert torch.get_num_threads() == then
        assert os.environ["RAYON_NUM_THREADS"] == "2"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("given", "then"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_torch_sleep_while_they_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, then: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    folder = tiny_models.bert_cross_encoder(tmp_path / "model")
    load_scorer(str(folder), engine="transformers").close_sync()
    assert os.environ["OMP_WAIT_POLICY"] == then
