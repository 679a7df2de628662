"""Quantized checkpoints in transformers: our modules for nn.Linear, under its own loading and tensor parallelism.

`AutoModelForCausalLM.from_pretrained` finds a `mix64` checkpoint's method in its config.json; GPTQ ones are ours with
`quantization_config=BitshardConfig()`. transformers then reads the packed tensors as it does any others, each rank its
slices of them (transformers_parallel.py); what its placements cannot describe is read and cut here. Private names of
transformers are used in these two files alone.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitshard.checkpoint import Checkpoint
from bitshard.errors import CheckpointError, PlanError, RankError, SpecError
from bitshard.integrations.transformers_parallel import require_degree, tp_plan
from bitshard.kernels import BACKEND, require_backend
from bitshard.layout import GptqLayout, Mix64Layout
from bitshard.mixed import MixedWeight
from bitshard.nn import Experts, Mix64Linear, PackedLinear, QuantLinear, eight_bit, fits_eight_bit, hoist_gather
from bitshard.parallel import Strategy, parse_strategy
from bitshard.sources import resolve
from bitshard.spec import STRIP, MixSpec, QuantSpec
from bitshard.versions import report_untested

logger = logging.getLogger(__name__)

# environment, for programs that pass no config on: with 0 no GPTQ checkpoint is ours to run, with anything else every
# one is, and without it those that bitshard wrote
EVERY_GPTQ = "BITSHARD_GPTQ"


def load(
    path: Path | str,
    tp_size: int = 1,
    strategy: Strategy = "tp-aware",
    dtype: torch.dtype | None = None,
    backend: str = "exact",
) -> PreTrainedModel:
    """A causal language model of the checkpoint `path`, 16-bit or quantized, ready to generate; a folder, .gguf file or
    hub id.

    tp_size > 1: called on every rank of a torch.distributed job of that size. dtype: of activations; by default float32
    on a CPU and the checkpoint's own elsewhere. backend: see kernels. Raises PlanError when the degree or the strategy
    does not fit, RankError outside of such a job, and FormatError or CheckpointError when the files do not hold all of
    a model that transformers knows.
    """
    path = resolve(str(path))
    checkpoint, config = Checkpoint.open(path), load_config(path)
    if tp_size > 1 and not dist.is_initialized() and "RANK" not in os.environ:
        start = f"start the program by `torchrun --nproc-per-node {tp_size}`, or use `bitshard generate --tp {tp_size}`"
        raise RankError("tp_size", f"{tp_size} ranks, and one process", "a torch.distributed job of that size", start)
    if tp_size > 1 and (started := int(os.environ.get("WORLD_SIZE", tp_size))) != tp_size:
        fix = f"--nproc-per-node {tp_size}, or a degree of {started}"
        raise RankError("tp_size", f"{tp_size} ranks, and {started} processes", "as many of both", fix)
    if dtype is None:
        dtype = getattr(config, "dtype", None) if torch.cuda.is_available() else torch.float32
    kwargs: dict[str, Any] = {"dtype": dtype or torch.float32}
    if checkpoint.quantization is not None:
        kwargs["quantization_config"] = BitshardConfig(backend, strategy)
    if tp_size > 1:
        require_degree(checkpoint.plan(), tp_size, strategy)
        kwargs["distributed_config"] = DistributedConfig(tp_size=tp_size, tp_plan="auto")
    elif torch.cuda.is_available():
        kwargs["device_map"] = "cuda"
    model, report = AutoModelForCausalLM.from_pretrained(
        path, config=config, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # transformers fills what it cannot load with random numbers
    if report["missing_keys"] or report["mismatched_keys"]:
        absent, misshapen = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
        found = f"no tensor {absent[0]}" if absent else "{} of shape {}, not {}".format(*map(_plain, misshapen[0]))
        raise CheckpointError(
            str(path), found, "all tensors of the model, as config.json has it", "get the files again"
        )
    return cast(PreTrainedModel, model.eval())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, torch.Size) else value


def load_config(path: Path) -> Any:
    """transformers' own config of a causal language model; CheckpointError when it knows none for this config.json."""
    try:
        config = AutoConfig.from_pretrained(path)
        known = type(config) in AutoModelForCausalLM._model_mapping
        if known:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever the classes of a foreign file may raise
        raise _unknown(path, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    if not known:
        raise _unknown(path, f"model_type {config.model_type!r}, which is no causal language model")
    return config


def require_whole(checkpoint: Checkpoint) -> None:
    """`require_tensors` of the model that config.json describes, before an engine is started."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(checkpoint.path))
    require_tensors(checkpoint, model)


def require_tensors(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raise CheckpointError for what `model`, yet without packed matrices, has beside these and the files have not:
    transformers would fill it with random numbers and vLLM leave it as it is.
    """
    arch = checkpoint.arch
    packed = {f"{arch.module_name(name)}.weight" for name in checkpoint.matrices()}
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_missing or ("(?!)",)))
    experts = arch.mlp.experts and arch.module_name(f".{arch.mlp.experts}").removesuffix(".{e}") + "."
    for name in checkpoint.absent(model.state_dict().keys() - packed - model.all_tied_weights_keys.keys()):
        if not ignored.search(name) and not (experts and experts in name):
            found = f"no tensor {name}"
            raise CheckpointError(str(checkpoint.path), found, "all tensors of the model", "get the files again")


