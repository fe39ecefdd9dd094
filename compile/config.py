"""Settings of the compiler. Frozen; resolved before they get here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PASSES = (
    "remove_noops", "real_pairs", "find_cat", "canonicalize", "merge_equal", "find_linear", "find_norm",
    "find_rope", "find_moe", "fuse_act_mul", "absorb_latent", "join_linears", "fuse_add_norm", "page_attention",
    "page_state", "keep_last_logits", "fuse_rope_cache", "pack_weights", "widen_logits", "cut_regions",
    "quantize_inputs", "fuse_norm_quant", "fuse_linear_act", "make_batch_invariant", "feed_embeds", "tap_hidden",
)  # fmt: skip
"""Names of passes, known without importing them; their order is that of passes/pipeline.py, a GPU's own last,
then those that a setting asks for."""
NEEDED_PASSES = frozenset({"page_attention", "page_state"})
"""Without these there is nothing to serve: the caches are theirs."""
MIXED_SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Up to some hundred tokens a step reads weights for as long as launching it takes, and padding costs next to nothing;
beyond, products take longer than their launches do."""


Progress = Callable[[str, int, int], None]
"""Is told (phase, done, all) while a model is compiled and loaded."""
STORED = "stored"
"""As `dtype` what auto means on a GPU: the checkpoint's, whatever it is. No flag has it."""


def silent(phase: str, done: int, total: int) -> None:
    """A Progress that nobody sees."""


@dataclass(frozen=True)
class CompileConfig:
    """Settings of one compiled model.

    Field names are the flag names of `fuseline serve`; the text under a field is its help.
    """

    model: str
    """Directory of the checkpoint (config.json, safetensors); of GGUF files the one that gguf/folder.py makes."""
    hf_config_path: str = ""
    """Directory, or hub id of a cached snapshot, whose config.json and generation_config.json count in place of the
    model's."""
    level: int = 1
    """0: the captured graph with reference ops, eager. 1: passes, our kernels and the plan. 2: ops without a
    kernel compiled by inductor, in the background. 3: a plan of its own for steps that
    only decode, and how each product is cut measured once; on a GPU, which kernel computes an op."""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto takes the checkpoint's, fp16 becoming bf16 on a CPU that cannot compute it."""
    kv_cache_dtype: str = "auto"
    """Element type of the KV cache: auto (the model's), float32, bfloat16, float16, fp8 (fp8_e4m3: three bits of
    fraction, up to 448) and fp8_e5m2 (two, up to 57344); on a CPU also int8, with a scale for each token and head."""
    calculate_kv_scales: bool = False
    """Scale an fp8 cache by the first step's keys and values instead of by the checkpoint's scales (none there: 1)."""
    cpu_offload_gb: float = 0.0
    """GiB of a GPU's weights that stay in host memory and are copied to it each step, layer by layer."""
    max_model_len: int = 0
    """Context length in tokens; 0 takes the model's own limit, auto or -1 as much of it as the KV cache can hold."""
    block_size: int = 16
    """Tokens per KV block."""
    max_num_batched_tokens: int = 2048
    """Largest number of tokens in one step (sizes the arena)."""
    max_num_seqs: int = 256
    """Largest number of sequences in one step."""
    disabled_passes: tuple[str, ...] = ()
    """Names of passes to leave out."""
    weight_format: str = ""
    """Storage format of the weights of linears (compile/formats); empty takes the one that the kernels read."""
    gives_hidden: bool = False
    """Give the final hidden states beside the logits: pooled vectors are made of them."""
    takes_embeds: bool = False
    """Let positions be fed by embeddings in place of their tokens'."""
    batch_invariant: bool = False
    """On a GPU, from level 1 on: a request's answer is the same bit for bit whatever else is in its batches, at the
    cost of products that are slower. On a CPU it always is."""
    wait_compiled: bool = False
    """Answer only once compiled regions are in use, instead of answering at level 1 meanwhile."""
    cpu_threads: int = 0
    """Threads that compute; 0 takes the cores this process may use (affinity and control group)."""
    cache_dir: str = ""
    """Where captured graphs are cached; empty takes $FUSELINE_CACHE_ROOT or ~/.cache/fuseline."""
    hf_overrides: tuple[tuple[str, object], ...] = ()
    """JSON merged over the checkpoint's config.json, objects key by key; a key that its model type has not is an
    error."""
    rope_scaling: tuple[tuple[str, object], ...] = ()
    """JSON that replaces the scaling of rotary embeddings, for instance {"rope_type": "dynamic", "factor": 2.0}; it
    extends the context."""
    rope_theta: float | None = None
    """Base period of rotary embeddings; default: the checkpoint's."""
    ignore_patterns: tuple[str, ...] = ("original/**/*",)
    """Glob of files of the checkpoint that are not read; may be repeated."""
    quantization: str | None = None
    """Method of the checkpoint's quantized weights; by default what its config.json says. Plain weights can be
    quantized as they are loaded: int8, int4, fp8, bitsandbytes, ptpc_fp8, tpu_int8, experts_int8 or deepspeedfp
    (QUANTIZATION.md)."""
    activation_dtype: str = "auto"
    """Element type of the inputs of linears with quantized weights: int8 (weights of int8 or int4, on a CPU) or fp8
    (of fp8, on a GPU that multiplies fp8) quantizes each token's as they are multiplied (QUANTIZATION.md has the
    error); auto does so where the checkpoint publishes int8, on a CPU."""
    load_format: str = "auto"
    """Files of the weights: auto (safetensors, else torch.save's, else Mistral's), safetensors, pt (.bin, .pt), npcache
    (those, kept as numpy's files beside them for the next start), sharded_state (written by the command
    save-sharded-state), mistral (consolidated.safetensors, params.json), tensorizer, runai_streamer, bitsandbytes, gguf
    (also taken for a file that ends in .gguf), or dummy (random weights from `seed`)."""
    model_loader_extra_config: tuple[tuple[str, object], ...] = ()
    """JSON for a load format: tensorizer_uri, tensorizer_dir and verify_hash (tensorizer), concurrency and memory_limit
    (runai_streamer), pattern (sharded_state)."""
    config_format: str = "auto"
    """File of the model's settings: hf (config.json), mistral (params.json), or auto, the first that there is."""
    seed: int = 0
    """Seed of dummy weights."""
    trust_remote_code: bool = False
    """Allow Python code that lies in the checkpoint directory."""
    skip_model_check: bool = False
    """Serve a model without comparing a small copy of it (random weights) with Transformers when it is captured."""

    @property
    def config_dir(self) -> str:
        """Directory of config.json."""
        return self.hf_config_path or self.model


