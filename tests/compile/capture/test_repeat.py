"""A graph repeated from a few layers is the graph of the whole model, node by node; what differs is exported whole."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import fx

from fuseline.compile.capture import export
from fuseline.compile.capture.export import export_repeated, export_whole
from fuseline.compile.capture.hf_model import build_on_meta
from fuseline.compile.capture.hf_patches import patch_model
from fuseline.compile.capture.repeat import find_layers, only_chosen
from fuseline.compile.graph.graph_json import encode

LAYERS = 6
QUICK = ("llama", "gemma3", "gpt2", "deepseek_v3")


def model_of(family: str):
    config = zoo.config_of(family)
    text = config.get_text_config()
    text.num_hidden_layers = LAYERS
    if types := getattr(text, "layer_types", None):
        text.layer_types = [types[number % len(types)] for number in range(LAYERS)]
    if types := getattr(text, "mlp_layer_types", None):
        text.mlp_layer_types = [types[min(number, len(types) - 1)] for number in range(LAYERS)]
    model = build_on_meta(config, torch.bfloat16, False)
    patch_model(model)
    return model


def written(graph: fx.GraphModule) -> list[object]:
    """All of a graph but the names that nodes happen to have."""
    values = encode(graph.graph)
    return [{**node, "name": "", "val": values["vals"][node["val"]]} for node in values["nodes"]]


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.FAMILIES]
)
def test_the_repeated_graph_is_the_whole_one(family):
    model = model_of(family)
    repeated, whole = export_repeated(model), export_whole(model)
    assert repeated is not None
    assert written(repeated[0]) == written(whole[0])
    assert repeated[1] == whole[1]


def test_one_layer_of_each_kind_and_the_last_of_it_are_exported():
    layers = find_layers(model_of("gemma3"))
    assert layers.path == "model.layers"
    assert [layers.kinds.index(kind) for kind in dict.fromkeys(layers.kinds)] == [0, 1]
    assert {0, 1} <= set(layers.chosen) and len(layers.chosen) < LAYERS


def test_the_model_is_left_as_it_was():
    model = model_of("gemma3")
    text, before = model.config.get_text_config(), list(model.model.layers)
    types = list(text.layer_types)
    with pytest.raises(ZeroDivisionError), only_chosen(model, find_layers(model)):
        assert len(model.model.layers) == text.num_hidden_layers == len(text.layer_types) < LAYERS
        raise ZeroDivisionError
    assert list(model.model.layers) == before and text.num_hidden_layers == LAYERS and text.layer_types == types


def scaled_by_number(model) -> None:
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: out * (1.0 + module.self_attn.layer_idx))


def reads_the_embedding(model) -> None:
    seen = {}
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.update(first=out))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: out + seen["first"])


def work_between_layers(model) -> None:
    for layer in list(model.model.layers)[:-1]:
        forward = layer.forward

        def wrapped(hidden, *args, _forward=forward, **kwargs):
            return _forward(hidden, *args, **kwargs)

        layer.forward = wrapped


@pytest.mark.parametrize("change", [scaled_by_number, reads_the_embedding, work_between_layers])
def test_models_that_do_more_are_exported_whole(change):
    model = model_of("llama")
    change(model)
    assert export_repeated(model) is None
    whole, _ = export_whole(model)
    found = [node for node in whole.graph.nodes if node.target is torch.ops.fuseline.attention.default]
    assert len(found) == LAYERS


def test_errors_are_those_of_the_whole_model(monkeypatch):
    model = model_of("llama")
    tries = []

    def failing(model, layer_list=""):
        tries.append(layer_list)
        raise export.CaptureError(f"tried {layer_list or 'all'}")

    monkeypatch.setattr(export, "_export", failing)
    with pytest.raises(export.CaptureError, match="tried all"):
        export_repeated(model) or export_whole(model)
    assert tries == ["model.layers", ""]
