"""A checkpoint whose config, modeling file and what that imports lie beside its weights.

The model is a small llama with twists of its own: a table of rotation frequencies that its file computes as the module
is made, heads whose outputs are scaled by a plain tensor, and one learned scale a layer.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from zoo import tokenizer

from fuseline.compile.capture.reference import randomize

CONFIGURATION = '''
from transformers import PretrainedConfig


class TwistConfig(PretrainedConfig):
    model_type = "twist"

    def __init__(self, vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, bend=1.7, **kwargs):
        self.vocab_size, self.hidden_size, self.bend = vocab_size, hidden_size, bend
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings = 256
        super().__init__(**kwargs)
'''
PARTS = '''
import torch
from torch import nn


class Rotation(nn.Module):
    def __init__(self, dim, bend):
        super().__init__()
        self.register_buffer("freqs", 1.0 / 1000.0 ** (torch.arange(0, dim, 2).float() / dim * bend), persistent=False)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].float() * self.freqs
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
'''
MODELING = '''
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_twist import TwistConfig
from .parts_twist import Rotation


def eager(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scores = query @ key.mT * scaling
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2), None


class Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.heads, self.dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rotation = Rotation(self.dim, config.bend)
        self.of_head = torch.linspace(0.5, 1.5, config.num_attention_heads)

    def forward(self, x, position_ids):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        q, k = self.rotation(q, position_ids), self.rotation(k, position_ids)
        attend = eager
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, _ = attend(self, q, k, v, None, scaling=self.dim**-0.5)
        return self.out((y * self.of_head[:, None]).reshape(x.shape))


class Layer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention = Attention(config, layer_idx)
        self.norm1, self.norm2 = nn.RMSNorm(config.hidden_size, eps=1e-6), nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.up, self.down = nn.Linear(config.hidden_size, 96), nn.Linear(96, config.hidden_size)
        self.amount = nn.Parameter(torch.ones(1))

    def forward(self, x, position_ids):
        x = x + self.amount * self.attention(self.norm1(x), position_ids)
        return x + self.down(torch.tanh(self.up(self.norm2(x))))


class TwistForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TwistConfig
    _supports_attention_backend = True
    _supports_sdpa = True
    _tied_weights_keys = {"head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, n) for n in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, use_cache=False, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, position_ids)
        return CausalLMOutputWithPast(logits=self.head(x))
'''
AUTO_MAP = {"AutoConfig": "configuration_twist.TwistConfig", "AutoModelForCausalLM": "modeling_twist.TwistForCausalLM"}


def write_custom(folder: Path, modeling: str = MODELING, tied: bool = False) -> PreTrainedModel:
    """Writes the checkpoint, with random weights; the model as Transformers runs it, eager and in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"configuration_twist.py": CONFIGURATION, "parts_twist.py": PARTS, "modeling_twist.py": modeling}
    for name, text in files.items():
        (folder / name).write_text(text)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = {"model_type": "twist", "auto_map": AUTO_MAP, "tie_word_embeddings": tied, "dtype": "float32", **ids}
    (folder / "config.json").write_text(json.dumps({**settings, "architectures": ["TwistForCausalLM"]}))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    settings = {"trust_remote_code": True, "attn_implementation": "eager", "dtype": torch.float32}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(config, **settings).eval()
        randomize(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder, save_jinja_files=False)
    for name, text in files.items():
        (folder / name).write_text(text)
    return model
