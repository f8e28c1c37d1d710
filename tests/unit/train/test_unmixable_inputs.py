"""What a loop of one's own gives an algorithm that changes inputs: numbers, or a clear error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hpdist.algorithms import (
    ICT,
    VAT,
    Algorithm,
    CRMatch,
    FixMatch,
    LogitAdjustment,
    MixMatch,
    Reconstruction,
    RegMixMatch,
    ReMixMatch,
    WeakOutputs,
)
from hpdist.algorithms.protocol import MicroBatch
from hpdist.data.batch import LabeledBatch, UnlabeledBatch
from hpdist.data.decode.text import Vocabulary
from hpdist.data.views import AudioViewsConfig, IdentityViewsConfig, TextViewsConfig, Views
from hpdist.errors import ConfigError
from hpdist.train.micro_batch import MicroBatcher

CHANGING: dict[str, Callable[[], Algorithm]] = {
    "ICT": ICT,
    "MixMatch": MixMatch,
    "ReMixMatch": lambda: ReMixMatch(4, rotation_weight=0.0),
    "RegMixMatch": lambda: RegMixMatch(4),
    "VAT": VAT,
    "Reconstruction": lambda: Reconstruction(FixMatch()),
    "LogitAdjustment": lambda: LogitAdjustment(MixMatch()),
}


class Ids:
    """Views of one's own, which leave integers as they are."""

    def plain(self, x: Tensor) -> Tensor:
        return x

    def weak(
        self, x: Tensor, *, stream: str, step: int, positions: Tensor, copy: int = 0
    ) -> Tensor:
        return x

    strong = weak


def cut(algorithm: Algorithm, views: Views, rows: Tensor) -> MicroBatch:
    """The one micro-batch of a step."""
    ids = torch.arange(len(rows))
    cutter = MicroBatcher(algorithm, views, 1, 0, 1, torch.device("cpu"), 0)
    batches = LabeledBatch(rows, ids % 4, ids), UnlabeledBatch(rows, ids)
    (micro,) = cutter.split(*batches, 0)
    return micro


IDS = torch.randint(3, 50, (8, 6), generator=torch.Generator().manual_seed(0))
SOUNDS = torch.rand(8, 160)
WAVES = AudioViewsConfig(sampling_rate=1600, seconds=0.1, spectrogram=False)


@pytest.mark.parametrize("name", CHANGING)
def test_what_has_no_sum_is_refused(name: str) -> None:
    text = TextViewsConfig(max_length=6).build(0, Vocabulary(50, 0, 1, (0, 1, 2)))
    with pytest.raises(ConfigError, match=f"^{name} mixes inputs, .* int64 values do not allow"):
        cut(CHANGING[name](), Ids(), IDS)
    with pytest.raises(ConfigError, match=f"^{name} mixes inputs, .* token ids do not allow"):
        cut(CHANGING[name](), text, IDS)
    with pytest.raises(ConfigError, match=f"^{name} mixes .* waveforms of different lengths do"):
        cut(CHANGING[name](), WAVES.build(0), SOUNDS)
    assert cut(CHANGING[name](), IdentityViewsConfig().build(0), SOUNDS).uses_unlabeled
    assert not cut(FixMatch(), Ids(), IDS).inputs.weak[0].is_floating_point()


@pytest.mark.parametrize("name", ["CRMatch", "ReMixMatch"])
def test_only_square_images_are_turned(name: str) -> None:
    algorithm = CRMatch() if name == "CRMatch" else ReMixMatch(4)
    micro = cut(algorithm, IdentityViewsConfig().build(0), torch.rand(8, 6))
    weak = WeakOutputs(torch.zeros(8, 4), micro.ids, positions=micro.inputs.positions)
    with pytest.raises(
        ConfigError, match=r"rotates square images .*algorithm\.rotation_weight to 0"
    ):
        algorithm.mix(micro.inputs, weak)
