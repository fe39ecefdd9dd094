"""torch.export of the meta model into one graph of token ids and positions to logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from transformers import PreTrainedConfig

from fuseline.compile.capture.captured import DTYPES, EXAMPLE_TOKENS, MAX_TOKENS, MIN_TOKENS, CapturedModel, facts_of
from fuseline.compile.capture.errors import CaptureError, one_line, told_as
from fuseline.compile.capture.hf_attention import attention_as_ops, has_key_bias, prepare_attention
from fuseline.compile.capture.hf_model import (
    ATTENDING,
    NOT_HOOKED,
    NOT_RECURRENT,
    RECURRENT,
    SLIDING,
    build_on_meta,
    is_own_table,
    load_config,
)
from fuseline.compile.capture.hf_patches import patch_model
from fuseline.compile.capture.hf_recurrences import give_constants, recurrences_as_ops
from fuseline.compile.capture.repeat import (
    find_layers,
    layer_at,
    layer_kinds,
    num_distinct_layers,
    only_chosen,
    repeat_layers,
)
from fuseline.compile.config import STORED, CompileConfig
from fuseline.compile.graph.edit import map_arguments
from fuseline.compile.graph.graph_json import module_of
from fuseline.compile.ops.library import named_arguments
from fuseline.compile.ops.registry import op_of


class _Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        return self.model(input_ids=token_ids, position_ids=positions, use_cache=False).logits


def resolve_dtype(config: CompileConfig, hf_config: PreTrainedConfig) -> torch.dtype:
    """auto: bf16 checkpoints stay, fp16 becomes bf16, fp32 stays, fp64 becomes fp32; STORED: halves stay too.

    Raises CaptureError.
    """
    if config.dtype not in ("auto", STORED):
        return DTYPES[config.dtype]
    stored = getattr(hf_config, "dtype", None) or torch.float32
    stored = getattr(torch, stored, stored) if isinstance(stored, str) else stored
    if stored == torch.float64:
        return torch.float32
    if stored not in DTYPES.values():
        raise CaptureError(f"config.json has dtype {stored}, which no model computes in: give one with --dtype")
    return torch.bfloat16 if stored == torch.float16 and config.dtype != STORED else stored


def capture_model(config: CompileConfig) -> CapturedModel:
    """Raises CaptureError when the model cannot be captured or its attention is not hooked."""
    hf_config = load_config(config)
    with told_as(CaptureError, f"{hf_config.model_type} cannot be captured"):
        return capture_config(hf_config, resolve_dtype(config, hf_config), config)


def capture_config(hf_config: PreTrainedConfig, dtype: torch.dtype, config: CompileConfig) -> CapturedModel:
    """capture_model of a config in memory."""
    model = build_on_meta(hf_config, dtype, config.trust_remote_code)
    rope_switch = patch_model(model)
    give_constants(model)
    prepare_attention(model)
    graph, buffers = export_repeated(model) or export_whole(model)
    captured = describe(model, graph, hf_config, dtype, buffers)
    captured.rope_switch = rope_switch
    captured.num_distinct_layers = num_distinct_layers(model)
    captured.has_key_bias = has_key_bias(model)
    _check_attention(captured, hf_config, layer_kinds(model)[0])
    _check_recurrences(captured, hf_config)
    return captured


def describe(
    model: nn.Module, graph: fx.GraphModule, hf_config: PreTrainedConfig, dtype: torch.dtype, buffers: set[str]
) -> CapturedModel:
    """The graph with what is known of the parameters, and the values of those buffers."""
    return CapturedModel(
        graph=graph,
        facts=facts_of(hf_config),
        dtype=dtype,
        parameters={name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()},
        constants=_real_buffers(model, buffers),
        tied=_tied(model),
    )


def export_repeated(model: nn.Module) -> tuple[fx.GraphModule, set[str]] | None:
    """The graph of all layers from a few of them; None when these do not tell it."""
    layers = find_layers(model)
    if layers is None:
        return None
    try:
        with only_chosen(model, layers):
            graph, _ = _export(model, layers.path)
    except Exception:  # the whole model may still export: it is tried next, and its errors are reported
        return None
    repeated = repeat_layers(graph, layers)
    if repeated is None:
        return None
    number_attention(repeated)
    attributes = {node.meta["fqn"] for node in repeated.nodes if node.op == "get_attr"}
    return module_of(repeated), attributes - {name for name, _ in model.named_parameters(remove_duplicate=False)}


def export_whole(model: nn.Module) -> tuple[fx.GraphModule, set[str]]:
    """The graph, and which of its get_attr nodes are buffers. Raises CaptureError."""
    graph, constants = _export(model)
    number_attention(graph)
    return module_of(graph), constants


def number_attention(graph: fx.Graph) -> None:
    """Gives each attention a cache of its own where modules run several times, or have each other's numbers (HRM)
    or none (Zamba).
    """
    nodes = graph.find_nodes(op="call_function", target=torch.ops.fuseline.attention.default)
    if len({node.args[4] for node in nodes}) < len(nodes):
        for position, node in enumerate(nodes):
            node.update_arg(4, position)


def _export(model: nn.Module, layer_list: str = "") -> tuple[fx.Graph, set[str]]:
    tokens = torch.zeros((1, EXAMPLE_TOKENS), dtype=torch.long, device="meta")
    dynamic = {1: torch.export.Dim("T", min=MIN_TOKENS, max=MAX_TOKENS)}
    try:
        with torch.no_grad(), recurrences_as_ops(model), attention_as_ops(model):
            program = torch.export.export(
                _Wrapped(model), (tokens, tokens.clone()), dynamic_shapes=(dynamic, dynamic), strict=False
            )
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many types; all mean the same to the user
        if is_own_table(error):
            raise CaptureError(f"{model.config.model_type}: {NOT_HOOKED}") from error
        raise CaptureError(f"{type(model).__name__} cannot be captured as one graph: {one_line(error)}") from error
    graph, constants, done = _lift(program, layer_list)
    _mark_embedded(model, done)
    return graph, constants


def _mark_embedded(model: nn.Module, done: Mapping[fx.Node, fx.Node]) -> None:
    """Marks the embeddings of the tokens (inputs_embeds), the last that their module computes, if they are found."""
    try:
        module = model.get_input_embeddings()
    except NotImplementedError:  # a model that does not tell
        return
    path = next((f"model.{name}" for name, other in model.named_modules() if other is module), None)
    inside = [node for node in done if path in _module_paths(node) and isinstance(node.meta["val"], Tensor)]
    if inside and inside[-1].meta["val"].ndim == 3:
        done[inside[-1]].meta["is_embedded"] = True


def _module_paths(node: fx.Node) -> list[str]:
    """Paths of the modules in which an exported node was traced."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _lift(
    program: torch.export.ExportedProgram, layer_list: str
) -> tuple[fx.Graph, set[str], dict[fx.Node, fx.Node]]:  # fmt: skip
    """Returns the graph, which of its get_attr nodes are buffers, and its nodes by exported ones.

    Parameters and buffers become get_attr nodes named by their path. With a layer list, nodes tell their layer.
    """
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    out, done, constants = fx.Graph(), {}, set()
    for node in program.graph.nodes:
        spec = kinds.get(node.name) if node.op == "placeholder" else None
        if node.op == "output":
            out.output(done[node.args[0][0]]).meta = {"val": None}
        elif spec is not None and spec.kind != InputKind.USER_INPUT:
            name = spec.target.removeprefix("model.")
            lifted = out.create_node("get_attr", name.replace(".", "__"))
            lifted.meta = {"val": node.meta["val"], "fqn": name}
            done[node] = lifted
            if spec.kind != InputKind.PARAMETER:
                constants.add(name)
        elif _moves_nothing(node):
            done[node] = done[node.args[0]]
        elif node.target is not torch.ops.aten._assert_tensor_metadata.default:  # it pins the meta device
            done[node] = _retarget(out.node_copy(node, lambda n: done[n]))
            if layer_list:
                done[node].meta["layer"] = layer_at(_module_paths(node), f"model.{layer_list}")
    return out, constants, done


