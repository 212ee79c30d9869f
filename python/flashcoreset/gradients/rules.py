"""Gradient rules that users register for types of modules, and those of torch's layers with several inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashcoreset.gradients.layers import OTHERWISE
from flashcoreset.gradients.replay import Rule

_RULES: dict[type[nn.Module], Rule] = {}


def register_gradient_rule(module_type: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Registers how `GradientSketcher` gets the per-sample gradients of a type of modules: a decorator of the rule.

    A rule comes before what the library knows of the type, and serves all wanted parameters inside of the module. It holds for the type
    and for its subclasses that compute the same (no forward of their own). Sums are checked as for other layers; a rule registered
    later replaces an earlier one.

    Args:
        module_type: a subclass of torch.nn.Module.

    The rule is rule(module, inputs, grad_output) -> dict, with
        inputs: the tuple of what the module was called with, keywords last; tensors are detached.
        grad_output: the gradient of the output, [B, ...]; a tuple, with None for those without one, if there are several outputs.
        dict: name of a parameter in the module -> gradients [B, *shape], one per sample, not averaged. It must hold
            all wanted ones.

    Returns:
        A decorator that returns the rule unchanged.

    Raises:
        TypeError: for a `module_type` that is no type of modules, or a rule that is not callable.

    Example:
        >>> import torch, flashcoreset as fc
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(4))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @fc.register_gradient_rule(Scale)
        ... def scale_gradients(module, inputs, grad_output):
        ...     return {"weight": inputs[0] * grad_output}
        >>> model = torch.nn.Sequential(Scale(), torch.nn.Linear(4, 2))
        >>> sketcher = fc.GradientSketcher(model, 16)
        >>> with sketcher:
        ...     model(torch.ones(3, 4)).square().sum().backward()
        >>> sketcher.norms.shape
        torch.Size([3])
    """
    if not isinstance(module_type, type) or not issubclass(module_type, nn.Module):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")

    def register(rule: Rule) -> Rule:
        if not callable(rule):
            raise TypeError(
                f"rule must be a function (module, inputs, grad_output) -> dict, got {type(rule).__name__}"
            )
        _RULES[module_type] = rule
        return rule

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of `module`'s type, or of the nearest type above that computes the same."""
    own = type(module)
    for kind in own.__mro__:
        rule = _RULES.get(kind)
        if rule is not None and all(
            getattr(own, name, None) is getattr(kind, name, None) for name in OTHERWISE
        ):
            return rule
    return None


def _bilinear(module: nn.Module, inputs: tuple[Any, ...], g: Any) -> dict[str, Tensor]:
    x, y = (one.flatten(1, -2) if one.dim() > 2 else one[:, None] for one in inputs)
    g = g.flatten(1, -2) if g.dim() > 2 else g[:, None]
    x, y, g = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (x, y, g))
    return {"weight": torch.einsum("btk,bti,btj->bkij", g, x, y), "bias": g.sum(1)}


register_gradient_rule(nn.Bilinear)(_bilinear)
