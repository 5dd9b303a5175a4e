"""Checkpoint names and module names: one adapter over what transformers 5 keeps private.

The hub's names differ from the modules' (a missing base prefix in gpt2, renamed layers); transformers converts on load.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from obsprune.errors import InputError


def module_names(network: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """{checkpoint key: parameter name in the network}; keys the network has no place for map to themselves.

    Raises InputError where a parameter is put together from several tensors (mixtures of experts do that).
    """
    mapping = get_model_conversion_mapping(network)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own = network.state_dict()
    names: dict[str, str] = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, network.base_model_prefix, own)
        if converted is not None and name in own:
            raise InputError(
                f"{key} is stored apart from its layer's other tensors (a fused or mixture-of-experts layer), "
                f"and {network.config.model_type} checkpoints of that kind are not supported yet"
            )
        names[key] = name
    return names
