"""S3 over real protocol servers: moto's everywhere, Ceph's gateway where it can be started (only it checks keys)."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rmsearch.errors import AccessError, ConfigError, InputMissingError, RetryableError
from rmsearch.storage import folders, local, records, s3, s3_streams, uri

pytestmark = pytest.mark.s3


@pytest.fixture(params=["moto", "ceph"])
def bucket(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue({"moto": "s3_bucket", "ceph": "ceph_bucket"}[request.param]))


def put(where: str, data: bytes) -> None:
    with uri.writer(where) as stream:
        stream.write(data)


def get(where: str) -> bytes:
    with uri.reader(where) as stream:
        return stream.read()


def uploads(bucket: str) -> list[Any]:
    found = s3.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    return list(found.get("Uploads", []))


def test_round_trip_and_facts(bucket: str) -> None:
    one = f"{bucket}/a folder/ä?#%+&=.txt"
    assert not uri.exists(one) and not uri.is_folder(bucket)
    put(one, b"12345")
    assert get(one) == b"12345" and uri.size(one) == 5 and uri.exists(one) and not uri.is_folder(one)
    assert uri.is_folder(f"{bucket}/a folder") and uri.exists(f"{bucket}/a folder/") and uri.is_folder(bucket)
    assert not uri.exists(f"{bucket}/a fold") and uri.list_files(bucket) == [one]
    assert uri.fetch(one).read_bytes() == b"12345" and uri.fetch(one).name == "ä?#%+&=.txt"
    first, folder = uri.digest(one), uri.digest(bucket)
    put(one, b"54321")
    assert uri.digest(one) != first and uri.digest(bucket) != folder and uri.fetch(one).read_bytes() == b"54321"
    put(one, b"")
    assert get(one) == b"" and uri.size(one) == 0
    uri.remove(f"{bucket}/a folder")
    uri.remove(f"{bucket}/a folder")
    assert not uri.exists(one)
    with pytest.raises(ConfigError, match="whole bucket"):
        uri.remove(bucket)


@pytest.mark.parametrize("suffix", ["json", "jsonl.gz", "csv", "parquet", "parquet.gz"])
def test_records(bucket: str, suffix: str) -> None:
    rows = [{"id": str(number), "text": "ü" * 50} for number in range(500)]
    where = f"{bucket}/rows.{suffix}"
    assert records.write_records(where, rows) == 500 and list(records.read_records(where)) == rows


def test_multipart(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_streams, "PART_BYTES", 5 << 20)  # the smallest that S3 takes
    data = b"".join(number.to_bytes(4, "big") for number in range(4_200_000))  # four parts
    with uri.writer(f"{bucket}/large") as stream:
        for start in range(0, len(data), 1_000_003):
            stream.write(data[start : start + 1_000_003])
        assert stream.tell() == len(data) and not uri.exists(f"{bucket}/large")
    assert get(f"{bucket}/large") == data
    head = s3.client().head_object(Bucket=bucket.removeprefix("s3://"), Key="large")
    assert head["ETag"].strip('"').endswith("-4") and not uploads(bucket)
    assert uri.fetch(f"{bucket}/large").read_bytes() == data


def test_abort_leaves_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_streams, "PART_BYTES", 5 << 20)
    put(f"{bucket}/a", b"old")
    with pytest.raises(KeyError), uri.writer(f"{bucket}/a") as stream:
        for _ in range(12):
            stream.write(bytes(1 << 20))
        stream.close()  # closing completes nothing
        raise KeyError
    assert get(f"{bucket}/a") == b"old" and not uploads(bucket)


def test_a_part_that_fails_ends_the_write_soon(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_streams, "PART_BYTES", 5 << 20)
    sent = []
    with pytest.raises(RetryableError), uri.writer(f"{s3_bucket}/a") as stream:
        stream.write(bytes(6 << 20))
        s3.client().abort_multipart_upload(**stream._where, UploadId=stream._upload_id)  # type: ignore[attr-defined]
        for number in range(50):
            stream.write(bytes(5 << 20))
            sent.append(number)
    assert len(sent) < 20 and not uri.exists(f"{s3_bucket}/a")


KILLED = """
import sys, time
from rmsearch.storage import s3_streams, uri
s3_streams.PART_BYTES = 5 << 20
with uri.writer(sys.argv[1]) as stream:
    stream.write(bytes(11 << 20))
    print("written", flush=True)
    time.sleep(60)
