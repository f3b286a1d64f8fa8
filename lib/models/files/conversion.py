"""Converts tensors of a checkpoint's files to those of the model: one is renamed, or several are made into others.

transformers renames tensors when it loads them (prefixes of base models and wrappers), and fuses or splits some (experts of a
mixture). Its rules are used here, but for one group of tensors at a time, and in both directions.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from lib.models.files.checkpoint import Checkpoint


@dataclass
class Group:
    """Tensors of the files that together make tensors of the model."""

    first: str  # the name in the model that a conversion starts from
    converter: WeightConverter | None = None  # None: the group is one tensor, which is only renamed
    files: dict[str, list[str]] = field(default_factory=dict)  # pattern of the converter -> names in the files, in order
    renamed: dict[str, str] = field(default_factory=dict)  # name that the conversion starts from -> name in the files

    @property
    def names(self) -> list[str]:
        """Names of the group's tensors in the files."""
        return [name for names in self.files.values() for name in names]


class ModelTensors(Mapping[str, torch.Tensor]):
    """{name in the model: tensor}, made on access from a checkpoint's tensors. Those that the model lacks are left out."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module):
        self.checkpoint = checkpoint
        self.model = model
        self.group_of: dict[str, Group] = {}  # name in the model -> its group
        self.shapes: dict[str, torch.Size] = {}
        for group in _groups(checkpoint, model):
            made = self._convert(group, {name: checkpoint.outline(name) for name in group.names})
            self.group_of |= dict.fromkeys(made, group)
            self.shapes |= {name: tensor.shape for name, tensor in made.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        group = self.group_of[name]
        return self._convert(group, {key: self.checkpoint[key] for key in group.names})[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.group_of)

    def __len__(self) -> int:
        return len(self.group_of)

    def in_files(self, names) -> set[str]:
        """Names in the files of all that the tensors `names` of the model are made from."""
        return {key for name in names for key in self.group_of[name].names}

    def carried_back(self, first: str, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """{name in the files: values} from `values`, those of a group's tensors in the model; the inverse conversion."""
        group = self.group_of[first]
        if not group.converter:
            return {group.names[0]: values[first]}
        inverse = group.converter.reverse_transform()
        for name in [name for name, other in self.group_of.items() if other is group]:
            target, pattern = apply_converters(name, [inverse])
            inverse.add_tensor(target, name, pattern, values[name])
        made = inverse.convert(target, model=self.model, config=self.model.config)
        return {group.renamed[name]: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _convert(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not group.converter:
            return {group.first: tensors[group.names[0]]}
        converter = deepcopy(group.converter)
        for pattern, names in group.files.items():
            for name in names:
                converter.add_tensor(group.first, name, pattern, tensors[name])
        made = converter.convert(group.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _groups(checkpoint: Checkpoint, model: nn.Module) -> list[Group]:
    """Sort the files' tensors by what they become, as transformers does when it loads them."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    for key in sorted(checkpoint, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state:
            group = groups.setdefault(name, Group(name, by_pattern[pattern] if pattern else None))
            group.files.setdefault(pattern or key, []).append(key)
            if pattern:
                group.renamed[apply_renamings(key, renamings)] = key
    return list(groups.values())
