"""`sparsecert data`: what is there, what is missing, what is damaged, and how to get it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.__main__ import main
from bench.data import DATASETS, load


def answers(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    assert main(["data", *map(str, words), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def write_binary_cifar(folder: Path) -> None:
    folder.mkdir(parents=True)
    for place in range(5):
        (folder / f"data_batch_{place + 1}.bin").write_bytes((bytes([place]) + bytes(3072)) * 4)
    (folder / "test_batch.bin").write_bytes((b"\x01" + bytes(3072)) * 2)


def test_each_set_of_an_empty_folder_is_missing_with_the_way_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answers(capsys, "--data-dir", tmp_path)
    assert [one["name"] for one in found] == list(DATASETS)
    assert found[0]["state"] == "embedded"
    assert found[0]["digest"] == load("digits").digest
    for one in found[1:]:
        assert (one["state"], one["usable"], one["digest"]) == ("missing", False, None)
        assert one["files"]
        assert one["origin"]
        assert str(tmp_path) in one["problem"]
    assert list(tmp_path.iterdir()) == []
    assert main(["data", "--data-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in DATASETS)
    assert "cifar-100-python.tar.gz (md5 eb9058c3a382ffc7106e4002c42a8d85)" in shown


def test_a_set_is_there_incomplete_or_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary_cifar(folder)
    (found,) = answers(capsys, "cifar10", "--data-dir", tmp_path)
    assert (found["state"], found["images"], found["usable"]) == ("there", [18, 2, 2], True)
    assert found["digest"] == load("cifar10", tmp_path).digest
    assert found["note"].startswith("not the published CIFAR-10 files")
    (folder / "data_batch_2.bin").write_bytes(b"x")
    (found,) = answers(capsys, "cifar10", "--data-dir", tmp_path, code=2)
    assert found["state"] == "damaged"
    assert "data_batch_2.bin has 1 bytes" in found["problem"]
    (folder / "data_batch_2.bin").unlink()
    (found,) = answers(capsys, "cifar10", "--data-dir", tmp_path, code=2)
    assert found["state"] == "incomplete"
    assert "data_batch_2.bin is missing" in found["problem"]


def test_a_named_set_that_cannot_be_used_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "svhn", "--data-dir", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("sparsecert: train_32x32.mat is missing")
    assert shown.err.count("\n") == 1
    assert main(["data", "cifar-100"]) == 2
    assert "did you mean 'cifar100'" in capsys.readouterr().err


def test_a_damaged_archive_is_damaged_and_nothing_in_it_is_unpickled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "cifar10_exact_subset.npz", train_images=np.array([print], dtype=object))
    (found,) = answers(capsys, "cifar10-subset", "--data-dir", tmp_path, code=2)
    assert found["state"] == "damaged"
    assert "allow_pickle=False" in found["problem"]