"""


def test_sigkill_leaves_the_old_object(s3_bucket: str) -> None:
    put(f"{s3_bucket}/a", b"old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, f"{s3_bucket}/a"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    process.kill()
    process.wait()
    assert get(f"{s3_bucket}/a") == b"old"


def test_put_if_absent(bucket: str) -> None:
    assert uri.put_if_absent(f"{bucket}/lock", b"1") and not uri.put_if_absent(f"{bucket}/lock", b"2")
    assert get(f"{bucket}/lock") == b"1"


def test_what_is_missing(bucket: str) -> None:
    for call in (get, uri.digest, uri.size, uri.fetch, uri.list_files, uri.fetch_folder):
        with pytest.raises(InputMissingError) as caught:
            call(f"{bucket}/none")
        assert caught.value.exit_code == 2 and f"{bucket}/none" in str(caught.value)
    absent = f"{bucket}-absent/x"
    for call in (get, uri.digest, uri.list_files):
        with pytest.raises(InputMissingError, match="bucket"):
            call(absent)
    with pytest.raises(InputMissingError, match="does not exist"):
        put(absent, b"")
    assert not uri.exists(absent) and not uri.is_folder(absent)


def test_wrong_keys(ceph_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f"{ceph_bucket}/a", b"1")
    secret = "wrong" * 8
    for name, value in (
        ("AWS_SECRET_ACCESS_KEY", secret),
        ("AWS_ACCESS_KEY_ID", "nobody"),
        ("AWS_ACCESS_KEY_ID", "a\n"),
    ):
        monkeypatch.setenv(name, value)
        for call in (get, uri.digest, uri.exists, uri.list_files, uri.remove):
            with pytest.raises(AccessError) as caught:
                call(f"{ceph_bucket}/a")
            message = str(caught.value)
            assert caught.value.exit_code == 2 and "\n" not in message and secret not in message
        with pytest.raises(AccessError):
            put(f"{ceph_bucket}/b", b"")


def test_no_keys(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessError, match="AWS_ACCESS_KEY_ID"):
        get(f"{s3_bucket}/a")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessError, match="ProfileNotFound"):
        get(f"{s3_bucket}/a")


@pytest.mark.parametrize("attempts", ["1", "2"])
def test_an_endpoint_that_does_not_answer(s3_bucket: str, monkeypatch: pytest.MonkeyPatch, attempts: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:hidden@127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    started = time.monotonic()
    for call in (get, uri.digest, uri.list_files, uri.exists):
        with pytest.raises(RetryableError, match="cannot reach the store") as caught:
            call(f"{s3_bucket}/a")
        assert caught.value.exit_code == 75 and "hidden" not in str(caught.value)
    assert time.monotonic() - started < 20


def test_settings_that_cannot_work(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        get(f"{s3_bucket}/a")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(ConfigError, match="AWS_MAX_ATTEMPTS"):
        get(f"{s3_bucket}/a")


@pytest.fixture
def breaking(moto_endpoint: str) -> Iterator[tuple[str, list[int]]]:
    """A proxy before the store that cuts each connection after 3 MB of answer; gives its URL and counts its cuts."""
    target = ("127.0.0.1", int(moto_endpoint.rsplit(":", 1)[1]))
    cuts: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def one(near: socket.socket) -> None:
            with near, socket.create_connection(target) as far:
                near.settimeout(20)
                request = b""
                while b"\r\n\r\n" not in request:
                    request += near.recv(1 << 16)
                far.sendall(request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
                left = 3_000_000
                while left > 0 and (data := far.recv(min(left, 1 << 16))):
                    near.sendall(data)
                    left -= len(data)
                if left <= 0:
                    cuts.append(1)

        def serve() -> None:
            while True:
                try:
                    near, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(near,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", cuts
        server.shutdown(socket.SHUT_RDWR)


def test_a_broken_download_goes_on_where_it_broke(
    s3_bucket: str, breaking: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"".join(number.to_bytes(4, "big") for number in range(2_500_000))
    put(f"{s3_bucket}/a", data)
    endpoint, cuts = breaking
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert get(f"{s3_bucket}/a") == data and len(cuts) >= 3


def test_an_object_replaced_during_a_read(
    s3_bucket: str, breaking: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch, moto_endpoint: str
) -> None:
    put(f"{s3_bucket}/a", bytes(10_000_000))
    monkeypatch.setenv("AWS_ENDPOINT_URL", breaking[0])
    with pytest.raises(RetryableError, match="replaced"), uri.reader(f"{s3_bucket}/a") as stream:
        stream.read(1000)
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto_endpoint)
        put(f"{s3_bucket}/a", bytes(9_000_000))
        stream.read()


def model_like(folder: Path) -> Path:
    for name, data in (
        ("config.json", b"{}"),
        ("rmsearch.json", b"{}"),
        ("w.safetensors", bytes(100)),
        ("sub/t.txt", b"t"),
    ):
        put(str(folder / name), data)
    return folder


def test_folders(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, where = model_like(tmp_path / "source"), f"{bucket}/models/m"
    put(f"{where}/checkpoint-1/state", b"of the user")
    uri.upload_folder(source, where)
    fetched = uri.fetch_folder(where)
    assert fetched.name == "m" and local.walk(fetched) == sorted([*local.walk(source), "checkpoint-1/state"])
    assert (fetched / "w.safetensors").read_bytes() == bytes(100)
    assert uri.fetch_folder(where, lambda name: name.endswith(".json")) != fetched
    (fetched / "sub" / "t.txt").unlink()  # a broken download: the mark is missing, what is there is kept
    (fetched.parent / ".complete").unlink()
    assert local.walk(uri.fetch_folder(where)) == local.walk(fetched) and (fetched / "sub" / "t.txt").exists()
    (source / "w.safetensors").unlink()
    put(str(source / "w2.safetensors"), b"2")
    uri.upload_folder(source, where)
    names = [name.removeprefix(where + "/") for name in uri.list_files(where)]
    assert "w.safetensors" not in names and "w2.safetensors" in names and "checkpoint-1/state" in names


def test_a_broken_upload_is_seen_and_goes_on(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, where = model_like(tmp_path / "source"), f"{bucket}/m"
    client, sent = s3.client(), []
    upload = client.upload_file

    def flaky(path: str, *rest: Any, **more: Any) -> None:
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(Path(path).name)
        upload(path, *rest, **more)

    monkeypatch.setattr(folders, "_FILES_AT_ONCE", 1)
    monkeypatch.setattr(client, "upload_file", flaky)
    with pytest.raises(KeyboardInterrupt):
        uri.upload_folder(source, where)
    with pytest.raises(InputMissingError, match="not finished"):
        uri.fetch_folder(where)
    assert not uri.exists(f"{where}/rmsearch.json")
    before, sent[:] = list(sent), []
    monkeypatch.setattr(
        client, "upload_file", lambda path, *rest, **more: (sent.append(path), upload(path, *rest, **more))
    )
    uri.upload_folder(source, where)
    assert len(before) == 2 and [Path(path).name for path in sent][-1] == "rmsearch.json" and len(sent) == 2
    assert local.walk(uri.fetch_folder(where)) == local.walk(source)
    uri.remove(f"{where}/config.json")
    with pytest.raises(InputMissingError, match=r"lacks 'config\.json'"):
        uri.fetch_folder(where)


def test_a_folder_of_others_has_no_manifest(bucket: str) -> None:
    put(f"{bucket}/data/corpus.jsonl", b"{}\n")
    s3.client().put_object(
        Bucket=bucket.removeprefix("s3://"), Key="data/", Body=b""
    )  # a console's empty folder object
    assert local.walk(uri.fetch_folder(f"{bucket}/data/")) == ["corpus.jsonl"]
    assert uri.list_files(f"{bucket}/data") == [f"{bucket}/data/corpus.jsonl"]


@pytest.mark.parametrize("key", ["m/../../evil", "m//etc/evil"])
def test_a_key_that_leaves_the_folder(ceph_bucket: str, key: str) -> None:
    s3.client().put_object(Bucket=ceph_bucket.removeprefix("s3://"), Key=key, Body=b"")
    with pytest.raises(ConfigError, match="outside of the folder"):
        uri.fetch_folder(f"{ceph_bucket}/m")


def test_a_listing_of_several_pages(bucket: str) -> None:
    for number in range(7):
        put(f"{bucket}/many/{number}", b"")
    assert [item.relative for item in s3.list_objects(f"{bucket}/many", page=3)] == list("0123456")


def test_clients_are_shared_by_threads_and_renewed_by_settings(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(s3.client())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1 and found[0] is s3.client()
    config = found[0].meta.config
    assert config.request_checksum_calculation == config.response_checksum_validation == "when_required"
    assert config.retries["mode"] == "adaptive" and config.s3["addressing_style"] == "path"
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    assert s3.client() is not found[0] and s3.client().meta.region_name == "eu-west-1"
    for name in ("AWS_ENDPOINT_URL", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name)
    config = s3.client().meta.config
    assert config.retries["total_max_attempts"] >= 8 and not config.s3.get("addressing_style")
