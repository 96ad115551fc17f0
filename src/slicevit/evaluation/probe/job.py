"""`slicevit probe`: a run, a data set, and what linear heads or nearest neighbours make of the run's features."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slicevit.calibration import require_statistics
from slicevit.checkpoint import from_pretrained, read_config
from slicevit.data import ImageSet, eval_config, eval_transform, open_dataset
from slicevit.evaluation.probe.cache import FeatureCache, Features
from slicevit.evaluation.probe.extract import extract, fingerprint
from slicevit.evaluation.probe.knn import score_knn
from slicevit.evaluation.probe.linear import linear_rows
from slicevit.evaluation.probe.probed import Driver, Probed
from slicevit.evaluation.probe.results import ProbeResult, scored, write_probe
from slicevit.evaluation.probe.settings import ProbeSettings
from slicevit.files import files_digest


def run_probe(settings: ProbeSettings, driver: Driver) -> tuple[list[ProbeResult], Path]:
    """The rows that were written, and the folder that they were written to.

    Raises Stopped when asked to, with the features kept, and ValueError for settings, a run or data that cannot be had.
    """
    settings.check()
    probed = _open(settings)
    out = settings.out or default_out(settings.run, settings.data)
    features = _features(settings, probed, out, driver)
    most = len(features["train"].targets_N)
    if settings.knn:
        if most < max(settings.neighbours):
            raise ValueError(f"--neighbours {max(settings.neighbours)}: there are {most} readable training images")
        rows = _knn_rows(settings, probed, features, driver)
        write_probe(out, "knn", rows)
        return rows, out
    rows = linear_rows(probed, features, out, driver)
    write_probe(out, "results", rows)
    return rows, out


def default_out(run: str, data: str) -> Path:
    """RUN/probe/DATA, or probe/RUN/DATA where the run is not a folder."""
    name = re.sub(r"[^\w.]+", "-", data.rstrip("/").rpartition("/")[2]).strip("-")
    return Path(run, "probe", name) if Path(run).is_dir() else Path("probe", run.replace("/", "-"), name)


def _open(settings: ProbeSettings) -> Probed:
    config, weights = read_config(settings.run)
    transform = eval_config(config)
    data: dict[str, ImageSet] = {}
    for split in ("train", "val"):
        dataset = open_dataset(settings.data, split, root=settings.data_root, in_chans=transform.in_chans)
        if not isinstance(dataset, ImageSet):
            raise ValueError(f"--data {settings.data} is a stream, which has no images by number: give a folder")
        data[split] = dataset
    counts = {dataset.num_classes for dataset in data.values()}
    if len(counts) > 1 or min(counts) < 2:
        seen = " and ".join(f"{dataset.num_classes} in {split}" for split, dataset in data.items())
        raise ValueError(f"--data {settings.data} has {seen} classes: a probe needs the same two or more in both")
    model = from_pretrained(settings.run)
    require_statistics(model, settings.run)
    model.reset_classifier(counts.pop())
    try:
        legal = sorted({model.width(width) for width in settings.widths} or set(model.widths))
    except ValueError as error:
        raise ValueError(f"--widths: {error}") from None
    return Probed(settings, model, config, weights, transform, {str(width): width for width in legal}, data)


def _features(
    settings: ProbeSettings,
    probed: Probed,
    out: Path,
    driver: Driver,
) -> dict[str, Features]:
    """Of both splits, from the cache in `out` or the images."""
    with FeatureCache(out / "features", _key(probed), settings.rebuild) as cache:
        todo = [split for split in probed.data if cache.done(split) < len(probed.data[split])]
        if todo:
            probed.model.to(driver.device)
            modules = {name: probed.model.subnet(width) for name, width in probed.widths.items()}
            try:
                for split in todo:
                    extract(
                        modules,
                        probed.data[split],
                        eval_transform(probed.transform),
                        cache,
                        batch_size=settings.batch_size,
                        workers=settings.workers,
                        max_bad_share=settings.max_bad_share,
                        driver=driver,
                    )
            finally:
                probed.model.release()
                probed.model.to("cpu")
        features = {split: cache.load(split) for split in probed.data}
    for split, kept in features.items():
        if not len(kept.targets_N):
            raise ValueError(f"--data {settings.data} has no readable {split} image")
    return features


def _key(probed: Probed) -> dict[str, Any]:
    sliced = {name: value for name, value in probed.config["slicevit"].items() if name not in ("version", "training")}
    described = {name: probed.config.get(name) for name in ("architecture", "model_args")}
    return {
        "weights": files_digest(probed.weights),
        "model": described | sliced,
        "data": {split: fingerprint(dataset) for split, dataset in probed.data.items()},
        "transform": asdict(probed.transform),
        "widths": list(probed.widths),
    }


def _knn_rows(
    settings: ProbeSettings,
    probed: Probed,
    features: dict[str, Features],
    driver: Driver,
) -> list[ProbeResult]:
    known, asked = features["train"], features["val"]
    rows = []
    for done, name in enumerate(probed.widths):
        driver.step("nearest neighbours", done, len(probed.widths))
        scores = score_knn(
            known.by_width[name],
            known.targets_N,
            asked.by_width[name],
            asked.targets_N,
            probed.classes,
            settings.neighbours,
            settings.temperature,
            driver.device,
        )
        rows += [
            scored(accuracy, **probed.describe(name, len(known.targets_N)), probe=f"knn-{count}")
            for count, accuracy in scores.items()
        ]
    return rows
