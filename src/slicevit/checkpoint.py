"""A model's folder: config.json and model.safetensors, which timm loads at full width and slicevit at every width.

BatchNorm statistics of narrow widths lie in statistics.safetensors (see `saved_statistics`).

Nothing but JSON and safetensors is read from a folder or the Hub.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from timm.models._hub import save_config_for_hf

from slicevit.elastic import ElasticModel, SliceSettings, create_model
from slicevit.files import replacing
from slicevit.model_card import model_card
from slicevit.reasons import one_line
from slicevit.saved_statistics import STATISTICS, read_statistics, write_statistics
from slicevit.version import __version__

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
SEGMENTATION: Final = "segmentation"
DETECTION: Final = "detection"
COMMANDS = {SEGMENTATION: "segment", DETECTION: "detect"}  # what makes models of a task; those of none are classifiers
KINDS = {SEGMENTATION: "segmenter", DETECTION: "detector"}


def save_pretrained(
    model: ElasticModel,
    folder: str | Path,
    *,
    data_config: dict[str, Any] | None = None,
    label_names: list[str] | None = None,
    extra: dict[str, Any] | None = None,
    name: str | None = None,
) -> None:
    """Write config.json, model.safetensors (timm's keys, full width) and a model card into `folder`.

    Args:
        data_config: timm's preprocessing (mean, std, interpolation, crop_pct) when it is not the model's default.
        label_names: class names, in the order of the logits; by default those that the model was loaded with.
        extra: further JSON entries below "slicevit" in config.json.
        name: the Hub repository that the model card names.

    Each file is written whole or not at all, the weights before the configuration that describes them.
    Raises ValueError when an argument of the model has no place in JSON.
    """
    if not hasattr(model, "pretrained_cfg"):
        raise ValueError("a model that was built from its class has no name in timm: make it with timm.create_model")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {"version": __version__, "grid": str(model.grid), **asdict(model.settings), **(extra or {})}
    config: dict[str, Any] = {"slicevit": described}
    if names := label_names or model.label_names:
        config["label_names"] = list(names)
    try:
        _stage(model, folder, config, data_config, name)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror or error}): what it held is kept") from None


def _stage(
    model: ElasticModel,
    folder: Path,
    config: dict[str, Any],
    data_config: dict[str, Any] | None,
    name: str | None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        staged = Path(staging)
        save_config_for_hf(
            model._full,
            str(staged / CONFIG),
            model_config=config,
            data_config=data_config,
            model_args=_unchanging(model),
        )
        save_weights(model, staged)
        (staged / CARD).write_text(model_card(model, json.loads((staged / CONFIG).read_text()), name), encoding="utf-8")
        if not (staged / STATISTICS).exists():
            (folder / STATISTICS).unlink(missing_ok=True)
        for file in (*sorted(staged.glob("*.safetensors")), staged / CONFIG, staged / CARD):
            os.replace(file, folder / file.name)


def save_weights(model: ElasticModel, folder: Path) -> None:
    """Write model.safetensors and the statistics of narrow widths alone, each whole or not at all.

    Raises ValueError when the disk does not take them.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        temporary.write_bytes(serialised(tensors))
    write_statistics(model, folder / WEIGHTS)


def _unchanging(model: ElasticModel) -> dict[str, Any]:
    """The model's arguments without regularisation, and without those that timm reads off the model itself."""
    read_off = ("num_classes", "img_size", "in_chans", "global_pool")
    return {k: v for k, v in model.model_args.items() if k not in read_off and not k.endswith("_rate")}


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the client's lines about every retry: what fails in the end is said once."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def is_hub_name(text: str) -> bool:
    """Whether it can be the name of a Hub repository, such as "owner/name"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def read_config(folder_or_id: str | Path) -> tuple[dict[str, Any], Path]:
    """(config.json, path of the weights) of a folder, or of a Hub repository such as "owner/name".

    Raises ValueError when there is no such folder or repository, a file in it is missing or broken, or it is no
    classifier.
    """
    require_classifier(folder_or_id)
    folder = Path(folder_or_id)
    if folder.is_dir():
        paths = folder / CONFIG, folder / WEIGHTS
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise ValueError(f"{folder} holds no {' and no '.join(missing)}: it is not a saved slicevit model")
    elif not is_hub_name(str(folder_or_id)):
        raise ValueError(f"{folder_or_id} is neither a folder nor a Hub repository such as owner/name")
    else:
        try:
            with _quiet_hub():
                paths = tuple(Path(hf_hub_download(str(folder_or_id), name)) for name in (CONFIG, WEIGHTS))  # type: ignore[assignment]
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{folder_or_id} is neither a folder nor a reachable Hub repository ({reason})") from None
    try:
        config = json.loads(paths[0].read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{paths[0]} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{paths[0]} is not a JSON object")
    require_classifier(folder_or_id, paths[0].parent)  # of the Hub, only now
    return config, paths[1]


def task_of(run: str | Path) -> str | None:
    """What the model in a folder is for, a key of `COMMANDS`; None for a classifier, and where there is no model."""
    try:
        return json.loads(Path(run, CONFIG).read_text(encoding="utf-8"))["slicevit"].get("task")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # whoever reads the model says what is wrong
        return None


def require_classifier(run: str | Path, folder: Path | None = None) -> None:
    """Raise ValueError when the folder of `run`, by default itself, holds a model of another task."""
    if task := task_of(folder or run):
        raise ValueError(f"{run} is a run of slicevit {COMMANDS.get(task, task)}, not a classifier of slicevit train")


def from_pretrained(folder_or_id: str | Path, **settings: Any) -> ElasticModel:
    """The model that `save_pretrained` or `push_to_hub` wrote, in eval mode.

    Args:
        folder_or_id: a folder, or a Hub repository such as "owner/name".
        settings: `grid`, fields of `SliceSettings` and timm's own arguments, over the saved ones.

    Raises ValueError when it is no slicevit model, or its files are missing, broken or do not fit together.
    """
    config, weights = read_config(folder_or_id)
    if "slicevit" not in config:
        raise ValueError(f"{folder_or_id} is not a slicevit model: its {CONFIG} has no 'slicevit' entry")
    try:
        names = ("grid", *(field.name for field in fields(SliceSettings)))
        arguments = {name: config["slicevit"][name] for name in names}
        arguments |= _tuples(config.get("model_args", {})) | {"num_classes": config["num_classes"]}
        arguments["pretrained_cfg_overlay"] = config["pretrained_cfg"]
        model = create_model(config["architecture"], **(arguments | settings))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder_or_id}: its {CONFIG} does not describe a model ({error!r})") from None
    try:
        model.load_state_dict(load_file(weights))
    except Exception as error:  # safetensors raises its own SafetensorError, torch a RuntimeError
        reason = one_line(error, 200)
        raise ValueError(f"{weights} does not hold this model's weights ({reason})") from None
    model.label_names = config.get("label_names")
    if model.has_batch_norm and (path := _statistics_file(folder_or_id, weights)):
        read_statistics(model, path, weights)
    return model.eval()


def _statistics_file(folder_or_id: str | Path, weights: Path) -> Path | None:
    """Where the statistics of a saved model lie, if it has some."""
    path = weights.with_name(STATISTICS)
    if not Path(folder_or_id).is_dir():
        try:
            with _quiet_hub():
                path = Path(hf_hub_download(str(folder_or_id), STATISTICS))
        except (HfHubHTTPError, OSError):  # it has none, or these were not downloaded before the network went
            return None
    return path if path.exists() else None


def _tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def push_to_hub(
    model: ElasticModel,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Add model",
) -> str:
    """Upload what `save_pretrained` writes; returns the commit's address.

    Raises huggingface_hub's own errors when the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token, library_name="slicevit", library_version=__version__)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, name=repo.repo_id)
        return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message))
