"""Low-rank adapters on the linear layers of any part, by peft: put in, merged into the weights, taken away.

Every part has its own peft configuration, injected into the part's own module: ranks and dropout differ by part, and
`q_proj` of the language model can never mean the vision tower's. Names keep their part's prefix
(`model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight`).
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmtune.config.tuning import Adapters, Dora, Full, Part, Qlora, TuningConfig
from vlmtune.errors import CheckpointError, RecipeError
from vlmtune.models.origin import Adaptation, origin_digests
from vlmtune.models.tuning import ADAPTER, PART_PREFIXES, part_of, unreached_prefixes
from vlmtune.models.vision import tower_family
from vlmtune.models.vlm import VLM

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def adapt(model: VLM, tuning: TuningConfig, seed: int) -> None:
    """Puts the adapters of a recipe in place, drawn from `seed`; a model that was opened with them is left alone.

    The adapters' first update is zero: the model computes what it did. Raises RecipeError for targets that do not
    exist.
    """
    modes = {part: mode for part, mode in tuning.parts().items() if isinstance(mode, Adapters)}
    if not modes or model.adaptation is not None:
        return
    if model.origin is None:
        raise CheckpointError(
            "adapters need a base that can be built again", "tuning", "Make the model with build_model."
        )
    targets = {part: {"targets": target_layers(model, part, mode)} for part, mode in modes.items()}
    resolved = tuning.model_copy(
        update={part: mode.model_copy(update=targets[part]) for part, mode in modes.items()}
    )
    digests = origin_digests(model, model.origin, tuning)
    inject(model, resolved, seed)
    model.adaptation = Adaptation(resolved, model.origin, digests)


def inject(model: VLM, tuning: TuningConfig, seed: int) -> None:
    """Changes the model in place: 4-bit layers where asked for, then the adapters; all that learns in float32.

    Adam moves a weight by about its learning rate: 2e-5 is less than half the distance between two bfloat16 numbers
    around 0.01, so a projector of a bfloat16 model would stand still. What is frozen keeps its type.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for part, mode in tuning.parts().items():
            if isinstance(mode, Adapters):
                layers = target_layers(model, part, mode)
                module = part_module(model, part)
                if isinstance(mode, Qlora):
                    _quantize(module, dict.fromkeys((*_block_layers(model, part), *layers)))
                _inject_part(module, mode, layers)
    whole = {part for part, mode in tuning.parts().items() if isinstance(mode, Full)}
    for name, weight in model.named_parameters():
        if part_of(name) in whole:
            weight.data = weight.data.float()
    part_module(model, "projector").register_forward_pre_hook(_cast_features)
    model.train(model.training)  # new modules start in training mode: dropout would be on


def _cast_features(projector: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tower's features in the projector's type; at the other border of parts Llava does it."""
    dtype = next(projector.parameters()).dtype
    return tuple(each.to(dtype) for each in inputs)


def _inject_part(module: nn.Module, mode: Adapters, layers: Iterable[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=mode.rank,
        lora_alpha=mode.scale,  # type: ignore[arg-type]  # a number is all it has to be
        lora_dropout=mode.dropout,
        use_dora=isinstance(mode, Dora),
        target_modules="|".join(map(re.escape, layers)),
    )
    inject_adapter_in_model(config, module, ADAPTER)
    for note in ("peft_config", "is_loaded_in_4bit"):  # peft's, for itself; the next adapters start afresh
        vars(module).pop(note, None)
    for _, layer in _lora_layers(module):
        for name, weight in layer.named_parameters():
            if not name.startswith("base_layer."):
                weight.data = weight.data.float()  # small, and the only weights that learn
        if isinstance(mode, Dora):
            _measure_again(layer)


def _measure_again(layer: LoraLayer) -> None:
    """DoRA's magnitudes from float32: rounded to the base's bfloat16 they would change the model before step 1."""
    layer.lora_magnitude_vector[ADAPTER].update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=layer.lora_A[ADAPTER].weight,
        lora_B=layer.lora_B[ADAPTER].weight,
        scaling=layer.scaling[ADAPTER],
    )


# ---------------------------------------------------------------- which layers


def part_module(model: VLM, part: Part) -> nn.Module:
    """The module that a part's targets are paths in."""
    return model.get_submodule(PART_PREFIXES[part][0].removesuffix("."))


def target_layers(model: VLM, part: Part, mode: Adapters) -> tuple[str, ...]:
    """Paths inside the part of the layers that get adapters; raises RecipeError when a pattern matches none.

    A layer that no gradient reaches is among them only when it is named; its adapters then stay frozen.
    """
    if mode.targets is None:
        unreached = unreached_prefixes(model.config)
        prefix = PART_PREFIXES[part][0]
        found = [name for name in _block_layers(model, part) if not f"{prefix}{name}.".startswith(unreached)]
        if not found:
            raise RecipeError(
                f"{part} has no linear layers", f"tuning.{part}", "Freeze it, or train it full."
            )
        return tuple(found)
    linear = _linear_layers(part_module(model, part))
    matched: dict[str, None] = {}
    for pattern in mode.targets:
        names = [name for name in linear if fnmatchcase(name, pattern)]
        if not names:
            raise RecipeError(
                f"no linear layer of {part} is {pattern!r}",
                f"tuning.{part}.targets",
                _nearest(pattern, linear),
            )
        matched |= dict.fromkeys(names)
    return tuple(matched)


def _block_layers(model: VLM, part: Part) -> list[str]:
    """Every linear layer of the part's transformer blocks; of a projector every linear layer."""
    found = _linear_layers(part_module(model, part))
    if part != "vision":
        return found
    blocks = tower_family(model.config.vision_config).layers
    return [name for name in found if name.startswith(f"{blocks}.")]


def _linear_layers(module: nn.Module) -> list[str]:
    """Exactly nn.Linear: a subclass may use its weight without calling it (as nn.MultiheadAttention does)."""
    return [name for name, layer in module.named_modules() if type(layer) is nn.Linear]


def _nearest(pattern: str, linear: list[str]) -> str:
    general = [*dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in linear)]
    near = difflib.get_close_matches(pattern, general, n=1, cutoff=0.3)
    return f"{f'Did you mean {near[0]!r}? ' if near else ''}There are: {', '.join(general)}."


