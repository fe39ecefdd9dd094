"""Files of llama.cpp (GGUF): what they hold, as a checkpoint of Transformers would hold it."""
