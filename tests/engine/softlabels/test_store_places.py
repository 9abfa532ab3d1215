"""Stores elsewhere: an object store on loopback, through fsspec."""

from __future__ import annotations

import json
import os

import pytest
import torch
from making import made, tokens
from test_store import FORMS, equal

from stillhouse.errors import CheckpointError, DamagedFile
from stillhouse.softlabels import SoftLabels
from stillhouse.softlabels.holding import held
from stillhouse.softlabels.inspection import verify
from stillhouse.softlabels.places import place
from stillhouse.softlabels.rewrite import compact


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A URI in an S3 server of this process."""
    import fsspec
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    name = f"labels-{os.urandom(4).hex()}"  # the server's buckets outlive it
    port = server._server.server_port
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    fsspec.config.conf["s3"] = {"skip_instance_cache": True}
    yield f"s3://{name}/kept"
    fsspec.config.conf.pop("s3")
    server.stop()


def test_a_store_at_a_uri(bucket, tmp_path):
    split = tokens()
    here = made(tmp_path / "here", FORMS["topk"], split=split)
    there = compact(here, place(bucket))
    ids = torch.randperm(30)
    assert equal(there.lookup(ids, split.mask[ids]), here.lookup(ids, split.mask[ids]))
    there.check(split=split)
    kept = list((tmp_path / "cache" / "soft-labels").iterdir())
    assert len(kept) == len(there.manifests)
    assert not any(problem for _, problem in verify(bucket))
    for copy in kept:  # is fetched anew
        copy.write_bytes(b"damaged")
    assert equal(SoftLabels.open(bucket).lookup(ids), here.lookup(ids))
    # the cache answers where the object is damaged or gone, and verify looks at the object
    lost = "shard-000000000000.safetensors"
    there.place.write(lost, b"damaged")
    assert equal(SoftLabels.open(bucket).lookup(ids), here.lookup(ids))
    assert any("changed or damaged" in problem for _, problem in verify(bucket))
    with pytest.raises(DamagedFile, match="changed or damaged"):
        SoftLabels.open(bucket).lookup(ids)
    there.place.remove(lost)
    assert any("is missing" in problem for _, problem in verify(bucket))


def test_is_labelled_and_mended_there(bucket, tmp_path):
    made(bucket, FORMS["sampled"])
    where = place(bucket)
    before = {name: where.read(name) for name in where.names()}
    where.remove("shard-000000000008.json")
    where.write("shard-000000000016.json", b"{}")
    labels = made(bucket, FORMS["sampled"])
    assert len(labels) == 30
    assert {name: where.read(name) for name in where.names()} == before


def test_one_writer_at_a_time_there(bucket):
    where = place(bucket)
    with held(where):
        assert json.loads(where.read("lock.json"))["pid"] == os.getpid()
        with pytest.raises(
            CheckpointError, match=rf"in use: process {os.getpid()} on .* remove .*lock\.json if it is gone"
        ):
            held(where).__enter__()
    assert where.names() == []
    gone = {"pid": 2**22 + 1, "host": __import__("socket").gethostname(), "started": "then"}
    where.write("lock.json", json.dumps(gone).encode())
    with held(where):  # whose process is gone holds nothing
        pass


@pytest.mark.parametrize("uri", ["nowhere://x/y", "s3://labels-none/none"])
def test_a_uri_without_labels_is_refused(uri, bucket):
    with pytest.raises(DamagedFile, match="can't be re"):
        SoftLabels.open(uri)
