"""Names of weights are those of the user's model, whatever wraps it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hpdist.checkpoint.manifest import digest_of
from hpdist.distributed.module_names import collapsed, plain_name, shortened, with_plain_names
from tests.support.odd_models import Odd, Reentrant, Small, differing, train, trainer


class Compiled(Small):
    """One of its layers is compiled, as for regional compilation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.compile(self.first, backend="eager")


def test_names_lose_the_segments_of_wrappers() -> None:
    assert plain_name("_orig_mod.encoder._checkpoint_wrapped_module.weight") == "encoder.weight"
    assert plain_name("module.weight") == "module.weight"  # may be the user's own
    wrapped = {"_orig_mod.module.a": 1, "_orig_mod.module.b": 2}
    assert with_plain_names(wrapped, under_ddp=True) == {"a": 1, "b": 2}
    assert with_plain_names(wrapped, under_ddp=False) == {"module.a": 1, "module.b": 2}


def test_a_compiled_model_saves_what_a_plain_one_does(tmp_path: Path) -> None:
    train(Small, tmp_path, "plain", 2)
    train(Compiled, tmp_path, "parts", 2)
    torch.manual_seed(0)
    compiled = torch.compile(Small(), backend="eager")
    trainer(compiled, tmp_path, "whole", 2).fit()
    assert differing(tmp_path, "plain", "parts", 2) == []
    assert differing(tmp_path, "plain", "whole", 2) == []


@pytest.mark.filterwarnings("ignore:model.* does not reach")
@pytest.mark.parametrize("prefix", ["_orig_mod.", "_orig_mod.module."])
def test_a_checkpoint_with_the_names_of_wrappers_is_continued(tmp_path: Path, prefix: str) -> None:
    for name in ("whole", "wrapped"):
        train(Odd, tmp_path, name, 2)
    under_ddp = "module" in prefix
    _wrap(tmp_path / "wrapped/checkpoints/step-00000002", prefix, ranks=2 if under_ddp else 1)
    for name in ("whole", "wrapped"):
        train(Odd, tmp_path, name, 3)
    assert differing(tmp_path, "whole", "wrapped", 3) == []


def _wrap(folder: Path, prefix: str, ranks: int) -> None:
    """Write a checkpoint's names as an earlier version did under a compiler."""
    facts = json.loads((folder / "manifest.json").read_text())
    del facts["digest"], facts["optimizer_apart"], facts["fragments"]
    for name in facts["files"]:
        tensors = {}
        for key, values in load_file(folder / name).items():
            kind, _, rest = key.partition("/")
            named = kind in ("master", "teacher", "buffer") or kind.startswith("optimizer.")
            tensors[f"{kind}/{prefix}{rest}" if named else key] = values
        save_file(tensors, folder / name)
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        facts["files"][name] = {"bytes": len(content), "sha256": digest}
    shapes = facts["identity"]["parameters"]
    facts["identity"]["parameters"] = {prefix + name: shape for name, shape in shapes.items()}
    del facts["identity"]["optim.name"]
    facts["world_size"] = ranks
    text = json.dumps({**facts, "digest": digest_of(facts)})
    (folder / "manifest.json").write_text(text)


def test_a_module_stands_for_all_that_it_trains() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert collapsed(model, ["0.0.weight", "0.0.bias", "1.bias"]) == [
        "0.0 (2 parameters)",
        "1.bias",
    ]
    assert collapsed(model, [n for n, _ in model[0].named_parameters(prefix="0")]) == [
        "0 (4 parameters)"
    ]
    assert shortened("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"


def test_layers_without_a_gradient_are_named_once_by_module(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="does not reach") as told:
        train(Reentrant, tmp_path, "run", 3)
    (line,) = [str(each.message) for each in told if "does not reach" in str(each.message)]
    assert "does not reach front (18 parameters); what no step reaches stays as it is" in line
    assert "use_reentrant=False" in line
