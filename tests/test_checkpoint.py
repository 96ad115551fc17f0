"""Saved folders: timm loads the full width, slicevit every width; broken files are one clear ValueError each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import slicevit
from slicevit.checkpoint import save_pretrained

NAME, GRID = "deit_tiny_patch16_224", "1/4:1:1/4"
KWARGS: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


@pytest.fixture(autouse=True)
def _offline_on_one_thread(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def elastic(name: str = NAME, grid: str = GRID, seed: int = 0, **changes: Any) -> slicevit.ElasticModel:
    torch.manual_seed(seed)
    model = slicevit.create_model(name, grid=grid, **KWARGS | changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    elastic().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved folder to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


# --- there and back --------------------------------------------------------------------------------------


SETTINGS: list[dict[str, Any]] = [
    {},
    {"layout": "flat", "isolation": "mirror", "attn_scale": "full", "norm_eps": 1e-5},
    {"layout": "per_projection", "isolation": "b"},
    {"heads": "scaled", "num_heads": 4},
    {"scope": "mlp", "isolation": "off"},
    {"drop_path_rate": 0.3, "global_pool": "avg"},
    {"in_chans": 1, "class_token": False, "global_pool": "avg"},
    {"init_values": 0.1, "qk_norm": True},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda c: ",".join(c) or "plain")
def test_every_width_comes_back_to_the_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    model = elastic(**changes)
    model.save_pretrained(tmp_path / "new" / "folder")
    back = slicevit.from_pretrained(tmp_path / "new" / "folder")
    assert not back.training
    assert back.widths == model.widths
    assert back.settings == model.settings
    x = images(changes.get("in_chans", 3))
    for width in model.widths:
        assert torch.equal(back(x, width=width), model(x, width=width))
    back.train()
    back(x, width="1/2").sum().backward()


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        (NAME, {}, 32),
        ("deit_tiny_distilled_patch16_224", {}, 32),
        (NAME, {"in_chans": 1, "class_token": False, "global_pool": "avg", "patch_size": 8}, 32),
        ("vit_base_patch16_siglip_224", {}, 32),
        ("eva02_tiny_patch14_224", {"embed_dim": 48}, 28),
        ("beit_base_patch16_224", {}, 32),
    ],
    ids=["deit", "distilled", "changed", "siglip", "eva02", "beit"],
)
def test_timm_alone_loads_the_full_width(name: str, changes: dict[str, Any], size: int, tmp_path: Path) -> None:
    model = elastic(name, "1/2:1:1/2" if "eva" in name else GRID, **{"img_size": size} | changes)
    model.save_pretrained(tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(plain) is type(model.to_timm(1))
    x = images(changes.get("in_chans", 3), size)
    assert torch.equal(plain(x), model(x))
    assert torch.equal(slicevit.from_pretrained(tmp_path)(x, width="1/2"), model(x, width="1/2"))
    assert timm.data.resolve_model_data_config(plain)["input_size"][1:] == (size, size)


def test_head_and_input_size_changed_since_are_saved_as_they_are(tmp_path: Path) -> None:
    model = elastic()
    model.reset_classifier(9)
    model.set_input_size(img_size=48)
    model.save_pretrained(tmp_path)
    x = images(size=48)
    back = slicevit.from_pretrained(tmp_path)
    for width in model.widths:
        assert torch.equal(back(x, width=width), model(x, width=width))
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


def test_what_lies_in_the_folder(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    state, stock = load_file(saved / "model.safetensors"), timm.create_model(NAME, **KWARGS).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in stock.items()}
    config = json.loads((saved / "config.json").read_text())
    assert config["architecture"] == NAME
    assert config["num_classes"] == 5
    assert config["slicevit"]["grid"] == GRID


def test_what_is_passed_beside_the_model_is_written(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    data = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}
    save_pretrained(elastic(), tmp_path, data_config=data, label_names=names, extra={"note": 1})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == names
    assert config["slicevit"]["note"] == 1
    assert tuple(slicevit.from_pretrained(tmp_path).pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert tuple(timm.data.resolve_model_data_config(plain)["mean"]) == (0.1, 0.2, 0.3)


def test_the_names_of_the_classes_stay_with_the_model_until_its_head_is_another(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(elastic().num_classes)]
    save_pretrained(elastic(), tmp_path, label_names=names)
    model = slicevit.from_pretrained(tmp_path)
    assert model.label_names == names
    save_pretrained(model, tmp_path / "again")
    assert slicevit.from_pretrained(tmp_path / "again").label_names == names
    model.reset_classifier(len(names))
    assert model.label_names is None


def test_the_model_card_says_how_to_load_it_and_what_each_width_costs(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: slicevit" in front
    assert "slicevit.from_pretrained" in body
    assert "timm.create_model" in body
    assert "2412.04786" in body
    for width, channels in (("1/4", 12), ("1/2", 24), ("3/4", 36), ("1", 48)):
        assert any(line.startswith(f"| {width} | {channels} |") for line in body.splitlines())
    huggingface_hub.ModelCard(card)


def test_settings_override_the_saved_ones(saved: Path) -> None:
    model = slicevit.from_pretrained(saved, grid="1/2:1:1/4", isolation="off")
    assert str(model.grid) == "1/2:1:1/4"
    half = model.to_timm("1/2")
    assert torch.equal(half.norm.weight, model.norm.weight[:24])


def test_saving_again_replaces_and_a_failed_save_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("slicevit.checkpoint.serialised", full)
        with pytest.raises(ValueError, match="No space left"):
            elastic(seed=3).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other = elastic(seed=3)
    other.save_pretrained(folder)
    assert torch.equal(slicevit.from_pretrained(folder)(images()), other(images()))
    assert {path.name for path in folder.iterdir()} == set(before)


def test_half_precision_is_saved(tmp_path: Path) -> None:
    model = elastic().half()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["norm.weight"].dtype == torch.float16
    back = slicevit.from_pretrained(tmp_path)
    assert torch.equal(back.half().norm.weight, model.norm.weight)


# --- broken files ----------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(path.read_text())
    replaced = change(config)
    path.write_text(json.dumps(config if replaced is None else replaced))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


CONFIG = "config.json"
BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_folder": (shutil.rmtree, "model"),
    "empty_folder": (lambda f: [p.unlink() for p in f.iterdir()], "config.json"),
    "no_config": (lambda f: (f / CONFIG).unlink(), "config.json"),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "config_cut": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text()[:80]), "config.json"),
    "config_empty": (lambda f: (f / CONFIG).write_text(""), "config.json"),
    "config_binary": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00\x80"), "config.json"),
    "config_a_list": (lambda f: (f / CONFIG).write_text("[1, 2]"), "config.json"),
    "not_slicevits": (lambda f: edit(f / CONFIG, lambda c: c.pop("slicevit") and None), "slicevit"),
    "slicevit_a_list": (lambda f: edit(f / CONFIG, lambda c: c.update(slicevit=[])), "config.json"),
    "no_grid": (lambda f: edit(f / CONFIG, lambda c: c["slicevit"].pop("grid") and None), "grid"),
    "bad_grid": (lambda f: edit(f / CONFIG, lambda c: c["slicevit"].update(grid="1/4:1")), "1/4:1"),
    "bad_layout": (lambda f: edit(f / CONFIG, lambda c: c["slicevit"].update(layout="odd")), "odd"),
    "no_architecture": (lambda f: edit(f / CONFIG, lambda c: c.pop("architecture") and None), "architecture"),
    "bad_architecture": (lambda f: edit(f / CONFIG, lambda c: c.update(architecture="vit_odd")), "vit_odd"),
    "bad_argument": (lambda f: edit(f / CONFIG, lambda c: c["model_args"].update(odd_argument=1)), "odd_argument"),
    "no_classes": (lambda f: edit(f / CONFIG, lambda c: c.pop("num_classes") and None), "num_classes"),
    "other_classes": (lambda f: edit(f / CONFIG, lambda c: c.update(num_classes=6)), "head"),
    "weights_cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors",
    ),
    "weights_empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "weights_text": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "model.safetensors"),
    "weights_lack_one": (lambda f: weights(f, lambda s: s.pop("norm.weight")), "norm.weight"),
    "weights_have_more": (lambda f: weights(f, lambda s: s.update(odd=torch.zeros(1))), "odd"),
    "weights_of_other_shape": (lambda f: weights(f, lambda s: s.update({"norm.bias": torch.zeros(3)})), "norm.bias"),
}


@pytest.mark.parametrize("way", BREAK)
def test_a_broken_folder_is_one_clear_error(way: str, folder: Path) -> None:
    damage, named = BREAK[way]
    damage(folder)
    with pytest.raises(ValueError, match=r"\S") as error:
        slicevit.from_pretrained(folder)
    message = str(error.value)
    assert type(error.value) is ValueError
    assert named in message
    assert str(folder) in message or folder.name in message or named not in (CONFIG, "model.safetensors")
    assert "\n" not in message
    assert len(message) < 500


def test_an_unreachable_hub_id_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="nobody/nothing") as error:
        slicevit.from_pretrained("nobody/nothing")
    assert "\n" not in str(error.value)


def test_nothing_pickled_is_ever_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(elastic().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        slicevit.from_pretrained(folder)
    torch.save(elastic().state_dict(), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        slicevit.from_pretrained(folder)


# --- the Hub ---------------------------------------------------------------------------------------------


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub is stood in for by a folder; what is uploaded is downloaded again by `from_pretrained`."""
    hub, calls = tmp_path / "hub", []

    class FakeApi:
        def __init__(self, *args: Any, **kwargs: Any):
            calls.append(("init", kwargs))

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            calls.append(("create_repo", {"repo_id": repo_id, **kwargs}))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")

        def upload_folder(self, **kwargs: Any) -> str:
            calls.append(("upload_folder", kwargs))
            shutil.copytree(kwargs["folder_path"], hub)
            return "https://huggingface.co/me/mine/commit/abc"

    monkeypatch.setattr("slicevit.checkpoint.HfApi", FakeApi)
    monkeypatch.setattr("slicevit.checkpoint.hf_hub_download", lambda repo, name, **kwargs: str(hub / name))
    model = elastic()
    address = model.push_to_hub("me/mine", private=True, token="secret", message="Hello")
    assert address == "https://huggingface.co/me/mine/commit/abc"
    arguments = dict(calls)
    assert arguments["init"]["token"] == "secret"
    assert arguments["create_repo"] == {"repo_id": "me/mine", "private": True, "exist_ok": True}
    assert arguments["upload_folder"]["repo_id"] == "me/mine"
    assert arguments["upload_folder"]["commit_message"] == "Hello"
    assert {path.name for path in hub.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert "me/mine" in (hub / "README.md").read_text()
    back = slicevit.from_pretrained("me/mine")
    for width in model.widths:
        assert torch.equal(back(images(), width=width), model(images(), width=width))
