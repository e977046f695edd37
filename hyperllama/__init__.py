"""HyperLlama: train, grow, merge, evaluate and count Llama models."""

__version__ = "0.1.0"