def _unknown(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        str(path / "config.json"), found, "a causal language model that transformers knows", "use such a model"
    )


def require_tokens(model: PreTrainedModel, ids: torch.Tensor, length: int, option: str) -> None:
    """Raise an error unless the model can read these token ids, and `length` in a row, which comes of this option."""
    size, longest = (
        model.get_input_embeddings().num_embeddings,
        getattr(model.config, "max_position_embeddings", length),
    )
    if ids.numel() == 0:
        raise SpecError("text", "no tokens", "one or more", "write something")
    if int(ids.max()) >= size:
        raise CheckpointError(
            "tokenizer.json",
            f"token {int(ids.max())}",
            f"0 to {size - 1}, as the model has them",
            "copy the model's own",
        )
    if length > longest:
        raise SpecError(option, f"{length} tokens in all", f"{longest}, the model's longest", "ask for fewer")


@register_quantization_config("bitshard")
class BitshardConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to run a quantized checkpoint: `from_pretrained(..., quantization_config=BitshardConfig(...))`.

    GPTQ checkpoints, act_order too, are then ours to run; `mix64` ones name the method themselves. backend: see
    kernels; by default what BITSHARD_BACKEND in the environment says, or "exact". strategy: see parallel. section:
    what config.json says of the quantization, which a model that is saved says again.
    """

    def __init__(self, backend: str | None = None, strategy: Strategy = "tp-aware", **section: Any) -> None:
        self.quant_method = "bitshard"
        self.backend, self.strategy = backend or os.environ.get(BACKEND, "exact"), parse_strategy(strategy)
        require_backend(self.backend)
        if section and "quant_method" not in section:  # what it was called with, not what config.json says
            raise SpecError("BitshardConfig", next(iter(section)), "backend, strategy", "leave it out")
        self.section = section

    def to_dict(self) -> dict[str, Any]:
        return dict(self.section)

    @classmethod
    def merged(cls, section: dict[str, Any], given: Any) -> Any:
        """Of a checkpoint's config and what `from_pretrained` was given, what counts: ours, of whatever method.

        transformers would take the checkpoint's, or refuse two of different classes, and has no way to say otherwise.
        """
        if not isinstance(given, cls) and section.get("quant_method") == "gptq":
            ours = os.environ.get(EVERY_GPTQ, "1" if "bitshard" in section else "0") != "0"
            if ours and (given is None or given.to_dict() == AutoQuantizationConfig.from_dict(section).to_dict()):
                given = cls()  # lm-eval gives what the file says
        if not isinstance(given, cls):
            return merge_quantization_configs(section, given)
        merged = copy(given)  # which may be given for another checkpoint, too
        merged.section = section
        return merged


merge_quantization_configs = AutoHfQuantizer.merge_quantization_configs
AutoHfQuantizer.merge_quantization_configs = BitshardConfig.merged


@register_quantizer("bitshard")
class BitshardQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps modules before the weights are read, and puts rows, slices and gathers in order after."""

    def __init__(self, quantization_config: BitshardConfig, **kwargs: Any) -> None:
        # older GPTQ files say nothing in config.json, which transformers takes for a model yet to be quantized
        super().__init__(copy(quantization_config), **{**kwargs, "pre_quantized": True})
        self.hooks = list[RemovableHandle]()

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        report_untested("transformers")
        devices = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in devices:
            raise PlanError(
                "device_map", "modules on disk", "processors and GPUs", "leave out max_memory, or use more devices"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        with torch.device("cpu"):  # not transformers' meta device
            self._open(model, checkpoint_files or ())
        arch, self.dtype = self.plan.arch, model.dtype
        self._require_model(model)
        require_tensors(self.checkpoint, model)
        modules = {arch.module_name(name): name for name in self.checkpoint.matrices()}
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        with torch.device("meta"):
            for layer in range(self.plan.sizes.layers if arch.mlp.experts else 0):
                self._replace_experts(model, layer)
            for module_name, name in modules.items():
                parent, linear = model.get_submodule(module_name.rpartition(".")[0]), self._quant_linear(name)
                setattr(parent, module_name.rpartition(".")[2], linear)
                if linear.cut == "ours":
                    ignored.add(re.escape(module_name))
                parent._is_hf_initialized = True  # else GPT-BigCode's initialiser looks for a dense weight in it
        model._keys_to_ignore_on_load_unexpected = ignored
        model.tp_plan = tp_plan(self.plan)
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _open(self, model: PreTrainedModel, files: Sequence[str]) -> None:
        """The checkpoint that these files are, checked, and on how many ranks it will run."""
        if not files or not files[0].endswith(".safetensors"):
            found = f"weights in {Path(files[0]).name}" if files else "no files of weights"
            raise CheckpointError(model.config.name_or_path, found, "safetensors", "load the checkpoint by its name")
        self.checkpoint = Checkpoint.open(Path(files[0]).parent)
        self.checkpoint.check_matrices()
        self.quantization_config.section = self.quantization_config.section or self.checkpoint.quantized.to_json()
        self.plan = self.checkpoint.plan()
        self.linears = {name: linear for i in range(self.plan.sizes.layers) for name, linear in self.plan.linears(i)}
        distributed = getattr(model.config, "distributed_config", None)
        self.tp_size = distributed.tp_size if distributed else 1
        if self.tp_size > 1:
            require_degree(self.plan, self.tp_size, self.quantization_config.strategy)

    def _require_model(self, model: nn.Module) -> None:
        """The causal language model of this checkpoint, with all its blocks."""
        try:
            model.get_submodule(f"{self.plan.arch.blocks}.{self.plan.sizes.layers - 1}")
        except AttributeError:
            raise PlanError(
                type(model).__name__, f"no {self.plan.arch.blocks}.{self.plan.sizes.layers - 1}",
                "the causal language model that the checkpoint is of", "use AutoModelForCausalLM",
            ) from None  # fmt: skip

    def _replace_experts(self, model: nn.Module, layer: int) -> None:
        arch, sizes = self.plan.arch, self.plan.sizes
        tensors = f"{arch.blocks}.{layer}.{arch.mlp.experts.removesuffix('.{e}')}"
        name = arch.module_name(tensors)
        widths = {"w1": (sizes.hidden, sizes.intermediate), "w2": (sizes.intermediate, sizes.hidden)}
        act_fn = cast(nn.Module, model.get_submodule(name).act_fn)

        def make_linear(below: str) -> nn.Module:
            return nn.Linear(*widths.get(below.rpartition(".")[2], widths["w1"]), bias=False)

        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Experts(sizes.experts, act_fn, make_linear))

    def _quant_linear(self, name: str) -> PackedLinear:
        spec, layout = self.checkpoint.spec_of(name), self.checkpoint.layout
        if isinstance(spec, MixSpec):
            return self._mix64_linear(name, spec)
        assert isinstance(spec, QuantSpec) and isinstance(layout, GptqLayout)
        shapes = self.checkpoint.shapes([f"{name}.g_idx", f"{name}.qweight", f"{name}.bias"])
        words, n = shapes[f"{name}.qweight"]
        linear = QuantLinear(words * 32 // spec.bits, n, spec, layout, f"{name}.bias" in shapes, self.dtype)
        if f"{name}.g_idx" not in shapes:
            linear.g_idx = None
        linear.cut = self._cut(name) if self.tp_size > 1 else "plain"
        if linear.cut == "ours":
            linear.leave_out()
        return linear

    def _mix64_linear(self, name: str, spec: MixSpec) -> Mix64Linear:
        """Empty where a rank's slice is cut here, else with tensors like the file's for transformers to read."""
        shapes = self.checkpoint.shapes(f"{name}.{suffix}" for suffix in Mix64Layout.suffixes)
        n, strips = shapes[f"{name}.qweight"]
        k, _ = self.checkpoint.size_of(name) or (strips * STRIP, n)
        linear = Mix64Linear(k, n, spec)
        linear.cut = "ours" if self.tp_size > 1 else "plain"
        if linear.cut == "plain":
            for full_name, shape in shapes.items():
                suffix = full_name.rpartition(".")[2]
                linear.replace(**{suffix: torch.empty(shape, dtype=Mix64Layout.dtypes.get(suffix, self.dtype))})
        return linear

    def _cut(self, name: str) -> str:
        """Which way a rank's slice is taken; the styles read it.

        "gathered": rows in file order, all scales. "sorted": cut here after sorting. "ours": read here, not by
        transformers. "parts": each of the vectors that lie side by side is cut.
        """
        below = name.removeprefix(f"{self.plan.arch.blocks}.").partition(".")[2]
        if name not in self.plan.gathered:
            if self.plan.arch.attention.fused and below in self.plan.arch.attention.column:
                return "ours"
            parts = self.plan.arch.mlp.parts
            return "parts" if parts > 1 and below in self.plan.arch.mlp.column else "plain"
        return "sorted" if self.quantization_config.strategy == "naive" else "gathered"

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, parameter in model.named_parameters():  # transformers 5.17 leaves Mixtral's routers as they come
            parameter.data = parameter.data.to(self.dtypes[name])
        names = {self.plan.arch.module_name(name): name for name in self.checkpoint.matrices()}
        slow = defaultdict[str, list[str]](list)
        for module_name, name in names.items():
            linear = model.get_submodule(module_name)
            assert isinstance(linear, PackedLinear)
            _to_local(linear)
            if linear.cut == "ours":
                linear.replace(**self._own_tensors(model, name))
            if isinstance(linear, QuantLinear):
                linear.order_rows()
                if linear.cut == "sorted":
                    linear.keep_rows(dist.get_rank(), self.tp_size)
            linear.backend = self.quantization_config.backend
            if linear.backend != "reference":
                linear.arrange()
                if linear.arrangement == "file":
                    slow[linear.why_slow()].append(name)
        if not dist.is_initialized() or dist.get_rank() == 0:
            for why, those in slow.items():
                logger.warning(
                    "plain torch runs %d of %d matrices, %s first: %s", len(those), len(names), those[0], why
                )
        for layer in range(self.plan.sizes.layers):
            self._finish_block(model.get_submodule(f"{self.plan.arch.blocks}.{layer}"))
        head = model.get_output_embeddings()
        if self.quantization_config.backend == "auto" and type(head) is nn.Linear and fits_eight_bit(head.weight):
            # in float32 it is read for longer than all blocks together: 545 MB of Qwen2.5-0.5B, whose blocks have 130
            model.set_output_embeddings(eight_bit(head.weight, head.bias))
        return model

    def _own_tensors(self, model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
        """This rank's slice of a matrix that transformers does not read: of GPTQ, q with a shared k and v."""
        layout: Any = self.checkpoint.layout  # either kind cuts the tensors of its own spec
        linear, spec, rank = self.linears.get(name), self.checkpoint.spec_of(name), dist.get_rank()
        tensors = self.checkpoint.matrix_tensors(name)
        if linear and linear.role == "column":
            tensors = layout.cut_columns(tensors, spec, self.plan.columns(linear.name, rank, self.tp_size))
        elif linear:
            tensors = layout.cut_rows(tensors, spec, rank, self.tp_size)
        if isinstance(layout, GptqLayout):
            tensors |= {suffix: t.to(self.dtype) for suffix, t in tensors.items() if t.is_floating_point()}
        return {suffix: t.to(model.device) for suffix, t in tensors.items()}

    def _finish_block(self, block: nn.Module) -> None:
        arch, size = self.plan.arch, self.tp_size
        attention = block.get_submodule(arch.attention.row.rpartition(".")[0])
        if size > 1:
            for attribute in arch.local_attributes:
                setattr(attention, attribute, getattr(attention, attribute) // size)
        self._hoist(block, arch.attention.norm, arch.attention.column)
        if arch.mlp.experts:
            experts = block.get_submodule(arch.module_name(f".{arch.mlp.experts}")[1:].removesuffix(".{e}"))
            assert isinstance(experts, Experts)
            experts.hoist_gathers()
        else:
            self._hoist(block, arch.mlp.norm, arch.mlp.column)

    def _hoist(self, block: nn.Module, norm: str, consumers: Sequence[str]) -> None:
        """One gather of the norm's output instead of one in each matrix that reads it."""
        perm = hoist_gather([block.get_submodule(name) for name in consumers])
        if perm is not None:
            hook = block.get_submodule(norm).register_forward_hook(partial(_gathered, perm))
            self.hooks.append(hook)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def is_serializable(self, **kwargs: Any) -> bool:
        """Experts have other names in transformers than in files, and it knows no way back for packed ones."""
        return not self.plan.arch.mlp.experts

    @property
    def is_trainable(self) -> bool:
        """Adapters beside them: packed weights have no gradient of their own, but give their input its."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Which experts a token goes to is found out in Python."""
        return not self.plan.arch.mlp.experts

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: packed tensors as the checkpoint has them; here they are in other orders."""
        self._require_no_adapters(model)
        packed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, PackedLinear))
        own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(packed)}
        names = [name for name in self.checkpoint.files if name.startswith(packed)]
        return own | self.checkpoint.read(names), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        """An ordinary model again, with the matrices that the codes mean, in the order that the file has."""
        if self.tp_size > 1 or self.plan.arch.mlp.experts:
            found = f"a model on {self.tp_size} ranks" if self.tp_size > 1 else "a mixture of experts"
            raise PlanError("dequantize", found, "one rank, one MLP a block", "quantize from the 16-bit model instead")
        self._require_no_adapters(model)
        # saving makes a name of the config's
        into = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        for name in self.checkpoint.matrices():
            old = model.get_submodule(name)
            weight, bias = self.checkpoint.weight(name), self.checkpoint.matrix_tensors(name).get("bias")
            W_NK = weight.dequantize() if isinstance(weight, MixedWeight) else weight.dequantize().T
            dense = _dense(W_NK[:, : old.in_features], bias)
            model.set_submodule(name, dense.to(model.device, into))
        for hook in self.hooks:
            hook.remove()
        head = model.get_output_embeddings()
        if isinstance(head, PackedLinear):  # rounded to 8 bits for `auto`
            own = next(f"{name}.weight" for name, module in model.named_modules() if module is head)
            shared = model.get_input_embeddings().weight
            read = self.checkpoint.tensor(own).to(shared) if own in self.checkpoint.files else shared.detach()
            model.set_output_embeddings(_dense(read, None))
            model.tie_weights()
        return cast(PreTrainedModel, model.to(into))

    def _require_no_adapters(self, model: nn.Module) -> None:
        for name in self.checkpoint.matrices():
            if not isinstance(model.get_submodule(name), PackedLinear):
                raise PlanError(
                    name, "an adapter around it", "the matrix alone",
                    "save adapters by PEFT's own save_pretrained, or take them off first: unload()",
                )  # fmt: skip


def _dense(W_NK: torch.Tensor, bias_N: torch.Tensor | None) -> nn.Linear:
    n, k = W_NK.shape
    with torch.device("meta"):
        linear = nn.Linear(k, n, bias_N is not None)
    linear.weight = nn.Parameter(W_NK.contiguous())
    if bias_N is not None:
        linear.bias = nn.Parameter(bias_N)
    return linear


def _gathered(perm: torch.Tensor, module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    return out[..., perm]


def _to_local(linear: PackedLinear) -> None:
    """This rank's slice as a plain tensor: the op knows no DTensor."""
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            setattr(linear, name, nn.Parameter(parameter.to_local(), requires_grad=False))
