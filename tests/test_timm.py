"""Runs timm's own model tests, from its source archive, on our models."""

import re
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import timm
from safetensors.torch import save

import stvit  # noqa: F401  registers the models in timm
from tests import source_archive
from tests.hub_server import Hub

# `make test` runs this model, which has all kinds of layers. `make test-long` runs the others.
SOME = ["test_stvit"]
OTHERS = [name for name in timm.list_models(module="stvit") if name not in SOME]
FEATURE_MODULES = "FEAT_INTER_FILTERS = ["

# Plugin of timm's test session. It registers our models and deselects the tests of other models.
PLUGIN = """
import os

import timm

import stvit

OURS = set(os.environ["STVIT_MODELS"].split())
list_all = timm.list_models


def list_ours(*args, **kwargs):
    return [name for name in list_all(*args, **kwargs) if name.split(".")[0] in OURS]


# Collecting the tests of all models would take longer than running those of ours.
timm.list_models = list_ours


def pytest_collection_modifyitems(config, items):
    def is_ours(item):
        if item.name.startswith("test_model_inference"):
            return False  # compares with results that are stored in timm's repositories on the Hub
        if "_pretrained[" in item.name and "_384" in item.name:
            return False  # has the same weights as the variant without _384
        name = item.callspec.params.get("model_name", "") if hasattr(item, "callspec") else ""
        return str(name).split(".")[0] in OURS

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = [item for item in items if is_ours(item)]
"""


def fetch_test_models() -> str:
    """Returns the text of tests/test_models.py in timm's source archive.

    Skips the test if pip cannot download the archive.
    """
    try:
        archive = source_archive.fetch("timm")
    except source_archive.ArchiveMissing as error:
        reason = f"{error}, ITS TESTS OF OUR MODELS DID NOT RUN"
        print(error.output)
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"timm-{timm.__version__}/tests/test_models.py")
        assert member is not None
        return member.read().decode()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("models", [SOME, pytest.param(OTHERS, marks=pytest.mark.long)], ids=["some", "others"])
def test_timm_tests_pass_for_our_models(models: list[str], hub: Hub, tmp_path: Path) -> None:
    """Tests that load pretrained weights download them from a local Hub."""
    source = fetch_test_models()
    published = [name for name in models if timm.is_model_pretrained(name)]
    for name in published:
        weights = save(timm.create_model(name).state_dict())
        repo = timm.get_pretrained_cfg(name).hf_hub_id
        hub.create_repo(repo)
        hub.commit(repo, {"model.safetensors": weights})
    assert source.count(FEATURE_MODULES) == 1
    (tmp_path / "test_models.py").write_text(source.replace(FEATURE_MODULES, FEATURE_MODULES + "'stvit', "))
    (tmp_path / "only_stvit.py").write_text(PLUGIN)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "only_stvit", "-p", "no:cacheprovider", "-W", "ignore", "-v", "-rs"]
        + ["test_models.py"],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home2") | {"PYTHONPATH": str(tmp_path), "STVIT_MODELS": " ".join(models)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout[-20000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

    passed: dict[str, set[str]] = {}
    for test, parameters in re.findall(r"::(test_\w+)\[(\S+)\] PASSED", result.stdout):
        passed.setdefault(test, set()).add(parameters.removeprefix("1-").removeprefix("2-").split(".")[0])
    for test in (
        "test_model_forward",
        "test_model_backward",
        "test_model_default_cfgs",
        "test_model_forward_torchscript",
        "test_model_forward_features",
        "test_model_forward_intermediates_features",
        "test_model_forward_intermediates",
        "test_model_features_pretrained",
        "test_prune_intermediate_layers_contract",
        "test_model_forward_fx",
        "test_model_backward_fx",
        "test_model_forward_fx_torchscript",
    ):
        assert passed.get(test, set()) == set(published if test == "test_model_features_pretrained" else models), test
    assert " skipped" not in result.stdout.splitlines()[-1]
