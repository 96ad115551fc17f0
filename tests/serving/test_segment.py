"""A segmenter behind the server: its table, masks in JSON and as PNG, windows, refusals, OpenAPI."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_files import CLASSES, SIZE, WIDTHS, save_segmenter
from PIL import Image
from serving_fakes import encoded, noise

pytestmark = [pytest.mark.extra, pytest.mark.usefixtures("one_thread_a_module")]
pytest.importorskip("fastapi", reason='needs fastapi: pip install "slicevit[serve]"')
pytest.importorskip("httpx2", reason='needs httpx2: pip install "slicevit[serve-test]"')

from fastapi.testclient import TestClient  # noqa: E402

from slicevit import cli  # noqa: E402
from slicevit.data.masks import eval_image_transform  # noqa: E402
from slicevit.dense.saved import load_segmenter  # noqa: E402
from slicevit.evaluation.segmentation import whole_logits  # noqa: E402
from slicevit.runtime.engine import Engine  # noqa: E402
from slicevit.runtime.measured import profile_run, read_profile, read_table  # noqa: E402
from slicevit.runtime.profile import Profile  # noqa: E402
from slicevit.serving.app import create_app  # noqa: E402
from slicevit.serving.settings import Settings  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter with made-up mIoUs, profiled here."""
    folder = save_segmenter(tmp_path_factory.mktemp("runs") / "tiny", Path("nowhere"))
    rows = [{"width": width, "miou": 40.0 + place, "ious": []} for place, width in enumerate(WIDTHS)]
    (folder / "results.json").write_text(json.dumps(rows))
    profile_run(folder, seconds=0.01, batch=(1, 2), threads=1)
    return folder


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[TestClient]:
    with Engine(run) as engine, TestClient(create_app(engine, read_profile(run), Settings(slo_ms=20_000.0))) as client:
        yield client


def segment(client: TestClient, content: bytes, accept: str = "*/*", **fields: str) -> Any:
    return client.post("/v1/segment", files={"image": ("a", content)}, data=fields, headers={"Accept": accept})


def mask_of(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as mask:
        assert (mask.format, mask.mode) == ("PNG", "L")
        return np.asarray(mask)


def expected(run: Path, image: Image.Image, width: str) -> np.ndarray:
    """As evaluation computes it."""
    model, recipe = load_segmenter(run)
    pixels_CHW = eval_image_transform(recipe.transform())(image)
    size = (image.height, image.width)
    with torch.inference_mode():
        logits_1KHW = whole_logits(lambda window: model(window, width=width), pixels_CHW[None], SIZE, size)
    return logits_1KHW[0].argmax(0).numpy()


def test_its_table_has_miou(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = read_table(run, "torch", "cpu")
    assert table["figure"] == "miou"
    assert [row["miou"] for row in table["rows"]] == [40.0, 41.0]
    assert "top1" not in table["rows"][0]
    assert [row.top1 for row in read_profile(run).rows] == [40.0, 41.0]
    cli.main(["profile", str(run), "--seconds", "0.001", "--batch", "1,2", "--threads", "1"])
    assert "mIoU" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "windows"), [((90, 90), 1), ((40, 30), 2), ((220, 70), 5)])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_mask_is_that_of_evaluation(
    run: Path, client: TestClient, size: tuple[int, int], windows: int, width: str
) -> None:
    image = noise(size)
    answer = segment(client, encoded(image), width=width).json()
    mask_HW = mask_of(base64.b64decode(answer["mask"]))
    np.testing.assert_array_equal(mask_HW, expected(run, image, width))
    assert (answer["size"], answer["windows"], answer["width"]) == ([size[1], size[0]], windows, width)
    assert 1 <= answer["batch"] <= 2  # as many as the table knows
    assert all(answer[name] >= 0 for name in ("decode_ms", "queue_ms", "compute_ms"))
    shares = {each["label"]: each["share"] for each in answer["classes"]}
    names = ("sky", "sea", "land")
    assert shares == {names[k]: pytest.approx(np.mean(mask_HW == k)) for k in np.unique(mask_HW)}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_json_in_and_png_out(run: Path, client: TestClient) -> None:
    image = noise((64, 64))
    body = {"image": base64.b64encode(encoded(image)).decode()}
    in_json = client.post("/v1/segment", json=body).json()
    png = segment(client, encoded(image), "image/png")
    assert png.headers["content-type"] == "image/png"
    np.testing.assert_array_equal(mask_of(png.content), mask_of(base64.b64decode(in_json["mask"])))
    assert png.headers["slicevit-width"] == in_json["width"] == "1"
    assert [part.partition(";dur=")[0] for part in png.headers["server-timing"].split(", ")] == [
        *("decode", "queue", "compute")
    ]
    both = segment(client, encoded(image), "application/json, image/png")
    assert both.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("content", "fields", "status", "said"),
    [
        (b"nonsense", {}, 415, "JPEG, PNG, WEBP, GIF, BMP"),
        (encoded(noise()), {"width": "1/4"}, 422, "the widths are 1/2, 1"),
        (
            encoded(noise()),
            {"top_k": "2"},
            422,
            "'top_k': there is no such field; the fields are image, deadline_ms",
        ),
        (encoded(noise((2, 200))), {}, 422, "2 x 200"),
    ],
)
def test_bad_input(client: TestClient, content: bytes, fields: dict[str, str], status: int, said: str) -> None:
    response = segment(client, content, **fields)
    assert (response.status_code, said in response.json()["detail"]) == (status, True), response.text


