"""The op vocabulary; importing it registers torch.ops.fuseline.*."""

from fuseline.compile.ops import activation, attention, linear, moe, norm, rope

__all__ = ["activation", "attention", "linear", "moe", "norm", "rope"]
