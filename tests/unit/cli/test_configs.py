"""Every config in `configs` resolves, and names what there is."""

import re
from pathlib import Path
from typing import cast

import pytest
import torch

from hpdist.algorithms.addons.base import AddOnConfig, build_algorithm
from hpdist.algorithms.base import AlgorithmConfig
from hpdist.data.config import Source
from hpdist.data.decode.text import Vocabulary
from hpdist.data.views import ImageViewsConfig, TextViewsConfig
from hpdist.models import HuggingFaceConfig, ModelConfig, TimmConfig, build_model
from hpdist.train import config as configuration
from hpdist.train.checks import divide_batch
from hpdist.train.config import RunConfig

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
HUB = [path for path in CONFIGS if ON_THE_HUB.fullmatch(configuration.load(path).data.labeled.path)]


def named(path: Path) -> str:
    return path.stem


def sets(config: RunConfig) -> list[Source]:
    data = config.data
    unlabeled = data.unlabeled
    assert unlabeled is not None
    return [data.labeled, *(unlabeled.mix or [unlabeled]), *filter(None, [data.test])]


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_it_resolves_and_its_parts_can_be_made(path: Path) -> None:
    config = configuration.load(path)
    assert configuration.parse(config.model_dump()) == config
    assert config.run.name == path.stem
    algorithm = build_algorithm(
        cast(AlgorithmConfig, config.algorithm), cast(list[AddOnConfig], config.addons), 4
    )
    assert config.algorithm.name in path.stem or path.stem.startswith(("bccd_", "case_", "digits"))
    assert algorithm.views.uses_unlabeled
    if path.stem != "case_synthetic":  # of one row a step
        assert divide_batch(config.batch, algorithm, 4) == 1
    assert isinstance(config.model, ModelConfig)
    if isinstance(config.views, ImageViewsConfig):
        config.views.build(0)
    elif isinstance(config.views, TextViewsConfig):
        config.views.build(0, Vocabulary(100, 0, 3, (0, 1, 2)))
    if isinstance(config.views, ImageViewsConfig) and not isinstance(config.model, TimmConfig):
        with torch.device("meta"):
            model = build_model(config.model, (3, 32, 32), 10, 0)
        if path.stem == "cifar100_fixmatch":
            assert 23e6 < sum(p.numel() for p in model.parameters()) < 24e6  # WRN-28-8


def test_the_sets_of_the_hub_have_a_config() -> None:
    stems = {path.stem.partition("_")[0] for path in HUB}
    assert stems == {"ag", "cifar100", "esc50", "eurosat", "imdb", "speech", "stl10", "yelp"}


@pytest.mark.parametrize("path", HUB, ids=named)
def test_a_config_of_a_public_set_says_whose_settings_it_has(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.search(r"\barXiv:\d{4}\.\d{5}\b", text.partition("\nmodel:")[0])
    assert "trust_remote_code" not in text
    config = configuration.load(path)
    assert {source.path for source in sets(config)} == {config.data.labeled.path}
    assert all(ON_THE_HUB.fullmatch(source.path) for source in sets(config))
    assert config.data.test is not None
    assert config.data.test.split != config.data.labeled.split
    if isinstance(config.model, HuggingFaceConfig | TimmConfig):
        assert config.model.pretrained