def test_an_image_whose_logits_would_fill_the_memory(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slicevit.serving.tasks.MOST_LOGITS", CLASSES * 64 * 640)
    assert segment(client, encoded(noise((20, 2)))).status_code == 200
    response = segment(client, encoded(noise((22, 2))))
    assert response.status_code == 413
    assert f"704 x 64 pixels, as the model takes it, with {CLASSES} classes" in response.json()["detail"]


def test_a_request_whose_windows_cannot_all_be_in_time_is_shed(run: Path) -> None:
    rows = [{"width": width, "top1": 40.0, "latency_ms": {1: 400.0, 2: 400.0}} for width in WIDTHS]
    settings = Settings(slo_ms=20_000.0)
    with Engine(run) as engine, TestClient(create_app(engine, Profile.parse(rows), settings)) as client:
        wide = encoded(noise((1000, 64)))  # 23 windows, twelve calls of 0.4 s
        response = segment(client, wide, deadline_ms="3000")
        assert response.status_code == 429
        assert response.headers["retry-after"]
        assert segment(client, encoded(noise((64, 64))), deadline_ms="3000").status_code == 200
        assert client.get("/v1/status").json()["queue"] == 0


def test_what_is_served_and_where(client: TestClient) -> None:
    model = client.get("/v1/model").json()
    assert (model["task"], model["figure"], model["architecture"]) == ("segmentation", "mIoU", "vit_tiny_patch16_224")
    assert (model["input_size"], model["num_classes"]) == ([3, *SIZE], CLASSES)
    assert model["label_names"] == ["sky", "sea", "land"]
    refused = client.post("/v1/classify", files={"image": ("a", encoded(noise()))})
    assert refused.status_code == 404
    assert refused.json()["detail"] == "a model for segmentation is served here: post the image to /v1/segment"
    described = client.get("/openapi.json").json()
    assert "/v1/classify" not in described["paths"]
    route = described["paths"]["/v1/segment"]["post"]
    assert set(route["responses"]["200"]["content"]) == {"application/json", "image/png"}
    form = route["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert (set(form), form["width"]["enum"]) == ({"image", "deadline_ms", "width"}, list(WIDTHS))


def test_other_engines_answer_alike(run: Path) -> None:
    pytest.importorskip("onnxruntime")
    windows_BChw = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with Engine(run) as source, Engine(run, "onnxruntime") as other:
        expected_BKhw = source.run(windows_BChw, "1/2")
        torch.testing.assert_close(other.run(windows_BChw, "1/2"), expected_BKhw, atol=1e-3, rtol=0)
