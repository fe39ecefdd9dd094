"""How published checkpoints hold quantized weights: one file a method."""
