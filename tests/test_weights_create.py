"""Tests pretrained weights from a local Hub, folders and files, and each error."""

import os
import pickle
import re
import resource
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save
from timm.models import adapt_input_conv

import stvit
from stvit import PretrainedDownloadError, PretrainedError
from stvit import hub as hub_module
from stvit.weights.errors import explain_errors
from stvit.weights.official import find_variant
from tests.hub_server import STRANGER, Hub

REPO = "team/test_stvit.in1k"
CONVERT = "python -m stvit.tools.convert_checkpoint FILE --output FOLDER"


@pytest.fixture(autouse=True)
def namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the Hub namespace, so that weights of test_stvit are expected in `REPO`."""
    monkeypatch.setenv("STVIT_HUB_NAMESPACE", "team")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with model.safetensors and config.json of a test_stvit."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("weights") / "model"
    hub_module.save(timm.create_model("test_stvit"), folder)
    return folder


@pytest.fixture
def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def published(hub: Hub, folder: Path) -> Hub:
    """Hub with the weights of `folder` in `REPO`."""
    hub.create_repo(REPO)
    hub.commit(REPO, {file.name: file.read_bytes() for file in folder.iterdir()})
    return hub


def has_weights(loaded: torch.nn.Module, weights: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> bool:
    """Returns whether the model has these weights.

    Keys that start with one of `but` may differ.
    """
    state = loaded.state_dict()
    return all(torch.equal(value, weights[key]) for key, value in state.items() if not key.startswith(but))


# Loading


def test_a_tag_and_an_id_load_the_published_weights(published: Hub, weights: dict[str, torch.Tensor]) -> None:
    for name in ("test_stvit", "test_stvit.in1k", f"hf-hub:{REPO}", f"hf-hub:{REPO}@main"):
        model = timm.create_model(name, pretrained=True)
        assert has_weights(model, weights) and len(model.state_dict()) == len(weights), name
    assert all(".bin" not in request.path for request in published.requests if REPO in request.path)


@pytest.mark.parametrize("name", ["test_stvit", f"hf-hub:{REPO}", "local-dir"])
def test_classes_channels_and_features_adapt(
    published: Hub, folder: Path, weights: dict[str, torch.Tensor], name: str
) -> None:
    name = f"local-dir:{folder}" if name == "local-dir" else name
    assert has_weights(timm.create_model(name, pretrained=True, num_classes=7), weights, ("head.",))
    assert has_weights(timm.create_model(name, pretrained=True, num_classes=0), weights)
    for channels in (1, 4):
        model = timm.create_model(name, pretrained=True, in_chans=channels)
        assert has_weights(model, weights, ("stem.0.weight",))
        expected = adapt_input_conv(channels, weights["stem.0.weight"])
        torch.testing.assert_close(model.state_dict()["stem.0.weight"], expected, rtol=0, atol=0)
    features = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 3))
    assert torch.equal(
        features.state_dict()["stages_3.blocks.0.attn.qkv.weight"], weights["stages.3.blocks.0.attn.qkv.weight"]
    )
    assert [tuple(x.shape[1:]) for x in features(torch.randn(1, 3, 64, 64))] == [(32, 8, 8), (64, 2, 2)]


def test_arguments_and_classes_come_from_config_json(hub: Hub, tmp_path: Path) -> None:
    """config.json sets other arguments, named classes and gray images."""
    model = timm.create_model("test_stvit", num_classes=3, in_chans=1, stoken_size=(4, 2, 1, 1), n_iter=2)
    hub_module.save(model, tmp_path / "own", label_names=["a", "b", "c"])
    hub.create_repo("org/own")
    hub.commit("org/own", {file.name: file.read_bytes() for file in (tmp_path / "own").iterdir()})
    loaded: Any = timm.create_model("hf-hub:org/own", pretrained=True)
    assert (loaded.num_classes, loaded.in_chans, loaded.stages[0].blocks[0].attn.n_iter) == (3, 1, 2)
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    image = torch.randn(1, 1, 64, 64)
    assert torch.equal(loaded.eval()(image), model.eval()(image))
    color: Any = timm.create_model("hf-hub:org/own", pretrained=True, in_chans=3)
    assert has_weights(color, model.state_dict(), ("stem.0.weight",))
    expected = adapt_input_conv(3, model.state_dict()["stem.0.weight"], base_chans=1)
    assert torch.equal(color.state_dict()["stem.0.weight"], expected)


def test_a_private_repository_needs_a_token_with_access(
    published: Hub, folder: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    published.create_repo("org/secret", private=True)
    published.commit("org/secret", {file.name: file.read_bytes() for file in folder.iterdir()})
    assert has_weights(stvit.create_model("hf-hub:org/secret", pretrained=True), weights)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    shutil.rmtree(constants.HF_HUB_CACHE)
    with pytest.raises(PretrainedDownloadError, match=r"org/secret.*the token in use has no access"):
        stvit.create_model("hf-hub:org/secret", pretrained=True)


def test_cached_weights_load_offline(
    published: Hub, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    timm.create_model("test_stvit", pretrained=True)
    stvit.create_model(f"hf-hub:{REPO}", pretrained=True)
    before = len(published.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert has_weights(timm.create_model("test_stvit", pretrained=True), weights)
    assert has_weights(stvit.create_model(f"hf-hub:{REPO}", pretrained=True), weights)
    assert len(published.requests) == before


def test_revisions(published: Hub, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    old = published.refs(REPO)["main"]
    other = save({key: value * 0 for key, value in weights.items()})
    new = published.commit(REPO, {"model.safetensors": other})
    for revision, zeros in ((old, False), (new, True), ("main", True)):
        model = stvit.create_model(f"hf-hub:{REPO}@{revision}", pretrained=True)
        assert bool((model.get_parameter("head.fc.weight") == 0).all()) == zeros


def test_the_namespace_is_read_when_a_model_is_created(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for namespace in ("org", "team"):
        monkeypatch.setenv("STVIT_HUB_NAMESPACE", namespace)
        for name in ("stvit_small.in1k", "stvit_small.in1k_384", "stvit_pico.in1k"):
            cfg = timm.create_model(name, device="meta").pretrained_cfg
            assert cfg["hf_hub_id"] == f"{namespace}/{name}"
        repo = f"{namespace}/test_stvit.in1k"
        # Each namespace has different weights.
        hub_module.save(timm.create_model("test_stvit"), folder.parent / namespace)
        hub.create_repo(repo)
        hub.commit(repo, {"model.safetensors": (folder.parent / namespace / "model.safetensors").read_bytes()})
        loaded = stvit.create_model("test_stvit", pretrained=True, verify=True)
        assert loaded.pretrained_cfg["hf_hub_id"] == repo
        assert has_weights(loaded, load_file(folder.parent / namespace / "model.safetensors"))


def test_the_namespace_does_not_change_given_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = {"hf_hub_id": "org/net"}
    assert timm.create_model("test_stvit", pretrained_cfg_overlay=overlay).pretrained_cfg["hf_hub_id"] == "org/net"
    given = timm.get_pretrained_cfg("stvit_small")
    assert timm.create_model("stvit_small", pretrained_cfg=given).pretrained_cfg["hf_hub_id"] == given.hf_hub_id
    assert "hf_hub_id" not in timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
    monkeypatch.setenv("STVIT_HUB_NAMESPACE", "")
    assert timm.create_model("stvit_small").pretrained_cfg["hf_hub_id"] == "stvit/stvit_small.in1k"


# Errors


def fails(name: str = "test_stvit", kind: type[Exception] = PretrainedDownloadError, **kwargs: Any) -> str:
    """Loads weights, which must fail, and returns the error message.

    The error has a cause, and its type is one that callers of timm catch.
    """
    create = timm.create_model if name == "test_stvit" else stvit.create_model
    try:
        create(name, pretrained=True, **kwargs)
    except PretrainedError as error:
        assert isinstance(error, RuntimeError) and error.__cause__ is not None
        assert type(error) is kind, "".join(traceback.format_exception(error))
        assert str(error).startswith((f"{name}: ", "test_stvit: ")) and "\n" not in str(error)
        assert "secret" not in str(error)
        return str(error)
    pytest.fail("loading did not fail")


def test_repository_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said = fails()
    assert f"Hub repository {REPO} (revision main): it does not exist, or it is private and the token in use" in said
    assert CONVERT in said and "local-dir:FOLDER" in said and "STVIT_HUB_NAMESPACE" in said
    with pytest.raises(OSError, match=REPO):
        timm.create_model("test_stvit", pretrained=True)
    monkeypatch.delenv("HF_TOKEN")
    assert "it does not exist, or it is private and no token was sent" in (said := fails())
    assert "hf auth login" in said and "HF_TOKEN" in said
    said = fails("hf-hub:org/none@dev")
    assert "Hub repository org/none (revision dev): it does not exist" in said and CONVERT not in said


@pytest.mark.parametrize(
    "name", ["stvit_femto", "stvit_pico", "stvit_pico.in1k", "stvit_nano", "stvit_tiny", "test_stvit"]
)
def test_unpublished_weights(hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("STVIT_HUB_NAMESPACE")
    model = name.partition(".")[0]
    for create in (timm.create_model, stvit.create_model):
        with pytest.raises(
            PretrainedError, match=f"^{model}: no pretrained weights of this model are published. "
        ) as e:
            create(name, pretrained=True)
        assert all(way in str(e.value) for way in ("hf-hub:ORG/NAME", "local-dir:FOLDER", "dict(file=PATH)"))
        assert f"Set STVIT_HUB_NAMESPACE=ORG if they are in the Hub repository ORG/{model}.in1k" in str(e.value)
    assert not hub.requests


def test_errors_of_other_timm_models_do_not_name_stvit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    untrained = next(name for name in timm.list_models("test_*vit*") if not timm.is_model_pretrained(name))
    assert untrained not in timm.list_models(module="stvit")
    with pytest.raises(PretrainedError, match=f"^{untrained}: no pretrained weights of this model are published") as e:
        stvit.create_model(untrained, pretrained=True)
    assert "STVIT" not in str(e.value)
    with pytest.raises(PretrainedError, match=r"^resnet18: .* timm/resnet18.a1_in1k .*: it does not exist") as e:
        stvit.create_model("resnet18", pretrained=True)
    assert "STVIT" not in str(e.value) and "stvit" not in str(e.value)


def test_bad_token(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    assert "the Hub does not know the access token" in (said := fails())
    assert "Log in again with `hf auth login`" in said


def test_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create_repo("org/gated", gated=True)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert f"access is restricted. Request access at {hub.url}/org/gated" in fails("hf-hub:org/gated")


def test_offline_and_not_cached(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for said in (fails(), fails(f"hf-hub:{REPO}")):
        assert f"{REPO} (revision main): offline mode is on (HF_HUB_OFFLINE), and it is not in the cache" in said
        assert "Unset HF_HUB_OFFLINE to download it once" in said and str(constants.HF_HUB_CACHE) in said


def test_endpoint_unreachable(hub: Hub) -> None:
    hub.__exit__()
    assert f"no connection to {hub.url}" in (said := fails())
    assert "HF_ENDPOINT" in said and "the proxy" in said


def test_server_that_is_not_a_hub(published: Hub) -> None:
    published.fail("resolve", "html")
    assert f"the server at {published.url} is not a Hub" in (said := fails())
    assert "login page of the network" in said


def test_server_errors(published: Hub) -> None:
    published.fail("HEAD .*resolve", "status:503")
    assert "the Hub answered with status 503" in (said := fails()) and "Try again later" in said


def test_interrupted_download_can_be_repeated(
    published: Hub, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    published.fail("GET .*model.safetensors", "cut")
    said = fails()
    assert "no connection to " in said and "run the same command again" in said
    published.heal()
    published.fail("GET .*model.safetensors", "cut", times=1)
    assert has_weights(timm.create_model("test_stvit", pretrained=True), weights)  # the client repeats the request


def test_revision_missing(published: Hub) -> None:
    assert "revision 'v9' does not exist. Pass an existing branch, tag or commit" in fails(f"hf-hub:{REPO}@v9")


def test_file_missing(published: Hub) -> None:
    published.commit(REPO, {"model.safetensors": None})
    assert "the file model.safetensors is missing" in (said := fails()) and CONVERT in said
    published.commit(REPO, {"config.json": None})
    assert "the file config.json is missing" in fails(f"hf-hub:{REPO}")


def pointer(content: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {len(content)}\n".encode()


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "is empty"),
    "truncated": (lambda content: content[:-100], "is truncated: it has"),
    "cut in the header": (lambda content: content[:60], "is truncated or not a safetensors file"),
    "pointer": (pointer, "is a Git LFS pointer"),
    "page": (lambda content: b"<!DOCTYPE html><p>Sign in", "is a web page, not weights"),
    "noise": (lambda content: content[:8] + b"\xff" * 90 + content[98:], "is truncated or not a safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(published: Hub, folder: Path, tmp_path: Path, damage: str) -> None:
    spoil, said = DAMAGES[damage]
    content = spoil((folder / "model.safetensors").read_bytes())
    published.commit(REPO, {"model.safetensors": content})
    for name in ("test_stvit", f"hf-hub:{REPO}"):
        message = fails(name, PretrainedError)
        assert f"{REPO} (revision main): {constants.HF_HUB_CACHE}" in message and said in message
        assert "delete it and load again; if that does not help, its owner must push it again" in message
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(folder / "config.json", own)
    (own / "model.safetensors").write_bytes(content)
    message = fails(f"local-dir:{own}", PretrainedError)
    assert f"{own / 'model.safetensors'} {said}" in message and "copy or convert it again" in message


def test_flipped_bits_are_found_by_the_checksum(published: Hub, weights: dict[str, torch.Tensor]) -> None:
    published.fail("GET .*model.safetensors", "flip")
    model = stvit.create_model(f"hf-hub:{REPO}", pretrained=True)
    assert not has_weights(model, weights)  # without the check there is no error
    for name in (f"hf-hub:{REPO}", "test_stvit"):
        with pytest.raises(PretrainedError, match=rf"corrupt files in the cache.*{REPO}.*: \S+ .sha256 is ") as caught:
            stvit.create_model(name, pretrained=True, verify=True)
    # Deleting the named file is enough.
    assert "Delete these files, and load again" in str(caught.value)
    published.heal()
    Path(re.findall(r"main\): (\S+) ", str(caught.value))[0]).unlink()
    model = stvit.create_model(f"hf-hub:{REPO}", pretrained=True, verify=True, features_only=True)
    assert len(model(torch.randn(1, 3, 64, 64))) == 4


def test_deleting_a_damaged_download_repairs_the_cache(published: Hub, weights: dict[str, torch.Tensor]) -> None:
    published.fail("model.safetensors$", "truncate")
    said = fails(kind=PretrainedError)
    published.heal()
    assert fails(kind=PretrainedError) == said  # the cache returns the same file
    Path(re.findall(r": (\S+) is truncated", said)[0]).unlink()
    assert has_weights(timm.create_model("test_stvit", pretrained=True), weights)


def test_verify_is_an_error_if_it_is_impossible(published: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="pass pretrained=True"):
        stvit.create_model("test_stvit", verify=True)
    with pytest.raises(ValueError, match="was not loaded from there"):
        stvit.create_model(f"local-dir:{folder}", pretrained=True, verify=True)
    stvit.create_model("test_stvit", pretrained=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        PretrainedDownloadError, match=r"verify=True could not compare.*offline mode is on.*this needs the Hub"
    ):
        stvit.create_model("test_stvit", pretrained=True, verify=True)


def test_wrong_variant_and_wrong_shapes(hub: Hub, weights: dict[str, torch.Tensor]) -> None:
    pico = timm.create_model("stvit_pico").state_dict()
    hub.create_repo(REPO)
    hub.commit(REPO, {"model.safetensors": save(pico)})
    assert "mismatches; these are weights of stvit_pico; create that model): " in fails(kind=PretrainedError)
    own = {**weights, "stages.1.blocks.0.norm1.weight": torch.ones(33)}
    hub.commit(REPO, {"model.safetensors": save(own)})
    said = fails(kind=PretrainedError)
    assert "(1 mismatch; check that the variant is right): key stages.1.blocks.0.norm1.weight has shape (33,)" in said


def test_weights_with_other_classes_or_arguments_than_the_tag(hub: Hub) -> None:
    """Weights of a user's namespace may have other classes or arguments than the tag.

    The error names the argument that loads them.
    """
    own = timm.create_model("test_stvit", num_classes=10).state_dict()
    hub.create_repo(REPO)
    hub.commit(REPO, {"model.safetensors": save(own)})
    said = fails(kind=PretrainedError)
    assert "these weights have 10 classes; pass pretrained_cfg_overlay=dict(num_classes=10)" in said
    assert "pretrained_cfg_overlay=dict(num_classes=10)" in said
    assert has_weights(
        timm.create_model("test_stvit", pretrained=True, pretrained_cfg_overlay={"num_classes": 10}), own
    )
    hub.commit(REPO, {"model.safetensors": save(timm.create_model("test_stvit").state_dict())})
    assert "these are weights of test_stvit with default arguments; check the arguments" in fails(
        kind=PretrainedError, depths=(2, 1, 1, 1)
    )


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 5}, {"features_only": True}, {"in_chans": 4}], ids=str)
def test_a_missing_tensor_is_an_error(hub: Hub, weights: dict[str, torch.Tensor], kwargs: dict[str, Any]) -> None:
    left = {key: value for key, value in weights.items() if key != "stages.2.blocks.0.mlp.fc1.bias"}
    hub.create_repo(REPO)
    hub.commit(REPO, {"model.safetensors": save(left)})
    assert "missing key stages.2.blocks.0.mlp.fc1.bias" in fails(kind=PretrainedError, **kwargs)


def test_a_classifier_is_random_only_for_other_classes(hub: Hub, weights: dict[str, torch.Tensor]) -> None:
    left = {key: value for key, value in weights.items() if not key.startswith("head.")}
    hub.create_repo(REPO)
    hub.commit(REPO, {"model.safetensors": save(left)})
    assert "missing key head.fc.weight" in fails(kind=PretrainedError)
    assert has_weights(timm.create_model("test_stvit", pretrained=True, num_classes=9), weights, ("head.",))
    with pytest.raises(
        PretrainedError, match=r"expected head.fc as the classifier in config.json, got \['head.fc', 'final_conv'\]"
    ):
        overlay = {"classifier": ["head.fc", "final_conv"]}
        timm.create_model("test_stvit", pretrained=True, num_classes=9, pretrained_cfg_overlay=overlay)
    # The file declares 3 channels and has 2. timm cannot adapt these and would leave random weights.
    odd = {**weights, "stem.0.weight": weights["stem.0.weight"][:, :2].contiguous()}
    hub.commit(REPO, {"model.safetensors": save(odd)})
    for channels in (1, 3, 4):
        assert "input_size[0]=3" in fails(kind=PretrainedError, in_chans=channels)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(published: Hub, folder: Path, tmp_path: Path) -> None:
    torch.save({"model": Evil(tmp_path / "harm")}, tmp_path / "evil.bin")
    published.commit(REPO, {"model.safetensors": None, "pytorch_model.bin": (tmp_path / "evil.bin").read_bytes()})
    said = fails(f"hf-hub:{REPO}", PretrainedError)
    assert "loading the file would run posix.mkdir, and code in files of weights is never run" in said
    assert "the file model.safetensors is missing" in fails()  # a tag uses only safetensors files
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(tmp_path / "harm")))
    fails(kind=PretrainedError, pretrained_cfg_overlay={"file": str(tmp_path / "evil.pth")})
    assert not (tmp_path / "harm").exists()


def test_invalid_config_json(published: Hub) -> None:
    published.commit(REPO, {"config.json": b"{"})
    assert "config.json cannot be used (Expecting" in fails(f"hf-hub:{REPO}", PretrainedError)
    published.commit(REPO, {"config.json": b'{"architecture": "foo", "pretrained_cfg": {}}'})
    assert "config.json cannot be used (Unknown model (foo))" in fails(f"hf-hub:{REPO}", PretrainedError)
    published.commit(REPO, {"config.json": b'{"pretrained_cfg": {}}'})
    assert "config.json has no 'architecture'" in fails(f"hf-hub:{REPO}", PretrainedError)


def test_full_disk(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # largest file that a process can write
    try:
        said = fails()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the disk is full" in said and "set HF_HOME to a disk with more space" in said
    timm.create_model("test_stvit", pretrained=True)  # the incomplete download is no obstacle


def test_missing_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "none.pth"
    said = fails(pretrained_cfg_overlay={"file": str(file)})
    assert f"{file}: no such file. Pass the path of the weights" in said
    assert f"{tmp_path}: no such file, or no config.json in the folder" in fails(f"local-dir:{tmp_path}")


def test_errors_not_about_weights_are_unchanged(published: Hub) -> None:
    with pytest.raises(TypeError, match="stoken_sizes"):
        timm.create_model("test_stvit", pretrained=True, stoken_sizes=4)
    with pytest.raises(ValueError, match="stoken_size"):
        stvit.create_model("test_stvit", pretrained=True, stoken_size=(1, 2))
    with pytest.raises(RuntimeError, match="Unknown model") as caught:
        stvit.create_model("stvit_smal", pretrained=True)
    assert not isinstance(caught.value, PretrainedError)
    with pytest.raises(ValueError, match="no source prefix"):
        stvit.create_model("org/name", pretrained=True)


def test_errors_of_other_functions_named_load_pretrained(folder: Path) -> None:
    def load_pretrained() -> None:
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"), explain_errors("net", {"file": "x"}):
        load_pretrained()
    with pytest.raises(RuntimeError, match="test_resnet: cannot load pretrained weights from the given state_dict: "):
        overlay = {"state_dict": load_file(folder / "model.safetensors")}
        stvit.create_model("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay)


def test_invalid_repository_ids(hub: Hub) -> None:
    assert "'a b' is not a repository id; pass ORG/NAME" in fails("hf-hub:a b")
    said = fails(pretrained_cfg_overlay={"hf_hub_id": "a/b/test_stvit.in1k"})  # result of STVIT_HUB_NAMESPACE=a/b
    assert "is not a repository id; pass ORG/NAME. Set STVIT_HUB_NAMESPACE if the weights have another owner" in said


# Finding the variant of weights


@pytest.mark.parametrize("name", timm.list_models(module="stvit"))
def test_variant_is_found_by_shapes(name: str) -> None:
    state = timm.create_model(name, num_classes=12, in_chans=4, device="meta").state_dict()
    assert find_variant(state) == name
    assert find_variant({key: value for key, value in state.items() if not key.startswith("head")}) == name
    assert find_variant({**state, "more": torch.ones(1)}) is None
    state.pop("stages.1.blocks.0.norm1.bias")
    assert find_variant(state) is None