# ---------------------------------------------------------------- four bits


def _quantize(module: nn.Module, layers: Iterable[str]) -> None:
    """Replaces linear layers by NF4 ones with double quantisation, on the accelerator if there is one."""
    demand_bitsandbytes("tuning mode qlora")
    from bitsandbytes.nn import Linear4bit, Params4bit

    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for path in layers:
        old = module.get_submodule(path)
        new = Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=old.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        weight = Params4bit(
            old.weight.data.contiguous(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        new.weight = weight.to(here or old.weight.device)
        new.bias = old.bias
        # Else a forward in eval mode on a CPU repacks the weights for bfloat16, lossily and for good: the next
        # training step would not see the weights of the last.
        new.support_avx512bf16_for_cpu = False
        module.set_submodule(path, new)
    module.is_loaded_in_4bit = True  # foreign: peft looks for it


def demand_bitsandbytes(who: str) -> None:
    """Raises RecipeError when the library is not installed."""
    if find_spec("bitsandbytes") is None:
        raise RecipeError(f"{who} needs bitsandbytes", "", 'Install it: pip install "vlmtune[quant]".')


def _is_quantized(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) and vars(layer.weight).get("quant_state") is not None


def _dequantized(layer: Any) -> Float[Tensor, "o i"]:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


# ---------------------------------------------------------------- merging


def merged_state(model: VLM) -> dict[str, Tensor]:
    """The state dict that the model has without adapters, their updates added to the weights.

    Updates are added in float32 and rounded once to the base's type. 4-bit weights are those the adapters were
    trained on, dequantised. The names are those of the base, or nothing is returned.
    """
    state = model.state_dict()
    if model.adaptation is None:
        return state
    changed = _changed_layers(model)
    plain = {name: tensor for name, tensor in state.items() if not _inside(name, changed)}
    for path, layer in changed.items():
        plain[f"{path}.weight"] = merged_weight(layer)
        if (bias := _base(layer).bias) is not None:
            plain[f"{path}.bias"] = bias.detach()
    with torch.device("meta"):
        expected = VLM(model.config).state_dict().keys()
    assert plain.keys() == expected, f"merged and base differ in {sorted(plain.keys() ^ expected)[:5]}"
    return plain


def merge_in_place(model: VLM) -> None:
    """Leaves the model without adapters, with plain linear layers; each old layer is freed before the next."""
    for path, layer in _changed_layers(model).items():
        bias = _base(layer).bias
        new = nn.Linear(1, 1, bias=bias is not None, device="meta")
        new.weight, new.bias = nn.Parameter(merged_weight(layer)), bias
        new.out_features, new.in_features = new.weight.shape
        model.set_submodule(path, new)
    model.adaptation = None


@torch.no_grad()
def merged_weight(layer: Any) -> Float[Tensor, "o i"]:
    """The matrix by which a layer multiplies, adapters included, in the type of its base."""
    base = _base(layer)
    if _is_quantized(base):
        weight = _dequantized(base)
        return (
            weight if layer is base else (weight.float() + layer.get_delta_weight(ADAPTER)).to(weight.dtype)
        )
    merged = copy.deepcopy(layer).float()
    merged.merge(safe_merge=True)
    return merged.get_base_layer().weight.data.to(base.weight.dtype)


def _changed_layers(model: VLM) -> dict[str, Any]:
    """Layers with adapters, and 4-bit ones without, by their path."""
    found: dict[str, Any] = dict(_lora_layers(model))
    inner = {id(layer.get_base_layer()) for layer in found.values()}
    bare = ((path, layer) for path, layer in model.named_modules() if id(layer) not in inner)
    return found | {path: layer for path, layer in bare if _is_quantized(layer)}


def _lora_layers(module: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer))


def _base(layer: Any) -> Any:
    """The layer under the adapters, or the layer itself."""
    from peft.tuners.lora import LoraLayer

    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _inside(name: str, paths: dict[str, Any]) -> bool:
    """Whether a tensor belongs to one of the modules."""
    words = name.split(".")
    return any(".".join(words[:count]) in paths for count in range(1, len(words)))
