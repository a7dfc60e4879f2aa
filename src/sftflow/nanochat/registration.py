"""Makes transformers' auto classes know the model, once sftflow is imported, without importing them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


def arrange() -> None:
    """Register the config now where transformers' `AutoConfig` is there, else as soon as it is imported.

    The model follows when there is such a config: it imports torch, and transformers' own modules import each other in
    circles until all are there.
    """
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    from sftflow.nanochat.config import MODEL_TYPE, SftflowNanochatConfig

    sys.modules[AUTO].AutoConfig.register(MODEL_TYPE, SftflowNanochatConfig, exist_ok=True)
    SftflowNanochatConfig.when_made = staticmethod(_register_model)


def _register_model() -> None:
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from sftflow.nanochat.config import SftflowNanochatConfig
    from sftflow.nanochat.model import SftflowNanochatForCausalLM, SftflowNanochatModel

    AutoModel.register(SftflowNanochatConfig, SftflowNanochatModel, exist_ok=True)
    AutoModelForCausalLM.register(SftflowNanochatConfig, SftflowNanochatForCausalLM, exist_ok=True)


class _WhenImported:
    """Finds one module as it would be found without it, and registers when that has run. Then it is gone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _register()

            loader.exec_module = exec_module
        return spec
