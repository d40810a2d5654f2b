"""Fixtures: real S3 protocol servers. `s3_bucket` (moto's server in its own process) runs everywhere; `ceph_bucket`
(Ceph's gateway) needs root and the start script that lies beside some checkouts."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it

RGW_UP = Path(__file__).resolve().parents[2] / "shared" / "ci" / "rgw_up.sh"


LONGEST = ("test_demo.py", "test_examples.py", "test_engines_vllm.py", "test_docs.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def free_port() -> int:
    """A port with two free ones after it (Ceph's monitor takes those)."""
    while True:
        with socket.socket() as probe, socket.socket() as second, socket.socket() as third:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
                third.bind(("127.0.0.1", port + 2))
            except (OSError, OverflowError):
                continue
            return port


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """The URL of a moto S3 server that lives as long as the test session."""
    port = free_port()
    command = [sys.executable, "-c", "import sys; from moto.server import main; main(sys.argv[1:])"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"moto_server ended: {log.read().decode()[-2000:]}")
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="session")
def ceph_settings() -> Iterator[dict[str, str]]:
    """Endpoint and keys of a Ceph gateway that lives as long as the test session."""
    if not RGW_UP.exists():
        pytest.skip(f"no {RGW_UP}: the Ceph gateway's start script is not beside this checkout")
    if os.getuid() != 0:
        pytest.skip("the Ceph gateway needs root")
    folder = tempfile.mkdtemp(prefix="rgw")  # short: the daemons' socket paths go below it
    try:
        started = subprocess.run([RGW_UP, folder, str(free_port())], capture_output=True, text=True, timeout=500)
        assert started.returncode == 0, started.stderr[-2000:]
        words = shlex.split(started.stdout.strip().splitlines()[-1])
        yield dict(word.split("=", 1) for word in words[1:])
    finally:
        subprocess.run([RGW_UP.with_name("rgw_down.sh"), folder], capture_output=True, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def use_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, str]) -> str:
    """Point this test (and the processes it starts) at a store and make a bucket there; returns its URI."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    more = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "3", "RMSEARCH_CACHE": str(tmp_path / "cache")}
    nobody = {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    for name, value in {**settings, **more, **nobody}.items():
        monkeypatch.setenv(name, value)
    from rmsearch.storage import s3

    bucket = f"test-{secrets.token_hex(6)}"
    s3.client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def s3_bucket(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """``s3://…`` of a fresh bucket on a real S3 protocol server; AWS_* and RMSEARCH_CACHE are set for this test."""
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    return use_store(monkeypatch, tmp_path, {"AWS_ENDPOINT_URL": moto_endpoint, **keys})


@pytest.fixture
def ceph_bucket(ceph_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """``s3://…`` of a fresh bucket on Ceph, which checks keys and signatures."""
    return use_store(monkeypatch, tmp_path, ceph_settings)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch with one thread: tiny models gain nothing from more, and lose much when other processes are busy."""
    import torch

    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)
