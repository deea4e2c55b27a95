"""Encoder files: writing and loading, and rejection of files that do not match."""

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from relvit_d2 import __version__
from relvit_d2.conversion.encoder_file import (
    MAX_HEADER,
    feature_difference,
    load_encoder_weights,
    read_encoder,
    save_encoder,
)
from relvit_d2.conversion.export import _read
from relvit_d2.encoders import ENCODERS, Encoder, build_encoder
from relvit_d2.utils.errors import UserError


def small(**arguments: object) -> Encoder:
    return build_encoder("vit_nano", **({"patch_size": 4, "img_size": 32} | arguments))


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_encoder_is_saved_and__read(name: str, tmp_path: Path) -> None:
    source, target = build_encoder(name, img_size=32), build_encoder(name, img_size=32)
    save_encoder(source, tmp_path / "encoder.safetensors", {"iteration": 7})
    report = load_encoder_weights(target, tmp_path / "encoder.safetensors")
    assert report.share == 1.0
    assert not report.missing + report.unexpected + report.resized + report.fresh
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )
    assert feature_difference(target, tmp_path / "encoder.safetensors") == 0.0
    assert read_encoder(tmp_path / "encoder.safetensors")[1]["iteration"] == 7


def test_a_position_embedding_absent_in_pretraining_is_fresh_not_missing(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small(pos_embed=False), path, {})
    target = small(pos_embed=True)
    before = target.state_dict()["vit.pos_embed"].clone()
    report = load_encoder_weights(target, path)
    assert report.fresh == ["vit.pos_embed"]
    assert report.share == 1.0
    assert feature_difference(target, path) < 1e-6
    assert torch.equal(target.state_dict()["vit.pos_embed"], before)


@pytest.mark.parametrize("name", ["vit_nano", "t2t_vit_14"])
def test_positions_that_an_encoder_does_not_use_are_not_compared(name: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(build_encoder(name, img_size=32), path, {})
    target = build_encoder(name, img_size=32, pos_embed=False)
    report = load_encoder_weights(target, path)
    assert len(target.lacks(report.metadata["encoder"])) == 1
    assert feature_difference(target, path) < 1e-6


def test_a_position_embedding_of_another_grid_is_resized(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small(img_size=32), path, {})
    target = small(img_size=48)
    report = load_encoder_weights(target, path)
    assert report.resized == ["vit.pos_embed"]
    assert feature_difference(target, path) < 1e-6


def test_a_wrong_tensor_changes_the_features(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    target = small()
    save_encoder(target, path, {})
    with torch.no_grad():
        target.state_dict()["vit.blocks.3.mlp.fc2.weight"][0].add_(0.5)
    assert feature_difference(target, path) > 1e-3


def test_weights_that_do_not_match_are_rejected_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small(), path, {})
    with pytest.raises(UserError, match=r"vit_nano.*vit_tiny.*MODEL.ENCODER.NAME"):
        load_encoder_weights(build_encoder("vit_tiny", patch_size=4, img_size=32), path)
    with pytest.raises(UserError, match=r"MODEL.ENCODER.PATCH_SIZE 4"):
        load_encoder_weights(small(patch_size=8), path)
    tensors, _ = read_encoder(path)
    poor = small()
    kept = {name: value.clone() for name, value in poor.state_dict().items()}
    save_encoder(poor, path, {})
    tensors = {name: value for name, value in tensors.items() if ".mlp." not in name}
    save_file(
        tensors, str(path), {"encoder": '{"name": "vit_nano", "patch_size": 4, "img_size": 32, "pos_embed": true}'}
    )
    with pytest.raises(UserError, match="% of the encoder's values match"):
        load_encoder_weights(poor, path)
    assert all(torch.equal(kept[name], value) for name, value in poor.state_dict().items())


def test_other_files_are_reported(tmp_path: Path) -> None:
    text, bare = tmp_path / "text.safetensors", tmp_path / "bare.safetensors"
    text.write_text("these are no weights")
    save_file({"x": torch.zeros(1)}, str(bare))
    for path, message in (
        (text, "not a readable safetensors"),
        (bare, "no description"),
        (tmp_path / "no.safetensors", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            load_encoder_weights(small(), path)


def test_a_changed_bit_is_reported_as_damage(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small(), path, {"iteration": 7})
    whole = path.read_bytes()
    tensors, metadata = read_encoder(path)
    for place in (len(whole) - 1, len(whole) // 2, whole.index(b"iteration") + 13, whole.index(b"digest") + 12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"encoder.safetensors' is (incomplete or damaged|not a readable)"):
            load_encoder_weights(small(), path)
    # Files of earlier versions have no digest.
    save_file(tensors, str(path), {key: json.dumps(value) for key, value in metadata.items()})
    assert read_encoder(path)[1] == metadata == {"encoder": small().to_config(), "version": __version__, "iteration": 7}


def test_a_truncated_file_is_reported_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small(), path, {})
    whole = path.read_bytes()
    for length in (0, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"encoder.safetensors' is incomplete or damaged \([\d,]+ bytes\)"):
            load_encoder_weights(small(), path)


@pytest.mark.parametrize(
    "description",
    [
        '{"name": "vit_nano", "img_size": 100000000, "patch_size": 16}',
        '{"name": "swin_tiny", "img_size": 1000000, "patch_size": 4, "pos_embed": false}',
        '{"name": "vit_nano", "img_size": 32, "patch_size": 4, "in_chans": 1000000000}',
        '{"name": "vit_base", "img_size": 32, "patch_size": 4}',
        '{"name": "vit_nano", "img_size": "32", "patch_size": 4}',
        '{"name": "vit_nano", "img_size": 32, "patch_size": 0}',
        '{"name": "vit_nano", "img_size": 32, "patch_size": 4, "drop_path": "x"}',
        '{"name": 3}',
        '["vit_nano"]',
        "no json",
        "[" * 100_000,
    ],
)
def test_descriptions_that_do_not_fit_the_tensors_build_nothing(description: str, tmp_path: Path) -> None:
    path, encoder = tmp_path / "encoder.safetensors", small()
    save_file(encoder.state_dict(), str(path), {"encoder": description})
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**29, hard))
    try:
        for read in (lambda: _read(path), lambda: feature_difference(encoder, path)):
            with pytest.raises(UserError, match=r"encoder\.safetensors.* write it again") as caught:
                read()
            assert len(str(caught.value)) < 1000
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_metadata_above_the_limit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(small(), path, {"notes": "a" * MAX_HEADER})
    with pytest.raises(UserError, match=r"bytes of metadata, above the limit of 16,777,216: write it again"):
        load_encoder_weights(small(), path)


def test_names_of_tensors_are_printed_without_control_characters(tmp_path: Path) -> None:
    path, encoder = tmp_path / "encoder.safetensors", small()
    save_encoder(encoder, path, {})
    tensors, metadata = read_encoder(path)
    save_file(
        tensors | {"x\x1b[2J\nweights 'other'": torch.zeros(1)},
        str(path),
        {key: json.dumps(value) for key, value in metadata.items()},
    )
    text = str(load_encoder_weights(encoder, path))
    assert "x\\x1b[2J\\nweights" in text and all(line.isprintable() for line in text.splitlines())