@dataclass(frozen=True)
class GraphConfig:
    """Which steps of a GPU are captured as CUDA graphs."""

    sizes: tuple[int, ...] = ()
    """Sequences of decode steps (`cudagraph_capture_sizes`). Empty: 1, 2, 4, then multiples of 8."""
    enabled: bool = True
    """False (`--enforce-eager`): every step is launched op by op."""
    max_seq_len: int = 8192
    """Decode steps with a sequence of more tokens are not replayed whole: their grids are made for this length."""
    num_warmups: int = 1
    """Trials before each capture (`cudagraph_num_of_warmups`): they compile kernels, and libraries load theirs. Of 0
    the first graph of whole steps and those in segments have one all the same."""
    mixed_sizes: tuple[int, ...] | None = None
    """Tokens of other steps, captured in segments. None: those of `sizes`, if there are any, else MIXED_SIZES."""
    splitting_ops: tuple[str, ...] = ()
    """Ops at which the segments end besides attention (`splitting_ops`), with or without the namespace."""
    is_mixed_whole: bool = False
    """Whether steps of `mixed_sizes` are also captured whole (`cudagraph_mode` FULL), for steps that fit."""
    max_size: int = 0
    """Most sequences of a captured decode step (`max_cudagraph_capture_size`); 0 sets no limit."""

    def resolved(self, max_num_seqs: int) -> tuple[int, ...]:
        """Sizes of decode steps, ascending; one is at most the sequences of a step."""
        most = min(max_num_seqs, self.max_size or max_num_seqs)
        return self._ascending(self.sizes or (1, 2, 4, *range(8, most + 1, 8)), most)

    def resolved_mixed(self, max_num_tokens: int) -> tuple[int, ...]:
        """Sizes of other steps, ascending; one is at most the tokens of a step."""
        sizes = (self.sizes or MIXED_SIZES) if self.mixed_sizes is None else self.mixed_sizes
        return self._ascending(sizes, max_num_tokens)

    def resolved_whole_mixed(self, max_num_tokens: int) -> tuple[int, ...]:
        """Those of them that are captured whole: of more tokens than two sequences."""
        sizes = self.resolved_mixed(max_num_tokens) if self.is_mixed_whole and not self.splitting_ops else ()
        return tuple(size for size in sizes if size > 2)

    def _ascending(self, sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
        return tuple(sorted({size for size in sizes if 0 < size <= most})) if self.enabled else ()
