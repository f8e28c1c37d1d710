"""How a model is compiled: the settings, what they need, and doing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hpdist.config.section import Section
from hpdist.errors import ConfigError

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Compile(Section):
    """How torch.compile compiles the model."""

    backend: str = "inductor"
    """The compiler; others than inductor are for trials."""
    mode: Mode = "default"
    """reduce-overhead: CUDA graphs, for small models; max-autotune: also time the kernels."""
    dynamic: bool | None = None
    """Compile for any batch size; by default as soon as a second size has come."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of `torch.compile` that are not its defaults."""
        chosen = self.model_dump(exclude_defaults=True)
        return {name: value for name, value in chosen.items() if value is not None}


def compile_arguments(
    wanted: bool | Compile, launcher: tuple[Mapping[str, Any], str] | None, stage: int | None
) -> Mapping[str, Any] | None:
    """Return the arguments of `torch.compile`: the launcher's, else the config's, or None.

    Raises ConfigError if they cannot work here, or under this ZeRO stage.
    """
    if launcher is not None:
        arguments, place = launcher
    elif wanted is False:
        return None
    else:
        arguments, place = {} if wanted is True else wanted.arguments(), "compile"
    backend, mode = arguments.get("backend", "inductor"), arguments.get("mode")
    known = torch.compiler.list_backends(exclude_tags=None) if "backend" in arguments else [backend]
    if backend not in known:
        raise ConfigError(f"compile.backend: torch has no {backend!r}; it has {', '.join(known)}")
    if mode is not None and backend != "inductor":
        raise ConfigError(f"{place}: mode {mode} is inductor's, not {backend}'s; leave one out")
    if mode == "reduce-overhead" and not torch.cuda.is_available():
        raise ConfigError(
            f"{place}: mode reduce-overhead records CUDA graphs, and no GPU is visible; leave the "
            "mode out"
        )
    if mode in _GRAPHS and stage == 3:
        raise ConfigError(
            f"{place}: mode {mode} records CUDA graphs, which need weights that stay where they "
            "are, and zero.stage 3 moves them; leave the mode out, or choose another stage"
        )
    return arguments


def compile_model(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Compile a model in place, so that its parameters keep their names.

    What a CUDA graph returns lies where the next pass writes, and a step has several passes: their
    outputs are copied.
    """
    from torch._dynamo import config  # takes as long as torch itself: not before it is needed

    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    model.compile(**arguments)
    if arguments.get("mode") in _GRAPHS:
        compiled: Any = model._compiled_call_impl
        model._compiled_call_impl = _with_copied_outputs(compiled)


_VARIANTS = 32  # of a pass: mode, gradient, what counts for running statistics, sizes
_GRAPHS = ("reduce-overhead", "max-autotune")


def _with_copied_outputs(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, torch.clone, compiled(*args, **kwargs))

    return call
