"""Tests models of the Hub that users request on the page.

The tests cover shared downloads, a Hub that hangs, and limits on size and arguments.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import timm

from stvit import hub as stvit_hub
from stvit.adapters.yolo import YOLO
from stvit.tools.common.cli import CommandError
from stvit.tools.demonstration.hub_models import Downloads, check_config, check_modules
from stvit.weights import Source
from tests.hub_server import Hub


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("model")
    stvit_hub.save(timm.create_model("test_stvit", num_classes=2), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(hub: Hub, name: str, files: dict[str, bytes]) -> None:
    hub.create_repo(name)
    hub.commit(name, files)


def asked(hub: Hub, words: str) -> int:
    return sum(words in request.path for request in hub.requests)


def test_users_of_the_same_model_share_a_download(hub: Hub, files: dict[str, bytes]) -> None:
    push(hub, "org/a", files)
    downloads = Downloads(60, 10**9, 10**9)
    hub.fail("GET .*safetensors", "hang")
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(downloads.get(Source.hub("org/a")))) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not asked(hub, "safetensors"):
        time.sleep(0.01)
    while downloads._places._value > 9:  # until all of them wait
        time.sleep(0.01)
    hub.heal()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and results[0].kind == "folder"
    assert asked(hub, "/api/models/org/a") == 1
    assert (results[0].path / "model.safetensors").read_bytes() == files["model.safetensors"]
    # The second request finds the weights in the cache.
    before = asked(hub, "safetensors")
    assert downloads.get(Source.hub("org/a")) == results[0] and asked(hub, "safetensors") == before


def test_a_hub_that_hangs_delays_only_its_users(hub: Hub, files: dict[str, bytes]) -> None:
    """They get a message, and later the model."""
    push(hub, "org/slow", files)
    push(hub, "org/fast", files)
    downloads = Downloads(0.5, 10**9, 10**9)
    hub.fail("org/slow", "hang")
    with pytest.raises(CommandError, match=r"hf-hub:org/slow: the download takes longer than 0\.5 seconds and"):
        downloads.get(Source.hub("org/slow"))
    downloads.seconds = 60
    assert downloads.get(Source.hub("org/fast")).kind == "folder"
    waiting = threading.Thread(target=downloads.close)
    waiting.start()
    with pytest.raises(CommandError, match=r"the server is shutting down|cannot open hf-hub:org/slow"):
        downloads.get(Source.hub("org/slow"))
    waiting.join()
    hub.heal()


def test_many_downloads_are_refused(hub: Hub) -> None:
    downloads = Downloads(60, 10**9, 10**9)
    downloads._running = {str(i): Any for i in range(8)}
    with pytest.raises(CommandError, match="too many models are being downloaded; try again in a minute"):
        downloads.get(Source.hub("org/a"))
    assert downloads._places._value == 12


def test_sizes_are_limited_before_the_download(hub: Hub, files: dict[str, bytes]) -> None:
    """The size of a model and of all models is limited.

    The limits do not hold for models of the operator.
    """
    push(hub, "org/a", files)
    push(hub, "org/b", {**files, "model.safetensors": files["model.safetensors"] + bytes(1)})
    size = len(files["model.safetensors"]) + len(files["config.json"])
    with pytest.raises(CommandError, match=r"org/a has \d+ MB, more than the limit of \d+ MB; run the"):
        Downloads(60, size - 1, 10**9).get(Source.hub("org/a"))
    assert not asked(hub, "safetensors")
    downloads = Downloads(60, 10**9, size + 1)
    assert downloads.get(Source.hub("org/a")) and downloads.get(Source.hub("org/a"))
    with pytest.raises(CommandError, match="the limit of 0 GB for all downloads is reached; choose a model"):
        downloads.get(Source.hub("org/b"))
    assert downloads.get(Source.hub("org/b"), is_limited=False)


def test_missing_files_are_named(hub: Hub, files: dict[str, bytes]) -> None:
    push(hub, "org/text", {"notes.txt": b"1"})
    push(hub, "org/two", {"a.pt": b"1", "b.pt": b"2"})
    push(hub, "org/config", {"config.json": b"{}"})
    push(hub, "org/one", {"own.pt": b"1"})
    downloads = Downloads(60, 10**9, 10**9)
    for name, words in (
        ("text", "no file ends in .pt"),
        ("two", "these files end in .pt: a.pt, b.pt"),
        ("config", "it has a config.json, but no model.safetensors or pytorch_model.bin"),
        ("missing", "it does not exist, or it is private"),
    ):
        with pytest.raises(CommandError) as caught:
            downloads.get(Source.hub(f"org/{name}"))
        assert f"cannot open hf-hub:org/{name}: " in str(caught.value) and words in str(caught.value)
    assert downloads.get(Source.hub("org/one")).path.name == "own.pt"


def test_without_the_hub_the_cache_serves(hub: Hub, files: dict[str, bytes]) -> None:
    push(hub, "org/a", files)
    push(hub, "org/d", {"model.pt": b"1"})
    downloads = Downloads(60, 10**9, 10**9)
    found = downloads.get(Source.hub("org/a")), downloads.get(Source.hub("org/d"))
    # Only a download of a branch stores in the cache which commit the branch means.
    from huggingface_hub import hf_hub_download

    for name, file in (("org/a", "config.json"), ("org/a", "model.safetensors"), ("org/d", "model.pt")):
        hf_hub_download(name, file)
    hub.fail("org/", "reset")
    assert (downloads.get(Source.hub("org/a")), downloads.get(Source.hub("org/d"))) == found
    with pytest.raises(CommandError, match="cannot open hf-hub:org/b: "):
        downloads.get(Source.hub("org/b"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_args": {"n_iter": 10**8}}, "n_iter=100000000, more than the limit of 8"),
        ({"model_args": {"stoken_size": [8, [4, 200_000]]}}, "stoken_size=200000, more than the limit of 64"),
        ({"model_args": {"depths": [100_000, 1]}}, "depths=100000, more than the limit of 64"),
        ({"model_args": {"depths": [1] * 100}}, "depths of 100 values, more than the limit of 64"),
        ({"model_args": {"dims": [10**6]}}, "dims=1000000, more than the limit of 4096"),
        ({"model_args": {"img_size": -1e9}}, "img_size=-1000000000.0, more than the limit of 1024"),
        ({"model_args": {"mlp_ratio": float("nan")}}, "mlp_ratio=nan"),
        ({"model_args": {"a": {"b": 10**400}}}, "b=1000"),
        ({"num_classes": 10**9}, "num_classes=1000000000, more than the limit of 100000"),
        ({"pretrained_cfg": {"input_size": [3, 200_000, 200_000]}}, "input_size=200000, more than the limit of 1024"),
    ],
)
def test_absurd_arguments_are_refused_before_the_model_is_built(
    changes: dict[str, Any], words: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    config = json.loads(files["config.json"]) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CommandError) as caught:
        check_config("hf-hub:org/a", Source.folder(tmp_path))
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "\x00", " " * (5 * 2**20)])
def test_broken_configurations_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CommandError, match=r"cannot open hf-hub:org/a: cannot read its config\.json"):
        check_config("hf-hub:org/a", Source.folder(tmp_path))


def test_usual_models_are_accepted(files: dict[str, bytes], tmp_path: Path) -> None:
    config = json.loads(files["config.json"])
    large = {
        "num_classes": 21_841,
        "model_args": {"img_size": 512, "dims": [256, 2048], "depths": [3, 27], "n_iter": 3},
    }
    for changes in ({}, large, {"model_args": None}, {"model_args": {"act_layer": "gelu", "qkv_bias": True}}):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        check_config("hf-hub:org/a", Source.folder(tmp_path))


def test_layers_of_a_detector_are_checked() -> None:
    detector: Any = YOLO("yolo26n-stokenattention.yaml")
    check_modules("hf-hub:org/a", detector)
    layer = next(module for module in detector.model.modules() if type(module).__name__ == "SuperTokenAttention")
    for key, value in (("n_iter", 10**8), ("stoken_size", (1, 10**5))):
        kept = getattr(layer, key)
        setattr(layer, key, value)
        with pytest.raises(CommandError, match=f"hf-hub:org/a has {key}=100000"):
            check_modules("hf-hub:org/a", detector)
        setattr(layer, key, kept)
