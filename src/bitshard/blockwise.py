"""A transformers model run one decoder block at a time: only one block's weights are in memory, in float32.

Shape legend: S segments of L tokens, H hidden channels.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bitshard.checkpoint import Checkpoint
from bitshard.errors import CheckpointError, FormatError, PlanError, SolverError
from bitshard.models import Architecture, Shapes
from bitshard.nn import Experts

Read = Callable[[Iterable[str]], Mapping[str, torch.Tensor]]
Watcher = Callable[[torch.Tensor], None]  # is given a matrix's input or output, [..., K] or [..., N]

AT_ONCE = 2048  # tokens of whole segments that are run together
FLOATS = ("BF16", "F16", "F32")  # dtypes of a model's tensors, as safetensors names them
# rotary frequencies and causal masks, which older files hold and transformers makes itself
OLD_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


class _Stop(Exception):
    """Nothing after this point of the block is of interest."""


class BlockwiseModel:
    """Runs calibration segments through a model's decoder blocks.

    Every block gets the arguments (masks, rotary embeddings) that the model itself would pass it: a dry run with blocks
    that do nothing records them. sizes: with padding in; config_updates: the config.json entries that padding changed.
    fast: matrices are multiplied in bfloat16 where the device is better at that; hidden states stay float32. Raises
    PlanError when transformers cannot build the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sizes: Shapes,
        config_updates: Mapping[str, Any],
        device: torch.device,
        fast: bool = False,
    ) -> None:
        self.checkpoint, self.arch, self.device = checkpoint, checkpoint.arch, device
        self.bfloat16 = fast and _is_good_at_bfloat16(device)
        self._model: nn.Module | None = _empty_model(checkpoint, sizes, config_updates, device)
        blocks = self._model.get_submodule(self.arch.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self._blocks = blocks
        self._arguments: dict[int, tuple[Any, Mapping[str, Any]]] = {}

    @torch.no_grad()
    def embed(self, tokens_SL: torch.Tensor, read: Read) -> torch.Tensor:
        """Inputs of the first block, float32 [S, L, H] on the CPU. To be called once, before any block is run.

        read: gives tensors outside the blocks by name. Raises CheckpointError for a weight that is missing and
        SolverError for one that is not finite, here as in `load`.
        """
        assert self._model is not None
        base, prefix, embedded = self._model.base_model, f"{self._model.base_model_prefix}.", []
        assert isinstance(base, nn.Module)
        wanted = {prefix + name for name in base.state_dict()}
        names = [name for name in self.checkpoint.names_outside_blocks() if self.arch.module_name(name) in wanted]
        self._load(base, read(names), prefix, but=self._blocks)

        def record(layer: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_1LH: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if layer == 0:
                    embedded.append(hidden_1LH.cpu())
                self._arguments[layer] = args, kwargs
                return hidden_1LH

            return forward

        for layer, block in enumerate(self._blocks):
            block.forward = record(layer)
        for tokens_L in tokens_SL:
            base(input_ids=tokens_L[None].to(self.device), use_cache=False)
        for block in self._blocks:
            del block.forward
        self._model = None  # frees the embeddings
        return torch.cat(embedded)

    def load(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give one block its weights and biases, by full checkpoint name; any float dtype."""
        self._load(self._blocks[layer], tensors, f"{self.arch.blocks}.{layer}.")

    def unload(self, layer: int) -> None:
        """Give up a block's weights."""
        self._blocks[layer].to("meta")
        trim()

    def linear(self, layer: int, name: str) -> nn.Linear:
        """A matrix of a block by its checkpoint name below the block."""
        module = self._blocks[layer].get_submodule(self._path(name))
        assert isinstance(module, nn.Linear)
        return module

    def _path(self, name: str) -> str:
        return self.arch.module_name(f".{name}")[1:]

    @torch.no_grad()
    def run(
        self,
        layer: int,
        hidden_SLH: torch.Tensor,
        watch: Mapping[str, Watcher] | None = None,
        watch_outputs: Mapping[str, Watcher] | None = None,
        known: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The block's outputs, float32 on the CPU.

        watch, watch_outputs: called with some segments' inputs or outputs of the named matrices, in order. known: the
        inputs [S, L, K] of row matrices as an earlier run with the same weights before them met them; what leads there,
        attention or most of an MLP, is not computed again.
        """
        with self._watching(layer, watch or {}, watch_outputs or {}), self._replaying(layer, known or {}):
            return torch.cat([self.run_some(layer, hidden_BLH).cpu() for hidden_BLH in _some(hidden_SLH)])

    @torch.no_grad()
    def run_as_far_as(
        self, layer: int, hidden_SLH: torch.Tensor, watch: Mapping[str, Watcher], known: Mapping[str, torch.Tensor]
    ) -> None:
        """The same for the inputs alone, which lie side by side: with one matrix the block is run only up to it."""

        def last(watcher: Watcher) -> Watcher:
            def watch_and_stop(x: torch.Tensor) -> None:
                watcher(x)
                raise _Stop

            return watch_and_stop

        if len(watch) == 1:
            watch = {name: last(watcher) for name, watcher in watch.items()}
        with self._watching(layer, watch, {}), self._replaying(layer, known):
            for hidden_BLH in _some(hidden_SLH):
                with suppress(_Stop):
                    self.run_some(layer, hidden_BLH)

    @contextmanager
    def _watching(self, layer: int, inputs: Mapping[str, Watcher], outputs: Mapping[str, Watcher]) -> Iterator[None]:
        def before(watcher: Watcher) -> Callable[..., None]:
            return lambda module, args: watcher(args[0])

        def after(watcher: Watcher) -> Callable[..., None]:
            return lambda module, args, y: watcher(y)

        with ExitStack() as hooks:
            for name, watcher in inputs.items():
                hook = self.linear(layer, name).register_forward_pre_hook(before(watcher))
                hooks.callback(hook.remove)
            for name, watcher in outputs.items():
                hook = self.linear(layer, name).register_forward_hook(after(watcher))
                hooks.callback(hook.remove)
            yield

    @contextmanager
    def _replaying(self, layer: int, known: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Make the modules around row matrices do nothing but multiply the inputs that are known."""

        def replay(name: str, x_SLK: torch.Tensor) -> Callable[..., Any]:
            linear, parts = self.linear(layer, name), iter(_some(x_SLK))

            def forward(*args: Any, **kwargs: Any) -> Any:
                y_BLH = linear(next(parts).to(self.device))
                return (y_BLH, None) if name == self.arch.attention.row else y_BLH  # attention gives its weights too

            return forward

        around = {name: self._blocks[layer].get_submodule(self._path(name).rpartition(".")[0]) for name in known}
        for name, module in around.items():
            module.forward = replay(name, known[name])
        try:
            yield
        finally:
            for module in around.values():
                del module.forward

    def run_some(self, layer: int, hidden_BLH: torch.Tensor) -> torch.Tensor:
        """Some segments' outputs on the device, which gradients go through."""
        args, kwargs = self._arguments[layer]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            out: torch.Tensor = self._blocks[layer](hidden_BLH.to(self.device), *args, **kwargs)
        return out

    def _load(
        self, module: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str, but: nn.Module | None = None
    ) -> None:
        for name, tensor in tensors.items():
            require_finite(name, tensor)
        # a copy even of float32: where a mapped tensor lies, and so the last bit of a product, differs from run to run
        state = {
            self.arch.module_name(name).removeprefix(prefix): tensor.to(self.device, torch.float32, copy=True)
            for name, tensor in tensors.items()
        }
        module.load_state_dict(state, strict=False, assign=True)
        later = set(but.parameters()) if but else set()
        for name, parameter in module.named_parameters():
            if parameter.is_meta and parameter not in later:
                raise CheckpointError(prefix + name, "no such tensor", "every weight of the model", "get it again")


def trim() -> None:
    """Give back what the C library has kept of freed memory.

    Between tensors of a few MB that come and go it keeps 80 MB more with every block of Qwen2.5-Coder-1.5B.
    """
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        malloc_trim(0)


def own_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without buffers of older files, once it is known to hold all that its config.json's model reads.

    Headers and what is outside the blocks are read. Raises PlanError when transformers cannot build the model,
    FormatError for a tensor that is missing, has another shape or dtype than the model's, or is one that the model
    does not have in a block, and SolverError for one outside the blocks that is not finite.
    """
    files = {name: file for name, file in checkpoint.files.items() if not OLD_BUFFERS.search(name)}
    checkpoint, arch = replace(checkpoint, files=files), checkpoint.arch
    model: Any = _empty_model(checkpoint, checkpoint.sizes, {}, torch.device("cpu"))
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes, dtypes = checkpoint.shapes(files), checkpoint.dtypes(files)
    for name in checkpoint.absent(expected.keys() - model.all_tied_weights_keys.keys()):
        raise FormatError(
            f"{checkpoint.path}: {name}", "no such tensor", "every tensor of the model, as config.json has it",
            "correct config.json, or get the files again",
        )  # fmt: skip
    for name, file in files.items():
        shape = expected.get(arch.module_name(name))
        if shape is None and name.startswith(f"{arch.blocks}."):
            raise FormatError(
                f"{file}: {name}", "a tensor that the model does not have", "the model's own, as config.json has it",
                "correct config.json, or take the tensor out",
            )  # fmt: skip
        if shape is not None and shape != shapes[name]:
            raise FormatError(
                f"{file}: {name}", f"shape {shapes[name]}", f"{shape}, as config.json has it",
                "correct config.json, or get the files again",
            )  # fmt: skip
        if shape is not None and dtypes[name] not in FLOATS:
            raise FormatError(
                f"{file}: {name}", f"dtype {dtypes[name]}", ", ".join(FLOATS), "start from the 16-bit model"
            )
    outside = [name for name in checkpoint.names_outside_blocks() if dtypes[name] in FLOATS]
    for name, tensor in checkpoint.read(outside).items():
        require_finite(name, tensor)
    return checkpoint


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise SolverError with this name when there is a NaN or an infinite value."""
    # the ends say it for all, NaN too; testing each takes 1 GB for the embeddings of Qwen2.5-Coder-1.5B
    if tensor.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
        raise SolverError(name, "NaN or infinite values", "finite ones", "get the 16-bit model and its config again")


def _some(x_SLK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Segments by as many as are run together."""
    return torch.split(x_SLK, max(1, AT_ONCE // x_SLK.shape[1]))


def _is_good_at_bfloat16(device: torch.device) -> bool:
    """2.1 times as many products a second as in float32 on Zen 4; without these instructions, fewer."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def _empty_model(
    checkpoint: Checkpoint, sizes: Shapes, config_updates: Mapping[str, Any], device: torch.device
) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        for key, value in config_updates.items():
            setattr(config, key, value)
        # parameters without memory, buffers (rotary frequencies) with their values
        with device, init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    except Exception as error:  # whatever the classes of a foreign model may raise
        raise PlanError(
            str(checkpoint.path / "config.json"),
            f"a model that transformers cannot build ({type(error).__name__}: {' '.join(str(error).split())[:200]})",
            "a causal language model that transformers knows without remote code",
            "use another model, or another version of transformers",
        ) from None
    for layer in range(sizes.layers if checkpoint.arch.mlp.experts else 0):
        _separate_experts(model, checkpoint.arch, sizes, layer)
    return model.eval()


def _separate_experts(model: nn.Module, arch: Architecture, sizes: Shapes, layer: int) -> None:
    """One linear module for each expert's matrix, where transformers has two 3-D tensors for all."""
    name = arch.module_name(f"{arch.blocks}.{layer}.{arch.mlp.experts.removesuffix('.{e}')}")
    parent, _, attribute = name.rpartition(".")

    def make_linear(below: str) -> nn.Module:
        widths = (sizes.hidden, sizes.intermediate)
        with torch.device("meta"):
            linear = nn.Linear(*(widths if not below.endswith(arch.mlp.row) else widths[::-1]), bias=False)
        return linear.requires_grad_(False)

    act_fn: Any = model.get_submodule(name).act_fn
    setattr(model.get_submodule(parent), attribute, Experts(sizes.experts, act_fn, make_linear))
