"""fuseline: an LLM serving engine that captures Transformers models as graphs and compiles them."""

__version__ = "0.1.0"
