"""Writing quantized checkpoints, and what they lose: `fuseline quantize`."""