def _moves_nothing(node: fx.Node) -> bool:
    """A move of a tensor to where it is. Layers that read what others have moved (DeepSeek-V2) are not repeated."""
    if node.target is not torch.ops.aten.to.dtype_layout or node.kwargs.get("copy"):
        return False
    return node.meta["val"].dtype == node.args[0].meta["val"].dtype


def _retarget(node: fx.Node) -> fx.Node:
    """Move tensor creation from the meta device to the CPU; of the node's metadata keep only `val`."""
    node.meta = {"val": node.meta.get("val")}
    map_arguments(node, lambda arg: torch.device("cpu") if arg == torch.device("meta") else arg)
    return node


def _real_buffers(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Values of the buffers, made by the model's own initialization as from_pretrained does.

    A buffer is initialized with its module or with one around that (Falcon-H1's mup_vector), inner modules first.
    """
    names = names & {name for name, _ in model.named_buffers(remove_duplicate=False)}
    modules, owned = dict(model.named_modules()), {}
    for path in {name.rpartition(".")[0] for name in names}:
        owned[path] = dict(modules[path]._buffers)
        real = {k: torch.empty_like(b, device="cpu") for k, b in owned[path].items() if b is not None}
        modules[path]._buffers.update(real)
    is_kept = all(name in getattr(modules[path], "fuseline_buffers", {}) for path, has in owned.items()
                  for name, buffer in has.items() if buffer is not None)  # fmt: skip
    around = {".".join(parts[:end]) for parts in (path.split(".") for path in owned) for end in range(len(parts) + 1)}
    for path in sorted(around, key=lambda path: path.count(".") + bool(path), reverse=True):
        if not is_kept:
            _initializing(modules, path)._init_weights(modules[path])
        modules[path]._buffers.update(getattr(modules[path], "fuseline_buffers", {}))
    values = {name: modules[name.rpartition(".")[0]]._buffers[name.rpartition(".")[2]] for name in names}
    for path, before in owned.items():
        modules[path]._buffers.update(before)
    return values


def _initializing(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    """The innermost model around a module: each initializes its own (Gemma 3n's reads its own sizes)."""
    parts = path.split(".") if path else []
    around = (modules[".".join(parts[:end])] for end in range(len(parts), -1, -1))
    return next(module for module in around if hasattr(module, "_init_weights"))


def _tied(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    return {
        name: first[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(p), name) != name
    }


def num_decoder_layers(hf_config: PreTrainedConfig) -> int:
    """Layers that generate text; the config of an encoder with a decoder counts the encoder's as its hidden layers."""
    text = hf_config.get_text_config()
    return getattr(text, "decoder_layers", None) or text.num_hidden_layers


def _layer_types(hf_config: PreTrainedConfig, captured: CapturedModel) -> list[str]:
    """The type of each layer; where the config does not tell, all attend, or none in a graph with recurrences only."""
    num_layers = num_decoder_layers(hf_config)
    types = list(getattr(hf_config.get_text_config(), "layer_types", None) or ())[:num_layers]
    if len(types) == num_layers:
        return types
    is_recurrent = _num_recurrences(captured) > 0 and not _attentions(captured)
    return ["linear_attention" if is_recurrent else "full_attention"] * num_layers


def _num_recurrences(captured: CapturedModel) -> int:
    return sum(1 for node in captured.graph.graph.nodes if (op := op_of(node.target)) and op.state)


def _attentions(captured: CapturedModel) -> list[fx.Node]:
    return captured.graph.graph.find_nodes(op="call_function", target=torch.ops.fuseline.attention.default)


def _check_recurrences(captured: CapturedModel, hf_config: PreTrainedConfig) -> None:
    """All layers that have a recurrence compute it by an op that keeps a state."""
    found = _num_recurrences(captured)
    expected = sum(kind in RECURRENT for kind in _layer_types(hf_config, captured))
    if found < expected:
        raise CaptureError(f"{hf_config.model_type}: in {expected - found} of {expected} layers {NOT_RECURRENT}")


def _idle_layers(captured: CapturedModel, layer_list: str) -> list[int]:
    """Layers that text does not reach: they attend to images (Mllama), and the graph reads none of their weights."""
    prefix = f"{layer_list}."
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in captured.parameters if name.startswith(prefix)}
    attributes = captured.graph.graph.find_nodes(op="get_attr")
    read = {node.meta["fqn"].removeprefix(prefix).partition(".")[0] for node in attributes if node.users}
    return sorted(int(number) for number in numbers - read) if layer_list else []


def _check_attention(captured: CapturedModel, hf_config: PreTrainedConfig, layer_list: str) -> None:
    """All layers attend through the op, to earlier tokens only, and with the window that the config gives them.

    Layers that run several times attend more often; each time has a cache of its own (number_attention).
    """
    found = _attentions(captured)
    name, layer_types = hf_config.model_type, _layer_types(hf_config, captured)
    num_layers = sum(kind in ATTENDING for kind in layer_types)
    if len(found) < num_layers:
        num_layers -= sum(layer_types[number] in ATTENDING for number in _idle_layers(captured, layer_list))
    if len(found) < num_layers:
        raise CaptureError(f"{name}: in {num_layers - len(found)} of {num_layers} layers {NOT_HOOKED}")
    if not found:
        return
    calls = [named_arguments(node) for node in found]
    if not all(call["causal"] for call in calls):
        raise CaptureError(f"{name} attends to later tokens too; only models that generate text are served")
    sliding = sum(kind in SLIDING for kind in layer_types)
    if sliding and sum(call["window"] > 0 for call in calls) < sliding:
        raise CaptureError(f"{name} keeps the window of its {sliding} sliding layers to itself, so it is refused")
