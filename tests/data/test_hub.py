"""Files of the Hugging Face Hub, from a server on loopback that answers as it does."""

from __future__ import annotations

import hashlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.data.corpora import CorpusFile, fetch_corpus
from megatron.data.download import Patience
from megatron.data.hub import download_from_hub
from megatron.errors import UserError
from tests.data.http_server import Served, serve

BODY = random.Random(1).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()
ADDRESS = "hf://datasets/owner/name/train/a b.zst"
QUICK = Patience(attempts=2, pause=0.01, timeout=5)
# The Hub redirects to another host, where the bytes are, and says with it what they must be.
PAGE, STORED = "/datasets/owner/name/resolve/main/train/a%20b.zst", "/storage/a"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serve({STORED: BODY}) as served:
        elsewhere = served.url.replace("127.0.0.1", "localhost")
        served.redirects[PAGE] = (f"{elsewhere}{STORED}", {"X-Linked-Etag": f'"{SHA}"', "X-Linked-Size": "300000"})
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield served


def fails(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        download_from_hub(ADDRESS, folder / "a.zst", patience=QUICK)
    assert "\n" not in str(caught.value) and PAGE in str(caught.value)
    assert not (folder / "a.zst").exists()


def test_a_file_is_fetched_once_and_resumed(hub: Served, tmp_path: Path) -> None:
    hub.break_after = [100_000]
    assert fetch_corpus("one", tmp_path, corpora={"one": (CorpusFile(ADDRESS),)}, patience=QUICK) == [
        str(tmp_path / "a b.zst")
    ]
    assert (tmp_path / "a b.zst").read_bytes() == BODY
    wanted = [(PAGE, None), (STORED, None), (PAGE, "bytes=100000-"), (STORED, "bytes=100000-")]
    assert hub.requests == wanted
    assert download_from_hub(ADDRESS, tmp_path / "a b.zst") == tmp_path / "a b.zst"
    assert hub.requests == wanted


def test_an_interrupted_call_is_resumed_by_the_next(hub: Served, tmp_path: Path) -> None:
    hub.break_after = [100_000]
    with pytest.raises(UserError, match="ended after 100000 of 300000 bytes, 1 times; .* resumes"):
        download_from_hub(ADDRESS, tmp_path / "a.zst", patience=Patience(attempts=1))
    assert download_from_hub(ADDRESS, tmp_path / "a.zst", patience=QUICK).read_bytes() == BODY
    assert hub.requests[-1] == (STORED, "bytes=100000-")


def test_the_checksum_that_the_hub_announces_is_checked(hub: Served, tmp_path: Path) -> None:
    hub.redirects[PAGE][1]["X-Linked-Etag"] = f'"{"0" * 64}"'
    fails(tmp_path, "wrong checksum, sha256 is .* instead of 0000")
    assert not list(tmp_path.iterdir())
    hub.redirects[PAGE][1]["X-Linked-Etag"] = '"git-s-own"'
    assert download_from_hub(ADDRESS, tmp_path / "a.zst", patience=QUICK).read_bytes() == BODY


def test_the_token_goes_to_the_hub_only(hub: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download_from_hub(ADDRESS, tmp_path / "a.zst", patience=QUICK)
    assert hub.tokens == [(PAGE, "Bearer hf_secret")] * 2 + [(STORED, None)]


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {"X-Error-Code": "EntryNotFound"}, "404 Client Error.*Entry Not Found.*; .* --input"),
        (401, {"X-Error-Code": "RepoNotFound"}, "owner/name is not open to everybody; log in with `hf auth login`"),
        (403, {"X-Error-Code": "GatedRepo"}, "owner/name is not open to everybody; log in with `hf auth login`"),
        (503, {}, "503 .*; check the network"),
    ],
)
def test_a_refusal_is_one_line(hub: Served, tmp_path: Path, status: int, headers: dict[str, str], message: str) -> None:
    hub.refusals[PAGE] = (status, headers)
    fails(tmp_path, message)


def test_no_network_is_one_line(hub: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails(tmp_path, "HF_HUB_OFFLINE is set; unset it")
    assert not hub.tokens
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    fails(tmp_path, "refused; check the network")
