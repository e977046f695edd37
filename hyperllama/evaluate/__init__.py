"""Evaluation: bits per byte of text, accuracy on minimal pairs, and text from a prompt."""

from hyperllama.evaluate.folder import evaluate_folder, folder_start, load_folder
from hyperllama.evaluate.generate import generate
from hyperllama.evaluate.pairs import evaluate_pairs
from hyperllama.evaluate.text import evaluate_text

__all__ = ["evaluate_folder", "evaluate_pairs", "evaluate_text", "folder_start", "generate", "load_folder"]
